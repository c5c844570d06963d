// The totals of a batch: sums as pairs of doubles, counts, and bins, of the rows of one call.
//
// A pair holds some hundred bits, so that what it loses, in whatever order it adds, is far below the last digit of a
// result. Everything is a sum over rows or samples, or a maximum: what several calls make of their rows can be merged.
#pragma once
#include "rows.h"

namespace {

// The places of klmetric.totals.sketch: of five sums the high parts, then the low parts, and two that stay 0; of three
// more the high parts, then the low parts; counts, the largest finite divergence and minus the smallest above 0; bins.
enum { KL, WEIGHT, SAMPLES, ROWS, INVALID, FIVE, SQUARES = 12, PRODUCTS, SIZES };
enum { CLUSTERS = 18, AGREED, COMPARED, SEEN, LARGEST, SMALLEST, BINS };

struct Pair { // eight sums beside one another
  D high{}, low{};
  INLINE void add(D x) { // (Knuth's TwoSum)
    D sum = high + x, of_x = sum - high;
    low = low + ((high - (sum - of_x)) + (x - of_x)), high = sum;
  }
  INLINE void add_product(D x, D y) { // with what rounds off x y (Dekker's product)
    D product = x * y, cx = x * 134217729., cy = y * 134217729., hx = cx - (cx - x), hy = cy - (cy - y);
    D lx = x - hx, ly = y - hy, rest = ((hx * hy - product) + (hx * ly + lx * hy)) + lx * ly;
    add(product), low = low + (rest == rest ? rest : D{}); // too large to be split: an infinity
  }
  void store_to(double *totals, int to_low) const {
    double h[DOUBLES], l[DOUBLES], sum = 0, rest = 0;
    store(h, high), store(l, low);
    for (int i = 0; i < DOUBLES; i++) {
      double s = sum + h[i], of_h = s - sum;
      rest += ((sum - (s - of_h)) + (h[i] - of_h)) + l[i], sum = s;
    }
    double both = sum + rest;
    totals[0] = both == both ? both : sum, totals[to_low] = both - both == 0 ? rest - (both - sum) : 0;
  }
};

class Totals {
  const Job &job;
  Pair kl, weight, samples, squares, products, sizes;
  int64_t rows = 0, invalid = 0, clusters = 0, agreed = 0, compared = 0, seen = 0;
  double largest = 0, smallest = D_INF;
  // The sample that is being read: its weighted sum, its weight, its weightiest row; and those that are done.
  double s = 0, size = 0, most = 0, done_s[DOUBLES], done_size[DOUBLES], done_most[DOUBLES];
  int64_t read = 0;
  int done = 0;

  int64_t count_of_bins() const { return job.fineness ? (job.highest - job.lowest) * 3 * job.fineness + 4 : 0; }
  INLINE void bin(double x) { // 3m a power of two, the k-th where m f (4 - f) = k, of x = 2^e (1 + f)
    constexpr int BITS = 25; // of f
    int64_t code = __builtin_bit_cast(int64_t, x) >> (52 - BITS), f = code & ((1 << BITS) - 1);
    int64_t within = (f * ((4 << BITS) - f) * job.fineness) >> 2 * BITS;
    int64_t place = ((code >> BITS) - (job.lowest + 1023)) * (3 * job.fineness) + within + 2;
    int64_t last = count_of_bins() - 1;
    place = place < 1 ? 1 : place > last - 1 ? last - 1 : place;
    job.totals[BINS + (x == 0 ? 0 : x == D_INF ? last : place)]++;
  }
  INLINE void end_sample() {
    seen++, clusters += size > 0;
    done_s[done] = s, done_size[done] = size, done_most[done] = most, done++;
    s = size = most = 0, read = 0;
    if (done == DOUBLES) add_samples();
  }
  INLINE void add_samples() {
    for (; done < DOUBLES; done++) done_s[done] = done_size[done] = done_most[done] = 0;
    D a = load<D>(done_s), n = load<D>(done_size);
    samples.add(load<D>(done_most)), squares.add_product(a, a), products.add_product(a, n), sizes.add_product(n, n);
    done = 0;
  }

 public:
  explicit Totals(const Job &job) : job(job) {
    for (int64_t i = 0, n = job.totals ? BINS + count_of_bins() : 0; i < n; i++) job.totals[i] = 0;
  }
  INLINE void add(int64_t r, int n, const double *divergences, const bool *agrees) {
    alignas(64) double x[GROUP] = {}, w[GROUP] = {};
    for (int i = 0; i < n; i++) {
      double value = divergences[i], of_row = job.weight ? job.weight[r + i] : 1;
      if (of_row > 0) {
        rows++;
        if (value != value) invalid++;
        else {
          w[i] = of_row, x[i] = value * of_row;
          compared++, agreed += agrees[i];
          if (value < D_INF && value > largest) largest = value;
          if (value > 0 && value < smallest) smallest = value;
          s += x[i], size += of_row, most = of_row > most ? of_row : most;
          if (job.fineness) bin(value);
        }
      }
      if (++read == job.positions) end_sample();
    }
    for (int i = 0; i < GROUP; i += DOUBLES) kl.add(load<D>(x + i)), weight.add(load<D>(w + i));
  }
  void finish() {
    if (done) add_samples();
    double *to = job.totals;
    kl.store_to(to + KL, FIVE), weight.store_to(to + WEIGHT, FIVE), samples.store_to(to + SAMPLES, FIVE);
    squares.store_to(to + SQUARES, 3), products.store_to(to + PRODUCTS, 3), sizes.store_to(to + SIZES, 3);
    to[ROWS] = double(rows), to[INVALID] = double(invalid), to[CLUSTERS] = double(clusters);
    to[AGREED] = double(agreed), to[COMPARED] = double(compared), to[SEEN] = double(seen);
    to[LARGEST] = largest, to[SMALLEST] = -smallest;
  }
};

} // namespace
