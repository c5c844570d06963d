// The worst rows: `top` divergences, the largest first and the first of equal ones, then their samples, then their
// places in these; -1 where there are no more.
#pragma once
#include "job.h"

namespace {

struct Worst {
  double *values;
  int64_t top;

  void put(int64_t i, double value, double sample, double place) {
    values[i] = value, values[top + i] = sample, values[2 * top + i] = place;
  }
  void add(double value, int64_t row, int64_t positions, double samples_before) { // a NaN is left out
    if (!(value > values[top - 1])) return;
    int64_t i = top - 1;
    for (; i > 0 && value > values[i - 1]; i--) put(i, values[i - 1], values[top + i - 1], values[2 * top + i - 1]);
    put(i, value, samples_before + double(row / positions), double(row % positions));
  }
  void merge(const double *a, const double *b, double samples_before) { // those of a, then of b
    for (int64_t k = 0, i = 0; k < top; k++) {
      int64_t j = k - i;
      if (a[i] >= b[j]) put(k, a[i], a[top + i], a[2 * top + i]), i++;
      else put(k, b[j], samples_before + b[top + j], b[2 * top + j]);
    }
  }
};

} // namespace
