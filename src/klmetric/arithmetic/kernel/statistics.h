// What else tells two rows apart: a second look at their blocks, once their masses are known.
//
// With t = log(q / p), b the larger of p and q, s = -|t|, e = e^s - 1, phi(s) = e - s and psi(u) = u - log(1 + u), a class
// adds b times this:
//     to KL(q || p): phi(s) where q is the larger, else s e - phi(s) = s e^s - e,
//     to twice Jensen-Shannon: (s e - phi(s)) - e^2 / 2 + (2 + e) psi(e / 2), to twice the total variation: -e.
// They are q log(q/p) + p - q and so on, written so that near t = 0 only two bits are lost to a difference, and nothing
// overflows however far p and q are apart.
#pragma once
#include "rows.h"

namespace {

constexpr int MOST_LIKELY = 10;
constexpr int SIZES_OF_TOP = 3, TOP[SIZES_OF_TOP] = {1, 5, MOST_LIKELY};
// Of one row, in the order of `Statistics` in statistics.py.
struct Statistics { double kl, reverse, jensen_shannon, total_variation, log_mass_p, log_mass_q, confidence; };

// The classes from the most likely one on, the first of equals first.
struct Ranking {
  double value[MOST_LIKELY];
  int64_t place[MOST_LIKELY];
  int count = 0;
  template <class T> INLINE void add(const T *x, int n, int64_t at) {
    typedef T V __attribute__((vector_size(64)));
    constexpr int lanes = 64 / sizeof(T);
    int i = 0;
    for (T least = least_of(x, n); i + lanes <= n; i += lanes) {
      if (!any(load<V>(x + i) >= least)) continue;
      for (int j = i; j < i + lanes; j++) if (x[j] >= least) insert(double(x[j]), at + j);
      if (count == MOST_LIKELY) least = T(value[MOST_LIKELY - 1]) > least ? T(value[MOST_LIKELY - 1]) : least;
    }
    for (; i < n; i++) insert(double(x[i]), at + i);
  }
  // What a class must have to be among them: of the first block, whose sixteen parts each have a largest class, so much
  // that enough of these do.
  template <class T> INLINE T least_of(const T *x, int n) const {
    if (count == MOST_LIKELY) return T(value[MOST_LIKELY - 1]);
    if (n < 2 * 16) return T(-D_INF);
    T largest[16];
    for (int k = 0; k < 16; k++) largest[k] = x[k];
    for (int i = 16; i + 16 <= n; i += 16) for (int k = 0; k < 16; k++) largest[k] = x[i + k] > largest[k] ? x[i + k] : largest[k];
    for (int k = 1; k < 16; k++) {
      T y = largest[k];
      int j = k;
      for (; j > 0 && y > largest[j - 1]; j--) largest[j] = largest[j - 1];
      largest[j] = y;
    }
    return largest[MOST_LIKELY - 1];
  }
  INLINE void insert(double x, int64_t at) {
    if (count == MOST_LIKELY && !(x > value[MOST_LIKELY - 1])) return;
    int k = count < MOST_LIKELY ? count++ : MOST_LIKELY - 1;
    for (; k > 0 && x > value[k - 1]; k--) value[k] = value[k - 1], place[k] = place[k - 1];
    value[k] = x, place[k] = at;
  }
  bool agrees(const Ranking &other, int k) const {
    for (int i = 0; i < k && i < count; i++) if (place[i] != other.place[i]) return false;
    return true;
  }
};

constexpr float ATANH_NEAR[] = {1.f / 3, 1.f / 5, 1.f / 7, 1.f / 9}, BOTH_NEAR[] = {1.f, 1.f / 6, 1.f / 15, 1.f / 28};
constexpr float LEAST_S = -80; // under which e^s is nothing beside 1
// e^s, e^s - 1 and phi(s), each with all its digits, for LEAST_S <= s <= 0.
template <class V> struct Powers { V exp, less_1, phi; };
INLINE Powers<F> powers(F s) { // as phi does it
  F shifted = fma(s, LOG2E, WHOLE), k = shifted - WHOLE, r = fma(k, -LN2_REST, fma(k, -LN2, s));
  F scale = (F)(((I)shifted << 23) + ONE), d = scale - 1.f, rest = r * r * polynomial(G, r), e = r + rest;
  F far = fma(d, r, fma(k, -LN2_REST, fma(k, -LN2, d)));
  return {fma(scale, e, scale), fma(scale, e, d), fma(scale, rest, far)};
}
INLINE Powers<D> powers(D s) {
  D e = exp(s), near = s * s * polynomial(G_D, s);
  L is_near = s > -NEAR_D;
  return {e, is_near ? s + near : e - 1, is_near ? near : e - 1 - s};
}
template <class V> struct Terms {
  V reverse{}, jensen_shannon{}, total_variation{};
  // Of b and t, which is infinite where p or q is 0.
  INLINE void add(V b, V t) {
    auto up = t > 0;
    V exact = up ? -t : t, s = exact > LEAST_S ? exact : V{} + LEAST_S, half;
    Powers<V> power = powers(s);
    V e = power.less_1, f = power.phi, se = s > -1 ? s * e - f : s * power.exp - e;
    V beyond = exact > LEAST_S ? V{} : exact > V{} - INF ? s - exact : -f; // where p is 0, KL(q || p) is not finite
    half = e / 2, reverse += b * (up ? f + beyond : se), total_variation -= b * e;
    jensen_shannon += (b + b) * ((se - e * half) + (2 + e) * psi(half, 1 + half)); // four times it
  }
  // Of p and t = log(q / p), |t| <= NEAR: the series of all three in r = tanh(t / 2).
  INLINE void add_near(V p, V t) {
    V e = fma(t * t, polynomial(G, t), t), r = e / (e + 2.f), rr = r * r, both = fma(p, e, p + p);
    V cubic = rr * r * polynomial(ATANH_NEAR, rr);
    reverse = fma(both, fma(r, cubic, rr + cubic), reverse), jensen_shannon = fma(both * rr, polynomial(BOTH_NEAR, rr), jensen_shannon);
    total_variation += p * (e > 0 ? e : -e);
  }
  INLINE void add_to(Statistics &s) const {
    s.reverse += total(reverse), s.jensen_shannon += total(jensen_shannon) / 4;
    s.total_variation += total(total_variation) / 2;
  }
};

// Those of floats, brought together in double now and then, as `Sum` does it.
struct FloatTerms : Terms<F> {
  Terms<W> whole;
  INLINE void together() {
    whole.reverse = whole.reverse + doubles(reverse), whole.jensen_shannon = whole.jensen_shannon + doubles(jensen_shannon);
    whole.total_variation = whole.total_variation + doubles(total_variation);
    reverse = jensen_shannon = total_variation = F{};
  }
};

// What two rows come to as a whole: a logit of each that is about the largest, the log mass of p less that of its own
// logit, and how much more that of q is. So a constant in all logits, of both or of one, costs no digits.
struct Masses {
  double top_p, top_q, mass, rest;
  double log_mass(double tau) const { return top_p * tau + mass; }
  double log_mass_q(double tau) const { return top_q * tau + (mass + rest); }
};

// t of logits x and y where both are, else whichever infinity, or 0, says which is not.
template <class V, class T> INLINE V log_ratio(V x, V y, V t) {
  V none = V{} - T(INF);
  return x > none ? (y > none ? t : none) : y > none ? -none : V{};
}

// Of logits in float. `lost` is the largest logit of q of the classes without p.
APART bool terms_in_float(const Floats &block, const Scale &s, const Masses &row, FloatTerms &terms, F &lost) {
  double log_mass = row.log_mass(s.tau), log_mass_q = row.log_mass_q(s.tau), apart = (row.top_q - row.top_p) + row.rest / s.tau;
  float top_p = float(log_mass / s.tau), top_q = float(log_mass_q / s.tau);
  if (!(top_p > -s.reach && top_p < s.reach && top_q > -s.reach && top_q < s.reach)) return false;
  Exponential base(s, all(top_p)), base_q(s, all(top_q));
  F of_p = all(float(exp(D{} + (base.k[0] * LN2_D - log_mass))[0])), none = all(-INF);
  F of_q = all(float(exp(D{} + (base_q.k[0] * LN2_D - log_mass_q))[0]));
  F shift = all(float(apart)), rest = all(float(apart - double(float(apart))));
  each(block, [&](F x, F y, int i, int) EACH {
    F d = y - x, t = ((d - shift) + (lost_in(d, y, x) - rest)) * s.factor;
    ahead(block, i);
    if (!any(~((t < NEAR) & (t > -NEAR)))) return terms.add_near(exp(x, s, base) * of_p, t);
    t = log_ratio<F, float>(x, y, t);
    Exponential larger_one = base;
    I up = t > 0.f;
    larger_one.under = up ? base_q.under : base.under, larger_one.k = up ? base_q.k : base.k;
    terms.add(exp(up ? y : x, s, larger_one) * (up ? of_q : of_p), t);
    lost = larger(x > none ? none : y, lost);
  }, terms);
  return true;
}
APART void terms_in_double(const double *a, const double *b, int n, const Masses &row, double tau, Terms<D> &terms, D &lost) {
  each<DOUBLES>(n, [&](int i, int) EACH {
    D x = load<D>(a + i), y = load<D>(b + i), none = D{} - D_INF, of_p = x - row.top_p, of_q = y - row.top_q, d = of_q - of_p;
    D t = log_ratio<D, double>(x, y, (d + lost_in(d, of_q, of_p)) * tau - row.rest);
    terms.add(exp(t > 0. ? (of_q * tau - row.rest) - row.mass : of_p * tau - row.mass), t);
    lost = larger(x > none ? none : y, lost);
  });
}

// What a second look finds in some classes of a row, or in all: sums of what each adds, the largest logit of q of the
// classes without p, and the most likely classes of both.
struct Look {
  Statistics sums{};
  double lost = -D_INF;
  Ranking first, second;
};
void look_again(const Job &job, Row p, Row q, const Masses &row, const Scale &scale, Scratch &k, Look &look) {
  bool fast = in_float(job) && job.p.format == LOGS && job.q.format == LOGS;
  for (int64_t at = 0; at < job.classes; at += BLOCK) {
    int n = job.classes - at < BLOCK ? int(job.classes - at) : BLOCK;
    if (fast) {
      Floats block = block_of(p, q, at, n, k);
      FloatTerms terms;
      F lost_here = all(-INF);
      look.first.add(block.a, n, at), look.second.add(block.b, n, at);
      if (terms_in_float(block, scale, row, terms, lost_here)) {
        terms.whole.add_to(look.sums), look.lost = larger(look.lost, double(largest(lost_here)));
        continue;
      }
    }
    int full = read_logs(p, at, n, k.p, [&](const double *x) { if (!fast) look.first.add(x, n, at); });
    read_logs(q, at, n, k.q, [&](const double *x) { if (!fast) look.second.add(x, n, at); });
    Terms<D> terms;
    D lost_here = D{} - D_INF;
    terms_in_double(k.p, k.q, full, row, scale.tau, terms, lost_here);
    terms.add_to(look.sums), look.lost = larger(look.lost, largest(lost_here));
  }
}

// The log mass of a row, less that of its largest class.
APART double log_mass_of(const Job &job, Row x, double largest, double tau, Scratch &k) {
  D sum{};
  for (int64_t at = 0; at < job.classes; at += BLOCK) {
    int n = job.classes - at < BLOCK ? int(job.classes - at) : BLOCK, full = read_logs(x, at, n, k.q, [](const double *) {});
    each<DOUBLES>(full, [&](int i, int) EACH { sum += exp((load<D>(k.q + i) - largest) * tau); });
  }
  return log(total(sum));
}

INLINE double logit_of(const Side &side, const Leader &l) { return side.format == PROBS ? log(l.value) : l.value; }

Masses masses_of(const Job &job, Row p, Row q, const Part &part, double kl, const Scale &scale, const Leader *leaders, Scratch &k) {
  double top_p = logit_of(job.p, leaders[0]), top_q = logit_of(job.q, leaders[1]);
  bool has_p = top_p > -D_INF, has_q = top_q > -D_INF;
  top_p = has_p ? top_p : 0, top_q = has_q ? top_q : 0;
  // A class of q that is masked with a large number moves the centres so far that no digits are left of
  // what is apart; a constant in all logits, so far that some are lost.
  constexpr double BEYOND = 64;
  double apart = part.centre + (part.top_q - part.top);
  if (has_p && has_q && !(apart > -BEYOND && apart < BEYOND && kl < BEYOND)) {
    double mass = log_mass_of(job, p, top_p, scale.tau, k);
    return {top_p, top_q, mass, log_mass_of(job, q, top_q, scale.tau, k) - mass};
  }
  double of_p = part.top - top_p * scale.tau, of_q = part.top_q - top_q * scale.tau, l = log1p(part.sum) + part.extra;
  return {top_p, top_q, of_p + log(part.mass), part.centre + (has_p ? of_q - of_p : of_q) + log(part.ratio) + l};
}

// Of row r; without `measures`, only what the divergence itself takes: the others are NaN. Where classes are few, `kl` is
// known: it has the bits there that it has elsewhere.
Statistics statistics_of(const Job &job, int64_t r, const Scale &scale, Scratch &k, bool measures, double kl, bool *agrees) {
  Row p{&job.p, start_of(job, job.p, r)}, q{&job.q, start_of(job, job.q, r)};
  Leader leaders[2];
  Part part = part_of_row(job, p, q, scale, k, leaders);
  if (job.classes > FEW) finish(&part, 1, &kl);
  for (int i = 0; i < SIZES_OF_TOP; i++) agrees[i] = false;
  if (kl != kl) return {D_NAN, D_NAN, D_NAN, D_NAN, D_NAN, D_NAN, D_NAN};
  Masses row = masses_of(job, p, q, part, kl, scale, leaders, k);
  double log_mass = row.log_mass(scale.tau), confidence = exp(D{} - row.mass)[0];
  Statistics s{kl, D_NAN, D_NAN, D_NAN, log_mass, row.log_mass_q(scale.tau), confidence};
  agrees[0] = leaders[0].place == leaders[1].place;
  if (!measures) return s;
  s.reverse = s.jensen_shannon = s.total_variation = 0;
  for (int i = 0; i < SIZES_OF_TOP; i++) agrees[i] = true;
  if (job.classes == 1) return s;
  Look look;
  look_again(job, p, q, row, scale, k, look);
  s.reverse = look.lost * scale.tau - s.log_mass_q > LEAST_LOG_P ? D_INF : look.sums.reverse;
  s.jensen_shannon = smaller(look.sums.jensen_shannon, LN2_D), s.total_variation = smaller(look.sums.total_variation, 1.);
  for (int i = 0; i < SIZES_OF_TOP; i++) agrees[i] = look.first.agrees(look.second, TOP[i]);
  return s;
}

// Of some classes of row r, which other processes have the rest of: what klmetric.arithmetic.sharded puts together. The
// divergence is that within these classes; `edge` is the largest log p of those where q is 0.
struct Share {
  Masses masses;
  double kl, edge, values[2], places[2];
};
Share share_of(const Job &job, int64_t r, const Scale &scale, Scratch &k) {
  Row p{&job.p, start_of(job, job.p, r)}, q{&job.q, start_of(job, job.q, r)};
  Leader leaders[2];
  Part part = part_of_row(job, p, q, scale, k, leaders);
  double l = log1p(part.sum) + part.extra, kl = part.mass == 0 || l == -D_INF ? 0 : l - part.y;
  kl = kl < 0 ? 0 : kl;
  return {masses_of(job, p, q, part, kl, scale, leaders, k), kl, part.edge, {leaders[0].value, leaders[1].value},
          {double(leaders[0].place), double(leaders[1].place)}};
}
// What the second look finds in them.
struct SecondShare { double reverse, jensen_shannon, total_variation, lost, values[2][MOST_LIKELY], places[2][MOST_LIKELY]; };
SecondShare second_share_of(const Job &job, int64_t r, const Masses &row, const Scale &scale, Scratch &k) {
  Look look;
  look_again(job, {&job.p, start_of(job, job.p, r)}, {&job.q, start_of(job, job.q, r)}, row, scale, k, look);
  SecondShare s{look.sums.reverse, look.sums.jensen_shannon, look.sums.total_variation, look.lost * scale.tau, {}, {}};
  for (int side = 0; side < 2; side++) {
    const Ranking &of = side ? look.second : look.first;
    for (int i = 0; i < MOST_LIKELY; i++) {
      s.values[side][i] = i < of.count ? of.value[i] : -D_INF, s.places[side][i] = i < of.count ? double(of.place[i]) : -1;
    }
  }
  return s;
}

} // namespace
