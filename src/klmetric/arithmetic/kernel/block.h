// One block of a row's classes: what it adds to the divergence of the row, in one pass over memory.
//
// Of logits a and b, with w = e^(a - top), d = b - a, c about the mean of d under w and t = d - c: with
//     x = sum w phi(t) / W >= 0, phi(t) = e^t - 1 - t, and y = sum w t / W, what rounding left of 0 in c,
// the log mass of p is top + log W, that of q is more by c + l, and the divergence within is l - y, l = log1p(x + y).
// What is more than c between p and q, a large constant, is between top and top_q: beside it c would have no digits.
// Every term of x is at least 0, so nothing cancels however close p and q are. A class without p adds its q to x.
#pragma once
#include "functions.h"

namespace {

constexpr int BLOCK = 1024; // classes; all that a block needs stays in the first-level cache

struct Part {
  double top, top_q, mass, ratio, centre; // log mass of p = top + log(mass); of q: top_q + log(mass) + centre + log(ratio) + l
  double sum, extra, y;            // l = log1p(sum) + extra; divergence within = l - y
  double edge;                     // largest log p (as `top` has it) of the classes where q is 0
};
constexpr double D_INF = INF, D_NAN = NOT_A_NUMBER;
INLINE Part no_distribution() { return {D_NAN, D_NAN, D_NAN, 1, 0, D_NAN, 0, D_NAN, -D_INF}; }
INLINE Part nothing() { return {0, 0, 0, 1, 0, 0, -D_INF, 0, -D_INF}; } // no mass, of p or q

struct Scratch {
  alignas(64) float a[BLOCK], b[BLOCK], w[BLOCK], d[BLOCK], rest[BLOCK], tail_a[FLOATS], tail_b[FLOATS];
  alignas(64) double p[BLOCK], q[BLOCK];
};

template <bool B> struct Constant { static constexpr bool value = B; };

// Applies `f(i, j)` to the vectors of a block, j alternating between two sums: one alone would wait for itself.
template <int LANES, class Step> INLINE void each(int n, Step f) {
  int i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) f(i, 0), f(i + LANES, 1);
  if (i < n) f(i, 0);
}
// Floats where they lie, but for those that fill no vector: a padded copy of these, as `f(x, y, i, j)` gets them.
struct Floats {
  const float *a, *b;
  int whole;
  const float *tail_a, *tail_b;
};
template <class Step> INLINE void each(const Floats &x, Step f) {
  each<FLOATS>(x.whole, [&](int i, int j) EACH { f(load<F>(x.a + i), load<F>(x.b + i), i, j); });
  if (x.tail_a) f(load<F>(x.tail_a), load<F>(x.tail_b), x.whole, 0);
}
// Two sums of floats, j alternating, brought together in double after some terms: where all classes are alike, every
// addition rounds the same way, and of many in a row the errors would show.
constexpr int IN_FLOAT = 16 * FLOATS; // classes
struct Sum {
  F part[2] = {};
  W whole{};
  INLINE void together() { whole = whole + (doubles(part[0]) + doubles(part[1])), part[0] = part[1] = F{}; }
};
INLINE double total(const Sum &s) { return total(s.whole); }
template <class Step, class... Sums> INLINE void each(const Floats &x, Step f, Sums &...sums) {
  for (int from = 0; from < x.whole; from += IN_FLOAT) {
    int n = x.whole - from < IN_FLOAT ? x.whole - from : IN_FLOAT;
    each<FLOATS>(n, [&](int i, int j) EACH { f(load<F>(x.a + from + i), load<F>(x.b + from + i), from + i, j); });
    (sums.together(), ...);
  }
  if (x.tail_a) f(load<F>(x.tail_a), load<F>(x.tail_b), x.whole, 0), (sums.together(), ...);
}
INLINE void ahead(const Floats &x, int i) { __builtin_prefetch(x.a + i + BLOCK), __builtin_prefetch(x.b + i + BLOCK); }

// What rounding took from d = b - a. (Knuth's TwoSum.)
template <class V> INLINE V lost_in(V d, V b, V a) {
  V minus_a = d - b;
  return (b - (d - minus_a)) + (-a - minus_a);
}

// ---- in double: any input, for the rows that float cannot do --------------------------------------------------------
// a and b are logarithms, n a multiple of the lanes; `within` the divergences of parts that stand for the classes.
constexpr double APART_FROM = 1e6, LEAST_LOG_P = -745.13321910194122; // under which e^x is 0 in double
APART Part careful(const double *a, const double *b, const double *within, int n, double tau) {
  D top = D{} - D_INF, top_q = top, infinite = top;
  L bad{};
  each<DOUBLES>(n, [&](int i, int) EACH {
    D x = load<D>(a + i), y = load<D>(b + i);
    top = larger(x, top), top_q = larger(y, top_q), bad |= (x != x) | (y != y);
  });
  double m = largest(top), mq = largest(top_q);
  if (any(bad) || m == D_INF || mq == D_INF) return no_distribution();
  if (mq == -D_INF && m == -D_INF) return nothing();
  // Logits that a large constant keeps apart are measured from the largest: beside it their mean would have no digits.
  bool apart = m > -D_INF && mq > -D_INF && (mq - m > APART_FROM || m - mq > APART_FROM);
  double of_p = apart ? m : 0, of_q = apart ? mq : 0;
  m -= of_p, mq -= of_q;
  auto p_at = [&](int i) EACH { return load<D>(a + i) - of_p; };
  auto q_at = [&](int i) EACH { return load<D>(b + i) - of_q; };
  auto exp_from = [&](D x, double from) EACH { return exp((x - from) * tau); };
  auto mass_of_q = [&]() {
    D V{};
    each<DOUBLES>(n, [&](int i, int) EACH { V += exp_from(q_at(i), mq); });
    return total(V);
  };
  if (m == -D_INF) return {0, mq * tau, 0, 1, 0, mass_of_q() - 1, 0, 0, -D_INF}; // of q alone: without log(mass)
  D level = D{} + (mq == -D_INF ? 0. : mq - m);
  auto difference = [&](D x, D y, D &rest) EACH {
    L known = (x > infinite) & (y > infinite);
    D d = known ? y - x : level;
    rest = known ? lost_in(d, y, x) : D{};
    return d;
  };
  D sum_w{}, S{}, K{}, edge = infinite, lost = infinite, low = -infinite, high = infinite;
  alignas(64) double weights[BLOCK];
  each<DOUBLES>(n, [&](int i, int) EACH {
    D x = p_at(i), y = q_at(i), rest, d = difference(x, y, rest), w = exp_from(x, m);
    sum_w += w, S += w * d, low = smaller(d, low), high = larger(d, high);
    edge = larger(y == infinite ? x : infinite, edge), lost = larger(x == infinite ? y : infinite, lost);
    if (within) K += w * load<D>(within + i);
    store(weights + i, w);
  });
  double mass = total(sum_w), mean = total(S) / mass, c = mean * tau, inner = total(K) / mass;
  Part part = {(m + of_p) * tau, (m + of_q) * tau, mass, 1, c, 0, 0, -inner, (largest(edge) + of_p) * tau};
  if (mq == -D_INF) return part.extra = -D_INF, part;
  double above = (mq - m) * tau - c;
  // So far apart, the textbook form has every digit. Where a class of p is without q, it is the mass of q that counts: in
  // a row whose weight lies elsewhere, this may be no class of p.
  if (above > 600 || part.edge - (part.top + log(mass)) > LEAST_LOG_P) {
    part.extra = above + log(mass_of_q()) - log(mass);
    return part;
  }
  // Where every t is small, and there is no class without p, whose term is its q, no second exp is needed.
  bool near = least(low) * tau - c > -NEAR_D && largest(high) * tau - c < NEAR_D && largest(lost) == -D_INF;
  D A{}, B{};
  auto add = [&](auto is_near) EACH {
    each<DOUBLES>(n, [&](int i, int) EACH {
      D x = p_at(i), y = q_at(i), w = load<D>(weights + i), rest, d = difference(x, y, rest);
      D t = ((d - mean) + rest) * tau, term = w * (t * t) * polynomial(G_D, t);
      if constexpr (!is_near.value) {
        D e = exp((y - m) * tau - c);
        term = ((t < NEAR_D) & (t > -NEAR_D) & (w > 0.)) ? term : (e - w) - w * t;
      }
      A += term, B += w * t;
    });
  };
  if (near) add(Constant<true>{});
  else add(Constant<false>{});
  double x = total(A) / mass, y = total(B) / mass;
  return part.sum = x + y, part.y = y - inner, part;
}

// ---- in float: logits, log-probabilities, and either of them against probabilities ----------------------------------
// A number of each side as weight and as logarithm. Logarithms of probabilities are taken in double, where they keep
// the digits in which p and q differ; d is then a pair of floats, as it is where `lost_in` says what rounding took.
constexpr float TINY = 1e-30f, VAST = 1e30f;
constexpr float FAR = 8; // beyond, t is rounded so coarsely that e^t could be off by a millionth
template <class V> INLINE auto is_tame(V x) { return (x > TINY) & (x < VAST); }
template <bool PROBS, class V> INLINE auto in_reach(V top, const Scale &s) {
  return (top > (PROBS ? TINY : -s.reach)) & (top < (PROBS ? VAST : s.reach));
}
template <bool PROBS> INLINE F weight(F x, const Scale &s, const Exponential &base) {
  if constexpr (PROBS) return x;
  else return exp(x, s, base);
}
template <bool PROBS> INLINE I has_mass(F x) { return x > (PROBS ? 0 : -INF); }
template <bool P, bool Q> INLINE I is_bad(F x, F y) { return ~((P ? x >= 0.f : x == x) & (Q ? y >= 0.f : y == y)); }
template <bool PROBS> INLINE W logs(F x) {
  if constexpr (PROBS) return log(doubles(x));
  else return doubles(x);
}
template <bool P, bool Q> INLINE F level_of(F p, F q) { return floats(logs<Q>(q)) - floats(logs<P>(p)); }
template <bool P, bool Q> INLINE F difference(F x, F y, F &rest) {
  if constexpr (P || Q) {
    W d = logs<Q>(y) - logs<P>(x);
    F rounded = floats(d);
    rest = floats(d - doubles(rounded));
    return rounded;
  } else {
    F d = y - x;
    rest = lost_in(d, y, x);
    return d;
  }
}
// w, d (of a class without p `level`, which is about d of the others) and what rounding took from d.
struct Term { F w, d, rest; I is_p; };
template <bool P, bool Q> INLINE Term term_of(F x, F y, F level, const Scale &s, const Exponential &base) {
  I is_p = has_mass<P>(x);
  F rest, d = difference<P, Q>(x, y, rest);
  return {weight<P>(x, s, base), is_p ? d : level, is_p ? rest : F{}, is_p};
}

struct Tops {
  float p, q;
  bool bad;
};
template <bool P, bool Q> INLINE Tops tops_of(const Floats &block) {
  F p = all(-INF), q = p;
  I bad{};
  each(block, [&](F x, F y, int, int) EACH { p = larger(x, p), q = larger(y, q), bad |= is_bad<P, Q>(x, y); });
  return {largest(p), largest(q), any(bad)};
}

// Whether t may stand as it is: what rounding took from d (c is about d), or left in c, could show in the divergence.
INLINE bool is_sharp(double c, double x, double y) { return c * c <= 16 * x && y * y <= x / 16; }

template <bool P, bool Q> APART bool block_of_logs(const Floats &block, Scale s, Tops top, Scratch &k, Part &part) {
  if (top.bad || !in_reach<P>(top.p, s) || !in_reach<Q>(top.q, s)) return false;
  constexpr bool MIXED = P || Q;
  Exponential base(s, all(P ? 0 : top.p)), base_q(s, all(Q ? 0 : top.q));
  int power = P ? 0 : base.k[0], shift = (Q ? 0 : base_q.k[0]) - power;
  F low = all(INF), high = -low, lost = high, none = high;
  Sum sum_w, S;
  F level = level_of<P, Q>(all(top.p), all(top.q));
  each(block, [&](F x, F y, int i, int j) EACH {
    Term term = term_of<P, Q>(x, y, level, s, base);
    lost = larger(term.is_p ? none : y, lost); // q of the classes without p
    sum_w.part[j] += term.w, S.part[j] = fma(term.w, term.d, S.part[j]), low = smaller(term.d, low), high = larger(term.d, high);
    store(k.w + i, term.w), store(k.d + i, term.d);
    if (MIXED) store(k.rest + i, term.rest);
    ahead(block, i);
  }, sum_w, S);
  auto mass_of_q = [&](bool without_p) EACH {
    Sum V;
    each(block, [&](F x, F y, int, int j) EACH {
      F v = weight<Q>(y, s, base_q);
      V.part[j] += !without_p ? v : has_mass<P>(x) ? F{} : v;
    }, V);
    return total(V);
  };
  double mass = total(sum_w), mean = total(S) / mass, c = mean * s.tau;
  double below = least(low) * s.tau - c, above = largest(high) * s.tau - c;
  part = {power * LN2_D, power * LN2_D, mass, 1, c, 0, 0, 0, -D_INF};
  if (!(below > -1e4)) return false;
  if (below < -80 || above > FAR) {
    W exact{}; // c once more, of which every digit counts here
    each(block, [&](F, F, int i, int) EACH { exact = exact + doubles(load<F>(k.w + i)) * doubles(load<F>(k.d + i)); });
    part.centre = c = total(exact) / mass * s.tau;
    double l = shift * LN2_D + log(mass_of_q(false)) - log(mass) - c;
    part.extra = l;
    return l > 0.3 * (1 + (c < 0 ? -c : c)); // else it is a difference of larger numbers
  }
  bool near = below > -NEAR && above < NEAR, exact = !near || MIXED;
  for (int attempt = 0; attempt < 3; attempt++) {
    F centre = all(float(mean));
    Sum A, B;
    auto add = [&](auto phi_of, bool with_rest) EACH {
      each(block, [&](F x, F y, int i, int j) EACH {
        F w = load<F>(k.w + i), d = load<F>(k.d + i), t = d - centre;
        if (with_rest) t += MIXED ? load<F>(k.rest + i) : has_mass<P>(x) ? lost_in(d, y, x) : F{};
        t *= s.factor; // at last: a product with a large d would have no digits to spare
        B.part[j] = fma(w, t, B.part[j]), A.part[j] = fma(w, phi_of(t), A.part[j]);
      }, A, B);
    };
    if (!near) add([](F t) EACH { return phi(t); }, true);
    else if (exact) add([](F t) EACH { return phi_near(t); }, true);
    else add([](F t) EACH { return phi_near(t); }, false);
    part.centre = float(mean) * s.tau;
    double x = total(A) / mass, y = total(B) / mass;
    if (largest(lost) > (Q ? 0 : -INF)) { // the term of a class without p is its q
      double scale = shift * LN2_D - part.centre;
      if (scale > 600) return false;
      x += mass_of_q(true) / mass * exp(D{} + scale)[0];
    }
    part.sum = x + y, part.y = y;
    if (is_sharp(exact ? 0 : part.centre, x, y)) return true;
    mean = float(mean) + y / s.tau, exact = true;
  }
  return false;
}

// ---- in float: probabilities ----------------------------------------------------------------------------------------
// With rho = Q/P as a rounded number and u = (q - rho p) / (rho p), whose numerator is one fma: a term of x is
// p (u - log1p u), y is the sum of p u, what rounding left of 0 in rho, and the divergence within is x + log1p(y) - y.
struct ProbsTerm { F d, a; I fit; };
INLINE ProbsTerm term_of_probs(F p, F q, F rho, F each_q) {
  F d = fma(p, -rho, q), inverse = 1.f / (p * rho), ratio = q * inverse;
  I is_p = p > 0.f;
  return {d, is_p ? p * psi(d * inverse, ratio) : d * each_q, ~is_p | is_tame(ratio)}; // not where q alone is 0
}
APART bool block_of_probs(const Floats &block, Tops top, Part &part) {
  if (top.bad) return false;
  Sum P, Q, A, B;
  each(block, [&](F p, F q, int i, int j) EACH { P.part[j] += p, Q.part[j] += q, ahead(block, i); }, P, Q);
  double mass = total(P), mass_q = total(Q);
  float rho = float(mass_q / mass);
  if (!(is_tame(mass) && is_tame(mass_q) && is_tame(rho))) return false;
  I fit = ~I{};
  each(block, [&](F p, F q, int, int j) EACH {
    ProbsTerm term = term_of_probs(p, q, all(rho), all(1 / rho));
    B.part[j] += term.d, A.part[j] += term.a, fit &= term.fit;
  }, A, B);
  if (any(~fit)) return false;
  double x = total(A) / mass, y = total(B) / mass / rho;
  part = {0, 0, mass, rho, 0, y, 0, y - x, -D_INF};
  return true;
}

} // namespace
