// Few classes: sixteen rows at a time, each a lane, so that no row pays for folding lanes into one. The arithmetic is
// that of block.h, but always the general one: which rows are neighbours must not show in a row's bits. A lane that
// float cannot do is left to the careful way.
#pragma once
#include "block.h"

namespace {

constexpr int FEW = 64; // classes at most
struct Table { alignas(64) float a[FEW * FLOATS], b[FEW * FLOATS], w[FEW * FLOATS], t[FEW * FLOATS], rest[FEW * FLOATS]; }; // [class][row]

struct Lane { Halves<D> kl; I done, agrees; };
// A sum over classes, eight at a time: one after the other they would round off more than is promised.
struct Sum {
  F all_before{}, here{};
  INLINE void next(int c) { if ((c & 7) == 7) all_before = all_before + here, here = F{}; }
  INLINE F total() const { return all_before + here; }
};

// x and y of sixteen rows as divergences.
INLINE Halves<D> divergences(Halves<D> x, Halves<D> y) {
  D zero{}, lo = log1p(x.lo + y.lo) - y.lo, hi = log1p(x.hi + y.hi) - y.hi;
  return {larger(lo, zero), larger(hi, zero)};
}
template <bool PROBS> INLINE F log_of(F x) {
  if constexpr (!PROBS) return x;
  else { Halves<D> y = logs<true>(x); return floats(y); }
}
template <bool PROBS> INLINE I in_reach(F top, const Scale &s) {
  F low = all(PROBS ? TINY : -s.reach), high = all(PROBS ? VAST : s.reach);
  return (top > low) & (top < high);
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

template <bool P, bool Q> APART Lane lanes_of_logs(Table &s, int classes, Scale scale) {
  LaneTops top = tops_of_lanes(s, classes);
  F none = all(-INF), factor = all(scale.factor), level = log_of<Q>(top.q) - log_of<P>(top.p);
  I fit = ~top.bad & in_reach<P>(top.p, scale) & in_reach<Q>(top.q, scale);
  top.p = where(fit, top.p, F{});
  Sum mass_of_p, terms;
  F S{}, low = all(INF), high = none, lost = none;
  Exponential base(scale, top.p);
  for (int c = 0; c < classes; c++) {
    F x = load<F>(s.a + c * FLOATS), y = load<F>(s.b + c * FLOATS), w = weight<P>(x, scale, base), rest;
    I is_p = has_mass<P>(x);
    F d = where(is_p, difference<P, Q>(x, y, rest), level);
    lost = larger(where(is_p, none, y), lost), low = smaller(d, low), high = larger(d, high);
    mass_of_p.here = mass_of_p.here + w, mass_of_p.next(c), S = fma(w, d, S);
    if (P) fit = fit & (x >= F{});
    if (Q) fit = fit & (y >= F{});
    store(s.w + c * FLOATS, w), store(s.t + c * FLOATS, d), store(s.rest + c * FLOATS, where(is_p, rest, F{}));
  }
  // The centre in two steps: what is left of a large one shows in t, to be taken out once more.
  F W = mass_of_p.total(), first = S / W, T{}, B{};
  for (int c = 0; c < classes; c++) {
    F w = load<F>(s.w + c * FLOATS), d = load<F>(s.t + c * FLOATS), rest = load<F>(s.rest + c * FLOATS);
    F t = ((d - first) + rest) * factor; // scaled last: a product with a large d would have no digits to spare
    T = fma(w, t, T);
    store(s.t + c * FLOATS, t);
  }
  F second = T / W;
  for (int c = 0; c < classes; c++) {
    F w = load<F>(s.w + c * FLOATS), t = load<F>(s.t + c * FLOATS) - second;
    B = fma(w, t, B), terms.here = fma(w, phi(t), terms.here), terms.next(c);
  }
  F below = (low - first) * factor, above = (high - first) * factor;
  fit = fit & (below > all(-80.f)) & (above < all(FAR));
  F A = terms.total();
  fit = fit & (second * second * W <= all(4.f) * A); // else t has lost digits to what was left of the centre
  Halves<D> mass = doubles(W), x = over(A, mass);
  if (any(has_mass<Q>(lost))) { // the term of a class without p is its q; where there is none nothing changes
    Exponential base_q(scale, where(has_mass<Q>(lost), lost, F{}));
    F V{};
    for (int c = 0; c < classes; c++) {
      V = V + where(has_mass<P>(load<F>(s.a + c * FLOATS)), F{}, weight<Q>(load<F>(s.b + c * FLOATS), scale, base_q));
    }
    Halves<D> v = over(V, mass), c1 = doubles(first), c2 = doubles(second), k = doubles(Of<F>::convert((Q ? I{} : base_q.k) - (P ? I{} : base.k)));
    D ln2 = all(Scale::LN2_D), tau = all(scale.tau), most = all(60.);
    D lo = (k.lo * ln2 - c1.lo * tau) - c2.lo, hi = (k.hi * ln2 - c1.hi * tau) - c2.hi;
    fit = fit & (floats(Halves<D>{lo, hi}) < all(60.f));
    x = {x.lo + v.lo * exp(smaller(lo, most)), x.hi + v.hi * exp(smaller(hi, most))};
  }
  return {divergences(x, over(B, mass)), fit, top.agrees};
}

APART Lane lanes_of_probs(Table &s, int classes) {
  LaneTops top = tops_of_lanes(s, classes);
  Sum mass_of_p, mass_of_q, terms; // both masses alike, so that rho is 1 where p is q
  F B{}, zero{}, tiny = all(TINY), vast = all(VAST), one = all(1.f);
  I fit = ~top.bad;
  for (int c = 0; c < classes; c++) {
    F p = load<F>(s.a + c * FLOATS), q = load<F>(s.b + c * FLOATS);
    mass_of_p.here = mass_of_p.here + p, mass_of_p.next(c), mass_of_q.here = mass_of_q.here + q, mass_of_q.next(c);
    fit = fit & (p >= zero) & (q >= zero);
  }
  F P = mass_of_p.total(), Q = mass_of_q.total(), rho = Q / P, each_q = one / rho;
  fit = fit & (P > tiny) & (P < vast) & (Q > tiny) & (Q < vast) & (rho > tiny) & (rho < vast);
  for (int c = 0; c < classes; c++) {
    F p = load<F>(s.a + c * FLOATS), q = load<F>(s.b + c * FLOATS), d = fma(p, -rho, q), inverse = one / (p * rho);
    F u = d * inverse, ratio = q * inverse;
    I is_p = p > zero;
    fit = fit & (~is_p | ((ratio > tiny) & (ratio < vast)));
    B = B + d, terms.here = terms.here + where(is_p, p * psi(u, ratio), d * each_q), terms.next(c);
  }
  Halves<D> mass = doubles(P), r = doubles(rho), x = over(terms.total(), mass), y = over(B, {mass.lo * r.lo, mass.hi * r.hi});
  D none{}, lo = x.lo + (log1p(y.lo) - y.lo), hi = x.hi + (log1p(y.hi) - y.hi);
  return {{larger(lo, none), larger(hi, none)}, fit, top.agrees};
}

} // namespace
