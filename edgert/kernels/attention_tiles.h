// `attend` for many new tokens by AMX; included by attention.cpp as the stages for AVX-512 are, and
// behind amx.h.
//
// bfloat16 has 8 binary digits; a float is the sum of three of them, and a code is one. Of the products
// of parts, those that reach a float's last digit are made: three with codes, six with floats. So what
// comes out is as good as in float32.

constexpr int PARTS = 3, COLUMNS = TILE / 16;

// 16 floats in parts, each the higher half of 32 bits.
INLINE void split(__m512 x, __m512i* parts) {
    for (int i = 0; i < PARTS; i++) {
        parts[i] = _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0xffff0000));
        x = _mm512_sub_ps(x, (__m512)parts[i]);
    }
}

template <int HELD>
INLINE void split_held(__m512 x, __m512i* parts) {
    if constexpr (HELD == PARTS)
        split(x, parts);
    else
        parts[0] = (__m512i)x;  // a code
}

// 32 floats -> a line of each part, which are `apart`.
INLINE void split_line(const __m512* x, Lines* to, int64_t apart, int line) {
    __m512i first[PARTS], second[PARTS];
    split(x[0], first);
    split(x[1], second);
    for (int i = 0; i < PARTS; i++) _mm512_store_si512(to[i * apart][line], upper_halves(first[i], second[i]));
}

// The sums in tiles 0 to 3 go on: 16 lines in parts `apart` with 64 columns in HELD parts `between`.
template <int HELD>
INLINE void multiply(const Lines* lines, int64_t apart, const Lines* columns, int64_t between) {
    _tile_loadd(4, lines[0], 64);
    _tile_loadd(5, lines[apart], 64);
    _tile_loadd(6, lines[2 * apart], 64);
    for (int j = 0; j < HELD; j++) {
        const Lines* held = columns + j * between;
#define WITH_COLUMNS(i)                       \
    _tile_loadd(7, held[i], 64);              \
    _tile_dpbf16ps(i, 4, 7);                  \
    if (j < PARTS - 1) _tile_dpbf16ps(i, 5, 7); \
    if (j < PARTS - 2) _tile_dpbf16ps(i, 6, 7);
        WITH_COLUMNS(0)
        WITH_COLUMNS(1)
        WITH_COLUMNS(2)
        WITH_COLUMNS(3)
#undef WITH_COLUMNS
    }
}

// Keys -> [part][32 channels][16 keys]: pairs of channels, keys side by side; zeros behind them.
template <int HELD, typename Cell>
INLINE void keys_as_columns(const Cell* keys, int count, int64_t d, Lines* to) {
    const int64_t steps = d / 32;
    for (int s = 0; s < COLUMNS; s++)
        for (int64_t step = 0; step < steps; step++) {
            __m512i lines[HELD][16];
            for (int r = 0; r < 16; r++) {
                __m512i first[HELD] = {}, second[HELD] = {};
                if (s * 16 + r < count) {
                    const Cell* key = keys + (s * 16 + r) * d + step * 32;
                    split_held<HELD>(load(key), first);
                    split_held<HELD>(load(key + 16), second);
                }
                for (int j = 0; j < HELD; j++) lines[j][r] = upper_halves(first[j], second[j]);
            }
            for (int j = 0; j < HELD; j++) {
                transpose(lines[j]);
                for (int r = 0; r < 16; r++)
                    _mm512_store_si512(to[(j * steps + step) * COLUMNS + s][r], lines[j][r]);
            }
        }
}

// Values -> [part][32 keys][16 channels]: pairs of keys, channels side by side; zeros behind them.
template <int HELD, typename Cell>
INLINE void values_as_columns(const Cell* values, int count, int64_t d, Lines* to) {
    for (int r = 0; r < TILE / 2; r++)
        for (int64_t i = 0; i < d / 16; i++) {
            __m512i even[HELD] = {}, odd[HELD] = {};
            if (2 * r < count) split_held<HELD>(load(values + 2 * r * d + i * 16), even);
            if (2 * r + 1 < count) split_held<HELD>(load(values + (2 * r + 1) * d + i * 16), odd);
            for (int j = 0; j < HELD; j++)
                _mm512_store_si512(to[(j * 2 + r / 16) * (d / 16) + i][r % 16], paired(even[j], odd[j]));
        }
}

// Softmax of a row goes on over a tile, `seen` of whose keys it sees: their weights -> [part][32 keys].
INLINE void weigh(const float* scores, int seen, int64_t d, float& most, float& total, float* sums, Lines* to, int line) {
    Vec x[COLUMNS] = {};
    if (seen) {
        __mmask16 held[COLUMNS];
        Vec top = all(most);
        for (int i = 0; i < COLUMNS; i++) {
            held[i] = (1 << std::clamp(seen - 16 * i, 0, 16)) - 1;
            x[i] = _mm512_mask_loadu_ps(all(-INFINITY), held[i], scores + 16 * i);
            top = _mm512_max_ps(x[i], top);
        }
        const float best = _mm512_reduce_max_ps(top);
        Vec added = {};
        for (int i = 0; i < COLUMNS; i++) {
            x[i] = _mm512_maskz_mov_ps(held[i], exponential(x[i] - all(best)));
            added += x[i];
        }
        if (best != most) {
            const float before = most > -INFINITY ? exponential(all(most - best))[0] : 0.0f;
            total *= before;
            for (int64_t i = 0; i < d; i += WIDE) store(sums + i, load(sums + i) * all(before));
            most = best;
        }
        total += sum(added);
    }
    split_line(x, to, 2, line);
    split_line(x + 2, to + 1, 2, line);
}

template <typename Cell>
INLINE void attend_many(const Call& c, int64_t index) {
    constexpr int HELD = sizeof(Cell) == 1 ? 1 : PARTS;
    const Part part(c, index);
    const int64_t d = c.d, steps = d / 32, rows = (part.rows + 15) / 16 * 16;
    const int64_t for_q = rows / 16 * PARTS * steps, for_k = HELD * COLUMNS * steps, for_v = HELD * 2 * (d / 16);
    const int64_t for_weights = rows / 16 * 2 * PARTS;
    struct alignas(64) Room {
        Lines lines;
    };
    thread_local std::vector<Room> room;
    room.resize(for_q + for_k + for_v + for_weights + rows * (TILE + d + 2) * sizeof(float) / sizeof(Lines) + 1);
    Lines *q = &room.data()->lines, *k = q + for_q, *v = k + for_k, *weights = v + for_v;
    float(*scores)[TILE] = (float(*)[TILE])(weights + for_weights);
    float *sums = scores[rows], *most = sums + rows * d, *total = most + rows;
    std::fill(sums, most, 0.0f);
    std::fill(most, total, -INFINITY);
    std::fill(total, total + rows, 0.0f);
    std::memset(q, 0, (char*)k - (char*)q);
    for (int64_t r = 0; r < part.rows; r++) {
        float row[MAX_HEAD];
        part.query(c, r, row);
        for (int64_t step = 0; step < steps; step++) {
            const Vec x[2] = {load(row + step * 32), load(row + step * 32 + 16)};
            split_line(x, q + r / 16 * PARTS * steps + step, steps, r % 16);
        }
    }

    const Shapes shapes;
    _tile_loadconfig(&shapes);
    const Cell* keys = static_cast<const Cell*>(c.keys) + part.head * c.C * d;
    const Cell* values = static_cast<const Cell*>(c.values) + part.head * c.C * d;
    for (int64_t at = 0; at < part.end; at += TILE) {
        const int count = static_cast<int>(std::min<int64_t>(TILE, part.end - at));
        keys_as_columns<HELD>(keys + at * d, count, d, k);
        values_as_columns<HELD>(values + at * d, count, d, v);
        const int64_t begin = part.first_to_see(at) / 16 * 16;
        for (int64_t r = begin; r < rows; r += 16) {
            float* to = scores[r];
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t step = 0; step < steps; step++)
                multiply<HELD>(q + r / 16 * PARTS * steps + step, steps, k + step * COLUMNS, steps * COLUMNS);
            _tile_stored(0, to, TILE * sizeof(float));
            _tile_stored(1, to + 16, TILE * sizeof(float));
            _tile_stored(2, to + 32, TILE * sizeof(float));
            _tile_stored(3, to + 48, TILE * sizeof(float));
        }
        for (int64_t r = begin; r < rows; r++) {
            const int seen = r < part.rows ? part.seen(r, at, count) : 0;
            weigh(scores[r], seen, d, most[r], total[r], sums + r * d, weights + r / 16 * 2 * PARTS, r % 16);
        }
        for (int64_t r = begin; r < rows; r += 16)
            for (int64_t i = 0; i < d; i += 64) {
                float* to = sums + r * d + i;
                _tile_loadd(0, to, d * sizeof(float));
                _tile_loadd(1, to + 16, d * sizeof(float));
                _tile_loadd(2, to + 32, d * sizeof(float));
                _tile_loadd(3, to + 48, d * sizeof(float));
                for (int half = 0; half < 2; half++)
                    multiply<HELD>(weights + r / 16 * 2 * PARTS + half, 2, v + half * (d / 16) + i / 16, 2 * (d / 16));
                _tile_stored(0, to, d * sizeof(float));
                _tile_stored(1, to + 16, d * sizeof(float));
                _tile_stored(2, to + 32, d * sizeof(float));
                _tile_stored(3, to + 48, d * sizeof(float));
            }
    }
    _tile_release();
    for (int64_t r = 0; r < part.rows; r++) part.answer(c, r, sums + r * d, total[r]);
}

void many_float(void* c, size_t index) { attend_many<float>(*static_cast<const Call*>(c), index); }
void many_codes(void* c, size_t index) { attend_many<int8_t>(*static_cast<const Call*>(c), index); }
