// Includes vector.h and the file named by STAGES for processors with AVX-512, if they are a possibility.

#ifdef EDGERT_HAS_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#define EDGERT_AVX512
namespace avx512 {
constexpr int WIDE = 16;
#include "vector.h"
#include STAGES
}
#undef EDGERT_AVX512
#pragma GCC pop_options
#endif
