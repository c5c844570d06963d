// exp, log, log1p and the two functions of the Bregman form, a lane each, from the operations of vectors.h alone: libm
// differs from one platform to the next in the last bits.
#pragma once
#include "vectors.h"

namespace {

constexpr float INF = __builtin_inff(), NOT_A_NUMBER = __builtin_nanf("");

template <class V, class T, int N> INLINE V polynomial(const T (&c)[N], V x) {
  V s = all(c[N - 1]);
  for (int i = N - 2; i >= 0; i--) {
    if constexpr (sizeof(T) == 4) s = fma(s, x, all(c[i]));
    else s = s * x + all(c[i]);
  }
  return s;
}

// ---- float ----------------------------------------------------------------------------------------------------------
// x = k ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 2^23 rounds to a whole number, which then stands in the low bits.
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147182464599609375f, LN2_REST = -1.904654290582768e-9f, WHOLE = 12582912.f;
// (e^r - 1 - r) / r^2, interpolated at Chebyshev's nodes for |r| <= ln 2 / 2: to 3e-9, and to 1.4e-7 for `exp` alone.
constexpr float G[] = {0.5f, 0.16666666681704215f, 0.041666464197405692f, 0.0083333108446478626f, 0.0013933730715792083f, 0.00019891080463998842f};
constexpr float G_SHORT[] = {0.5f, 0.16666576666119928f, 0.041666554212984150f, 0.0083632328836826182f, 0.0013926250831497612f};

// e^(x/T) 2^-K. The largest of a block fixes the power of two, so that nothing overflows and no x loses its last digits
// to a subtraction, as it would in e^(x - largest).
struct Scale {
  double tau;                      // 1/T
  float factor, log2e, ln2, ln2_rest, reach; // 1/T; log2(e)/T; T ln 2 in two parts; what x may be and still have a k
  explicit Scale(double temperature)
      : tau(1 / temperature), factor(float(tau)), log2e(float(1.4426950408889634 * tau)), ln2(float(LN2_D * temperature)),
        ln2_rest(float(LN2_D * temperature - double(ln2))), reach(1e6f * ln2) {}
  static constexpr double LN2_D = 0.69314718055994530942;
};
constexpr float UNDER = -86.f; // e^UNDER times the largest counts as 0
struct Exponential {
  F under; I k;
  INLINE Exponential(const Scale &s, F top) : under(top + all(UNDER / s.factor)) {
    k = bits_as<I>(fma(top, all(s.log2e), all(WHOLE))) - bits_as<I>(all(WHOLE));
  }
};
INLINE F exp(F x, const Scale &s, const Exponential &base) {
  F shifted = fma(x, all(s.log2e), all(WHOLE)), k = shifted - all(WHOLE);
  F r = fma(k, all(-s.ln2_rest), fma(k, all(-s.ln2), x)) * all(s.factor);
  F e = fma(r * r, polynomial(G_SHORT, r), r) + all(1.f);
  return where(x < base.under, F{}, bits_as<F>(bits_as<I>(e) + ((bits_as<I>(shifted) - base.k) << 23)));
}
// e^t - 1 - t >= 0 without losing digits. With s = 2^k it is s r^2 g(r) + (s - 1) r + (s - 1 - k ln 2).
INLINE F phi(F t) { // |t| <= 80
  F shifted = fma(t, all(LOG2E), all(WHOLE)), k = shifted - all(WHOLE);
  F r = fma(k, all(-LN2_REST), fma(k, all(-LN2), t));
  F s = bits_as<F>((bits_as<I>(shifted) << 23) + all(0x3f800000)), d = s - all(1.f);
  F rest = fma(d, r, fma(k, all(-LN2_REST), fma(k, all(-LN2), d)));
  return fma(s * (r * r), polynomial(G, r), rest);
}
constexpr float NEAR = 0.34f;
INLINE F phi_near(F t) { return (t * t) * polynomial(G, t); } // |t| <= NEAR
// u - log(1 + u) >= 0, of u and of ratio = 1 + u, each with all its digits. With ratio = 2^k (1 + f) and s = 2^k it is
// f^2 h(f) + (s - 1)(1 + f) - k ln 2; where k = 0, f is u itself.
constexpr float H[] = {0.5f, -0.33333322793607103f, 0.25000010940100676f, -0.20001446722200232f, 0.16667536772428633f,
                       -0.14232317759552221f, 0.12420814467908905f, -0.11812136142329650f, 0.11557287882015821f, -0.067690241138160015f};
INLINE F psi(F u, F ratio) {
  I bits = bits_as<I>(ratio), k = (bits - all(0x3f3504f3)) >> 23;
  F one_and_f = bits_as<F>(bits - (k << 23)), f = where(k == I{}, u, one_and_f - all(1.f));
  F s = bits_as<F>((k << 23) + all(0x3f800000)), whole = Of<F>::convert(k);
  F rest = fma(whole, all(-LN2_REST), fma(whole, all(-LN2), (s - all(1.f)) * one_and_f));
  return fma(f * f, polynomial(H, f), rest);
}

// ---- double: no fma, which not every processor has and which costs much to imitate; there are digits to spare -------
constexpr double LOG2E_D = 1.4426950408889634, LN2_HIGH_D = 0.693147180369123816490, LN2_LOW_D = 1.90821492927058770002e-10, WHOLE_D = 6755399441055744.;
// (e^r - 1 - r) / r^2 for |r| <= 1/2, to 3e-18.
constexpr double G_D[] = {0.5, 0.16666666666666666658, 0.04166666666666706171, 0.0083333333333333596599, 0.0013888888888704548969, 0.00019841269841146991866,
                          0.000024801587616145412717, 2.7557319433620242821e-6, 2.7557076636642723479e-7, 2.5051946709721621128e-8, 2.0962955815976075739e-9, 1.6116496514371546473e-10};
constexpr double NEAR_D = 0.5, UNDER_D = -708., OVER_D = 700.;
INLINE D exp(D x) { // x <= OVER_D; 0 under UNDER_D
  D shifted = x * all(LOG2E_D) + all(WHOLE_D), k = shifted - all(WHOLE_D);
  D r = (x - k * all(LN2_HIGH_D)) - k * all(LN2_LOW_D);
  D e = (r * r * polynomial(G_D, r) + r) + all(1.);
  return where(x < all(UNDER_D), D{}, bits_as<D>(bits_as<L>(e) + (bits_as<L>(shifted) << 52)));
}
// log(2^k (1 + f)) = k ln 2 + f - z (f - s), z = f / (2 + f), r the rest of its series.
struct Split { D k, one_and_f; }; // x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt 2, of a normal number
INLINE Split split(D x) {
  L bits = bits_as<L>(x) + all(int64_t(0x3ff0000000000000 - 0x3fe6a09e667f3bcd));
  // Of what is not negative a shift is the same with sign or without.
  D biased = bits_as<D>(((bits >> 52) & all(int64_t(0xfff))) + all(int64_t(0x4338000000000000)));
  L mantissa = (bits & all(int64_t(0x000fffffffffffff))) + all(int64_t(0x3fe6a09e667f3bcd));
  return {biased - all(WHOLE_D + 1023), bits_as<D>(mantissa)};
}
constexpr double ATANH[] = {2. / 3, 2. / 5, 2. / 7, 2. / 9, 2. / 11, 2. / 13, 2. / 15, 2. / 17, 2. / 19, 2. / 21};
INLINE D log_of_parts(D k, D f) {
  D z = f / (all(2.) + f), zz = z * z, r = zz * polynomial(ATANH, zz); // log(1 + f) = 2 z + z r = f - z (f - r)
  return k * all(LN2_HIGH_D) + (k * all(LN2_LOW_D) + (f - z * (f - r)));
}
INLINE D log1p(D u) { // u > -1
  Split x = split(all(1.) + u);
  return log_of_parts(x.k, where(x.k == D{}, u, x.one_and_f - all(1.)));
}
INLINE D log(D x) { // of any number: log 0 = -inf, of negative ones NaN
  L tiny = x < all(2.2250738585072014e-308);
  Split y = split(where(tiny, x * all(0x1p54), x));
  D r = log_of_parts(y.k - where(tiny, all(54.), D{}), y.one_and_f - all(1.));
  r = where(x == D{}, all(double(-INF)), where(x < D{}, all(double(NOT_A_NUMBER)), r));
  return where((x == all(double(INF))) | (x != x), x, r);
}
INLINE double log(double x) { double y[DOUBLES]; store(y, log(all(x))); return y[0]; }
INLINE double log1p(double x) { double y[DOUBLES]; store(y, log1p(all(x))); return y[0]; }

} // namespace
