// What one call asks for: plain numbers and pointers, laid out as native.py packs them.
#pragma once
#include <cstdint>

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

enum Dtype : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum Format : int64_t { PROBS, LOGS };
enum Direction : int64_t { FORWARD, REVERSE, JEFFREYS };

struct Side { // row r is (r / inner, r % inner); steps are in elements
  const void *data;
  int64_t outer_step, inner_step, class_step, dtype, format;
};
struct Job {
  Side p, q;
  int64_t inner, classes, direction;
  double temperature;
  double *kl;            // of each row, or null
  uint8_t *agrees;       // whether the most likely class is the same, of each row, or null
  const double *weight;  // of each row, or null for 1
  int64_t positions;     // rows of a sample
  double *totals;        // see totals.h; null where none are wanted
  int64_t fineness, lowest, highest; // of the bins, from 2^lowest to 2^highest; 0 where none are wanted
};
