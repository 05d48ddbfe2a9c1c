// Sums of the ranks' parts, built once per instruction set.
#include "exchange.h"
#include "simd.h"

namespace kvarto {
namespace KVARTO_ISA {

template <class T>
static void sum(const void* const* parts, int64_t num_parts, int64_t begin, int64_t end, void* out) {
  for (int64_t i = begin; i < end; i += WIDTH) {
    const int64_t left = end - i;
    Vec total = load_some((const T*)parts[0] + i, left);
    for (int64_t part = 1; part < num_parts; ++part) total = add(total, load_some((const T*)parts[part] + i, left));
    store_some((T*)out + i, total, left);
  }
}

extern const ExchangeKernels exchange_kernels;
const ExchangeKernels exchange_kernels = {{sum<float>, sum<bf16>, sum<f16>}};

}  // namespace KVARTO_ISA
}  // namespace kvarto
