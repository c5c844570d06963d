// Few classes: sixteen rows at a time, each a lane, so that no row pays for folding lanes into one. The terms are those
// of block.h, but always the general ones: which rows are neighbours must not show in a row's bits. A lane that float
// cannot do is left to the careful way.
#pragma once
#include "block.h"

namespace {

constexpr int FEW = 128; // classes at most: so many still lie in the first-level cache
struct Table { // [class][row]
  alignas(64) float a[FEW * FLOATS], b[FEW * FLOATS], w[FEW * FLOATS], t[FEW * FLOATS], rest[FEW * FLOATS];
  int classes;
  template <class Step> INLINE void each(Step f) { // `f(x, y, i)` for the numbers of each class, i being their place
    for (int i = 0; i < classes * FLOATS; i += FLOATS) f(load<F>(a + i), load<F>(b + i), i);
  }
};
struct Lane { W sum, y; I done, agrees; }; // KL = log1p(sum) - y

// A sum over classes, eight at a time: one after the other they would round off more than is promised.
struct LaneSum {
  F before{}, eight{};
  INLINE void add(F x, int i) { eight += x, next(i); }
  INLINE void add_product(F x, F y, int i) { eight = fma(x, y, eight), next(i); }
  INLINE void next(int i) {
    if (i % (8 * FLOATS) == 7 * FLOATS) before += eight, eight = F{};
  }
  INLINE F total() const { return before + eight; }
};

struct LaneTops { F p, q; I fit, agrees; };
template <bool P, bool Q> INLINE LaneTops tops_of_lanes(Table &table) {
  F p = all(-INF), q = p;
  I first_p{}, first_q{}, bad{};
  table.each([&](F x, F y, int i) EACH {
    first_p = x > p ? I{} + i : first_p, first_q = y > q ? I{} + i : first_q;
    p = larger(x, p), q = larger(y, q), bad |= is_bad<P, Q>(x, y);
  });
  return {p, q, ~bad, first_p == first_q};
}

template <bool P, bool Q> APART Lane lanes_of_logs(Table &table, Scale scale) {
  LaneTops top = tops_of_lanes<P, Q>(table);
  F none = all(-INF), level = level_of<P, Q>(top.p, top.q), factor = all(scale.factor);
  I fit = top.fit & in_reach<P>(top.p, scale) & in_reach<Q>(top.q, scale);
  Exponential base(scale, fit ? top.p : F{});
  LaneSum of_w, of_terms;
  F S{}, low = all(INF), high = none, lost = none;
  table.each([&](F x, F y, int i) EACH {
    Term term = term_of<P, Q>(x, y, level, scale, base);
    of_w.add(term.w, i), S = fma(term.w, term.d, S);
    low = smaller(term.d, low), high = larger(term.d, high), lost = larger(term.is_p ? none : y, lost);
    store(table.w + i, term.w), store(table.t + i, term.d), store(table.rest + i, term.rest);
  });
  // The centre in two steps: what is left of a large one shows in t, to be taken out once more.
  F mass = of_w.total(), centre = S / mass, T{}, B{};
  table.each([&](F, F, int i) EACH { // scaled last: a product with a large d would have no digits to spare
    F t = ((load<F>(table.t + i) - centre) + load<F>(table.rest + i)) * factor;
    T = fma(load<F>(table.w + i), t, T);
    store(table.t + i, t);
  });
  F more = T / mass;
  table.each([&](F, F, int i) EACH {
    F w = load<F>(table.w + i), t = load<F>(table.t + i) - more;
    B = fma(w, t, B), of_terms.add_product(w, phi(t), i);
  });
  F A = of_terms.total();
  fit &= ((low - centre) * factor > -80.f) & ((high - centre) * factor < FAR);
  fit &= more * more * mass <= 4.f * A; // else t has lost digits to what was left of the centre
  W x = doubles(A) / doubles(mass), y = doubles(B) / doubles(mass);
  if (any(has_mass<Q>(lost))) { // the term of a class without p is its q; where there is none nothing changes
    Exponential base_q(scale, has_mass<Q>(lost) ? lost : F{});
    F V{};
    table.each([&](F x, F y, int) EACH { V += has_mass<P>(x) ? F{} : weight<Q>(y, scale, base_q); });
    W power = doubles(floats((Q ? I{} : base_q.k) - (P ? I{} : base.k)));
    W from = (power * LN2_D - doubles(centre) * scale.tau) - doubles(more);
    fit &= ~has_mass<Q>(lost) | (floats(from) < 60.f);
    x = x + doubles(V) / doubles(mass) * exp(smaller(from, W{} + 60.));
  }
  return {x + y, y, fit, top.agrees};
}

APART Lane lanes_of_probs(Table &table) {
  LaneTops top = tops_of_lanes<true, true>(table);
  LaneSum of_p, of_q, of_terms; // both alike, so that rho is 1 where p is q
  table.each([&](F p, F q, int i) EACH { of_p.add(p, i), of_q.add(q, i); });
  F P = of_p.total(), Q = of_q.total(), rho = Q / P, each_q = 1.f / rho, B{};
  I fit = top.fit & is_tame(P) & is_tame(Q) & is_tame(rho);
  table.each([&](F p, F q, int i) EACH {
    ProbsTerm term = term_of_probs(p, q, rho, each_q);
    B += term.d, of_terms.add(term.a, i), fit &= term.fit;
  });
  W mass = doubles(P), x = doubles(of_terms.total()) / mass, y = doubles(B) / (mass * doubles(rho));
  return {y, y - x, fit, top.agrees};
}

} // namespace
