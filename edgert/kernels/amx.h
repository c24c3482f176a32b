// What kernels by AMX share: the processor's eight tiles of 16 lines of 64 bytes, and bfloat16, which
// is the higher half of a float; included in a namespace with options of its own.
//
// A product of tiles adds 32 products to each of 16 x 16 sums: of 16 lines of 32 numbers with 16 lines
// that have, for each of 16 columns, two numbers that follow each other.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.

// All tiles are whole ones.
struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

typedef uint16_t Lines[16][32];

// The higher halves of 16 pairs of numbers, one beside the other.
INLINE __m512i paired(__m512i even, __m512i odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
}

// The higher halves of 32 numbers, in order.
INLINE __m512i upper_halves(__m512i first, __m512i second) {
    alignas(64) static constexpr uint16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(first, _mm512_load_si512(odd), second);
}
