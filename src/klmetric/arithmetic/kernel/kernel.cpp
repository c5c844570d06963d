// The entrances: five functions a level (LEVEL is its name), compiled for the registers of that level.
#include "rows.h"
#include "statistics.h"
#include "totals.h"
#include "worst.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#ifndef LEVEL
#define LEVEL baseline
#endif

namespace {

// The sums of two vectors of totals up to the bins, or the first `size` of them.
void add_first(const double *before, const double *totals, double *to, int64_t size) {
  auto pairs = [&](int from, int n) { // as totals/pairs.py has it (Knuth's TwoSum)
    for (int i = from; i < from + n; i++) {
      double a = before[i], b = totals[i], high = a + b, of_b = high - a, lost = (a - (high - of_b)) + (b - of_b);
      double low = high - high == 0 ? lost + (before[n + i] + totals[n + i]) : 0, both = high + low;
      to[i] = both, to[n + i] = both - both == 0 ? low - (both - high) : 0;
    }
  };
  auto ends = [&](int from, int end) {
    for (int i = from; i < end; i++) to[i] = before[i] > totals[i] ? before[i] : totals[i];
  };
  pairs(KL, LOW), ends(2 * LOW, SQUARES);
  if (size < BINS) return;
  pairs(SQUARES, 3), ends(LARGEST, BINS);
  for (int i = CLUSTERS; i < LARGEST; i++) to[i] = before[i] + totals[i];
}

// After the plan stand the sizes of the axes, then their steps in p and in q.
Job job_of(const Job &plan, const void *p, const void *q) {
  Job job = plan;
  job.sizes = (const int64_t *)(&plan + 1), job.p.steps = job.sizes + job.axes, job.q.steps = job.p.steps + job.axes;
  job.p.data = p, job.q.data = q;
  return job;
}

} // namespace

// Measures the rows from `start` to `stop`, and makes totals of them and of those `before`. Without p, the divergences
// are known already.
EXPORT void JOIN(klmetric_rows_, LEVEL)(const Job &plan, const void *p, const void *q, const double *weight, double *kl,
                                        bool *agrees, const double *before, double *to, int64_t start, int64_t stop) {
  Job job = job_of(plan, p, q);
  double own[BINS], none[BINS] = {};
  job.weight = weight, job.totals = job.size < BINS ? own : to;
  none[SMALLEST] = -D_INF;
  int64_t worst_from = job.size - 3 * job.top;
  for (int64_t i = 0; to && i < BINS; i++) job.totals[i] = 0;
  for (int64_t i = BINS; to && i < job.size; i++) to[i] = before ? before[i] : i < worst_from ? 0 : -1;
  Worst worst{to ? to + worst_from : nullptr, job.top};
  Scale scale(job.temperature);
  Totals totals(job);
  for (int64_t r = start; r < stop; r += GROUP) {
    int n = stop - r < GROUP ? int(stop - r) : GROUP;
    alignas(64) double x[GROUP], back[GROUP];
    bool same[GROUP] = {}, reverse = job.direction == REVERSE;
    if (p) {
      group_of_rows(job, reverse ? job.q : job.p, reverse ? job.p : job.q, r, n, scale, x, same);
      if (job.direction == JEFFREYS) {
        group_of_rows(job, job.q, job.p, r, n, scale, back, same);
        for (int i = 0; i < n; i++) x[i] += back[i];
      }
      for (int i = 0; i < n; i++) kl[r + i] = x[i];
      for (int i = 0; agrees && i < n; i++) agrees[r + i] = same[i];
    } else {
      for (int i = 0; i < n; i++) x[i] = kl[r + i];
      for (int i = 0; agrees && i < n; i++) same[i] = agrees[r + i];
    }
    if (!to) continue;
    totals.add(r, n, x, same);
    for (int i = 0; job.top && i < n; i++)
      if (!weight || weight[r + i] > 0) worst.add(x[i], r + i, job.positions, before ? before[SEEN] : 0);
  }
  if (to) totals.finish(), add_first(before ? before : none, job.totals, to, job.size);
}

// Totals of two stretches of data as those of both.
EXPORT void JOIN(klmetric_add_, LEVEL)(const double *before, const double *totals, double *to, int64_t size,
                                       int64_t top) {
  add_first(before, totals, to, size);
  if (size < BINS) return;
  int64_t worst = size - 3 * top;
  for (int64_t i = BINS; i < worst; i++) to[i] = before[i] + totals[i];
  Worst{to + worst, top}.merge(before + worst, totals + worst, before[SEEN]);
}

// The divergences of the rows from `start` to `stop`, and what else is known of them.
EXPORT void JOIN(klmetric_statistics_, LEVEL)(const Job &plan, const void *p, const void *q, Statistics *out, bool *agrees,
                                              int64_t measures, int64_t start, int64_t stop) {
  Job job = job_of(plan, p, q);
  Scale scale(job.temperature);
  Scratch scratch;
  for (int64_t r = start; r < stop; r += GROUP) {
    int n = stop - r < GROUP ? int(stop - r) : GROUP;
    alignas(64) double kl[GROUP];
    bool same[GROUP];
    if (job.classes <= FEW) group_of_rows(job, job.p, job.q, r, n, scale, kl, same);
    for (int64_t i = r; i < r + n; i++) out[i] = statistics_of(job, i, scale, scratch, measures, kl[i - r], agrees + SIZES_OF_TOP * i);
  }
}

// What is known of rows by some of their classes; and then, when it is known what all of them come to, by a second look.
EXPORT void JOIN(klmetric_shares_, LEVEL)(const Job &plan, const void *p, const void *q, Share *out, int64_t start,
                                          int64_t stop) {
  Job job = job_of(plan, p, q);
  Scale scale(job.temperature);
  Scratch scratch;
  for (int64_t r = start; r < stop; r++) out[r] = share_of(job, r, scale, scratch);
}
EXPORT void JOIN(klmetric_second_, LEVEL)(const Job &plan, const void *p, const void *q, const Masses *rows,
                                          SecondShare *out, int64_t start, int64_t stop) {
  Job job = job_of(plan, p, q);
  Scale scale(job.temperature);
  Scratch scratch;
  for (int64_t r = start; r < stop; r++) out[r] = second_share_of(job, r, rows[r], scale, scratch);
}
