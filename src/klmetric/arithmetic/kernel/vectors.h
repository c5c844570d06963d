// Sixteen float lanes and eight or sixteen double lanes, whatever the width of a register: one source, the same bits
// everywhere. Every operation is one correctly rounded operation a lane, so neither the width nor the compiler shows in
// the result; contraction is off, and fma is asked for by name.
#pragma once
#include <cstdint>
#include <cstring>

#if !defined(__clang__) && !defined(ANY_COMPILER)
#error "Of vectors wider than a register gcc makes slow code: clang is needed (ziglang, or CXX=clang++)."
#endif
#define INLINE inline __attribute__((always_inline))
#define EACH __attribute__((always_inline)) // of a lambda
#define APART __attribute__((noinline))

namespace {

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef double D __attribute__((vector_size(64)));
typedef int64_t L __attribute__((vector_size(64)));
typedef double W __attribute__((vector_size(128))); // of the lanes of an F
constexpr int FLOATS = 16, DOUBLES = 8;

INLINE F all(float x) { return F{} + x; }
INLINE F all(F x) { return x; }
template <class V> INLINE V larger(V a, V b) { return a > b ? a : b; }
template <class V> INLINE V smaller(V a, V b) { return a < b ? a : b; }
template <class V, class T> INLINE V load(const T *x) { V v; memcpy(&v, x, sizeof v); return v; }
template <class V, class T> INLINE void store(T *x, V v) { memcpy(x, &v, sizeof v); }
INLINE W doubles(F x) { return __builtin_convertvector(x, W); }
INLINE F floats(W x) { return __builtin_convertvector(x, F); }
INLINE F floats(I x) { return __builtin_convertvector(x, F); }
template <class M> INLINE bool any(M m) { // of a mask
  uint64_t words[sizeof m / 8], some = 0;
  memcpy(words, &m, sizeof m);
  for (uint64_t x : words) some |= x;
  return some;
}

// a b + c, rounded once.
#if defined(__FMA__) || defined(__aarch64__)
INLINE F fma_of(F a, F b, F c) {
#if defined(__clang__)
  return __builtin_elementwise_fma(a, b, c);
#else
  for (int i = 0; i < FLOATS; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}
#else
// A product of floats is exact in double. The sum is rounded to odd, so that rounding it once more, to float, gives
// what one rounding would have. (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.)
APART F fma_of(F a, F b, F c) {
  using M = decltype(W{} < W{});
  W product = doubles(a) * doubles(b), d = doubles(c), sum = product + d, of_d = sum - product;
  W lost = (product - (sum - of_d)) + (d - of_d);
  M is_odd = (M)sum << 63 != 0, inexact = (lost > 0.) | (lost < 0.), up = (lost > 0.) == (sum > 0.);
  return floats((W)((M)sum + (inexact & ~is_odd & (up ? M{} + 1 : M{} - 1))));
}
#endif
template <class A, class B, class C> INLINE F fma(A a, B b, C c) { return fma_of(all(a), all(b), all(c)); }

// All lanes as one, in a fixed order. Sums of floats are taken in double.
template <class V, class Op> INLINE auto fold(V v, Op op) {
  constexpr int lanes = sizeof v / sizeof v[0];
  decltype(v[0] + v[0]) x[lanes];
  store(x, v);
  for (int half = lanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] = op(x[i], x[i + half]);
  return x[0];
}
template <class V> INLINE double total(V v) { return fold(v, [](double a, double b) { return a + b; }); }
INLINE double total(F v) { return total(doubles(v)); }
template <class V> INLINE auto largest(V v) { return fold(v, [](auto a, auto b) { return a > b ? a : b; }); }
template <class V> INLINE auto least(V v) { return fold(v, [](auto a, auto b) { return a < b ? a : b; }); }

} // namespace
