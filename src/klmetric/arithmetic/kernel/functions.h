// exp, log, log1p and the two functions of the Bregman form, a lane each, from the operations of vectors.h alone: libm
// differs from one platform to the next in the last bits.
#pragma once
#include "vectors.h"

namespace {

constexpr float INF = __builtin_inff(), NOT_A_NUMBER = __builtin_nanf("");

template <int N> INLINE F polynomial(const float (&c)[N], F x) {
  F s = all(c[N - 1]);
  for (int i = N - 2; i >= 0; i--) s = fma(s, x, c[i]);
  return s;
}
template <class V, int N> INLINE V polynomial(const double (&c)[N], V x) {
  V s = V{} + c[N - 1];
  for (int i = N - 2; i >= 0; i--) s = s * x + c[i];
  return s;
}

// ---- float ----------------------------------------------------------------------------------------------------------
// x = k ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 2^23 rounds to a whole number, which then stands in the low bits.
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147182464599609375f, LN2_REST = -1.904654290582768e-9f;
constexpr float WHOLE = 12582912.f;
constexpr int32_t ONE = 0x3f800000; // 1.f
// (e^r - 1 - r) / r^2, interpolated at Chebyshev's nodes for |r| <= ln 2 / 2: to 3e-9, and to 1.4e-7 for `exp` alone.
constexpr float G[] = {
  0.5f, 0.16666666681704215f, 0.041666464197405692f, 0.0083333108446478626f, 0.0013933730715792083f,
  0.00019891080463998842f};
constexpr float G_SHORT[] = {
  0.5f, 0.16666576666119928f, 0.041666554212984150f, 0.0083632328836826182f, 0.0013926250831497612f};

// e^(x/T) 2^-K. The largest of a block fixes the power of two, so that nothing overflows and no x loses its last digits
// to a subtraction, as it would in e^(x - largest).
constexpr double LN2_D = 0.69314718055994530942;
struct Scale {
  double tau;                                // 1/T
  float factor, log2e, ln2, ln2_rest, reach; // 1/T; log2(e)/T; T ln 2 in two parts; what x may be and still have a k
  explicit Scale(double temperature)
      : tau(1 / temperature), factor(float(tau)), log2e(float(1.4426950408889634 * tau)),
        ln2(float(LN2_D * temperature)), ln2_rest(float(LN2_D * temperature - double(ln2))), reach(1e6f * ln2) {}
};
constexpr float UNDER = -86.f; // e^UNDER times the largest counts as 0
struct Exponential {
  F under;
  I k;
  INLINE Exponential(const Scale &s, F top)
      : under(top + UNDER / s.factor), k((I)fma(top, s.log2e, WHOLE) - (I)all(WHOLE)) {}
};
INLINE F exp(F x, const Scale &s, const Exponential &base) {
  F shifted = fma(x, s.log2e, WHOLE), k = shifted - WHOLE;
  F r = fma(k, -s.ln2_rest, fma(k, -s.ln2, x)) * s.factor;
  F e = fma(r * r, polynomial(G_SHORT, r), r) + 1.f;
  return x < base.under ? F{} : (F)((I)e + (((I)shifted - base.k) << 23));
}
// e^t - 1 - t >= 0 without losing digits. With s = 2^k it is s r^2 g(r) + (s - 1) r + (s - 1 - k ln 2).
INLINE F phi(F t) { // |t| <= 80
  F shifted = fma(t, LOG2E, WHOLE), k = shifted - WHOLE;
  F r = fma(k, -LN2_REST, fma(k, -LN2, t));
  F s = (F)(((I)shifted << 23) + ONE), d = s - 1.f;
  return fma(s * (r * r), polynomial(G, r), fma(d, r, fma(k, -LN2_REST, fma(k, -LN2, d))));
}
constexpr float NEAR = 0.34f;
INLINE F phi_near(F t) { return (t * t) * polynomial(G, t); } // |t| <= NEAR
// u - log(1 + u) >= 0, of u and of ratio = 1 + u, each with all its digits. With ratio = 2^k (1 + f) and s = 2^k it is
// f^2 h(f) + (s - 1)(1 + f) - k ln 2; where k = 0, f is u itself.
constexpr float H[] = {
  0.5f, -0.33333322793607103f, 0.25000010940100676f, -0.20001446722200232f, 0.16667536772428633f, -0.14232317759552221f,
  0.12420814467908905f, -0.11812136142329650f, 0.11557287882015821f, -0.067690241138160015f};
INLINE F psi(F u, F ratio) {
  I bits = (I)ratio, k = (bits - 0x3f3504f3) >> 23;
  F one_and_f = (F)(bits - (k << 23)), f = k == 0 ? u : one_and_f - 1.f;
  F s = (F)((k << 23) + ONE), whole = floats(k);
  F rest = fma(whole, -LN2_REST, fma(whole, -LN2, (s - 1.f) * one_and_f));
  return fma(f * f, polynomial(H, f), rest);
}

// ---- double: no fma, which not every processor has and which costs much to imitate; there are digits to spare -------
constexpr double LOG2E_D = 1.4426950408889634, LN2_HIGH_D = 0.693147180369123816490;
constexpr double LN2_LOW_D = 1.90821492927058770002e-10, WHOLE_D = 6755399441055744.;
// (e^r - 1 - r) / r^2 for |r| <= 1/2, to 3e-18.
constexpr double G_D[] = {
  0.5, 0.16666666666666666658, 0.04166666666666706171, 0.0083333333333333596599, 0.0013888888888704548969,
  0.00019841269841146991866, 0.000024801587616145412717, 2.7557319433620242821e-6, 2.7557076636642723479e-7,
  2.5051946709721621128e-8, 2.0962955815976075739e-9, 1.6116496514371546473e-10};
constexpr double NEAR_D = 0.5, UNDER_D = -708., OVER_D = 700.;
template <class V> INLINE V exp(V x) { // x <= OVER_D; 0 under UNDER_D
  using M = decltype(x < x);
  V shifted = x * LOG2E_D + WHOLE_D, k = shifted - WHOLE_D;
  V r = (x - k * LN2_HIGH_D) - k * LN2_LOW_D;
  V e = (r * r * polynomial(G_D, r) + r) + 1.;
  return x < UNDER_D ? V{} : (V)((M)e + ((M)shifted << 52));
}
// x = 2^k (1 + f) with sqrt(1/2) <= 1 + f < sqrt 2, of a normal number.
template <class V> INLINE V split(V x, V &one_and_f) {
  using M = decltype(x < x);
  constexpr int64_t ROOT = 0x3fe6a09e667f3bcd; // sqrt(1/2)
  M bits = (M)x + (0x3ff0000000000000 - ROOT);
  one_and_f = (V)((bits & 0x000fffffffffffff) + ROOT);
  // Of what is not negative a shift is the same with sign or without.
  return (V)(((bits >> 52) & 0xfff) + 0x4338000000000000) - (WHOLE_D + 1023);
}
// log(2^k (1 + f)) = k ln 2 + log(1 + f); with z = f / (2 + f), log(1 + f) = 2 z + z r = f - z (f - r).
constexpr double ATANH[] = {2. / 3, 2. / 5, 2. / 7, 2. / 9, 2. / 11, 2. / 13, 2. / 15, 2. / 17, 2. / 19, 2. / 21};
template <class V> INLINE V log_of_parts(V k, V f) {
  V z = f / (f + 2.), zz = z * z, r = zz * polynomial(ATANH, zz);
  return k * LN2_HIGH_D + (k * LN2_LOW_D + (f - z * (f - r)));
}
template <class V> INLINE V log1p(V u) { // u > -1
  V one_and_f, k = split(u + 1., one_and_f);
  return log_of_parts(k, k == 0. ? u : one_and_f - 1.);
}
template <class V> INLINE V log(V x) { // of any number: log 0 = -inf, of negative ones NaN
  auto tiny = x < 2.2250738585072014e-308;
  V one_and_f, k = split(tiny ? x * 0x1p54 : x, one_and_f), none{};
  V r = log_of_parts(tiny ? k - 54. : k, one_and_f - 1.);
  r = x == 0. ? none - double(INF) : x < 0. ? none + double(NOT_A_NUMBER) : r;
  return ((x == double(INF)) | (x != x)) ? x : r;
}
INLINE D psi(D u, D ratio) { // far from 0 the difference has the digits that its sums need
  D near = (u * u) * (1. / 2 - u * (1. / 3 - u * (1. / 4 - u * (1. / 5 - u * (1. / 6 - u * (1. / 7))))));
  return ((u < 1e-3) & (u > -1e-3)) ? near : u - log(ratio);
}
INLINE double log(double x) { return log(D{} + x)[0]; }
INLINE double log1p(double x) { return log1p(D{} + x)[0]; }

} // namespace
