// Linear layers whose weight is codes.
#pragma once

#include "isa.h"

namespace kvarto {

// kvarto_linear of a weight_dtype in KvartoWeightCodes. Throws std::bad_alloc.
void multiply_codes(const KvartoLinear& call, const Isa& isa);

}  // namespace kvarto
