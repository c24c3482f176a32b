// Code for what every processor of a kind has, and for AVX2 beside it, chosen as it runs.

#pragma once

#include <cstring>

#if defined(__x86_64__) && !defined(__clang__)
#include <cpuid.h>
#include <immintrin.h>
#define EDGERT_HAS_AVX2
inline const bool AVX2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#define CHOSEN(stage) (AVX2 ? avx2::stage : any_processor::stage)
#else
#define CHOSEN(stage) any_processor::stage
#endif

#define INLINE __attribute__((always_inline)) inline
