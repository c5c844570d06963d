// What one call asks for: plain numbers, laid out as level.py packs them, and pointers, which come with the call.
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

struct Side {
  int64_t class_step, dtype, format; // steps are in elements
  const void *data;
  const int64_t *steps; // of the axes of rows
};
struct Job {
  Side p, q;
  int64_t axes, classes, direction; // axes of rows, of which the last one runs fastest
  double temperature;
  int64_t positions;                 // rows of a sample
  int64_t size, top;                 // of the totals, and the worst rows among them
  int64_t fineness, lowest, highest; // of the bins, from 2^lowest to 2^highest; 0 where none are wanted
  const int64_t *sizes;              // of the axes
  const double *weight;              // of each row, or null for 1
  double *totals;                    // see totals.h; null where none are wanted
};
