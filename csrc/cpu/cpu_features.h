// What this processor can do, asked at run time.
#pragma once

namespace neuroada::cpu {

// AVX2 with FMA and F16C, as the avx2 kernels are compiled for.
inline bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
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

// With the product of pairs of bfloat16 too.
inline bool has_avx512_bf16() {
#if defined(__x86_64__)
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// "intel", "amd", or "" for any other: whose library torch's own product is at home with.
inline const char* vendor() {
#if defined(__x86_64__)
  if (__builtin_cpu_is("intel")) return "intel";
  if (__builtin_cpu_is("amd")) return "amd";
#endif
  return "";
}

}  // namespace neuroada::cpu
