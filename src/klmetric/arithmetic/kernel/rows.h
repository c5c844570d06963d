// Rows: how their numbers are read, and how the blocks of a wide one are merged.
#pragma once
#include "job.h"
#include "lanes.h"

namespace {

constexpr int GROUP = 64; // rows that are finished together
constexpr int PARTS = 128; // blocks that are merged at once

// ---- reading --------------------------------------------------------------------------------------------------------
INLINE float number(float x) { return x; }
INLINE double number(double x) { return x; }
struct Bfloat { uint16_t bits; };
struct Half { uint16_t bits; };
INLINE float number(Bfloat x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
// Moved to the exponents of float, which are 112 further on; NaN and infinity have the last.
INLINE float number(Half x) {
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
INLINE int64_t start_of(const Job &job, const Side &s, int64_t r) {
  int64_t at = 0;
  for (int64_t k = job.axes - 1; k > 0; r /= job.sizes[k--]) at += r % job.sizes[k] * s.steps[k];
  return at + r * s.steps[0];
}
// Where the elements of n rows begin, from row r on.
INLINE void starts_of(const Job &job, const Side &s, int64_t r, int n, int64_t *starts) {
  int64_t last = job.axes - 1, at = start_of(job, s, r);
  for (int i = 0; i < n;) {
    // Divisions cost as much as a small row: one lot of them for all rows that follow along the last axis.
    int64_t along = last ? job.sizes[last] - (r + i) % job.sizes[last] : n, end = along < n - i ? i + along : n;
    if (i) at = start_of(job, s, r + i);
    for (; i < end; i++, at += s.steps[last]) starts[i] = at;
  }
}
template <class To> INLINE void read(Row r, int64_t at, To *to, int64_t step_to, int n) {
  int64_t step = r.side->class_step, from = r.start + at * step;
  switch (r.side->dtype) {
    case FLOAT32: return copy((const float *)r.side->data + from, step, to, step_to, n);
    case FLOAT64: return copy((const double *)r.side->data + from, step, to, step_to, n);
    case BFLOAT16: return copy((const Bfloat *)r.side->data + from, step, to, step_to, n);
    default: return copy((const Half *)r.side->data + from, step, to, step_to, n);
  }
}
// A block of floats, where it lies or as a copy.
INLINE const float *floats_of(Row r, int64_t at, int n, float *copy_to) {
  if (r.side->dtype == FLOAT32 && r.side->class_step == 1) return (const float *)r.side->data + r.start + at;
  return read(r, at, copy_to, 1, n), copy_to;
}
INLINE Floats block_of(Row p, Row q, int64_t at, int n, Scratch &k) {
  const float *a = floats_of(p, at, n, k.a), *b = floats_of(q, at, n, k.b);
  int whole = n / FLOATS * FLOATS;
  if (whole == n) return {a, b, whole, nullptr, nullptr};
  for (int i = 0; i < FLOATS; i++) {
    bool some = whole + i < n;
    k.tail_a[i] = some ? a[whole + i] : p.side->format == PROBS ? 0 : -INF;
    k.tail_b[i] = some ? b[whole + i] : q.side->format == PROBS ? 0 : -INF;
  }
  return {a, b, whole, k.tail_a, k.tail_b};
}

// ---- the most likely class: the first of the largest ----------------------------------------------------------------
struct Leader { double value = -D_INF; int64_t place = 0; };
template <class T> INLINE void follow(Leader &l, const T *x, int n, int64_t at, double top) {
  if (!(top > l.value)) return;
  typedef T V __attribute__((vector_size(64)));
  constexpr int lanes = 64 / sizeof(T);
  int i = 0;
  while (i + lanes <= n && !any(load<V>(x + i) == T(top))) i += lanes;
  while (i < n - 1 && x[i] != top) i++;
  l = {top, at + i};
}

// ---- one row --------------------------------------------------------------------------------------------------------
// The chain rule of KL: KL(p || q) = KL(P || Q) + sum_j P_j KL(p | j || q | j) for the masses P, Q of blocks j. Masses
// and offsets are taken from those of the heaviest block, so that large common logits cost no digits.
APART Part merge(const Part *parts, int n) {
  alignas(64) double a[PARTS], b[PARTS], k[PARTS], mass[PARTS], ratio[PARTS], sum[PARTS];
  int full = (n + DOUBLES - 1) / DOUBLES * DOUBLES, ref = 0;
  double edge = -D_INF;
  for (int j = 0; j < full; j++) {
    const Part &p = j < n ? parts[j] : nothing();
    mass[j] = p.mass, ratio[j] = p.ratio, sum[j] = p.sum;
    edge = p.edge > edge ? p.edge : edge;
  }
  for (int j = 0; j < full; j += DOUBLES) {
    store(a + j, log(load<D>(mass + j))), store(b + j, log(load<D>(ratio + j))), store(k + j, log1p(load<D>(sum + j)));
  }
  for (int j = 1; j < n; j++) if (parts[j].top + a[j] > parts[ref].top + a[ref]) ref = j;
  const Part &of = parts[ref];
  for (int j = 0; j < full; j++) {
    const Part &p = j < n ? parts[j] : nothing();
    double l = k[j] + p.extra, mass = p.mass == 0 ? 0 : a[j];
    a[j] = a[j] + (p.top - of.top);
    b[j] = (mass + (p.top_q - of.top_q)) + ((p.centre - of.centre) + b[j]) + l;
    k[j] = p.mass == 0 || l == -D_INF ? 0 : l - p.y;
  }
  Part whole = careful(a, b, k, full, 1);
  whole.top += of.top, whole.top_q += of.top_q, whole.centre += of.centre, whole.edge = edge;
  return whole;
}

// A block in double as logarithms, filled up to whole vectors, so many in all; `look` sees the numbers as they were.
template <class Look> INLINE int read_logs(Row r, int64_t at, int n, double *x, Look look) {
  int full = (n + DOUBLES - 1) / DOUBLES * DOUBLES;
  bool probs = r.side->format == PROBS;
  read(r, at, x, 1, n);
  for (int i = n; i < full; i++) x[i] = probs ? 0 : -D_INF;
  look(x);
  for (int i = 0; probs && i < full; i += DOUBLES) store(x + i, log(load<D>(x + i)));
  return full;
}
INLINE Part careful_block(Row p, Row q, int64_t at, int n, const Scale &scale, Scratch &k, Leader *leaders) {
  auto into = [&](int side) {
    return [=](const double *x) {
      if (!leaders) return;
      D top = load<D>(x);
      for (int i = DOUBLES; i < n; i += DOUBLES) top = larger(load<D>(x + i), top);
      follow(leaders[side], x, n, at, largest(top));
    };
  };
  int full = read_logs(p, at, n, k.p, into(0));
  read_logs(q, at, n, k.q, into(1));
  return careful(k.p, k.q, nullptr, full, scale.tau);
}

// Whether float will do: where it will not, the block is read again.
INLINE bool in_float(const Job &job) {
  bool logs = job.p.format == LOGS && job.q.format == LOGS;
  return job.p.dtype != FLOAT64 && job.q.dtype != FLOAT64 && (job.temperature == 1 || logs);
}
// `f` with the two formats as constants.
template <class Function> INLINE auto of_formats(const Side &p, const Side &q, Function f) {
  Constant<true> yes;
  Constant<false> no;
  auto with_p = [&](auto is_p) EACH { return q.format == PROBS ? f(is_p, yes) : f(is_p, no); };
  return p.format == PROBS ? with_p(yes) : with_p(no);
}

Part part_of_row(const Job &job, Row p, Row q, const Scale &scale, Scratch &k, Leader *leaders) {
  Part parts[PARTS];
  int count = 0;
  bool fast = in_float(job);
  for (int64_t at = 0; at < job.classes; at += BLOCK) {
    int n = job.classes - at < BLOCK ? int(job.classes - at) : BLOCK;
    bool done = false;
    if (count == PARTS) parts[0] = merge(parts, count), count = 1;
    Part &part = parts[count++];
    if (fast) {
      Floats block = block_of(p, q, at, n, k);
      auto measure = [&](auto is_p, auto is_q) {
        constexpr bool P = is_p.value, Q = is_q.value;
        Tops top = tops_of<P, Q>(block);
        if (leaders) follow(leaders[0], block.a, n, at, top.p), follow(leaders[1], block.b, n, at, top.q);
        if constexpr (P && Q) return block_of_probs(block, top, part);
        else return block_of_logs<P, Q>(block, scale, top, k, part);
      };
      done = of_formats(*p.side, *q.side, measure);
    }
    if (!done) part = careful_block(p, q, at, n, scale, k, fast ? nullptr : leaders);
  }
  return count == 1 ? parts[0] : merge(parts, count);
}

// The divergences of rows from what their classes came to; NaN for what is no pair of distributions.
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

// ---- a group of rows ------------------------------------------------------------------------------------------------
union Memory { Scratch block; Table table; Memory() {} };

// [row][class] to [class][row], a square of four by four at a time; lanes without a row do the first one again.
INLINE void turn(const float *const *rows, int classes, float *to) {
  typedef float Four __attribute__((vector_size(16)));
  int whole = classes / 4 * 4;
  for (int i = 0; i < FLOATS; i += 4) {
    for (int c = 0; c < whole; c += 4) {
      Four x[4], pairs[4];
      for (int j = 0; j < 4; j++) x[j] = load<Four>(rows[i + j] + c);
      for (int j = 0; j < 4; j += 2) {
        pairs[j] = __builtin_shufflevector(x[j], x[j + 1], 0, 4, 1, 5);
        pairs[j + 1] = __builtin_shufflevector(x[j], x[j + 1], 2, 6, 3, 7);
      }
      for (int j = 0; j < 2; j++) {
        store(to + (c + 2 * j) * FLOATS + i, __builtin_shufflevector(pairs[j], pairs[j + 2], 0, 1, 4, 5));
        store(to + (c + 2 * j + 1) * FLOATS + i, __builtin_shufflevector(pairs[j], pairs[j + 2], 2, 3, 6, 7));
      }
    }
    for (int c = whole; c < classes; c++) store(to + c * FLOATS + i, Four{rows[i][c], rows[i + 1][c], rows[i + 2][c], rows[i + 3][c]});
  }
}
INLINE void read_lanes(const Side &side, const int64_t *starts, int classes, int n, bool is_dense, float *to) {
  if (side.dtype != FLOAT32 || side.class_step != 1) {
    for (int i = 0; i < FLOATS; i++) read({&side, starts[i < n ? i : 0]}, 0, to + i, FLOATS, classes);
    return;
  }
  const float *data = (const float *)side.data, *from[FLOATS];
  if (classes == 2 && is_dense && n >= FLOATS) {
    F x = load<F>(data + *starts), y = load<F>(data + *starts + FLOATS);
    store(to, __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
    return store(to + FLOATS, __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
  }
  for (int i = 0; i < FLOATS; i++) from[i] = data + starts[i < n ? i : 0];
  turn(from, classes, to);
}

// Rows of few classes: the divergences, where p and q agree, and which of them are done; whether all are.
INLINE bool lanes_of_group(const Job &job, const Side &p, const Side &q, const int64_t *p_at, const int64_t *q_at, int n,
                           const Scale &scale, Table &t, double *kl, bool *agrees, bool *done) {
  typedef int8_t Bytes __attribute__((vector_size(FLOATS)));
  alignas(64) double y[GROUP];
  I fit = ~I{};
  bool dense_p = job.axes == 1 && p.steps[0] == job.classes, dense_q = job.axes == 1 && q.steps[0] == job.classes;
  t.classes = int(job.classes);
  for (int i = 0; i < n; i += FLOATS) {
    read_lanes(p, p_at + i, t.classes, n - i, dense_p, t.a), read_lanes(q, q_at + i, t.classes, n - i, dense_q, t.b);
    Lane lane = of_formats(p, q, [&](auto is_p, auto is_q) {
      constexpr bool P = is_p.value, Q = is_q.value;
      if constexpr (P && Q) return lanes_of_probs(t);
      else return lanes_of_logs<P, Q>(t, scale);
    });
    store(kl + i, lane.sum), store(y + i, lane.y);
    store(agrees + i, __builtin_convertvector(lane.agrees, Bytes) & 1);
    store(done + i, __builtin_convertvector(lane.done, Bytes) & 1);
    fit &= lane.done; // lanes without a row are like the first one
  }
  // Logarithms of many rows at once do not wait for one another.
  for (int i = 0; i < n; i += DOUBLES) store(kl + i, larger(log1p(load<D>(kl + i)) - load<D>(y + i), D{}));
  return !any(~fit);
}

// At most GROUP rows from r on; `kl` and `agrees` have room for as many.
void group_of_rows(const Job &job, const Side &p, const Side &q, int64_t r, int n, const Scale &scale, double *kl,
                   bool *agrees) {
  Memory memory;
  int64_t p_at[GROUP], q_at[GROUP];
  starts_of(job, p, r, n, p_at), starts_of(job, q, r, n, q_at);
  bool done[GROUP], is_few = job.classes <= FEW && in_float(job);
  if (is_few && lanes_of_group(job, p, q, p_at, q_at, n, scale, memory.table, kl, agrees, done) && job.classes > 1) return;
  Part parts[GROUP];
  int left[GROUP], count = 0;
  for (int i = 0; i < n; i++) {
    if (is_few && done[i]) continue;
    Leader leaders[2];
    parts[count] = part_of_row(job, {&p, p_at[i]}, {&q, q_at[i]}, scale, memory.block, leaders);
    agrees[i] = leaders[0].place == leaders[1].place, left[count++] = i;
  }
  if (count) {
    double values[GROUP];
    finish(parts, count, values);
    for (int i = 0; i < count; i++) kl[left[i]] = values[i];
  }
  for (int i = 0; job.classes == 1 && i < n; i++) kl[i] = kl[i] == kl[i] ? 0 : kl[i]; // whatever rounding left of it
}

} // namespace
