// Which levels this processor, and its operating system, can run.
#include "job.h"

// 0 baseline (or all there is), 1 avx2 with fma, 2 avx512; -1 if what calls has another struct Job.
#if defined(__x86_64__)
#include <cpuid.h>
EXPORT int64_t klmetric_level(int64_t size_of_job) {
  constexpr uint32_t WIDE = 0x6, WIDER = 0xe6; // registers that the system keeps, of 32 and of 64 bytes
  uint32_t a, b, c, d, kept, unused;
  if (size_of_job != sizeof(Job)) return -1;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA)) return 0;
  asm volatile("xgetbv" : "=a"(kept), "=d"(unused) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2) || (kept & WIDE) != WIDE) return 0;
  constexpr uint32_t ALL = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
  return (b & ALL) == ALL && (kept & WIDER) == WIDER ? 2 : 1;
}
#else
EXPORT int64_t klmetric_level(int64_t size_of_job) { return size_of_job == sizeof(Job) ? 0 : -1; }
#endif
