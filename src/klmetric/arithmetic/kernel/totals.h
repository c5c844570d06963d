// The totals of the rows of one call: sums as pairs of doubles, counts, and bins.
//
// A pair holds some hundred bits, so that what it loses, in whatever order it adds, is far below the last digit of a
// result. Everything is a sum over rows or samples, or a maximum: what several calls make of their rows can be added.
#pragma once
#include "rows.h"

namespace {

// Where they stand in the vector, as totals/vector.py and totals/sketch.py lay it out: five sums, their low parts, two
// places that are left alone, three more sums, their low parts, the counts and the two ends, and the bins.
enum { KL, WEIGHT, SAMPLES, ROWS, INVALID, LOW, SQUARES = 12, PRODUCTS, SIZES, CLUSTERS = 18, AGREED, COMPARED, SEEN, LARGEST, SMALLEST, BINS };

struct Pair { // eight sums beside one another
  D high{}, low{};
  INLINE void add(D x) { // (Knuth's TwoSum)
    D sum = high + x, of_x = sum - high;
    low = low + ((high - (sum - of_x)) + (x - of_x)), high = sum;
  }
  INLINE void add_product(D x, D y) { // with what rounds off x y (Dekker's product)
    D product = x * y, cx = x * 134217729., cy = y * 134217729., hx = cx - (cx - x), hy = cy - (cy - y);
    D lx = x - hx, ly = y - hy, rest = ((hx * hy - product) + (hx * ly + lx * hy)) + lx * ly;
    add(product), low += rest == rest ? rest : D{}; // too large to be split: an infinity
  }
  void store_to(double *sum_at, int to_low) const {
    double h[DOUBLES], l[DOUBLES], sum = 0, rest = 0;
    store(h, high), store(l, low);
    for (int i = 0; i < DOUBLES; i++) {
      double s = sum + h[i], of_h = s - sum;
      rest += ((sum - (s - of_h)) + (h[i] - of_h)) + l[i], sum = s;
    }
    double both = sum + rest;
    sum_at[0] = both == both ? both : sum, sum_at[to_low] = both - both == 0 ? rest - (both - sum) : 0;
  }
};

class Totals {
  const Job &job;
  Pair kl, weight, samples, squares, products, sizes;
  L rows{}, invalid{}, agreed{}, clusters{}; // minus the numbers of them
  D largest{}, smallest = D{} + D_INF;       // of the finite ones, and of those above 0
  int64_t seen = 0;
  // The sample that is being read: its weighted sum, its weight, its weightiest row; and those that are done.
  double s = 0, size = 0, most = 0, done_s[DOUBLES], done_size[DOUBLES], done_most[DOUBLES];
  int64_t read = 0;
  int done = 0;

  INLINE void add_samples(D sum, D of_weights, D weightiest) {
    samples.add(weightiest), clusters += of_weights > 0.;
    if (!job.fineness) return; // the others are for the standard error, which goes with the bins
    squares.add_product(sum, sum), products.add_product(sum, of_weights), sizes.add_product(of_weights, of_weights);
  }
  INLINE void add_done() {
    for (; done < DOUBLES; done++) done_s[done] = done_size[done] = done_most[done] = 0;
    add_samples(load<D>(done_s), load<D>(done_size), load<D>(done_most)), done = 0;
  }
  INLINE void add_to_sample(double x, double w) {
    s += x, size += w, most = w > most ? w : most;
    if (++read < job.positions) return;
    done_s[done] = s, done_size[done] = size, done_most[done] = most, done++, seen++;
    s = size = most = 0, read = 0;
    if (done == DOUBLES) add_done();
  }
  // As totals/histogram.py has it: f (4 - f) m of the first 25 bits of the fraction f, in whole numbers.
  INLINE void bin(double x) {
    int64_t bins = (job.highest - job.lowest) * 3 * job.fineness + 4, code = __builtin_bit_cast(int64_t, x) >> 27;
    int64_t f = code & ((1 << 25) - 1), within = (f * ((1 << 27) - f) * job.fineness) >> 50;
    int64_t place = ((code >> 25) - (job.lowest + 1023)) * 3 * job.fineness + within + 2;
    place = place < 1 ? 1 : place > bins - 2 ? bins - 2 : place;
    job.totals[BINS + (x == 0 ? 0 : x == D_INF ? bins - 1 : place)]++;
  }
  // Lanes from n on have no weight; the arrays have numbers there.
  INLINE void add_eight(int64_t r, int n, const double *divergences, const bool *agrees) {
    double weights[DOUBLES] = {}, sums[DOUBLES];
    bool is_whole = n == DOUBLES && !job.weight;
    for (int i = 0; !is_whole && i < n; i++) weights[i] = job.weight ? job.weight[r + i] : 1;
    D value = load<D>(divergences), w = is_whole ? D{} + 1 : load<D>(weights);
    L counts = w > 0., is_bad = counts & (value != value);
    rows += counts, invalid += is_bad, counts &= ~is_bad;
    w = counts ? w : D{};
    D x = counts ? value * w : D{}, finite = (counts & (value < D_INF)) ? value : D{};
    largest = larger(finite, largest), smallest = smaller((counts & (value > 0.)) ? value : D{} + D_INF, smallest);
    kl.add(x), weight.add(w);
    if (job.positions == 1) add_samples(x, w, w), seen += n;
    else {
      store(sums, x), store(weights, w);
      for (int i = 0; i < n; i++) add_to_sample(sums[i], weights[i]);
    }
    if (!job.fineness) return;
    typedef uint8_t Bytes __attribute__((vector_size(DOUBLES)));
    agreed -= counts & __builtin_convertvector(load<Bytes>(agrees), L);
    int64_t counted[DOUBLES];
    store(counted, counts);
    for (int i = 0; i < n; i++) if (counted[i]) bin(divergences[i]);
  }

 public:
  explicit Totals(const Job &job) : job(job) {}
  INLINE void add(int64_t r, int n, const double *divergences, const bool *agrees) {
    for (int i = 0; i < n; i += DOUBLES) add_eight(r + i, n - i < DOUBLES ? n - i : DOUBLES, divergences + i, agrees + i);
  }
  void finish() {
    if (done) add_done();
    double *at = job.totals;
    kl.store_to(at + KL, LOW), weight.store_to(at + WEIGHT, LOW), samples.store_to(at + SAMPLES, LOW);
    squares.store_to(at + SQUARES, 3), products.store_to(at + PRODUCTS, 3), sizes.store_to(at + SIZES, 3);
    auto number = [](L n) { return -fold(n, [](auto a, auto b) { return a + b; }); };
    at[ROWS] = number(rows), at[INVALID] = number(invalid), at[CLUSTERS] = number(clusters), at[AGREED] = number(agreed);
    at[COMPARED] = at[ROWS] - at[INVALID], at[SEEN] = seen, at[LARGEST] = ::largest(largest), at[SMALLEST] = -least(smallest);
  }
};

} // namespace
