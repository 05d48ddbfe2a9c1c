// Row ops, built once per instruction set. A token's bits depend on nothing but its own row.
#include "rows.h"
#include "simd.h"

namespace kvarto {
namespace KVARTO_ISA {

// What Transformers rounds to the model's dtype between two steps is rounded here as well.
KVARTO_INLINE Vec rounded(Vec v, const float*) { return v; }
template <class T>
KVARTO_INLINE Vec rounded(Vec v, const T*) {
  T lanes[WIDTH];
  store(lanes, v);
  return load((const T*)lanes);
}

template <class T>
KVARTO_INLINE void norm_row(const KvartoNorm& call, T* x, const T* addend, T* out) {
  const int64_t dim = call.dim;
  const T* weight = (const T*)call.weight;
  Vec squares = zero();
  for (int64_t d = 0; d < dim; d += WIDTH) {
    Vec v = load_some(x + d, dim - d);
    if (addend) {
      v = rounded(add(v, load_some(addend + d, dim - d)), x);
      store_some(x + d, v, dim - d);
    }
    squares = fma(v, v, squares);
  }
  const Vec factor = set1(1.0f / __builtin_sqrtf(reduce_add(squares) / (float)dim + call.eps));
  for (int64_t d = 0; d < dim; d += WIDTH) {
    const Vec v = mul(load_some(x + d, dim - d), factor), w = load_some(weight + d, dim - d);
    store_some(out + d, call.plus_one ? mul(v, add(w, set1(1.0f))) : mul(rounded(v, x), w), dim - d);
  }
}

template <class T>
static void norm(const KvartoNorm& call, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token)
    for (int64_t head = 0; head < call.heads; ++head) {
      const int64_t at = token * call.x_stride + head * call.dim;
      norm_row(call, (T*)call.x + at, call.addend ? (const T*)call.addend + at : nullptr,
               (T*)call.out + token * call.out_stride + head * call.dim);
    }
}

template <class T>
static void rotate(const KvartoRotation& call, int64_t begin, int64_t end) {
  const int64_t half = call.num_angles;
  for (int64_t token = begin; token < end; ++token) {
    const float *cos = call.cos + token * half, *sin = call.sin + token * half;
    for (int64_t head = 0; head < call.num_heads; ++head) {
      T* first = (T*)call.heads + token * call.stride + head * call.head_dim;
      T* second = first + half;
      for (int64_t j = 0; j < half; j += WIDTH) {
        const Vec a = load_some(first + j, half - j), b = load_some(second + j, half - j);
        const Vec c = load_some(cos + j, half - j), s = load_some(sin + j, half - j);
        store_some(first + j, sub(mul(a, c), mul(b, s)), half - j);
        store_some(second + j, add(mul(b, c), mul(a, s)), half - j);
      }
    }
  }
}

// x / (1 + e^-x)
KVARTO_INLINE Vec silu(Vec x) {
  // exp2 takes no positive number: of -|x|, and where x < 0 both sides times e^x.
  const Vec magnitude = max(x, sub(zero(), x));
  const Vec small = exp2(mul(magnitude, set1(-1.4426950408889634f)));
  const Vec above = zero_where_less(set1(1.0f), x, zero());  // 1 where x >= 0, or NaN
  const Vec numerator = add(above, mul(sub(set1(1.0f), above), small));
  return div(mul(x, numerator), add(set1(1.0f), small));
}

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
KVARTO_INLINE Vec gelu_tanh(Vec x) {
  const Vec cube = mul(mul(x, x), x);
  const Vec inner = mul(set1(0.7978845608028654f), fma(set1(0.044715f), cube, x));
  return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
}

template <class T>
static void gate(const KvartoGate& call, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const T* x = (const T*)call.x + token * 2 * call.dim;
    T* out = (T*)call.out + token * call.dim;
    for (int64_t d = 0; d < call.dim; d += WIDTH) {
      const int64_t left = call.dim - d;
      const Vec v = load_some(x + d, left), up = load_some(x + call.dim + d, left);
      const Vec active = call.activation == KVARTO_SILU ? silu(v) : gelu_tanh(v);
      store_some(out + d, mul(rounded(active, x), up), left);
    }
  }
}

constexpr int64_t STRETCH = 1024;  // elements that are looked through again for the place of their largest

// The largest of count elements, and whether any of them is not finite: then it may be any of them.
template <class T>
KVARTO_INLINE float largest(const T* x, int64_t count, bool& not_finite) {
  const Vec lowest = set1(-__builtin_inff());
  Vec top = lowest, other = lowest, zeros = zero();
  int64_t d = 0;
  for (; d + 2 * WIDTH <= count; d += 2 * WIDTH) {
    const Vec a = load(x + d), b = load(x + d + WIDTH);
    top = max(top, a), other = max(other, b);
    zeros = fma(a, zero(), fma(b, zero(), zeros));
  }
  float found = reduce_max(max(top, other));
  for (; d < count; d += WIDTH) {
    const Vec v = load_some(x + d, count - d);
    zeros = fma(v, zero(), zeros);
    float lanes[WIDTH];
    store(lanes, v);
    for (int64_t i = 0; i < WIDTH && d + i < count; ++i) found = lanes[i] > found ? lanes[i] : found;
  }
  not_finite = reduce_add(zeros) != 0.0f;
  return found;
}

// The first element that is NaN or else the largest of count elements.
template <class T>
static void best_of(const T* x, int64_t count, float& value, int64_t& place) {
  value = -__builtin_inff(), place = 0;
  for (int64_t d = 0; d < count; d += WIDTH) {
    float lanes[WIDTH];
    store(lanes, load_some(x + d, count - d));
    for (int64_t i = 0; i < WIDTH && d + i < count; ++i) {
      if (__builtin_isnan(lanes[i])) {
        value = __builtin_inff(), place = d + i;
        return;
      }
      if (lanes[i] > value) value = lanes[i], place = d + i;
    }
  }
}

template <class T>
static void best(const KvartoBest& call, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const T* x = (const T*)call.x + token * call.x_stride;
    float top = -__builtin_inff();
    int64_t from = 0;
    bool any_not_finite = false;
    for (int64_t d = 0; d < call.dim && !any_not_finite; d += STRETCH) {
      const int64_t left = call.dim - d;
      const float found = largest(x + d, left < STRETCH ? left : STRETCH, any_not_finite);
      if (found > top) top = found, from = d;
    }
    int64_t count = call.dim - from;
    if (any_not_finite) from = 0, count = call.dim;
    else if (count > STRETCH) count = STRETCH;
    best_of(x + from, count, call.values[token], call.ids[token]);
    call.ids[token] += from;
  }
}

template <class T>
static void take(const KvartoTake& call, int64_t begin, int64_t end) {
  const Vec scale = set1(call.scale);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t row = call.index[token] - call.first;
    T* out = (T*)call.out + token * call.dim;
    if ((uint64_t)row >= (uint64_t)call.num_rows) {
      memset(out, 0, call.dim * sizeof(T));
      continue;
    }
    const T* values = (const T*)call.table + row * call.dim;
    if (call.scale == 1.0f) {
      memcpy(out, values, call.dim * sizeof(T));
      continue;
    }
    for (int64_t d = 0; d < call.dim; d += WIDTH)
      store_some(out + d, mul(load_some(values + d, call.dim - d), scale), call.dim - d);
  }
}

extern const RowKernels row_kernels;
const RowKernels row_kernels = {
    {norm<float>, norm<bf16>, norm<f16>},
    {rotate<float>, rotate<bf16>, rotate<f16>},
    {gate<float>, gate<bf16>, gate<f16>},
    {best<float>, best<bf16>, best<f16>},
    {take<float>, take<bf16>, take<f16>},
};

}  // namespace KVARTO_ISA
}  // namespace kvarto
