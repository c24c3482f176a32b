// Code for what every processor of a kind has, and for AVX2 and AVX-512 beside it, chosen as it runs.
// EDGERT_NATIVE=avx2 leaves what is newer unused, EDGERT_NATIVE=avx512 what is newer than that.

#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && !defined(__clang__)
#include <cpuid.h>
#include <immintrin.h>
#define EDGERT_HAS_AVX2
#if defined(__linux__) && __GNUC__ >= 11
#include <sys/syscall.h>
#include <unistd.h>
#define EDGERT_HAS_AMX
#endif
inline const bool AVX2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
inline bool limited(const char* to) {
    const char* asked = std::getenv("EDGERT_NATIVE");
    return asked && !std::strcmp(asked, to);
}
inline const bool AVX512 = AVX2 && !limited("avx2") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef EDGERT_HAS_AMX
// The tiles and bfloat16 in and out of them. Linux gives a process the tiles when it asks.
inline bool has_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned tile = 1u << 24, bf16 = 1u << 22, bf16_vectors = 1u << 5;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & tile) || !(d & bf16)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & bf16_vectors)) return false;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
inline const bool AMX = AVX512 && !limited("avx512") && has_amx();
#endif
#define CHOSEN(stage) (AVX512 ? avx512::stage : AVX2 ? avx2::stage : any_processor::stage)
#else
#define CHOSEN(stage) any_processor::stage
#endif

#define INLINE __attribute__((always_inline)) inline
