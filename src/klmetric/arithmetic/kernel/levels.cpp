// Which levels this processor, and its operating system, can run.
#include <cstdint>
#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(__x86_64__)
#include <cpuid.h>
extern "C" EXPORT int64_t klmetric_level() { // 0 baseline, 1 avx2 with fma, 2 avx512
  constexpr uint32_t WIDE = 0x6, WIDER = 0xe6; // registers that the system keeps, of 32 and of 64 bytes
  uint32_t a, b, c, d, kept, unused;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA)) return 0;
  asm volatile("xgetbv" : "=a"(kept), "=d"(unused) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2) || (kept & WIDE) != WIDE) return 0;
  constexpr uint32_t ALL = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
  return (b & ALL) == ALL && (kept & WIDER) == WIDER ? 2 : 1;
}
#else
extern "C" EXPORT int64_t klmetric_level() { return 0; }
#endif
