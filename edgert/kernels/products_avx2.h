// The work of a call, by AVX2; included as avx2_processor.h says.
//
//   round     a row of activations to 16 bits, in the order in which codes are unpacked: of 4 bits,
//             first the even ones of a group, which are the low halves of bytes, then the odd ones
//   multiply  a piece of the result: some columns of some rows

constexpr int AHEAD = 2048;  // bytes read before they are needed

typedef int16_t Shorts __attribute__((vector_size(WIDE * 4)));

// Two vectors of 16 codes of a group, less their zero point.
struct Group {
    Shorts first, second;
};

INLINE Shorts widened(const uint8_t* codes) {
    return (Shorts)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)codes));
}

template <int BITS>
INLINE Group unpacked(const uint8_t* codes, const Shorts& zero) {
    if constexpr (BITS == 8) return {widened(codes) - zero, widened(codes + 16) - zero};
    const Shorts both = widened(codes);
    return {(both & 15) - zero, (both >> 4) - zero};
}

// Products of 16 pairs, the neighbours added: 8 whole numbers.
INLINE Ints paired(const Shorts& a, const Shorts& b) {
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}

INLINE Shorts shorts(const int16_t* from) {
    Shorts value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

INLINE Vec added(const Vec& total, const Ints& sum, const Vec& scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps((__m256i)sum), scale, total);
}

// What a call has, as constants: EACH groups of a block, or 0 for `c.each`; ZEROS: with zero points.
template <int BITS_, int EACH_, bool ZEROS_>
struct Kind {
    static constexpr int BITS = BITS_, EACH = EACH_, BYTES = GROUP * BITS / 8;
    static constexpr bool ZEROS = ZEROS_;
    // A sum is that of so many equal parts of the blocks. With two, an addition need not wait for
    // the one before where there is one row; bytes of 8 bits come in too slowly for that to matter.
    static constexpr int PARTS = BITS == 4 ? 2 : 1;
};

// Adds `count` blocks of a column from `first` on to the sums of R rows, and for P = 2 as many from
// `second` on to sums of their own, so that an addition need not wait for the one before.
template <typename K, int R, int P>
INLINE void add_blocks(const Call& c, int64_t row, int64_t column, int64_t first, int64_t second, int64_t count,
                       Vec* total) {
    const int64_t each = K::EACH ? K::EACH : c.each, wide = c.groups * GROUP;
    const int64_t begin[2] = {first, second};
    const int16_t* x[P];
    const uint8_t* codes[P];
    const float* scales[P];
    for (int p = 0; p < P; p++) {
        x[p] = static_cast<const int16_t*>(c.rounded) + row * wide + begin[p] * each * GROUP;
        codes[p] = c.codes + (column * c.groups + begin[p] * each) * K::BYTES;
        scales[p] = c.scales + column * c.blocks + begin[p];
    }
    Shorts zero = Shorts{} + static_cast<int16_t>(c.middle);
    const auto add = [&](int p, int64_t n) __attribute__((always_inline)) {
        const Vec scale = all(scales[p][n]);
        if (K::ZEROS) {
            const int64_t block = begin[p] + n;
            const int byte = c.zeros[column * c.zero_bytes + block * K::BITS / 8];
            zero = Shorts{} + static_cast<int16_t>(K::BITS == 8 ? byte : byte >> block % 2 * 4 & 15);
        }
        for (int64_t g = 0; g < each; g++) {
            const Group w = unpacked<K::BITS>(codes[p], zero);
            for (int r = 0; r < R; r++) {
                const int16_t* a = x[p] + r * wide;
                const Ints sum = paired(shorts(a), w.first) + paired(shorts(a + 16), w.second);
                total[p * R + r] = added(total[p * R + r], sum, scale);
            }
            x[p] += GROUP, codes[p] += K::BYTES;
        }
    };
    int64_t n = 0;
    if (R < ROWS_AT_ONCE)
        for (; n + 4 <= count; n += 4) {
            for (int p = 0; p < P; p++)
                for (int64_t at = 0; at < 4 * each * K::BYTES; at += LINE)
                    __builtin_prefetch(codes[p] + AHEAD + at);
            for (int i = 0; i < 4; i++)
                for (int p = 0; p < P; p++) add(p, n + i);
        }
    for (; n < count; n++)
        for (int p = 0; p < P; p++) add(p, n);
}

// R rows by C columns of the result, the columns one after the other: memory is read in order.
// A sum is made in the same order whatever R and C are.
template <typename K, int R, int C>
INLINE void tile(const Call& c, int64_t row, int64_t column) {
    const int64_t part = (c.blocks + K::PARTS - 1) / K::PARTS, rest = c.blocks - part;
    Vec total[(R * C + 3) / 4 * 4] = {};
    for (int i = 0; i < C; i++) {
        Vec parts[K::PARTS * R] = {};
        if (K::PARTS == 2 && R <= 2) {
            add_blocks<K, R, 2>(c, row, column + i, 0, part, rest, parts);
            if (rest < part) add_blocks<K, R, 1>(c, row, column + i, rest, 0, 1, parts);
        } else {
            add_blocks<K, R, 1>(c, row, column + i, 0, 0, part, parts);
            if (K::PARTS == 2) add_blocks<K, R, 1>(c, row, column + i, part, 0, rest, parts + R);
        }
        for (int r = 0; r < R; r++) total[r * C + i] = K::PARTS == 2 ? parts[r] + parts[R + r] : parts[r];
    }
    const float* steps = c.steps + row;
    float* y = c.y + row * c.N + column;
#pragma GCC unroll 4
    for (int n = 0; n < R * C; n += 4) {
        const Four four = sums(total + n);
        for (int i = n; i < std::min(R * C, n + 4); i++)
            y[i / C * c.N + i % C] = four[i - n] * steps[i / C];
    }
}

template <typename K, int R, int C>
INLINE void rows(const Call& c, int64_t& row, int64_t last, int64_t column, int64_t end) {
    for (; row + R <= last; row += R) {
        int64_t at = column;
        for (; at + C <= end; at += C) tile<K, R, C>(c, row, at);
        if (C > 1)
            for (; at < end; at++) tile<K, R, 1>(c, row, at);
    }
}

template <typename K>
INLINE void multiply(const Call& c, int64_t index) {
    const int64_t column = index % c.panels * c.panel, end = std::min(c.N, column + c.panel);
    int64_t row = index / c.panels * c.chunk;
    const int64_t last = std::min(c.M, row + c.chunk);
    rows<K, ROWS_AT_ONCE, 1>(c, row, last, column, end);
    rows<K, 4, 1>(c, row, last, column, end);
    rows<K, 2, 2>(c, row, last, column, end);
    rows<K, 1, 4>(c, row, last, column, end);
}

template <int BITS>
INLINE void multiply(void* call, int64_t index) {
    const Call& c = *static_cast<const Call*>(call);
    if (c.each == 1)
        c.zeros ? multiply<Kind<BITS, 1, true>>(c, index) : multiply<Kind<BITS, 1, false>>(c, index);
    else
        c.zeros ? multiply<Kind<BITS, 0, true>>(c, index) : multiply<Kind<BITS, 0, false>>(c, index);
}

void multiply_4(void* call, size_t index) { multiply<4>(call, index); }
void multiply_8(void* call, size_t index) { multiply<8>(call, index); }

// 32 floats -> as many whole numbers, even ones first if SPLIT.
template <bool SPLIT>
INLINE void round_group(const float* x, const Vec& by, int16_t* to) {
    __m256i whole[4];
    for (int i = 0; i < 4; i++)
        whole[i] = _mm256_cvtps_epi32(load(x + i * WIDE) * by);
    const auto packed = [](__m256i a, __m256i b) {
        return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    };
    __m256i first = packed(whole[0], whole[1]), second = packed(whole[2], whole[3]);
    if (SPLIT) {
        const auto low = [](__m256i v) { return _mm256_srai_epi32(_mm256_slli_epi32(v, 16), 16); };
        const auto high = [](__m256i v) { return _mm256_srai_epi32(v, 16); };
        const __m256i even = packed(low(first), low(second));
        second = packed(high(first), high(second));
        first = even;
    }
    _mm256_storeu_si256((__m256i*)to, first);
    _mm256_storeu_si256((__m256i*)(to + 16), second);
}

// A row that holds a number that is none, or an infinite one, becomes all NaN: its step is.
template <bool SPLIT>
INLINE void round_row(const Call& c, int64_t row) {
    const float* x = c.x + row * c.K;
    int16_t* to = static_cast<int16_t*>(c.rounded) + row * c.groups * GROUP;
    const Ints magnitude = Ints{} + 0x7fffffff;
    Ints most = {};  // bits of numbers without a sign, which are in the order of the numbers
    int64_t i = 0;
    for (; i + WIDE <= c.K; i += WIDE) {
        const Ints bits = (Ints)load(x + i) & magnitude;
        most = bits > most ? bits : most;
    }
    int32_t largest = 0;
    for (; i < c.K; i++) {
        int32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        largest = std::max(largest, bits & 0x7fffffff);
    }
    for (int lane = 0; lane < WIDE; lane++) largest = std::max(largest, most[lane]);
    float top;
    std::memcpy(&top, &largest, sizeof top);
    constexpr float least = 1e-30f;  // below, the step would have no inverse
    const bool sound = largest < 0x7f800000;
    c.steps[row] = sound ? top / 32767.0f : std::numeric_limits<float>::quiet_NaN();
    const Vec by = all(sound && top > least ? 32767.0f / top : 0.0f);
    for (i = 0; i + GROUP <= c.K; i += GROUP) round_group<SPLIT>(x + i, by, to + i);
    for (; i < c.groups * GROUP; i += GROUP) {  // what is beyond the row counts as 0
        float rest[GROUP] = {};
        if (i < c.K) std::memcpy(rest, x + i, (c.K - i) * sizeof(float));
        round_group<SPLIT>(rest, by, to + i);
    }
}

void round_4(void* call, size_t row) { round_row<true>(*static_cast<const Call*>(call), row); }
void round_8(void* call, size_t row) { round_row<false>(*static_cast<const Call*>(call), row); }
