// The entrance: one function a level (LEVEL is its name), compiled for the registers of that level.
#include "rows.h"
#include "totals.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#ifndef LEVEL
#define LEVEL baseline
#endif

EXPORT void JOIN(klmetric_rows_, LEVEL)(const Job &job, int64_t start, int64_t stop) {
  Scale scale(job.temperature);
  Totals totals(job);
  for (int64_t r = start; r < stop; r += GROUP) {
    int n = stop - r < GROUP ? int(stop - r) : GROUP;
    alignas(64) double kl[GROUP], back[GROUP];
    bool agrees[GROUP];
    bool reverse = job.direction == REVERSE;
    group_of_rows(job, reverse ? job.q : job.p, reverse ? job.p : job.q, r, n, scale, kl, agrees);
    if (job.direction == JEFFREYS) {
      group_of_rows(job, job.q, job.p, r, n, scale, back, agrees);
      for (int i = 0; i < n; i++) kl[i] += back[i];
    }
    for (int i = 0; i < n; i++) {
      if (job.kl) job.kl[r + i] = kl[i];
      if (job.agrees) job.agrees[r + i] = agrees[i];
    }
    if (job.totals) totals.add(r, n, kl, agrees);
  }
  if (job.totals) totals.finish();
}
