// Sixteen float lanes and eight double lanes, whatever the width of a register: one source, the same bits everywhere.
//
// Where a register holds fewer lanes, a vector is a pair of halves, down to what fits. (A vector wider than a register
// is allowed by the compilers, but gcc makes slow code of it.) Every operation here is one correctly rounded operation
// a lane, so neither the width nor the compiler shows in the result; contraction is off, and fma is asked for by name.
#pragma once
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#define EACH __attribute__((always_inline)) // of a lambda
#define APART __attribute__((noinline))

namespace {

#if defined(__AVX512F__)
constexpr int REGISTER = 64;
#elif defined(__AVX2__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif

template <class V> struct Halves { V lo, hi; };

template <class T, int N, bool FITS = (N * sizeof(T) <= REGISTER)> struct Lanes { using type = Halves<typename Lanes<T, N / 2>::type>; };
template <class T, int N> struct Lanes<T, N, true> { typedef T type __attribute__((vector_size(N * sizeof(T)))); };

using F = Lanes<float, 16>::type;
using D = Lanes<double, 8>::type;
constexpr int FLOATS = 16, DOUBLES = 8;

#define BOTH(op)                                                                                                      \
  template <class V> INLINE auto operator op(Halves<V> a, Halves<V> b) {                                              \
    return Halves<decltype(a.lo op b.lo)>{a.lo op b.lo, a.hi op b.hi};                                                \
  }
BOTH(+) BOTH(-) BOTH(*) BOTH(/) BOTH(&) BOTH(|) BOTH(<) BOTH(>) BOTH(<=) BOTH(>=) BOTH(==) BOTH(!=)
#undef BOTH
using I = decltype(F{} < F{}); // integers as wide as the floats; a comparison gives -1 or 0
using L = decltype(D{} < D{});
template <class V> INLINE Halves<V> operator~(Halves<V> a) { return {~a.lo, ~a.hi}; }
template <class V> INLINE Halves<V> operator-(Halves<V> a) { return {-a.lo, -a.hi}; }
template <class V> INLINE Halves<V> operator<<(Halves<V> a, int n) { return {a.lo << n, a.hi << n}; }
template <class V> INLINE Halves<V> operator>>(Halves<V> a, int n) { return {a.lo >> n, a.hi >> n}; }

template <class V> struct Of { // the vectors of one number, and the bits of another type
  template <class T> static INLINE V all(T x) { return V{} + x; }
  template <class M> static INLINE V where(M m, V a, V b) { return m ? a : b; }
  template <class M> static INLINE V convert(M a) { return __builtin_convertvector(a, V); }
  template <class U> static INLINE V bits(U x) { return (V)x; }
  template <class T> static INLINE V load(const T *x) { V v; memcpy(&v, x, sizeof v); return v; }
  template <class T> static INLINE void store(T *x, V v) { memcpy(x, &v, sizeof v); }
};
template <class V> struct Of<Halves<V>> {
  template <class T> static INLINE Halves<V> all(T x) { return {Of<V>::all(x), Of<V>::all(x)}; }
  template <class M> static INLINE Halves<V> where(Halves<M> m, Halves<V> a, Halves<V> b) {
    return {Of<V>::where(m.lo, a.lo, b.lo), Of<V>::where(m.hi, a.hi, b.hi)};
  }
  template <class M> static INLINE Halves<V> convert(Halves<M> a) { return {Of<V>::convert(a.lo), Of<V>::convert(a.hi)}; }
  template <class U> static INLINE Halves<V> bits(Halves<U> x) { return {Of<V>::bits(x.lo), Of<V>::bits(x.hi)}; }
  // Half by half: gcc takes a copy of both at once through memory.
  template <class T> static INLINE Halves<V> load(const T *x) { return {Of<V>::load(x), Of<V>::load(x + sizeof(V) / sizeof(T))}; }
  template <class T> static INLINE void store(T *x, Halves<V> v) { Of<V>::store(x, v.lo), Of<V>::store(x + sizeof(V) / sizeof(T), v.hi); }
};
INLINE F all(float x) { return Of<F>::all(x); }
INLINE D all(double x) { return Of<D>::all(x); }
INLINE I all(int32_t x) { return Of<I>::all(x); }
INLINE L all(int64_t x) { return Of<L>::all(x); }
template <class V, class M> INLINE V where(M m, V a, V b) { return Of<V>::where(m, a, b); }
template <class V, class U> INLINE V bits_as(U x) { return Of<V>::bits(x); }
template <class V> INLINE V larger(V a, V b) { return where(a > b, a, b); }
template <class V> INLINE V smaller(V a, V b) { return where(a < b, a, b); }
template <class V, class T> INLINE V load(const T *x) { return Of<V>::load(x); }
template <class V, class T> INLINE void store(T *x, V v) { Of<V>::store(x, v); }
INLINE int32_t first(I x) { int32_t y; memcpy(&y, &x, sizeof y); return y; }
template <class M> INLINE bool any(M m) { // of a mask
  uint64_t w[sizeof m / 8], r = 0;
  memcpy(w, &m, sizeof m);
  for (uint64_t x : w) r |= x;
  return r;
}

// Between sixteen floats and two times eight doubles.
template <class T, int N> struct Register { typedef T type __attribute__((vector_size(N * sizeof(T)))); };
template <class V> INLINE auto doubles(V x) {
  constexpr int n = sizeof(V) / sizeof(float) / 2;
  using H = typename Register<float, n>::type;
  using W = typename Register<double, n>::type;
  H part[2];
  memcpy(part, &x, sizeof x);
  return Halves<W>{__builtin_convertvector(part[0], W), __builtin_convertvector(part[1], W)};
}
template <class V> INLINE auto doubles(Halves<V> x) { return Halves<decltype(doubles(x.lo))>{doubles(x.lo), doubles(x.hi)}; }
template <class W> INLINE auto floats(Halves<W> x) {
  constexpr int n = sizeof(W) / sizeof(double);
  using H = typename Register<float, n>::type;
  H part[2] = {__builtin_convertvector(x.lo, H), __builtin_convertvector(x.hi, H)};
  typename Register<float, 2 * n>::type r;
  memcpy(&r, part, sizeof r);
  return r;
}
template <class W> INLINE auto floats(Halves<Halves<W>> x) { return Halves<decltype(floats(x.lo))>{floats(x.lo), floats(x.hi)}; }

// a b + c, rounded once.
#if defined(__FMA__) || defined(__aarch64__)
template <class V> INLINE V fma_of(V a, V b, V c) {
#if defined(__clang__)
  return __builtin_elementwise_fma(a, b, c);
#else // gcc makes one instruction of it
  V r;
  for (unsigned i = 0; i < sizeof(V) / sizeof(float); i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#endif
}
template <class V> INLINE Halves<V> fma_of(Halves<V> a, Halves<V> b, Halves<V> c) { return {fma_of(a.lo, b.lo, c.lo), fma_of(a.hi, b.hi, c.hi)}; }
INLINE F fma(F a, F b, F c) { return fma_of(a, b, c); }
#else
// A product of floats is exact in double. The sum is rounded to odd, so that rounding it once more, to float, gives what
// one rounding would have. (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.)
INLINE D fma_to_odd(D product, D c) {
  D sum = product + c, of_c = sum - product, lost = (product - (sum - of_c)) + (c - of_c);
  L bits = bits_as<L>(sum), one = all(int64_t(1)), zero = L{};
  L inexact = (lost > D{}) | (lost < D{}), even = (bits & one) == zero;
  L towards = where((lost > D{}) == (sum > D{}), one, all(int64_t(-1)));
  return bits_as<D>(bits + where(inexact & even, towards, zero));
}
INLINE F fma(F a, F b, F c) {
  Halves<D> x = doubles(a), y = doubles(b), z = doubles(c);
  return floats(Halves<D>{fma_to_odd(x.lo * y.lo, z.lo), fma_to_odd(x.hi * y.hi, z.hi)});
}
#endif

// All lanes as one, in a fixed order. Sums of floats are taken in double.
template <class Op> INLINE double fold(D v, Op op) {
  double x[DOUBLES];
  store(x, v);
  for (int half = DOUBLES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] = op(x[i], x[i + half]);
  return x[0];
}
template <class Op> INLINE float fold(F v, Op op) {
  float x[FLOATS];
  store(x, v);
  for (int half = FLOATS / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] = op(x[i], x[i + half]);
  return x[0];
}
INLINE double total(D v) { return fold(v, [](double a, double b) { return a + b; }); }
INLINE double total(F v) { Halves<D> x = doubles(v); return total(x.lo + x.hi); }
template <class V> INLINE auto largest(V v) { return fold(v, [](auto a, auto b) { return a > b ? a : b; }); }
template <class V> INLINE auto least(V v) { return fold(v, [](auto a, auto b) { return a < b ? a : b; }); }

} // namespace
