// Many rows by AMX, whose one instruction multiplies 16 rows by 16 columns and adds 32 products to
// each of the sums; included by products.cpp behind products_panels.h.
//
// Its numbers are bfloat16, of 8 binary digits: an activation is off by 2^-8 of itself at most, and so is
// a weight, its code times its scale. So a row's bits are not those of the other ways, but they are the
// same among any number of rows.

// Activations of 16 rows, a group of each; what is beyond a row counts as 0.
INLINE void round_tile(const Call& c, int64_t row) {
    Lines* to = static_cast<Lines*>(c.rounded) + row / 16 * c.groups;
    for (int64_t g = 0; g < c.groups; g++) {
        __m512 x[2];
        for (int h = 0; h < 2; h++) {
            const int64_t at = g * GROUP + h * 16, left = std::clamp<int64_t>(c.K - at, 0, 16);
            x[h] = _mm512_maskz_loadu_ps((1 << left) - 1, c.x + row * c.K + at);
        }
        _mm512_store_si512(to[g][row % 16], (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
    }
}

// Weights of 16 columns, a group of each: pairs of inputs, columns side by side.
template <int BITS>
struct alignas(LINE) Weights {
    Lines pairs;
    float scales[16];
    int32_t zeros[16];

    INLINE void put(const Call& c, int q, Bytes codes) {
        const __m512 by = _mm512_load_ps(scales);
        const __m512 less = c.zeros ? _mm512_cvtepi32_ps(bytes(zeros)) : _mm512_set1_ps(c.middle);
        constexpr int PAIRS = 16 / BITS;
        for (int i = 0; i < PAIRS; i++) {
            const __m512 even = weight(_mm512_srli_epi32(codes, 2 * i * BITS), less, by);
            const __m512 odd = weight(_mm512_srli_epi32(codes, (2 * i + 1) * BITS), less, by);
            _mm512_store_si512(pairs[q * PAIRS + i], paired(nearest(even), nearest(odd)));
        }
    }
    static INLINE __m512 weight(Bytes codes, const __m512& less, const __m512& by) {
        const __m512 sixteen = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512 code = BITS == 4 ? _mm512_permutexvar_ps(codes, sixteen)  // by its lowest four binary digits
                                      : _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(255)));
        return _mm512_mul_ps(_mm512_sub_ps(code, less), by);
    }
    // So that the higher half is the nearest bfloat16.
    static INLINE __m512i nearest(__m512 x) { return _mm512_add_epi32((__m512i)x, _mm512_set1_epi32(0x8000)); }
};

// Sums of 16 rows by 16 columns over some groups.
struct alignas(LINE) Sums {
    float of[16][16];
};

// 32 rows of 32 columns from `begin` on.
INLINE void written(const Call& c, int64_t pair, int64_t begin, const Sums* sums) {
    for (int64_t row = 32 * pair; row < std::min(c.M, 32 * pair + 32); row++)
        for (int p = 0; p < 2; p++) {
            const int64_t column = begin + p * 16, held = c.N - column;
            const __mmask16 mask = held >= 16 ? 0xffff : held > 0 ? (1 << held) - 1 : 0;
            const __m512 sum = _mm512_load_ps(sums[row / 16 % 2 * 2 + p].of[row % 16]);
            _mm512_mask_storeu_ps(c.y + row * c.N + column, mask, sum);
        }
}

constexpr int64_t TOGETHER = 6;  // groups that the first cache holds of 32 rows and 32 columns

// A piece: 32 columns of all rows, some groups of all before the next ones.
template <int BITS>
INLINE void by_tiles(const Call& c, int64_t index) {
    thread_local std::vector<Weights<BITS>> room;
    thread_local std::vector<Sums> sums;
    const int64_t begin = index * c.panel, pairs = (c.M + 31) / 32;  // of 16 rows
    if (static_cast<int64_t>(room.size()) < 2 * c.groups) room.resize(2 * c.groups);
    if (static_cast<int64_t>(sums.size()) < 4 * pairs) sums.resize(4 * pairs);
    Weights<BITS> *left = room.data(), *right = left + c.groups;
    arrange<BITS>(c, begin, left);
    arrange<BITS>(c, begin + 16, right);
    for (int64_t first = 0; first < c.groups; first += TOGETHER) {
        const int64_t last = std::min(c.groups, first + TOGETHER);
        for (int64_t pair = 0; pair < pairs; pair++) {
            Sums* sum = &sums[4 * pair];
            if (first) {
                _tile_loadd(0, sum[0].of, 64);
                _tile_loadd(1, sum[1].of, 64);
                _tile_loadd(2, sum[2].of, 64);
                _tile_loadd(3, sum[3].of, 64);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            const Lines* upper = static_cast<const Lines*>(c.rounded) + 2 * pair * c.groups;
            const Lines* lower = upper + c.groups;
            for (int64_t g = first; g < last; g++) {
                _tile_loadd(4, upper[g], 64);
                _tile_loadd(6, left[g].pairs, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, right[g].pairs, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, lower[g], 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, sum[0].of, 64);
            _tile_stored(1, sum[1].of, 64);
            _tile_stored(2, sum[2].of, 64);
            _tile_stored(3, sum[3].of, 64);
            // While these are made, those before are put where they belong.
            if (last == c.groups && pair) written(c, pair - 1, begin, sum - 4);
        }
    }
    written(c, pairs - 1, begin, &sums[4 * (pairs - 1)]);
}

template <int BITS>
INLINE void tiles(const Call& c, int64_t index) {
    const Shapes shapes;
    _tile_loadconfig(&shapes);
    by_tiles<BITS>(c, index);
    _tile_release();
}

void round_tiles_4(void* call, size_t row) { round_tile(*static_cast<const Call*>(call), row); }
void round_tiles_8(void* call, size_t row) { round_tile(*static_cast<const Call*>(call), row); }
void tiles_4(void* call, size_t index) { tiles<4>(*static_cast<const Call*>(call), index); }
void tiles_8(void* call, size_t index) { tiles<8>(*static_cast<const Call*>(call), index); }
