// Includes vector.h and the file named by STAGES for processors with AVX2, if they are a possibility.

#ifdef EDGERT_HAS_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define EDGERT_AVX2
namespace avx2 {
#include "vector.h"
#include STAGES
}
#undef EDGERT_AVX2
#pragma GCC pop_options
#endif
