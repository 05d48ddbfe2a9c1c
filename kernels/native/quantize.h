// Rows of codes with one scale each; kernels/kv_layout.py says how they lie in a cache.
#pragma once

#include <cstdint>

namespace kvarto {

// dtype: KVARTO_I8 or KVARTO_F8. Writes dim codes and returns their scale: NaN where x is not finite throughout.
float quantize_row(const float* x, int64_t dim, int32_t dtype, void* codes);

}  // namespace kvarto
