// The instruction sets this library was built for, least first.
#pragma once

#include "abi.h"

namespace kvarto {

struct Isa {
  const char* name;
  const AttentionKernels* attention;
  const LinearKernels* linear;
};

// Null unless isa was built and this processor runs it.
const Isa* find_isa(int32_t isa);

inline int64_t element_size(int32_t dtype) { return dtype == KVARTO_F32 ? 4 : 2; }

}  // namespace kvarto
