// The instruction sets of this processor, detected at run time.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace neuroada::cpu {

// AVX2 with FMA and F16C, as the avx2 kernels are compiled for.
inline bool has_avx2() {
#if defined(__x86_64__)
  constexpr unsigned kF16c = 1u << 29;  // cpuid bit: Clang before 18 does not support "f16c" by name
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
         (c & kF16c);
#else
  return false;
#endif
}

// The AVX-512 of Skylake servers: foundation, vector length, byte and word, double and quad word.
inline bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

// AVX-512 as above, and AVX512-BF16.
inline bool has_avx512_bf16() {
#if defined(__x86_64__)
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// AVX512-BF16 and AMX-BF16, if Linux permits this process to use tiles. Permission is requested once: each thread that
// uses tiles has 8 KB more to save in a context switch.
inline bool has_amx_bf16() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool granted = [] {
    constexpr unsigned kOsSavesRegisters = 1u << 27, kBf16 = 1u << 22, kTiles = 1u << 24;  // bits of cpuid
    constexpr unsigned kTileState = 3u << 17;                                              // of XCR0
    constexpr long kRequestPermission = 0x1023, kTileData = 18;                            // of arch_prctl
    unsigned a, b, c, d;
    if (!has_avx512_bf16() || !__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsSavesRegisters)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTiles)) != (kBf16 | kTiles)) return false;
    asm("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

// "intel", "amd", or "" for any other: torch's float32 GEMM may be MKL's, which is made for Intel's processors.
inline const char* vendor() {
#if defined(__x86_64__)
  if (__builtin_cpu_is("intel")) return "intel";
  if (__builtin_cpu_is("amd")) return "amd";
#endif
  return "";
}

}  // namespace neuroada::cpu
