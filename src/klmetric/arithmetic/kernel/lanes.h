// Few classes: sixteen rows at a time, each a lane, so that no row pays for folding lanes into one. The arithmetic is
// that of block.h, but always the general one: which rows are neighbours must not show in a row's bits. A lane that
// float cannot do is left to the careful way.
#pragma once
#include "block.h"

namespace {

constexpr int FEW = 64; // classes at most
struct Table { alignas(64) float a[FEW * FLOATS], b[FEW * FLOATS], w[FEW * FLOATS], t[FEW * FLOATS]; }; // [class][row]

struct Lane { Halves<D> kl; I done, agrees; };

// x, y and the weights of sixteen rows as the divergences; x' adds to x without the rounding of one float.
INLINE Halves<D> divergences(Halves<D> x, Halves<D> y) {
  D zero{}, lo = log1p(x.lo + y.lo) - y.lo, hi = log1p(x.hi + y.hi) - y.hi;
  return {larger(lo, zero), larger(hi, zero)};
}
INLINE Halves<D> over(F a, Halves<D> b) { Halves<D> x = doubles(a); return {x.lo / b.lo, x.hi / b.hi}; }

struct LaneTops { F p, q; I bad, agrees; };
INLINE LaneTops tops_of_lanes(const Table &s, int classes) {
  F p = load<F>(s.a), q = load<F>(s.b);
  I first_p{}, first_q{}, bad = (p != p) | (q != q);
  for (int c = 1; c < classes; c++) {
    F x = load<F>(s.a + c * FLOATS), y = load<F>(s.b + c * FLOATS);
    I here = all(int32_t(c)), up = x > p, up_q = y > q;
    first_p = where(up, here, first_p), first_q = where(up_q, here, first_q);
    p = where(up, x, p), q = where(up_q, y, q), bad = bad | (x != x) | (y != y);
  }
  return {p, q, bad, first_p == first_q};
}

APART Lane lanes_of_logs(Table &s, int classes, Scale scale) {
  LaneTops top = tops_of_lanes(s, classes);
  F none = all(-INF), reach = all(scale.reach), factor = all(scale.factor), level = top.q - top.p;
  I fit = ~top.bad & (top.p > -reach) & (top.p < reach) & (top.q > -reach) & (top.q < reach);
  top.p = where(fit, top.p, F{});
  F W{}, S{}, low = all(INF), high = none, lost = none;
  Exponential base(scale, top.p);
  for (int c = 0; c < classes; c++) {
    F x = load<F>(s.a + c * FLOATS), y = load<F>(s.b + c * FLOATS), w = exp(x, scale, base);
    I is_p = x > none;
    F d = where(is_p, y - x, level);
    lost = larger(where(is_p, none, y), lost), low = smaller(d, low), high = larger(d, high);
    W = W + w, S = fma(w, d, S);
    store(s.w + c * FLOATS, w);
  }
  // The centre in two steps: what is left of a large one shows in t, to be taken out once more.
  F first = S / W * factor, T{}, A{}, B{};
  for (int c = 0; c < classes; c++) {
    F x = load<F>(s.a + c * FLOATS), y = load<F>(s.b + c * FLOATS), w = load<F>(s.w + c * FLOATS);
    I is_p = x > none;
    F d = where(is_p, y - x, level), rest = where(is_p, lost_in(d, y, x), F{});
    F t = fma(rest, factor, fma(d, factor, -first));
    T = fma(w, t, T);
    store(s.t + c * FLOATS, t);
  }
  F second = T / W;
  for (int c = 0; c < classes; c++) {
    F w = load<F>(s.w + c * FLOATS), t = load<F>(s.t + c * FLOATS) - second;
    B = fma(w, t, B), A = fma(w, phi(t), A);
  }
  F below = fma(low, factor, -first), above = fma(high, factor, -first);
  fit = fit & (below > all(-80.f)) & (above < all(34.f));
  if (any(lost > none)) { // the term of a class without p is its q; where there is none nothing changes
    F V{};
    Exponential shifted(scale, top.p + (first + second) / factor);
    F most = all(60.f);
    fit = fit & (fma(lost - top.p, factor, -(first + second)) < most);
    for (int c = 0; c < classes; c++) {
      F x = load<F>(s.a + c * FLOATS), y = load<F>(s.b + c * FLOATS);
      V = V + where(x > none, F{}, exp(y, scale, shifted));
    }
    // e^(y/T) 2^-k stands for e^(y/T - top/T - first - second) of the unit 2^-K of W: put the powers of two right.
    F k = Of<F>::convert(shifted.k - base.k), left = fma(k, all(LN2_REST), fma(k, all(LN2), -first) - second);
    A = A + where(lost > none, V * (phi(left) + (all(1.f) + left)), F{});
  }
  Halves<D> mass = doubles(W);
  return {divergences(over(A, mass), over(B, mass)), fit, top.agrees};
}

APART Lane lanes_of_probs(Table &s, int classes) {
  LaneTops top = tops_of_lanes(s, classes);
  F P{}, Q{}, A{}, B{}, zero{}, tiny = all(TINY), vast = all(VAST), one = all(1.f);
  I fit = ~top.bad;
  for (int c = 0; c < classes; c++) {
    F p = load<F>(s.a + c * FLOATS), q = load<F>(s.b + c * FLOATS);
    P = P + p, Q = Q + q, fit = fit & (p >= zero) & (q >= zero);
  }
  F rho = Q / P, each_q = one / rho;
  fit = fit & (P > tiny) & (P < vast) & (Q > tiny) & (Q < vast) & (rho > tiny) & (rho < vast);
  for (int c = 0; c < classes; c++) {
    F p = load<F>(s.a + c * FLOATS), q = load<F>(s.b + c * FLOATS), d = fma(p, -rho, q), inverse = one / (p * rho);
    F u = d * inverse, ratio = q * inverse;
    I is_p = p > zero;
    fit = fit & (~is_p | ((ratio > tiny) & (ratio < vast)));
    B = B + d, A = A + where(is_p, p * psi(u, ratio), d * each_q);
  }
  Halves<D> mass = doubles(P), r = doubles(rho), x = over(A, mass), y = over(B, {mass.lo * r.lo, mass.hi * r.hi});
  D none{}, lo = x.lo + (log1p(y.lo) - y.lo), hi = x.hi + (log1p(y.hi) - y.hi);
  return {{larger(lo, none), larger(hi, none)}, fit, top.agrees};
}

} // namespace
