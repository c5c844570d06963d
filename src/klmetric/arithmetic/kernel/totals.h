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
    D split = all(134217729.), product = x * y, cx = split * x, cy = split * y, hx = cx - (cx - x), hy = cy - (cy - y);
    D lx = x - hx, ly = y - hy, rest = ((hx * hy - product) + (hx * ly + lx * hy)) + lx * ly;
    add(product), low = low + where(rest == rest, rest, D{}); // too large to be split: an infinity
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
  int64_t rows = 0, invalid = 0, clusters = 0, agreed = 0, seen = 0;
  double largest = 0, smallest = D_INF; // of the finite ones, and of those above 0
  // The sample that is being read: its weighted sum, its weight, its weightiest row; and those that are done.
  double s = 0, size = 0, most = 0, done_s[DOUBLES], done_size[DOUBLES], done_most[DOUBLES];
  int64_t read = 0;
  int done = 0;

  // As totals/histogram.py has it: f (4 - f) m of the first 25 bits of the fraction f, in whole numbers.
  INLINE void bin(double x) {
    int64_t bins = (job.highest - job.lowest) * 3 * job.fineness + 4, code = __builtin_bit_cast(int64_t, x) >> 27;
    int64_t f = code & ((1 << 25) - 1), within = (f * ((1 << 27) - f) * job.fineness) >> 50;
    int64_t place = ((code >> 25) - (job.lowest + 1023)) * 3 * job.fineness + within + 2;
    place = place < 1 ? 1 : place > bins - 2 ? bins - 2 : place;
    job.totals[BINS + (x == 0 ? 0 : x == D_INF ? bins - 1 : place)]++;
  }
  INLINE void end_sample() {
    clusters += size > 0, seen++;
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
  explicit Totals(const Job &job) : job(job) {}
  INLINE void add(int64_t r, int n, const double *divergences, const bool *agrees) {
    alignas(64) double x[GROUP] = {}, w[GROUP] = {};
    for (int i = 0; i < n; i++) {
      double value = divergences[i], of_row = job.weight ? job.weight[r + i] : 1;
      if (of_row > 0) {
        rows++;
        if (value != value) invalid++;
        else {
          w[i] = of_row, x[i] = value * of_row;
          agreed += agrees[i], largest = value > largest && value < D_INF ? value : largest;
          smallest = value > 0 && value < smallest ? value : smallest;
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
    kl.store_to(job.totals + KL, LOW), weight.store_to(job.totals + WEIGHT, LOW), samples.store_to(job.totals + SAMPLES, LOW);
    squares.store_to(job.totals + SQUARES, 3), products.store_to(job.totals + PRODUCTS, 3), sizes.store_to(job.totals + SIZES, 3);
    auto count = [&](int place, int64_t n) { job.totals[place] = double(n); };
    count(ROWS, rows), count(INVALID, invalid), count(CLUSTERS, clusters), count(AGREED, agreed), count(COMPARED, rows - invalid), count(SEEN, seen);
    job.totals[LARGEST] = largest, job.totals[SMALLEST] = -smallest;
  }
};

} // namespace
