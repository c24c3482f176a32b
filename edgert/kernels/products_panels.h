// Many rows: 16 columns side by side in a vector, whose codes are put in order once for all rows;
// included by products.cpp behind products_vnni.h.
//
// A `Kind` says how a group of 16 rows and 16 columns is multiplied: what it takes of the rows
// (`Kind::Rows`) and of the columns (`Kind::Panel`), and the whole numbers of such a block, `dots`.

// Columns from `column` on in order, those beyond the last one as copies of it. `Kind::put` takes four
// bytes of the codes of each column, the q-th ones of a group; `Kind::place` says where groups lie.
template <int BITS, typename Kind>
INLINE void arrange(const Call& c, int64_t column, typename Kind::Panel* panel) {
    constexpr int HELD = 64 * 8 / BITS / GROUP;  // groups in 64 bytes
    const int64_t wide = c.groups * GROUP * BITS / 8;
    const auto at = [&](int i) { return std::min(column + i, c.N - 1); };
    const auto loaded = [&](__m512i* v, const uint8_t* from, int64_t stride, int64_t left) {
        const __mmask16 mask = left < 16 ? (1 << left) - 1 : 0xffff;
        for (int i = 0; i < 16; i++) {
            v[i] = _mm512_maskz_loadu_epi32(mask, from + at(i) * stride);
            prefetch(from + (at(i) + 16) * stride);  // those of the next 16 columns
        }
        transpose(v);
    };
    __m512i v[16];
    for (int64_t b = 0; b < c.blocks; b += 16) {
        loaded(v, (const uint8_t*)(c.scales + b), c.blocks * sizeof(float), c.blocks - b);
        for (int64_t i = 0; i < std::min<int64_t>(16, c.blocks - b); i++)
            for (int64_t e = 0; e < c.each; e++)
                _mm512_store_si512(panel[Kind::place(c.groups, (b + i) * c.each + e)].scales, v[i]);
    }
    if (c.zeros)
        for (int64_t g = 0; g < c.groups; g++)
            for (int i = 0; i < 16; i++) panel[Kind::place(c.groups, g)].zeros[i] = zero<BITS>(c, at(i), g / c.each);
    for (int64_t g = 0; g < c.groups; g += HELD) {
        loaded(v, c.codes + g * GROUP * BITS / 8, wide, (c.groups - g) * BITS);
        for (int h = 0; h < HELD && g + h < c.groups; h++)
            for (int q = 0; q < BITS; q++) Kind::put(c, panel[Kind::place(c.groups, g + h)], q, v[h * BITS + q]);
    }
}

// Groups lie in the order in which they are added up: 0, 4, 8 ..., then those from 2, from 1, from 3 on.
constexpr int PARTS[] = {0, 2, 1, 3};

INLINE int64_t part_size(int64_t groups, int from) { return (groups - from + 3) / 4; }

INLINE int64_t place_of(int64_t groups, int64_t g) {
    int64_t begin = 0;
    for (int from : PARTS) {
        if (g % 4 == from) return begin + g / 4;
        begin += part_size(groups, from);
    }
    return 0;
}

constexpr int64_t AT_ONCE = 8, ROW_TILES = 8, MOST_PANELS = 3;  // groups that the first cache holds; 16 rows, so many times

// Sums of 16 rows by 16 columns over some groups.
struct alignas(LINE) Sums {
    float of[16][16];
};

// Some groups of all these rows and columns: both stay in the first cache while they are multiplied.
template <typename Kind>
INLINE void add_groups(const Call& c, const typename Kind::Rows* x, int64_t row_tiles,
                       const typename Kind::Panel* panels, int64_t count, int64_t groups, bool first, Sums* sums) {
    typename Kind::Block blocks[ROW_TILES * MOST_PANELS * AT_ONCE + 1], *block = blocks;
    for (int64_t t = 0; t < row_tiles; t++)
        for (int64_t p = 0; p < count; p++)
            for (int64_t g = 0; g < groups; g++) *block++ = {x + t * c.groups + g, panels + p * c.groups + g};
    *block = block[-1];
    block = blocks;
    Kind kind;
    if (groups) kind.begin(*block);
    for (int64_t i = 0; i < row_tiles * count; i++) {
        auto& sum = sums[i].of;
        __m512 total[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) total[r] = first ? _mm512_setzero_ps() : _mm512_load_ps(sum[r]);
        for (int64_t g = 0; g < groups; g++, block++) {
            const auto dots = kind.dots(c, block);
            const __m512 scale = _mm512_load_ps(block->panel->scales);
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++) total[r] = _mm512_fmadd_ps(dots.of(r), scale, total[r]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) _mm512_store_ps(sum[r], total[r]);
    }
}

// A piece: some columns of all rows.
template <int BITS, typename Kind>
INLINE void by_panels(const Call& c, int64_t index) {
    thread_local std::vector<typename Kind::Panel> room;
    thread_local std::vector<Sums> sums;
    const int64_t begin = index * c.panel, count = (std::min(c.N - begin, c.panel) + 15) / 16;
    if (static_cast<int64_t>(room.size()) < count * c.groups) room.resize(count * c.groups);
    const int64_t apart = count * ROW_TILES;  // of the four parts
    if (static_cast<int64_t>(sums.size()) < 4 * apart) sums.resize(4 * apart);
    for (int64_t p = 0; p < count; p++) arrange<BITS, Kind>(c, begin + p * 16, room.data() + p * c.groups);
    for (int64_t row = 0; row < c.M; row += 16 * ROW_TILES) {
        const int64_t last = std::min(c.M, row + 16 * ROW_TILES), row_tiles = (last - row + 15) / 16;
        const auto* x = static_cast<const typename Kind::Rows*>(c.rounded) + row / 16 * c.groups;
        int64_t at = 0;
        for (int from : PARTS) {
            const int64_t size = part_size(c.groups, from);
            int64_t done = 0;
            do {
                const int64_t groups = std::min(size - done, AT_ONCE);
                add_groups<Kind>(c, x + at, row_tiles, room.data() + at, count, groups, !done,
                                 sums.data() + from * apart);
                at += groups, done += groups;
            } while (done < size);
        }
        for (int64_t r = row; r < last; r++) {
            const __m512 step = _mm512_set1_ps(c.steps[r]);
            for (int64_t p = 0; p < count; p++) {
                const Sums* of = &sums[(r - row) / 16 * count + p];
                const auto part = [&](int from) { return _mm512_load_ps(of[from * apart].of[r % 16]); };
                const int64_t column = begin + p * 16;
                const __mmask16 mask = c.N - column < 16 ? (1 << (c.N - column)) - 1 : 0xffff;
                const __m512 sum = _mm512_add_ps(_mm512_add_ps(part(0), part(2)), _mm512_add_ps(part(1), part(3)));
                _mm512_mask_storeu_ps(c.y + r * c.N + column, mask, _mm512_mul_ps(sum, step));
            }
        }
    }
}

// By VNNI: four codes of each column by four numbers of a row.
template <int BITS>
struct Vectors {
    struct alignas(LINE) Rows {
        int8_t high[16][GROUP], low[16][GROUP];
        int32_t offset[16];  // of each row, as `offset_of` says
    };
    struct alignas(LINE) Panel {
        uint8_t codes[GROUP / 4][16][4];
        float scales[16];
        int32_t zeros[16];
    };

    static INLINE void round(const Call& c, int64_t row) {
        Rows* to = static_cast<Rows*>(c.rounded) + row / 16 * c.groups;
        round_row(c, row, [&](int64_t g, const __m512i& words) {
            const __m256i high = narrowed<BITS>(high_of(words)), low = narrowed<BITS>(words);
            Rows& rows = to[place_of(c.groups, g)];
            std::memcpy(rows.high[row % 16], &high, GROUP);
            std::memcpy(rows.low[row % 16], &low, GROUP);
            rows.offset[row % 16] = offset_of(c, sum_of(words));
        });
    }
    static INLINE int64_t place(int64_t groups, int64_t g) { return place_of(groups, g); }
    static INLINE void put(const Call&, Panel& panel, int q, __m512i codes) {
        _mm512_store_si512(panel.codes[q], BITS == 4 ? lower(codes) : codes);
        if (BITS == 4) _mm512_store_si512(panel.codes[q + 4], higher(codes));
    }

    struct Block {
        const Rows* x;
        const Panel* panel;
    };
    struct Dots {
        const Call& c;
        const Rows& x;
        Bytes w[GROUP / 4], zeros;

        INLINE __m512 of(int r) const {
            __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
            for (int q = 0; q < GROUP / 4; q++) {
                int32_t four[2];
                std::memcpy(&four[0], x.high[r] + 4 * q, 4);
                std::memcpy(&four[1], x.low[r] + 4 * q, 4);
                high = _mm512_dpbusd_epi32(high, w[q], _mm512_set1_epi32(four[0]));
                low = _mm512_dpbusd_epi32(low, w[q], _mm512_set1_epi32(four[1]));
            }
            __m512i offset = _mm512_set1_epi32(x.offset[r]);
            if (c.zeros) offset = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_mullo_epi32(offset, zeros));
            return _mm512_cvtepi32_ps(_mm512_add_epi32(whole(high, low), offset));
        }
    };

    INLINE void begin(const Block&) {}
    INLINE Dots dots(const Call& c, const Block* block) {
        Dots dots{c, *block->x, {}, bytes(block->panel->zeros)};
        for (int q = 0; q < GROUP / 4; q++) dots.w[q] = bytes(block->panel->codes[q]);
        return dots;
    }
};

void round_panels_4(void* call, size_t row) { Vectors<4>::round(*static_cast<const Call*>(call), row); }
void round_panels_8(void* call, size_t row) { Vectors<8>::round(*static_cast<const Call*>(call), row); }
void panels_4(void* call, size_t index) { by_panels<4, Vectors<4>>(*static_cast<const Call*>(call), index); }
void panels_8(void* call, size_t index) { by_panels<8, Vectors<8>>(*static_cast<const Call*>(call), index); }
