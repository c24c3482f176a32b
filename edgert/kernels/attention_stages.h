// The work of a call, for the processor that the including file names: it includes this once for
// each, in a namespace of its own.
//
//   append   turn the new keys by their position and put them into the cache, with the values
//   attend   a part: CHUNK keys of one KV head for one group of rows. A row is the query of one
//            head of one token; the g heads that share keys lie side by side, so that what is
//            read is used for all. Softmax is kept online: largest score, sum, weighted values.
//
// Source: FlashAttention-2 (arXiv 2307.08691).

constexpr int AT_ONCE = WIDE == 16 ? 6 : 3;  // rows whose sums with four keys the registers hold

INLINE void turn(const Call& c, int64_t position, const float* x, float* y) {
    const float* cosine = c.cosines + position * c.half;
    const float* sine = c.sines + position * c.half;
    std::memcpy(y, x, c.d * sizeof(float));
    for (int64_t i = 0; i < c.half; i++) {
        const int64_t a = c.interleaved ? 2 * i : i, b = c.interleaved ? a + 1 : i + c.half;
        y[a] = x[a] * cosine[i] - x[b] * sine[i];
        y[b] = x[b] * cosine[i] + x[a] * sine[i];
    }
}

INLINE void keep(float* to, const float* from, const float*, int64_t d) {
    std::memcpy(to, from, d * sizeof(float));
}

INLINE void keep(int8_t* to, const float* from, const float* scale, int64_t d) {
    for (int64_t i = 0; i < d; i++) {
        const float code = std::nearbyint(from[i] * (1.0f / scale[i]));
        to[i] = static_cast<int8_t>(std::min(127.0f, std::max(-128.0f, code)));
    }
}

// Put the new keys (turned) and values of one KV head of one sequence into the cache.
template <typename Cell>
INLINE void append(const Call& c, int64_t index) {
    const int64_t b = index / c.m, h = index % c.m, past = c.past(b);
    Cell* keys = static_cast<Cell*>(c.keys) + index * c.C * c.d;
    Cell* values = static_cast<Cell*>(c.values) + index * c.C * c.d;
    if (c.past_k != c.keys)
        std::memcpy(keys, static_cast<const Cell*>(c.past_k) + index * c.C * c.d,
                    past * c.d * sizeof(Cell));
    if (c.past_v != c.values)
        std::memcpy(values, static_cast<const Cell*>(c.past_v) + index * c.C * c.d,
                    past * c.d * sizeof(Cell));
    const float* k_scale = c.k_scale ? c.k_scale + h * c.d : nullptr;
    const float* v_scale = c.v_scale ? c.v_scale + h * c.d : nullptr;
    float turned[MAX_HEAD];
    for (int64_t t = 0; t < c.T; t++) {
        const int64_t row = (b * c.T + t) * c.kv_width + h * c.d;
        turn(c, past + t, c.k + row, turned);
        keep(keys + (past + t) * c.d, turned, k_scale, c.d);
        keep(values + (past + t) * c.d, c.v + row, v_scale, c.d);
    }
}

// Scores of R rows with 4 keys: everything that is loaded is used 4 or R times.
template <int R, typename Cell>
INLINE void dots(const float* q, const Cell* keys, int64_t d, float* scores) {
    Vec total[R][4] = {};
    for (int64_t i = 0; i < d; i += WIDE) {
        Vec query[R];  // with 4 R sums and a key, sixteen registers, or 32
        for (int r = 0; r < R; r++) query[r] = load(q + r * d + i);
        for (int j = 0; j < 4; j++) {
            const Vec key = load(keys + j * d + i);
            for (int r = 0; r < R; r++) total[r][j] += query[r] * key;
        }
    }
    for (int r = 0; r < R; r++) {
        const Four four = sums(total[r]);
        std::memcpy(scores + r * TILE, &four, sizeof four);
    }
}

template <int R, typename Cell>
INLINE void score(const float* q, const Cell* keys, int count, int64_t d, float* scores) {
    int j = 0;
    for (; j + 4 <= count; j += 4) dots<R>(q, keys + j * d, d, scores + j);
    for (; j < count; j++)
        for (int r = 0; r < R; r++) {
            Vec total = {};
            for (int64_t i = 0; i < d; i += WIDE) total += load(q + r * d + i) * load(keys + j * d + i);
            scores[r * TILE + j] = sum(total);
        }
}

// The same with keys that lie channel by channel, [d, TILE]: no sum is over lanes.
template <int R>
INLINE void score_across(const float* q, const float* keys, int64_t d, float* scores) {
    constexpr int N = 4;
    for (int j = 0; j < TILE; j += N * WIDE) {
        Vec total[R][N] = {};
        for (int64_t i = 0; i < d; i++) {
            Vec key[N];
            for (int n = 0; n < N; n++) key[n] = load(keys + i * TILE + j + n * WIDE);
            for (int r = 0; r < R; r++)
                for (int n = 0; n < N; n++) total[r][n] += all(q[r * d + i]) * key[n];
        }
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++) store(scores + r * TILE + j + n * WIDE, total[r][n]);
    }
}

// Add weighted values, N vectors of channels of R rows.
template <int R, int N, typename Cell>
INLINE void mix(const float* weights, const Cell* values, int count, int64_t d, float* sums) {
    Vec total[R][N];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) total[r][i] = load(sums + r * d + i * WIDE);
    for (int j = 0; j < count; j++) {
        Vec weight[R];
        for (int r = 0; r < R; r++) weight[r] = all(weights[r * TILE + j]);
        for (int i = 0; i < N; i++) {
            const Vec value = load(values + j * d + i * WIDE);
            for (int r = 0; r < R; r++) total[r][i] += weight[r] * value;
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) store(sums + r * d + i * WIDE, total[r][i]);
}

template <int R, typename Cell>
INLINE void blend(const float* weights, const Cell* values, int count, int64_t d, float* sums) {
    int64_t i = 0;
    for (; i + 4 * WIDE <= d; i += 4 * WIDE) mix<R, 4>(weights, values + i, count, d, sums + i);
    for (; i < d; i += WIDE) mix<R, 1>(weights, values + i, count, d, sums + i);
}

// Softmax of R rows goes on over a tile; row r sees `seen[r]` of its keys, which lie channel by channel
// if ACROSS.
template <int R, bool ACROSS, typename Cell>
INLINE void tile(const float* q, const Cell* keys, const Cell* values, int count, int64_t d,
                 const int* seen, float* most, float* total, float* sums) {
    alignas(64) float scores[R * TILE];
    if constexpr (ACROSS)
        score_across<R>(q, keys, d, scores);
    else
        score<R>(q, keys, count, d, scores);
    for (int r = 0; r < R; r++) {
        float* s = scores + r * TILE;
        for (int j = seen[r]; j < TILE; j++) s[j] = -INFINITY;
        Vec top = load(s);
        for (int j = WIDE; j < TILE; j += WIDE) top = larger(load(s + j), top);
        float best = most[r];
        for (int j = 0; j < WIDE; j++) best = std::max(best, top[j]);
        if (!seen[r]) {
            for (int j = 0; j < TILE; j++) s[j] = 0;
            continue;
        }
        const float before = exponential(all(most[r] - best))[0] * (most[r] > -INFINITY);
        Vec added = {};
        for (int j = 0; j < TILE; j += WIDE) {
            const Vec x = load(s + j);
            Vec weight = exponential(x - all(best));
            weight = (Vec)((Ints)weight & (Ints)(x != all(-INFINITY)));
            store(s + j, weight);
            added += weight;
        }
        total[r] = total[r] * before + sum(added);
        most[r] = best;
        for (int64_t i = 0; i < d; i += WIDE) store(sums + r * d + i, load(sums + r * d + i) * all(before));
    }
    blend<R>(scores, values, count, d, sums);
}

// `tile` of as many rows.
template <int R, bool ACROSS, typename Cell>
INLINE void tiles(int rows, const float* q, const Cell* keys, const Cell* values, int count, int64_t d,
                  const int* seen, float* most, float* total, float* sums) {
    if (rows == R) return tile<R, ACROSS>(q, keys, values, count, d, seen, most, total, sums);
    if constexpr (R > 1) tiles<R - 1, ACROSS>(rows, q, keys, values, count, d, seen, most, total, sums);
}

INLINE const float* as_floats(const float* values, int64_t, float*) { return values; }
INLINE const float* as_floats(const int8_t* codes, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += WIDE) store(to + i, load(codes + i));
    return to;
}

// Keys [count, d] -> [d, TILE], zeros behind them.
template <typename Cell>
INLINE void turned_over(const Cell* keys, int count, int64_t d, float* to) {
    for (int64_t i = 0; i < d; i++) {
        for (int j = 0; j < count; j++) to[i * TILE + j] = keys[j * d + i];
        for (int j = count; j < TILE; j++) to[i * TILE + j] = 0;
    }
}

// The rows of one piece of the work, and the keys that they are attended with.
struct Part {
    int64_t g, number, block, head, b, h, from, to, past, rows, first, end;

    INLINE Part(const Call& c, int64_t index)
        : g(c.group()), number(index % c.parts), block(index / c.parts % c.blocks), head(index / c.parts / c.blocks) {
        b = head / c.m, h = head % c.m, from = block * c.tokens, to = std::min(c.T, from + c.tokens);
        past = c.past(b), rows = (to - from) * g, first = number * CHUNK;
        end = c.parts > 1 ? std::min(past + to, first + CHUNK) : past + to;
    }
    // Of `count` keys from `at` on.
    INLINE int seen(int64_t row, int64_t at, int count) const {
        return static_cast<int>(std::clamp<int64_t>(past + from + row / g + 1 - at, 0, count));
    }
    // The first row that sees a key from `at` on.
    INLINE int64_t first_to_see(int64_t at) const { return std::clamp<int64_t>((at - past - from) * g, 0, rows); }
    INLINE void query(const Call& c, int64_t row, float* to) const {
        const int64_t t = from + row / g;
        turn(c, past + t, c.q + (b * c.T + t) * c.q_width + (h * g + row % g) * c.d, to);
        for (int64_t j = 0; j < c.d; j++) to[j] *= c.k_scale ? c.scale * c.k_scale[h * c.d + j] : c.scale;
    }
    INLINE void answer(const Call& c, int64_t row, const float* sums, float total) const {
        float* out = c.out + ((b * c.T + from + row / g) * c.n + h * g + row % g) * c.d;
        const float over = 1.0f / total;
        for (int64_t i = 0; i < c.d; i++) out[i] = sums[i] * over * (c.v_scale ? c.v_scale[h * c.d + i] : 1.0f);
    }
};

template <typename Cell>
INLINE void attend(const Call& c, int64_t index) {
    const Part part(c, index);
    const int64_t d = c.d, rows = part.rows;
    const bool many = c.many();  // what they read is made ready once for all
    scratch.resize(rows * (2 * d + 2) + (many ? 2 * TILE * d : 0));
    float *q = scratch.data(), *sums = q + rows * d, *most = sums + rows * d, *total = most + rows;
    float *some_keys = total + rows, *some_values = some_keys + TILE * d;
    std::fill(sums, most, 0.0f);
    std::fill(most, total, -INFINITY);
    std::fill(total, total + rows, 0.0f);
    for (int64_t r = 0; r < rows; r++) part.query(c, r, q + r * d);

    const Cell* keys = static_cast<const Cell*>(c.keys) + part.head * c.C * d;
    const Cell* values = static_cast<const Cell*>(c.values) + part.head * c.C * d;
    for (int64_t at = part.first; at < part.end; at += TILE) {
        const int count = static_cast<int>(std::min<int64_t>(TILE, part.end - at));
        const auto all_rows = [&](const auto across, const auto* k, const auto* v) __attribute__((always_inline)) {
            for (int64_t r = 0; r < rows; r += AT_ONCE) {
                const int left = static_cast<int>(std::min<int64_t>(AT_ONCE, rows - r));
                int seen[AT_ONCE];
                for (int i = 0; i < left; i++) seen[i] = part.seen(r + i, at, count);
                if (seen[left - 1])
                    tiles<AT_ONCE, across.value>(left, q + r * d, k, v, count, d, seen, most + r, total + r,
                                                 sums + r * d);
            }
        };
        if (many) {
            turned_over(keys + at * d, count, d, some_keys);
            all_rows(std::true_type(), some_keys, as_floats(values + at * d, count * d, some_values));
        } else {
            all_rows(std::false_type(), keys + at * d, values + at * d);
        }
    }

    if (c.parts > 1) {
        float* to_merge = c.partial + index * c.stride();
        std::memcpy(to_merge, sums, rows * (d + 2) * sizeof(float));
        return;
    }
    for (int64_t r = 0; r < rows; r++) part.answer(c, r, sums + r * d, total[r]);
}

void append_float(void* c, size_t index) { append<float>(*static_cast<const Call*>(c), index); }
void append_codes(void* c, size_t index) { append<int8_t>(*static_cast<const Call*>(c), index); }
void attend_float(void* c, size_t index) { attend<float>(*static_cast<const Call*>(c), index); }
void attend_codes(void* c, size_t index) { attend<int8_t>(*static_cast<const Call*>(c), index); }
