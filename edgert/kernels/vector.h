// Vectors of WIDE floats, 8 or 16, for the processor that the including file names: it includes this
// once for each, in a namespace of its own.

typedef float Vec __attribute__((vector_size(WIDE * 4)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(WIDE * 4)));
typedef int8_t Codes __attribute__((vector_size(WIDE)));

INLINE Vec load(const float* from) {
    Vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

INLINE Vec load(const int8_t* from) {
#if defined(EDGERT_AVX512)  // otherwise GCC takes them apart one by one
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(EDGERT_AVX2)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    Codes codes;
    std::memcpy(&codes, from, sizeof codes);
    return __builtin_convertvector(__builtin_convertvector(codes, Ints), Vec);
#endif
}

INLINE void store(float* to, const Vec& value) { std::memcpy(to, &value, sizeof value); }

INLINE Vec all(float value) {
#ifdef EDGERT_AVX512
    return _mm512_set1_ps(value);
#else
    return Vec{value, value, value, value, value, value, value, value};
#endif
}

INLINE Vec chosen(const Ints& which, const Vec& a, const Vec& b) {
    return (Vec)(((Ints)a & which) | ((Ints)b & ~which));
}

INLINE Vec larger(const Vec& a, const Vec& b) { return chosen(a > b, a, b); }

// Sums of the lanes that are a multiple of four apart.
INLINE Four by_fours(const Vec& v) {
    Four part[WIDE / 4];
    std::memcpy(part, &v, sizeof v);
    return WIDE == 8 ? part[0] + part[1] : (part[0] + part[WIDE / 8]) + (part[1] + part[WIDE / 4 - 1]);
}

INLINE float sum(const Vec& v) {
    const Four four = by_fours(v);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// GCC before 12 lacks the builtin that Clang has as well.
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Places __attribute__((vector_size(16)));
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

// The sums of four vectors, side by side.
INLINE Four sums(const Vec* v) {
    const Four a = by_fours(v[0]), b = by_fours(v[1]), c = by_fours(v[2]), d = by_fours(v[3]);
    const Four ab = SHUFFLED(a, b, 0, 4, 1, 5) + SHUFFLED(a, b, 2, 6, 3, 7);
    const Four cd = SHUFFLED(c, d, 0, 4, 1, 5) + SHUFFLED(c, d, 2, 6, 3, 7);
    return SHUFFLED(ab, cd, 0, 1, 4, 5) + SHUFFLED(ab, cd, 2, 3, 6, 7);
}
#undef SHUFFLED

// e^x for x <= 0, to two units in the last place, and as good as 0 below -87; NaN stays what it is.
// Cephes' polynomial of degree 5.
INLINE Vec exponential(Vec x) {
    const Vec least = all(-87.0f);
    x = chosen(x < least, least, x);
    const Vec shifted = x * all(1.44269504f) + all(12582912.0f);  // rounds to whole numbers
    const Vec whole = shifted - all(12582912.0f);
    x = x - whole * all(0.693359375f) - whole * all(-2.12194440e-4f);
    Vec p = all(1.9875691500e-4f);
    p = p * x + all(1.3981999507e-3f);
    p = p * x + all(8.3334519073e-3f);
    p = p * x + all(4.1665795894e-2f);
    p = p * x + all(1.6666665459e-1f);
    p = p * x + all(5.0000001201e-1f);
    p = p * x * x + x + all(1.0f);
    const Ints power = (__builtin_convertvector(whole, Ints) + 127) << 23;
    return p * (Vec)power;
}

// x / (1 + e^-x) without an overflow on either side.
INLINE Vec silu(const Vec& x) {
    const Ints positive = x > all(0.0f);
    const Vec tail = exponential(chosen(positive, -x, x)), over = all(1.0f) + tail;
    return x * chosen(positive, all(1.0f), tail) / over;
}
