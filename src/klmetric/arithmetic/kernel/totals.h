// The totals of a batch: sums as pairs of doubles, counts, and bins, of the rows of one call.
//
// A pair holds some hundred bits, so that what it loses, in whatever order it adds, is far below the last digit of a
// result. Everything is a sum over rows or samples, or a maximum: what several calls make of their rows can be added.
#pragma once
#include "rows.h"

namespace {

// Where a sum's high part stands in the totals; its low part is LOW places on.
enum { KL, WEIGHT, SAMPLES, SQUARES, PRODUCTS, SIZES, LOW, ROWS = 2 * LOW, INVALID, INFINITE, CLUSTERS, AGREED, COMPARED, MAX };

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
  void store_to(double *totals) const {
    double h[DOUBLES], l[DOUBLES], sum = 0, rest = 0;
    store(h, high), store(l, low);
    for (int i = 0; i < DOUBLES; i++) {
      double s = sum + h[i], of_h = s - sum;
      rest += ((sum - (s - of_h)) + (h[i] - of_h)) + l[i], sum = s;
    }
    double both = sum + rest;
    totals[0] = both == both ? both : sum, totals[LOW] = both - both == 0 ? rest - (both - sum) : 0;
  }
};

class Totals {
  const Job &job;
  Pair kl, weight, samples, squares, products, sizes;
  int64_t rows = 0, invalid = 0, infinite = 0, clusters = 0, agreed = 0, compared = 0;
  double max = 0;
  // The sample that is being read: its weighted sum, its weight, its weightiest row; and those that are done.
  double s = 0, size = 0, most = 0, done_s[DOUBLES], done_size[DOUBLES], done_most[DOUBLES];
  int64_t read = 0;
  int done = 0;

  INLINE void bin(double x) {
    int64_t bins = ((job.highest - job.lowest) << job.bits) + 4, first = (job.lowest + 1023) << job.bits;
    int64_t place = (__builtin_bit_cast(int64_t, x) >> (52 - job.bits)) - (first - 2); // the first bits of a double are its bin
    place = place < 1 ? 1 : place > bins - 2 ? bins - 2 : place;
    job.bins[x == 0 ? 0 : x == D_INF ? bins - 1 : place]++;
  }
  INLINE void end_sample() {
    clusters += size > 0;
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
          compared++, agreed += agrees[i], infinite += value == D_INF, max = value > max ? value : max;
          s += x[i], size += of_row, most = of_row > most ? of_row : most;
          if (job.bins) bin(value);
        }
      }
      if (++read == job.positions) end_sample();
    }
    for (int i = 0; i < GROUP; i += DOUBLES) kl.add(load<D>(x + i)), weight.add(load<D>(w + i));
  }
  void finish() {
    if (done) add_samples();
    const Pair *sums[] = {&kl, &weight, &samples, &squares, &products, &sizes};
    for (int i = 0; i < LOW; i++) sums[i]->store_to(job.totals + i);
    int64_t counts[] = {rows, invalid, infinite, clusters, agreed, compared};
    for (int i = 0; i < 6; i++) job.totals[ROWS + i] = double(counts[i]);
    job.totals[MAX] = max;
  }
};

} // namespace
