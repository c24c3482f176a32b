// The work of a call by AVX-512 with VNNI, whose one instruction multiplies 64 bytes and adds them by
// fours; included by products.cpp in a namespace and with options of its own.
//
// Activations of 16 bits are a high and a low byte, both with a sign, so a sum of products is
// 256 times that of the high ones and that of the low ones: exact, in whole numbers, for each group
// of 32. Only then is it rounded to a float, scaled and added, in one order: groups 0, 4, 8 ..., those
// from 1, from 2 and from 3 on, then (0 + 2) + (1 + 3). So it does not matter by which of two ways the
// whole numbers came about: for few rows, here, four columns at a time, whose codes are taken as they
// come from memory; for many by panels (products_panels.h).

typedef __m512i Bytes;

// A row's activations, four groups at a time.
struct alignas(LINE) Unit {
    int8_t high[4 * GROUP], low[4 * GROUP];  // in the order of the codes
    int32_t offset[16];                      // of each group four times: its sum, as `offset_of` says
};

// Codes have no sign as they are multiplied; a row's sum, times their zero point, is taken away: here
// if all have the same.
INLINE int32_t offset_of(const Call& c, int32_t sum) { return c.zeros ? sum : -c.middle * sum; }

INLINE Bytes bytes(const void* from) { return _mm512_loadu_si512(from); }

// 64 codes of 4 bits that lie in the lower, or the higher, halves of bytes.
INLINE Bytes lower(Bytes codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
INLINE Bytes higher(Bytes codes) { return lower(_mm512_srli_epi16(codes, 4)); }

INLINE __m512i whole(__m512i high, __m512i low) {
    return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

// A row to 16 bits by its largest; `put` takes the 32 of a group. A row that holds a number that is
// none, or an infinite one, becomes all NaN: its step is.
template <typename Put>
INLINE void round_row(const Call& c, int64_t row, const Put& put) {
    const float* x = c.x + row * c.K;
    const auto held = [&](int64_t i) {
        const int64_t left = std::min<int64_t>(16, c.K - i);
        return _mm512_maskz_loadu_ps((1 << left) - 1, x + i);
    };
    __m512i most = _mm512_setzero_si512();  // bits of numbers without a sign, in the order of the numbers
    for (int64_t i = 0; i < c.K; i += 16)
        most = _mm512_max_epi32(most, _mm512_and_si512((__m512i)held(i), _mm512_set1_epi32(0x7fffffff)));
    const int32_t largest = _mm512_reduce_max_epi32(most);
    float top;
    std::memcpy(&top, &largest, sizeof top);
    constexpr float least = 1e-30f, range = 127 * 256 + 127;  // below the first, no step has an inverse
    const bool sound = largest < 0x7f800000;
    c.steps[row] = sound ? top / range : std::numeric_limits<float>::quiet_NaN();
    const __m512 by = _mm512_set1_ps(sound && top > least ? range / top : 0.0f);
    for (int64_t g = 0; g < c.groups; g++) {
        const float* from = x + g * GROUP;
        float rest[GROUP] = {};  // what is beyond the row counts as 0
        if ((g + 1) * GROUP > c.K) {
            if (g * GROUP < c.K) std::memcpy(rest, from, (c.K - g * GROUP) * sizeof(float));
            from = rest;
        }
        const auto half = [&](const float* from) {
            return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from), by)));
        };
        put(g, _mm512_inserti64x4(_mm512_castsi256_si512(half(from)), half(from + 16), 1));
    }
}

// The bytes of a group of 16-bit numbers; where codes are of 4 bits, even ones first, as the halves of
// bytes are.
template <int BITS>
INLINE __m256i narrowed(__m512i words) {
    if (BITS == 8) return _mm512_cvtepi16_epi8(words);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtepi32_epi8(words)),
                                   _mm512_cvtepi32_epi8(_mm512_srli_epi32(words, 16)), 1);
}

// Numbers of 16 bits = 256 times their high bytes + their low ones.
INLINE __m512i high_of(__m512i words) {
    return _mm512_srai_epi16(_mm512_add_epi16(words, _mm512_set1_epi16(128)), 8);
}

INLINE int32_t sum_of(__m512i words) {
    return _mm512_reduce_add_epi32(_mm512_madd_epi16(words, _mm512_set1_epi16(1)));
}

template <int BITS>
INLINE void round_few(const Call& c, int64_t row) {
    const int64_t units = (c.groups + 3) / 4;
    Unit* to = static_cast<Unit*>(c.rounded) + row * units;
    to[units - 1] = {};
    round_row(c, row, [&](int64_t g, const __m512i& words) {
        const __m256i high = narrowed<BITS>(high_of(words)), low = narrowed<BITS>(words);
        Unit& unit = to[g / 4];
        const int at = g % 4;
        if (BITS == 8) {
            std::memcpy(unit.high + at * GROUP, &high, GROUP);
            std::memcpy(unit.low + at * GROUP, &low, GROUP);
        } else {  // the even ones of all groups, then the odd ones
            for (int odd = 0; odd < 2; odd++) {
                std::memcpy(unit.high + odd * 64 + at * 16, (const char*)&high + odd * 16, 16);
                std::memcpy(unit.low + odd * 64 + at * 16, (const char*)&low + odd * 16, 16);
            }
        }
        const int32_t offset = offset_of(c, sum_of(words));
        for (int i = 0; i < 4; i++) unit.offset[at * 4 + i] = offset;
    });
}

// Four groups' sums of four lanes, of four columns -> [group][column].
INLINE __m512i by_column(const __m512i* t) {
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(t[0], t[1]), _mm512_unpackhi_epi32(t[0], t[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(t[2], t[3]), _mm512_unpackhi_epi32(t[2], t[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// [column][group] -> [group][column]
INLINE __m512i turned(__m128i a, __m128i b, __m128i c, __m128i d) {
    const __m256i ab = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    const __m256i cd = _mm256_inserti128_si256(_mm256_castsi128_si256(c), d, 1);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, _mm512_inserti64x4(_mm512_castsi256_si512(ab), cd, 1));
}

// The zero point of a block.
template <int BITS>
INLINE int32_t zero(const Call& c, int64_t column, int64_t block) {
    const int byte = c.zeros[column * c.zero_bytes + block * BITS / 8];
    return BITS == 8 ? byte : byte >> block % 2 * 4 & 15;
}

// What belongs to four groups of a column from `group` on, those in `mask`: floats of their blocks.
INLINE __m128i scales_of(const Call& c, int64_t column, int64_t group, __mmask8 mask) {
    const float* scales = c.scales + column * c.blocks;
    if (c.each == 1) return (__m128i)_mm_maskz_loadu_ps(mask, scales + group);
    if (c.each % 4 == 0) return (__m128i)_mm_maskz_mov_ps(mask, _mm_set1_ps(scales[group / c.each]));
    float each[4] = {};
    for (int i = 0; i < 4; i++)
        if (mask >> i & 1) each[i] = scales[(group + i) / c.each];
    return (__m128i)_mm_loadu_ps(each);
}

template <int BITS>
INLINE __m128i zeros_of(const Call& c, int64_t column, int64_t group, __mmask8 mask) {
    int32_t each[4] = {};
    for (int i = 0; i < 4; i++)
        if (mask >> i & 1) each[i] = zero<BITS>(c, column, (group + i) / c.each);
    return _mm_loadu_si128((const __m128i*)each);
}

INLINE void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }  // into the second cache

// R rows by four columns of the result, or fewer columns at the end.
template <int BITS, int R>
INLINE void few(const Call& c, int64_t row, int64_t column, int64_t end) {
    constexpr int64_t LOADED = BITS * 16, AHEAD = 4096;  // bytes: of a unit; read before they are needed
    const int64_t units = (c.groups + 3) / 4, wide = c.groups * GROUP * BITS / 8;
    const Unit* x = static_cast<const Unit*>(c.rounded) + row * units;
    int64_t at[4];
    const uint8_t* codes[4];
    for (int i = 0; i < 4; i++) {
        at[i] = std::min(column + i, end - 1);
        codes[i] = c.codes + at[i] * wide;
    }
    __m512 total[R];
    for (int r = 0; r < R; r++) total[r] = _mm512_setzero_ps();
    const auto add = [&](int64_t u, int64_t left) __attribute__((always_inline)) {
        Bytes w[4][2];
        for (int i = 0; i < 4; i++) {
            const uint8_t* from = codes[i] + u * LOADED;
            if (BITS == 4) {
                const Bytes both =
                    left >= 4 ? bytes(from) : _mm512_maskz_loadu_epi32((1 << 4 * left) - 1, from);
                w[i][0] = lower(both), w[i][1] = higher(both);
            } else if (left >= 4) {
                w[i][0] = bytes(from), w[i][1] = bytes(from + 64);
            } else {
                const uint32_t mask = (1 << 8 * left) - 1;
                w[i][0] = _mm512_maskz_loadu_epi32(mask, from);
                w[i][1] = _mm512_maskz_loadu_epi32(mask >> 16, from + 64);
            }
        }
        const __mmask8 mask = left >= 4 ? 15 : (1 << left) - 1;
        const int64_t g = u * 4;
        const __m512 scale = (__m512)turned(scales_of(c, at[0], g, mask), scales_of(c, at[1], g, mask),
                                            scales_of(c, at[2], g, mask), scales_of(c, at[3], g, mask));
        __m512i zeros;
        if (c.zeros)
            zeros = turned(zeros_of<BITS>(c, at[0], g, mask), zeros_of<BITS>(c, at[1], g, mask),
                           zeros_of<BITS>(c, at[2], g, mask), zeros_of<BITS>(c, at[3], g, mask));
        for (int r = 0; r < R; r++) {
            const Unit& a = x[r * units + u];
            const Bytes high[2] = {bytes(a.high), bytes(a.high + 64)};
            const Bytes low[2] = {bytes(a.low), bytes(a.low + 64)};
            const __m512i none = _mm512_setzero_si512();
            __m512i t[4];
            for (int i = 0; i < 4; i++) {
                if (BITS == 4) {
                    t[i] = whole(_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(none, w[i][0], high[0]), w[i][1], high[1]),
                                 _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(none, w[i][0], low[0]), w[i][1], low[1]));
                } else {
                    __m512i half[2];
                    for (int h = 0; h < 2; h++)
                        half[h] = whole(_mm512_dpbusd_epi32(none, w[i][h], high[h]),
                                        _mm512_dpbusd_epi32(none, w[i][h], low[h]));
                    t[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(half[0], half[1], 0x88),
                                            _mm512_shuffle_i32x4(half[0], half[1], 0xdd));
                }
            }
            __m512i offset = bytes(a.offset);
            if (c.zeros) offset = _mm512_sub_epi32(none, _mm512_mullo_epi32(offset, zeros));
            const __m512i sum = _mm512_add_epi32(by_column(t), offset);
            total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total[r]);
        }
    };
    const auto ahead = [&](int64_t u) __attribute__((always_inline)) {
        for (int i = 0; i < 4; i++)
            for (int64_t line = 0; line < LOADED; line += LINE) prefetch(codes[i] + u * LOADED + line + AHEAD);
        prefetch(c.scales + column * c.blocks + (u * 16 + AHEAD * 8 / BITS / GROUP) / c.each);
    };
    int64_t u = 0;
    for (; u < c.groups / 4; u++) {
        if (R == 1) ahead(u);
        add(u, 4);
    }
    if (u < units) {
        if (R == 1) ahead(u);
        add(u, c.groups % 4);
    }
    for (int r = 0; r < R; r++) {
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(total[r]), _mm512_extractf32x8_ps(total[r], 1));
        const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        const __mmask8 mask = (1 << std::min<int64_t>(4, end - column)) - 1;
        _mm_mask_storeu_ps(c.y + (row + r) * c.N + column, mask, _mm_mul_ps(sum, _mm_set1_ps(c.steps[row + r])));
    }
}

// A piece: some columns of all rows.
template <int BITS>
INLINE void few(const Call& c, int64_t index) {
    const int64_t end = std::min(c.N, (index + 1) * c.panel);
    for (int64_t column = index * c.panel; column < end; column += 4) {
        int64_t row = 0;
        for (; row + 4 <= c.M; row += 4) few<BITS, 4>(c, row, column, end);
        for (; row + 2 <= c.M; row += 2) few<BITS, 2>(c, row, column, end);
        for (; row < c.M; row++) few<BITS, 1>(c, row, column, end);
    }
}

void round_few_4(void* call, size_t row) { round_few<4>(*static_cast<const Call*>(call), row); }
void round_few_8(void* call, size_t row) { round_few<8>(*static_cast<const Call*>(call), row); }
void few_4(void* call, size_t index) { few<4>(*static_cast<const Call*>(call), index); }
void few_8(void* call, size_t index) { few<8>(*static_cast<const Call*>(call), index); }
