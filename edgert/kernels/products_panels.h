// Many rows by VNNI, and how codes are put in order for it and for AMX: 16 columns side by side in a
// vector, once for all rows; included by products.cpp behind products_vnni.h.

// Columns from `column` on in order, those beyond the last one as copies of it. `Panel::put` takes four
// bytes of the codes of each column, the q-th ones of a group.
template <int BITS, typename Panel>
INLINE void arrange(const Call& c, int64_t column, Panel* panel) {
    constexpr int HELD = 64 * 8 / BITS / GROUP;  // groups in 64 bytes
    const int64_t wide = c.groups * GROUP * BITS / 8;
    const auto at = [&](int i) { return std::min(column + i, c.N - 1); };
    const auto loaded = [&](__m512i* v, const void* from, int64_t stride, int64_t left) {
        const __mmask16 mask = left < 16 ? (1 << left) - 1 : 0xffff;
        for (int i = 0; i < 16; i++) {
            v[i] = _mm512_maskz_loadu_epi32(mask, (const char*)from + at(i) * stride);
            prefetch((const char*)from + (at(i) + 16) * stride);  // those of the next 16 columns
        }
        transpose(v);
    };
    __m512i v[16];
    for (int64_t b = 0; b < c.blocks; b += 16) {
        loaded(v, c.scales + b, c.blocks * sizeof(float), c.blocks - b);
        for (int64_t i = 0; i < std::min<int64_t>(16, c.blocks - b); i++)
            for (int64_t e = 0; e < c.each; e++) _mm512_store_si512(panel[(b + i) * c.each + e].scales, v[i]);
    }
    if (c.zeros)
        for (int64_t g = 0; g < c.groups; g++)
            for (int i = 0; i < 16; i++) panel[g].zeros[i] = zero<BITS>(c, at(i), g / c.each);
    for (int64_t g = 0; g < c.groups; g += HELD) {
        loaded(v, c.codes + g * GROUP * BITS / 8, wide, (c.groups - g) * BITS);
        for (int h = 0; h < HELD && g + h < c.groups; h++)
            for (int q = 0; q < BITS; q++) panel[g + h].put(c, q, v[h * BITS + q]);
    }
}

// Activations of 16 rows, a group of each.
struct alignas(LINE) Sixteen {
    int8_t high[16][GROUP], low[16][GROUP];
    int32_t offset[16];  // of each row, as `offset_of` says
};

// Codes of 16 columns, a group of each, by fours.
template <int BITS>
struct alignas(LINE) Panel {
    uint8_t codes[GROUP / 4][16][4];
    float scales[16];
    int32_t zeros[16];

    INLINE void put(const Call&, int q, Bytes four) {
        _mm512_store_si512(codes[q], BITS == 4 ? lower(four) : four);
        if (BITS == 4) _mm512_store_si512(codes[q + 4], higher(four));
    }
};

template <int BITS>
INLINE void round_sixteen(const Call& c, int64_t row) {
    Sixteen* to = static_cast<Sixteen*>(c.rounded) + row / 16 * c.groups;
    round_row(c, row, [&](int64_t g, const __m512i& words) {
        const __m256i high = narrowed<BITS>(high_of(words)), low = narrowed<BITS>(words);
        std::memcpy(to[g].high[row % 16], &high, GROUP);
        std::memcpy(to[g].low[row % 16], &low, GROUP);
        to[g].offset[row % 16] = offset_of(c, sum_of(words));
    });
}

// The whole numbers of a row and 16 columns, rounded to floats.
template <int BITS>
INLINE __m512 dot(const Call& c, const Sixteen& x, int row, const Bytes* w, const Panel<BITS>& panel) {
    __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
    for (int q = 0; q < GROUP / 4; q++) {
        int32_t four[2];
        std::memcpy(&four[0], x.high[row] + 4 * q, 4);
        std::memcpy(&four[1], x.low[row] + 4 * q, 4);
        high = _mm512_dpbusd_epi32(high, w[q], _mm512_set1_epi32(four[0]));
        low = _mm512_dpbusd_epi32(low, w[q], _mm512_set1_epi32(four[1]));
    }
    __m512i offset = _mm512_set1_epi32(x.offset[row]);
    if (c.zeros)
        offset = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_mullo_epi32(offset, bytes(panel.zeros)));
    return _mm512_cvtepi32_ps(_mm512_add_epi32(whole(high, low), offset));
}

// 16 rows or fewer by 16 columns.
template <int BITS>
INLINE void by_panel(const Call& c, const Sixteen* x, const Panel<BITS>* panel, int64_t row, int64_t column) {
    alignas(LINE) float parts[4][16][16];
    for (int from = 0; from < 4; from++) {
        __m512 total[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) total[r] = _mm512_setzero_ps();
        for (int64_t g = from; g < c.groups; g += 4) {
            Bytes w[GROUP / 4];
            for (int q = 0; q < GROUP / 4; q++) w[q] = bytes(panel[g].codes[q]);
            const __m512 scale = _mm512_load_ps(panel[g].scales);
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++)
                total[r] = _mm512_fmadd_ps(dot<BITS>(c, x[g], r, w, panel[g]), scale, total[r]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) _mm512_store_ps(parts[from][r], total[r]);
    }
    const __mmask16 mask = c.N - column < 16 ? (1 << (c.N - column)) - 1 : 0xffff;
    for (int r = 0; r < std::min<int64_t>(16, c.M - row); r++) {
        const auto part = [&](int from) { return _mm512_load_ps(parts[from][r]); };
        const __m512 sum = _mm512_add_ps(_mm512_add_ps(part(0), part(2)), _mm512_add_ps(part(1), part(3)));
        _mm512_mask_storeu_ps(c.y + (row + r) * c.N + column, mask,
                              _mm512_mul_ps(sum, _mm512_set1_ps(c.steps[row + r])));
    }
}

constexpr int64_t PANELS = 3;  // of a piece

// A piece: some columns of all rows.
template <int BITS>
INLINE void by_panels(const Call& c, int64_t index) {
    thread_local std::vector<Panel<BITS>> room;
    const int64_t begin = index * c.panel, count = (std::min(c.N - begin, c.panel) + 15) / 16;
    if (static_cast<int64_t>(room.size()) < count * c.groups) room.resize(count * c.groups);
    for (int64_t p = 0; p < count; p++) arrange<BITS>(c, begin + p * 16, room.data() + p * c.groups);
    const Sixteen* x = static_cast<const Sixteen*>(c.rounded);
    for (int64_t row = 0; row < c.M; row += 16, x += c.groups)
        for (int64_t p = 0; p < count; p++)
            by_panel<BITS>(c, x, room.data() + p * c.groups, row, begin + p * 16);
}

void round_panels_4(void* call, size_t row) { round_sixteen<4>(*static_cast<const Call*>(call), row); }
void round_panels_8(void* call, size_t row) { round_sixteen<8>(*static_cast<const Call*>(call), row); }
void panels_4(void* call, size_t index) { by_panels<4>(*static_cast<const Call*>(call), index); }
void panels_8(void* call, size_t index) { by_panels<8>(*static_cast<const Call*>(call), index); }
