// One block of a row's classes: what it adds to the divergence of the row, in one pass over memory.
//
// Of logits a and b, with w = e^(a - top), d = b - a, c about the mean of d under w and t = d - c: with
//     x = sum w phi(t) / W >= 0, phi(t) = e^t - 1 - t, and y = sum w t / W, what rounding left of 0 in c,
// the log mass of p is top + log W, that of q is more by c + l, and the divergence within is l - y, l = log1p(x + y).
// Every term of x is at least 0, so nothing cancels however close p and q are. A class without p adds its q to x.
#pragma once
#include "functions.h"

namespace {

constexpr int BLOCK = 1024; // classes; all that a block needs stays in the first-level cache

struct Part {
  double top, mass, ratio, centre; // log mass of p = top + log(mass); of q: + centre + log(ratio) + l
  double sum, extra, y;            // l = log1p(sum) + extra; divergence within = l - y
  double edge;                     // largest log p (as `top` has it) of the classes where q is 0
};
constexpr double D_INF = INF, D_NAN = NOT_A_NUMBER;
INLINE Part no_distribution() { return {D_NAN, D_NAN, 1, 0, D_NAN, 0, D_NAN, -D_INF}; }
INLINE Part nothing() { return {0, 0, 1, 0, 0, -D_INF, 0, -D_INF}; } // no mass, of p or q

struct Scratch {
  alignas(64) float a[BLOCK], b[BLOCK], w[BLOCK], d[BLOCK], rest[BLOCK], tail_a[FLOATS], tail_b[FLOATS];
  alignas(64) double p[BLOCK], q[BLOCK];
};

// Applies `f(i, j)` to the vectors of a block, j alternating between two sums: one alone would wait for itself.
template <int LANES, class Step> INLINE void each(int n, Step f) {
  int i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) f(i, 0), f(i + LANES, 1);
  if (i < n) f(i, 0);
}
// Floats where they lie, but for those that fill no vector: a padded copy of these, as `f(x, y, i, j)` gets them.
struct Floats { const float *a, *b; int whole; const float *tail_a, *tail_b; };
template <class Step> INLINE void each(const Floats &x, Step f) {
  each<FLOATS>(x.whole, [&](int i, int j) EACH { f(load<F>(x.a + i), load<F>(x.b + i), i, j); });
  if (x.tail_a) f(load<F>(x.tail_a), load<F>(x.tail_b), x.whole, 0);
}
INLINE void ahead(const Floats &x, int i) { __builtin_prefetch(x.a + i + BLOCK), __builtin_prefetch(x.b + i + BLOCK); }

// What rounding took from d = b - a. (Knuth's TwoSum.)
template <class V> INLINE V lost_in(V d, V b, V a) {
  V minus_a = d - b;
  return (b - (d - minus_a)) + (-a - minus_a);
}

// ---- in double: any input, for the rows that float cannot do ---------------------------------------------------------
// a and b are logarithms, n a multiple of the lanes; `within` the divergences of parts that stand for the classes.
constexpr double APART_FROM = 1e6;
APART Part careful(const double *a, const double *b, const double *within, int n, double tau) {
  D top = all(-D_INF), top_q = top;
  L bad{};
  each<DOUBLES>(n, [&](int i, int) EACH {
    D x = load<D>(a + i), y = load<D>(b + i);
    top = larger(x, top), top_q = larger(y, top_q), bad = bad | (x != x) | (y != y);
  });
  double m = largest(top), mq = largest(top_q);
  if (any(bad) || m == D_INF || mq == D_INF) return no_distribution();
  if (mq == -D_INF && m == -D_INF) return nothing();
  // Logits that a large constant keeps apart are measured from the largest: beside it their mean would have no digits.
  bool apart = m > -D_INF && mq > -D_INF && (mq - m > APART_FROM || m - mq > APART_FROM);
  double of_p = apart ? m : 0, of_q = apart ? mq : 0;
  m -= of_p, mq -= of_q;
  auto p_at = [&](int i) EACH { return load<D>(a + i) - all(of_p); };
  auto q_at = [&](int i) EACH { return load<D>(b + i) - all(of_q); };
  D scale = all(tau), level = all(mq == -D_INF || m == -D_INF ? 0. : mq - m), infinite = all(-D_INF);
  auto exp_from = [&](D x, double from) EACH { return exp((x - all(from)) * scale); };
  auto mass_of_q = [&]() { D V{}; each<DOUBLES>(n, [&](int i, int) EACH { V = V + exp_from(q_at(i), mq); }); return total(V); };
  if (m == -D_INF) return {0, 0, 1, mq * tau, mass_of_q() - 1, 0, 0, -D_INF};
  auto difference = [&](D x, D y, D &rest) EACH {
    L known = (x > infinite) & (y > infinite);
    D d = where(known, y - x, level);
    rest = where(known, lost_in(d, y, x), D{});
    return d;
  };
  D W{}, S{}, K{}, edge = infinite, lost = infinite, low = all(D_INF), high = infinite;
  alignas(64) double weights[BLOCK];
  each<DOUBLES>(n, [&](int i, int) EACH {
    D x = p_at(i), y = q_at(i), rest, d = difference(x, y, rest), w = exp_from(x, m);
    W = W + w, S = S + w * d, low = smaller(d, low), high = larger(d, high);
    edge = larger(where(y == infinite, x, infinite), edge), lost = larger(where(x == infinite, y, infinite), lost);
    if (within) K = K + w * load<D>(within + i);
    store(weights + i, w);
  });
  double mass = total(W), mean = total(S) / mass, c = mean * tau, inner = total(K) / mass, border = (largest(edge) + of_p) * tau;
  Part part = {(m + of_p) * tau, mass, 1, c + (of_q - of_p) * tau, 0, 0, -inner, border};
  if (mq == -D_INF) return part.extra = -D_INF, part;
  double above = (mq - m) * tau - c;
  if (above > 600) { // so far apart that the textbook form has every digit
    part.extra = above + log(mass_of_q()) - log(mass);
    return part;
  }
  D A{}, B{};
  auto sums = [&](bool near) EACH {
    each<DOUBLES>(n, [&](int i, int) EACH {
      D x = p_at(i), y = q_at(i), w = load<D>(weights + i), rest, d = difference(x, y, rest);
      D t = ((d - all(mean)) + rest) * scale, term = w * (t * t) * polynomial(G_D, t);
      if (!near) {
        D e = exp((y - all(m)) * scale - all(c));
        term = where((t < all(NEAR_D)) & (t > all(-NEAR_D)) & (w > D{}), term, (e - w) - w * t);
      }
      A = A + term, B = B + w * t;
    });
  };
  // Where every t is small, and there is no class without p, whose term is its q, no second exp is needed.
  if (least(low) * tau - c > -NEAR_D && largest(high) * tau - c < NEAR_D && largest(lost) == -D_INF) sums(true);
  else sums(false);
  double x = total(A) / mass, y = total(B) / mass;
  return part.sum = x + y, part.y = y - inner, part;
}

// ---- in float: logits, log-probabilities, and either of them against probabilities -----------------------------------
// A number of each side as weight and as logarithm. Logarithms of probabilities are taken in double, where they keep the
// digits in which p and q differ; d is then a pair of floats, as it is where `lost_in` says what rounding took from it.
template <bool PROBS> INLINE F weight(F x, const Scale &s, const Exponential &base) {
  if constexpr (PROBS) return x;
  else return exp(x, s, base);
}
template <bool PROBS> INLINE I has_mass(F x) { return x > (PROBS ? F{} : all(-INF)); }
template <bool PROBS> INLINE Halves<D> logs(F x) {
  Halves<D> y = doubles(x);
  if constexpr (PROBS) return {log(y.lo), log(y.hi)};
  else return y;
}
template <bool P, bool Q> INLINE F difference(F x, F y, F &rest) {
  if constexpr (P || Q) {
    Halves<D> a = logs<P>(x), b = logs<Q>(y), d = b - a;
    F rounded = floats(d);
    rest = floats(d - doubles(rounded));
    return rounded;
  } else {
    F d = y - x;
    rest = lost_in(d, y, x);
    return d;
  }
}
INLINE float log_of(float x, bool probs) { return probs ? float(log(double(x))) : x; }

struct Tops { float p, q; bool bad; };
template <bool P, bool Q> INLINE Tops tops_of(const Floats &block) {
  F p = all(-INF), q = p;
  I bad{};
  each(block, [&](F x, F y, int, int) EACH {
    p = larger(x, p), q = larger(y, q);
    if constexpr (P || Q) bad = bad | ~((P ? x >= F{} : x == x) & (Q ? y >= F{} : y == y));
    else bad = bad | (x != x) | (y != y);
  });
  return {largest(p), largest(q), any(bad)};
}
constexpr float FAR = 8; // beyond, t is rounded so coarsely that e^t could be off by a millionth
constexpr float TINY = 1e-30f, VAST = 1e30f;
INLINE bool in_reach(float top, bool probs, const Scale &s) {
  return probs ? top > TINY && top < VAST : top > -s.reach && top < s.reach;
}

// Whether t may stand as it is: what rounding took from d (c is about d), or left in c, could show in the divergence.
INLINE bool is_sharp(double c, double x, double y) { return c * c <= 16 * x && y * y <= x / 16; }

template <bool P, bool Q> APART bool block_of_logs(const Floats &block, Scale s, Tops top, Scratch &k, Part &part) {
  if (top.bad || !in_reach(top.p, P, s) || !in_reach(top.q, Q, s)) return false;
  constexpr bool MIXED = P || Q;
  Exponential base(s, all(P ? 0 : top.p)), base_q(s, all(Q ? 0 : top.q));
  int power = P ? 0 : first(base.k), shift = (Q ? 0 : first(base_q.k)) - power;
  F W[2] = {}, S[2] = {}, low = all(INF), high = all(-INF), lost = high, none = high, level = all(log_of(top.q, Q) - log_of(top.p, P));
  each(block, [&](F x, F y, int i, int j) EACH {
    F w = weight<P>(x, s, base), rest;
    I is_p = has_mass<P>(x);
    F d = where(is_p, difference<P, Q>(x, y, rest), level);
    lost = larger(where(is_p, none, y), lost); // q of the classes without p
    W[j] = W[j] + w, S[j] = fma(w, d, S[j]), low = smaller(d, low), high = larger(d, high);
    store(k.w + i, w), store(k.d + i, d);
    if (MIXED) store(k.rest + i, where(is_p, rest, F{}));
    ahead(block, i);
  });
  auto mass_of_q = [&](bool without_p) EACH {
    F V[2] = {};
    each(block, [&](F x, F y, int, int j) EACH {
      F v = weight<Q>(y, s, base_q);
      V[j] = V[j] + (without_p ? where(has_mass<P>(x), F{}, v) : v);
    });
    return total(V[0] + V[1]);
  };
  double mass = total(W[0] + W[1]), c = total(S[0] + S[1]) / mass * s.tau;
  double below = least(low) * s.tau - c, above = largest(high) * s.tau - c;
  part = {power * Scale::LN2_D, mass, 1, c, 0, 0, 0, -D_INF};
  if (!(below > -1e4)) return false;
  if (below < -80 || above > FAR) {
    double l = shift * Scale::LN2_D + log(mass_of_q(false)) - log(mass) - c;
    part.extra = l;
    return l > 0.3 * (1 + (c < 0 ? -c : c)); // else it is a difference of larger numbers
  }
  bool near = below > -NEAR && above < NEAR, exact = !near || MIXED;
  for (int attempt = 0; attempt < 3; attempt++) {
    F A[2] = {}, B[2] = {}, centre = all(-float(c)), factor = all(s.factor);
    auto sums = [&](auto phi_of, bool with_rest) EACH {
      each(block, [&](F x, F y, int i, int j) EACH {
        F w = load<F>(k.w + i), d = load<F>(k.d + i), t = fma(d, factor, centre);
        if (with_rest) t = fma(MIXED ? load<F>(k.rest + i) : where(has_mass<P>(x), lost_in(d, y, x), F{}), factor, t);
        B[j] = fma(w, t, B[j]), A[j] = fma(w, phi_of(t), A[j]);
      });
    };
    if (!near) sums([](F t) EACH { return phi(t); }, true);
    else if (exact) sums([](F t) EACH { return phi_near(t); }, true);
    else sums([](F t) EACH { return phi_near(t); }, false);
    part.centre = float(c);
    double x = total(A[0] + A[1]) / mass, y = total(B[0] + B[1]) / mass;
    if (largest(lost) > (Q ? 0 : -INF)) { // the term of a class without p is its q
      double q[DOUBLES], scale = shift * Scale::LN2_D - part.centre;
      if (scale > 600) return false;
      store(q, exp(all(scale)));
      x += mass_of_q(true) / mass * q[0];
    }
    part.sum = x + y, part.y = y;
    if (is_sharp(exact ? 0 : part.centre, x, y)) return true;
    c = part.centre + y, exact = true;
  }
  return false;
}

// ---- in float: probabilities -----------------------------------------------------------------------------------------
// With rho = Q/P as a rounded number and u = (q - rho p) / (rho p), whose numerator is one fma: a term of x is
// p (u - log1p u), y is the sum of p u, what rounding left of 0 in rho, and the divergence within is x + log1p(y) - y.
APART bool block_of_probs(const Floats &block, Tops top, Part &part) {
  if (top.bad) return false;
  F P[2] = {}, Q[2] = {};
  each(block, [&](F p, F q, int i, int j) EACH { P[j] = P[j] + p, Q[j] = Q[j] + q, ahead(block, i); });
  double mass = total(P[0] + P[1]), mass_q = total(Q[0] + Q[1]);
  if ( !(mass > TINY && mass < VAST && mass_q > TINY && mass_q < VAST)) return false;
  float rho = float(mass_q / mass);
  if (!(rho > TINY && rho < VAST)) return false;
  F A[2] = {}, B[2] = {}, r = all(rho), minus = all(-rho), each_q = all(1 / rho);
  I out{};
  each(block, [&](F p, F q, int, int j) EACH {
    F d = fma(p, minus, q), inverse = all(1.f) / (p * r);
    F u = d * inverse, ratio = q * inverse;
    I is_p = p > F{};
    out = out | (is_p & ~((ratio > all(TINY)) & (ratio < all(VAST))));
    B[j] = B[j] + d, A[j] = A[j] + where(is_p, p * psi(u, ratio), d * each_q);
  });
  if (any(out)) return false; // also where q alone is 0
  double x = total(A[0] + A[1]) / mass, y = total(B[0] + B[1]) / mass / rho;
  part = {0, mass, rho, 0, y, 0, y - x, -D_INF};
  return true;
}

} // namespace
