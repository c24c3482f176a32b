// Attention of new tokens over a KV cache, as one ONNX Runtime operator: the inputs, outputs and
// attributes of com.microsoft.GroupQueryAttention, for keys and values in float32 or int8.
//
// A decode step is bounded by reading the cache; this reads it once, in place, for all query heads
// that share it, where ONNX Runtime's kernel multiplies one matrix of a single row for each head.
// The keys of a step are split into parts of the same size whatever the number of threads, so that
// the bits of a result do not depend on it.
//
// Sources: Flash-Decoding (Dao et al. 2023) for the split over keys; the operator: onnxruntime
// docs/ContribOperators.md.

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "attention_call.h"
#include "operator.h"
#include "processor.h"
#include "registered.h"

namespace {

constexpr int64_t ALONE = 768;  // below so many keys in all, waking a thread costs more than it does

// Of the thread that called: sessions may run side by side.
thread_local std::vector<float> scratch, partials;

#define STAGES "attention_stages.h"
#include "each_processor.h"

#ifdef EDGERT_HAS_AMX
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")
namespace avx512 {
#include "transpose.h"
#include "amx.h"
#include "attention_tiles.h"
}
#pragma GCC pop_options
#endif

typedef void (*Stage)(void*, size_t);

bool by_tiles(const Call& c) {
#ifdef EDGERT_HAS_AMX
    return AMX && c.many() && c.d % 64 == 0 && c.d <= 256;
#else
    return false;
#endif
}

// The way to attend that this processor has for such a call.
template <bool CODES>
Stage attending(const Call& c) {
#ifdef EDGERT_HAS_AMX
    if (by_tiles(c)) return CODES ? avx512::many_codes : avx512::many_float;
#endif
#ifdef EDGERT_HAS_AVX2
    if (AVX2 && c.d % avx512::WIDE) return CODES ? avx2::attend_codes : avx2::attend_float;
#endif
    return CODES ? CHOSEN(attend_codes) : CHOSEN(attend_float);
}

// Parts of the keys -> the result, for one KV head; a decode step's rows are those of one token.
void merge(const Call& c, int64_t head) {
    const int64_t g = c.group(), d = c.d, b = head / c.m, h = head % c.m;
    const float* first = c.partial + head * c.parts * c.stride();
    for (int64_t r = 0; r < g; r++) {
        float* out = c.out + (b * c.n + h * g + r) * d;
        std::fill(out, out + d, 0.0f);
        float best = -INFINITY, total = 0;
        for (int64_t p = 0; p < c.parts; p++) best = std::max(best, first[p * c.stride() + g * d + r]);
        for (int64_t p = 0; p < c.parts; p++) {
            const float *sums = first + p * c.stride() + r * d, *most = first + p * c.stride() + g * d + r;
            const float weight = *most == -INFINITY ? 0.0f : std::exp(*most - best);
            total += weight * most[g];
            for (int64_t i = 0; i < d; i++) out[i] += weight * sums[i];
        }
        for (int64_t i = 0; i < d; i++) out[i] *= (c.v_scale ? c.v_scale[h * d + i] : 1.0f) / total;
    }
}

template <bool CODES>
struct Attention {
    static constexpr const char* name = "GroupQueryAttention";
    static constexpr size_t inputs = 14, outputs = 3;
    static constexpr OrtElementType cell = CODES ? ORT_INT8 : ORT_FLOAT;

    static Port input(size_t index) {
        switch (index) {
            case 0: return {ORT_FLOAT};
            case 3: case 4: return {cell, ORT_OPTIONAL};
            case 5: case 6: return {ORT_INT32, ORT_OPTIONAL};
            case 9: return {ORT_INT64, ORT_OPTIONAL};
            default: return {ORT_FLOAT, ORT_OPTIONAL};
        }
    }
    static Port output(size_t index) { return {index ? cell : ORT_FLOAT}; }

    const OrtApi* api = nullptr;
    int64_t query_heads = 0, kv_heads = 0;
    bool rotary = false, interleaved = false;
    float scale = 0;

    OrtStatus* create(const OrtApi& api, const OrtKernelInfo* info) {
        const auto whole = [&](const char* name, int64_t otherwise) {
            return attribute<int64_t>(api, info, name, otherwise);
        };
        query_heads = whole("num_heads", 0);
        kv_heads = whole("kv_num_heads", 0);
        rotary = whole("do_rotary", 0);
        interleaved = whole("rotary_interleaved", 0);
        scale = attribute(api, info, "scale", 0.0f);
        if (query_heads < 1 || kv_heads < 1 || query_heads % kv_heads)
            return api.status(ORT_INVALID_ARGUMENT, "the numbers of heads do not fit each other");
        if (whole("local_window_size", -1) != -1 || attribute(api, info, "softcap", 0.0f) != 0 ||
            whole("smooth_softmax", 0) > 0 || whole("qk_output", 0) != 0)
            return api.status(ORT_INVALID_ARGUMENT, "an attribute that this operator does not have");
        return nullptr;
    }

    OrtStatus* compute(OrtKernelContext* context) const;
};

template <bool CODES>
OrtStatus* Attention<CODES>::compute(OrtKernelContext* context) const {
    const auto refuse = [&] { return refused(*api); };
    const auto in = [&](size_t index, const auto** data, Shape* shape = nullptr) {
        return read(*api, context, index, data, shape);
    };
    Call c{};
    Shape query, key, value, past, past_v, table, sines, last, scales, v_scales;
    TRY(in(0, &c.q, &query));
    TRY(in(1, &c.k, &key));
    TRY(in(2, &c.v, &value));
    TRY(in(3, &c.past_k, &past));
    TRY(in(4, &c.past_v, &past_v));
    TRY(in(5, &c.last, &last));
    TRY(in(7, &c.cosines, &table));
    TRY(in(8, &c.sines, &sines));
    TRY(in(12, &c.k_scale, &scales));
    TRY(in(13, &c.v_scale, &v_scales));
    for (size_t index : {9, 10, 11}) {  // positions, a bias, a sink
        const void* given = nullptr;
        TRY(in(index, &given));
        if (given) return refuse();
    }

    c.n = query_heads, c.m = kv_heads;
    if (query.rank != 3 || past.rank != 4 || !c.past_v || !c.last) return refuse();
    if (!(past == past_v)) return refuse();
    c.B = query.dims[0], c.T = query.dims[1], c.C = past.dims[2], c.d = past.dims[3];
    if (past.dims[0] != c.B || past.dims[1] != c.m || c.d % WIDE || c.d < WIDE || c.d > MAX_HEAD)
        return refuse();
    if (c.k) {
        c.q_width = c.n * c.d, c.kv_width = c.m * c.d;
        const Shape wanted{{c.B, c.T, c.kv_width}, 3};
        if (!c.v || !(key == wanted) || !(value == wanted)) return refuse();
    } else {  // packed: q | k | v
        c.q_width = c.kv_width = (c.n + 2 * c.m) * c.d;
        c.k = c.q + c.n * c.d, c.v = c.k + c.m * c.d;
    }
    if (query.dims[2] != c.q_width || (last.rank ? last.dims[0] : 1) != c.B) return refuse();
    if (rotary) {
        if (!c.cosines || !c.sines || !(table == sines) || table.rank != 2 || 2 * table.dims[1] > c.d) return refuse();
        c.half = table.dims[1];
    }
    const Shape channels{{1, c.m, 1, c.d}, 4};
    if (CODES && (!c.k_scale || !c.v_scale || !(scales == channels) || !(v_scales == channels)))
        return refuse();
    for (int64_t b = 0; b < c.B; b++) {
        const int64_t end = c.past(b) + c.T;
        if (end > c.C || (rotary && end > table.dims[0])) return refuse();
    }
    c.interleaved = interleaved;
    c.scale = scale ? scale : 1.0f / std::sqrt(static_cast<float>(c.d));

    TRY(write(*api, context, 0, Shape{{c.B, c.T, c.n * c.d}, 3}, &c.out));
    TRY(write(*api, context, 1, past, &c.keys));
    TRY(write(*api, context, 2, past, &c.values));
    if (!c.B || !c.T) return nullptr;

    int64_t length = 0;
    for (int64_t b = 0; b < c.B; b++) length = std::max(length, c.past(b) + c.T);
    c.tokens = std::max<int64_t>(1, (by_tiles(c) ? MANY_ROWS : ROWS) / c.group());
    c.blocks = (c.T + c.tokens - 1) / c.tokens;
    c.parts = 1;
    if (c.T == 1) {
        c.tokens = 1;
        c.parts = (length + CHUNK - 1) / CHUNK;
    }
    const int64_t heads = c.B * c.m, pieces = heads * c.blocks * c.parts;
    if (c.parts > 1) {
        partials.resize(pieces * c.stride());
        c.partial = partials.data();
    }

    const auto run = [&](Stage stage, int64_t count, bool alone) -> OrtStatus* {
        return each_piece(*api, context, stage, count, alone, &c);
    };
    TRY(run(CODES ? CHOSEN(append_codes) : CHOSEN(append_float), heads, c.T < 16));
    TRY(run(attending<CODES>(c), pieces, heads * c.T * length < ALONE));
    if (c.parts > 1)
        for (int64_t i = 0; i < heads; i++) merge(c, i);
    return nullptr;
}

const Operator<Attention<false>> floats;
const Operator<Attention<true>> codes;

}  // namespace

OrtStatus* register_attention(const OrtApi& api, OrtCustomOpDomain* domain) {
    TRY(api.add_op(domain, &floats));
    return api.add_op(domain, &codes);
}
