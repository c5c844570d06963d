// Rows: how their numbers are read, and how the blocks of a wide one are merged.
#pragma once
#include "job.h"
#include "lanes.h"

namespace {

constexpr int GROUP = FLOATS; // rows that are finished together
constexpr int PARTS = 128;    // blocks that are merged at once

// ---- reading ---------------------------------------------------------------------------------------------------------
INLINE float number(float x) { return x; }
INLINE double number(double x) { return x; }
struct Bfloat { uint16_t bits; };
struct Half { uint16_t bits; };
INLINE float number(Bfloat x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
INLINE float number(Half x) { // moved to the exponents of float, which are 112 further on; NaN and infinity have the last
  uint32_t bits = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  float magnitude = __builtin_bit_cast(float, bits) * 0x1p112f;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, magnitude) | special | sign);
}
template <class T, class To> INLINE void copy(const T *from, int64_t step, To *to, int64_t step_to, int n) {
  if (step == 1 && step_to == 1) for (int i = 0; i < n; i++) to[i] = To(number(from[i]));
  else for (int i = 0; i < n; i++) to[i * step_to] = To(number(from[i * step]));
}
struct Row { const Side *side; int64_t start; }; // its first element
INLINE Row row_of(const Side &s, int64_t inner, int64_t r) { return {&s, r / inner * s.outer_step + r % inner * s.inner_step}; }
template <class To> INLINE void read(Row r, int64_t at, To *to, int64_t step_to, int n) {
  int64_t step = r.side->class_step, from = r.start + at * step;
  switch (r.side->dtype) {
    case FLOAT32: return copy((const float *)r.side->data + from, step, to, step_to, n);
    case FLOAT64: return copy((const double *)r.side->data + from, step, to, step_to, n);
    case BFLOAT16: return copy((const Bfloat *)r.side->data + from, step, to, step_to, n);
    default: return copy((const Half *)r.side->data + from, step, to, step_to, n);
  }
}
// A block of floats, filled up to whole vectors: where it lies, or as a copy.
INLINE const float *block_of(Row r, int64_t at, int n, int full, float *copy_to) {
  if (r.side->dtype == FLOAT32 && r.side->class_step == 1 && n == full) return (const float *)r.side->data + r.start + at;
  read(r, at, copy_to, 1, n);
  for (int i = n; i < full; i++) copy_to[i] = r.side->format == PROBS ? 0 : -INF;
  return copy_to;
}

// ---- the most likely class: the first of the largest -----------------------------------------------------------------
struct Leader { double value = -D_INF; int64_t place = 0; };
template <class T> INLINE void follow(Leader &l, const T *x, int n, int64_t at, double top) {
  if (!(top > l.value)) return;
  int i = 0;
  while (i < n - 1 && x[i] != top) i++;
  l = {top, at + i};
}

// ---- one row ---------------------------------------------------------------------------------------------------------
// The chain rule of KL: KL(p || q) = KL(P || Q) + sum_j P_j KL(p | j || q | j) for the masses P, Q of blocks j. Masses and
// offsets are taken from those of the first block that has any, so that large common logits cost no digits.
__attribute__((noinline)) Part merge(const Part *parts, int n) {
  alignas(64) double a[PARTS], b[PARTS], k[PARTS], mass[PARTS], ratio[PARTS], sum[PARTS];
  int full = (n + DOUBLES - 1) / DOUBLES * DOUBLES, ref = 0;
  double edge = -D_INF;
  for (int j = 0; j < full; j++) {
    const Part &p = j < n ? parts[j] : nothing();
    mass[j] = p.mass, ratio[j] = p.ratio, sum[j] = p.sum;
    edge = p.edge > edge ? p.edge : edge;
  }
  while (ref < n - 1 && parts[ref].mass == 0) ref++;
  double top = parts[ref].top, centre = parts[ref].centre;
  for (int j = 0; j < full; j += DOUBLES) {
    store(a + j, log(load<D>(mass + j))), store(b + j, log(load<D>(ratio + j))), store(k + j, log1p(load<D>(sum + j)));
  }
  for (int j = 0; j < full; j++) {
    const Part &p = j < n ? parts[j] : nothing();
    double l = k[j] + p.extra, offset = (p.centre - centre) + b[j];
    a[j] = a[j] + (p.top - top);
    b[j] = p.mass == 0 ? (offset - top) + l : (a[j] + offset) + l;
    k[j] = p.mass == 0 || l == -D_INF ? 0 : l - p.y;
  }
  Part whole = careful(a, b, k, full, 1);
  whole.top += top, whole.centre += centre, whole.edge = edge;
  return whole;
}

INLINE Part careful_block(Row p, Row q, int64_t at, int n, const Scale &scale, Scratch &k, Leader *leaders) {
  int full = (n + DOUBLES - 1) / DOUBLES * DOUBLES;
  auto logs = [&](Row r, double *x, Leader *leader) {
    bool probs = r.side->format == PROBS;
    read(r, at, x, 1, n);
    for (int i = n; i < full; i++) x[i] = probs ? 0 : -D_INF;
    if (leader) {
      D top = load<D>(x);
      for (int i = DOUBLES; i < full; i += DOUBLES) top = larger(load<D>(x + i), top);
      follow(*leader, x, n, at, largest(top));
    }
    if (probs) for (int i = 0; i < full; i += DOUBLES) store(x + i, log(load<D>(x + i)));
  };
  logs(p, k.p, leaders), logs(q, k.q, leaders ? leaders + 1 : nullptr);
  return careful(k.p, k.q, nullptr, full, scale.tau);
}

// Whether float will do: where it will not, the block is read again.
INLINE bool in_float(const Job &job) {
  return job.p.dtype != FLOAT64 && job.q.dtype != FLOAT64 && job.p.format == job.q.format && (job.p.format == LOGS || job.temperature == 1);
}

Part part_of_row(const Job &job, Row p, Row q, const Scale &scale, Scratch &k, Leader *leaders) {
  Part parts[PARTS];
  int count = 0;
  bool fast = in_float(job), probs = job.p.format == PROBS;
  for (int64_t at = 0; at < job.classes; at += BLOCK) {
    int n = job.classes - at < BLOCK ? int(job.classes - at) : BLOCK, full = (n + FLOATS - 1) / FLOATS * FLOATS;
    bool done = false;
    if (count == PARTS) parts[0] = merge(parts, count), count = 1;
    Part &part = parts[count++];
    if (fast) {
      const float *a = block_of(p, at, n, full, k.a), *b = block_of(q, at, n, full, k.b);
      Masses m;
      if (probs) m = masses_of_probs(a, b, full);
      else m.top = tops_of_logs(a, b, full);
      if (leaders) follow(leaders[0], a, n, at, m.top.p), follow(leaders[1], b, n, at, m.top.q);
      done = probs ? block_of_probs(a, b, full, m, part) : block_of_logs(a, b, full, scale, m.top, k, part);
    }
    if (!done) part = careful_block(p, q, at, n, scale, k, fast ? nullptr : leaders);
  }
  return count == 1 ? parts[0] : merge(parts, count);
}

// The divergences of rows from what their classes came to; NaN for what is no pair of distributions.
constexpr double LEAST_LOG_P = -745.13321910194122; // under which e^x is 0 in double
void finish(const Part *parts, int n, double *kl) {
  alignas(64) double sum[GROUP] = {};
  for (int i = 0; i < n; i++) sum[i] = parts[i].sum;
  for (int i = 0; i < n; i += DOUBLES) store(sum + i, log1p(load<D>(sum + i)));
  for (int i = 0; i < n; i++) {
    const Part &p = parts[i];
    double l = sum[i] + p.extra, x = l - p.y;
    kl[i] = !(p.mass > 0) || l == -D_INF ? D_NAN : x < 0 ? 0 : x;
    if (p.edge > -D_INF && kl[i] == kl[i] && p.edge - (p.top + log(p.mass)) > LEAST_LOG_P) kl[i] = D_INF;
  }
}

// ---- a group of rows -------------------------------------------------------------------------------------------------
union Memory { Scratch block; Table table; Memory() {} };

INLINE void read_lanes(const Job &job, const Side &side, int64_t r, int n, float *to) {
  int classes = int(job.classes);
  for (int i = 0; i < n; i++) read(row_of(side, job.inner, r + i), 0, to + i, GROUP, classes);
  for (int i = n; i < GROUP; i++) for (int c = 0; c < classes; c++) to[c * GROUP + i] = 0;
}

void group_of_rows(const Job &job, const Side &p, const Side &q, int64_t r, int n, const Scale &scale, double *kl, bool *agrees) {
  Memory memory;
  bool done[GROUP] = {};
  if (job.classes <= FEW && in_float(job)) {
    Table &t = memory.table;
    read_lanes(job, p, r, n, t.a), read_lanes(job, q, r, n, t.b);
    Lane lane = p.format == PROBS ? lanes_of_probs(t, int(job.classes)) : lanes_of_logs(t, int(job.classes), scale);
    int32_t fits[GROUP], same[GROUP];
    store(kl, lane.kl), store(fits, lane.done), store(same, lane.agrees);
    for (int i = 0; i < GROUP; i++) done[i] = fits[i], agrees[i] = same[i];
  }
  Part parts[GROUP];
  int left[GROUP], count = 0;
  for (int i = 0; i < n; i++) {
    if (done[i]) continue;
    Leader leaders[2];
    parts[count] = part_of_row(job, row_of(p, job.inner, r + i), row_of(q, job.inner, r + i), scale, memory.block, leaders);
    agrees[i] = leaders[0].place == leaders[1].place, left[count++] = i;
  }
  if (!count) return;
  double values[GROUP];
  finish(parts, count, values);
  for (int i = 0; i < count; i++) kl[left[i]] = values[i];
}

} // namespace
