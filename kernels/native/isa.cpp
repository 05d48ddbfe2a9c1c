// Which kernels this processor can run.
#include "isa.h"

#if defined(__x86_64__)
#define KVARTO_EACH_ISA(apply) apply(portable) apply(avx2) apply(avx512) apply(avx512_bf16)
#else
#define KVARTO_EACH_ISA(apply) apply(portable)
#endif

#define KVARTO_DECLARE(isa)                                       \
  namespace kvarto::isa {                                         \
  extern const AttentionKernels attention_kernels;                \
  extern const LinearKernels linear_kernels;                      \
  extern const QuantizedLinearKernels quantized_linear_kernels;   \
  extern const RowKernels row_kernels;                            \
  extern const ScoreKernels score_kernels;                        \
  extern const ExchangeKernels exchange_kernels;                  \
  }
KVARTO_EACH_ISA(KVARTO_DECLARE)

namespace kvarto {
namespace {

#define KVARTO_ENTRY(isa) \
  {#isa, &isa::attention_kernels, &isa::linear_kernels, &isa::quantized_linear_kernels, &isa::row_kernels, \
   &isa::score_kernels, &isa::exchange_kernels},
const Isa ISAS[] = {KVARTO_EACH_ISA(KVARTO_ENTRY)};
constexpr int32_t NUM_ISAS = sizeof ISAS / sizeof ISAS[0];

bool processor_runs(int32_t isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case 1: return avx2;
    case 2: return avx512;
    case 3: return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return isa == 0;
}

}  // namespace

const Isa* find_isa(int32_t isa) {
  return isa >= 0 && isa < NUM_ISAS && processor_runs(isa) ? &ISAS[isa] : nullptr;
}

}  // namespace kvarto

extern "C" {

int32_t kvarto_abi_version() { return KVARTO_ABI_VERSION; }

int32_t kvarto_num_isas() { return kvarto::NUM_ISAS; }

const char* kvarto_isa_name(int32_t isa) {
  const kvarto::Isa* found = kvarto::find_isa(isa);
  return found ? found->name : nullptr;
}
}
