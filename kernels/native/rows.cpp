// Shares the tokens of a row op out among threads.
#include "rows.h"

#include <algorithm>

#include "isa.h"
#include "team.h"

namespace {

constexpr int64_t SERIAL_ELEMENTS = 1 << 14;  // below which waking threads costs more than it saves

template <class Call>
int32_t run(const Call& call, int64_t elements_per_token, void (*kernel)(const Call&, int64_t, int64_t)) {
  const int64_t most = call.num_tokens * elements_per_token < SERIAL_ELEMENTS ? 1 : call.num_threads;
  const int threads = (int)std::max<int64_t>(1, std::min(most, call.num_tokens));
  kvarto::parallel_ranges(threads, call.num_tokens,
                          [&](int, int64_t begin, int64_t end) { kernel(call, begin, end); });
  return KVARTO_OK;
}

const kvarto::RowKernels& kernels(int32_t isa) { return *kvarto::find_isa(isa)->rows; }

}  // namespace

extern "C" {

int32_t kvarto_norm(const KvartoNorm* call, int64_t*) {
  return run(*call, call->heads * call->dim, kernels(call->isa).norm[call->dtype]);
}

int32_t kvarto_rotate(const KvartoRotation* call, int64_t*) {
  return run(*call, call->num_heads * call->head_dim, kernels(call->isa).rotate[call->dtype]);
}

int32_t kvarto_gate(const KvartoGate* call, int64_t*) {
  return run(*call, call->dim, kernels(call->isa).gate[call->dtype]);
}

int32_t kvarto_best(const KvartoBest* call, int64_t*) {
  return run(*call, call->dim, kernels(call->isa).best[call->dtype]);
}

int32_t kvarto_take(const KvartoTake* call, int64_t* detail) {
  if (!call->partial)
    for (int64_t token = 0; token < call->num_tokens; ++token)
      if ((uint64_t)(call->index[token] - call->first) >= (uint64_t)call->num_rows) {
        *detail = token;
        return KVARTO_BAD_INDEX;
      }
  return run(*call, call->dim, kernels(call->isa).take[call->dtype]);
}
}
