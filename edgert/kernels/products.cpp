// Products with weights of 4 or 8 bits in blocks, as one ONNX Runtime operator: the inputs, outputs
// and attributes of com.microsoft.MatMulNBits with scales in float32.
//
// Activations are rounded to 16 bits, a row at a time by its largest. Weights are used as they lie in
// the file: nothing is packed when a model is loaded, and the pages are those of the file. A row's
// result does not depend on the number of rows, nor of threads, bit for bit: a prompt read at once
// and a token at a time agree. Only AMX has another way, of bfloat16, for more than 17 rows.
//
// There are ways for processors with AVX2 (products_avx2.h), with AVX-512 and VNNI
// (products_vnni.h), and with AMX beside them (products_tiles.h). On others ONNX Runtime's kernels
// do better: see edgert_products.
//
// Source of the operator: onnxruntime docs/ContribOperators.md.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "operator.h"
#include "processor.h"
#include "products_call.h"
#include "registered.h"

#ifdef EDGERT_HAS_AVX2

namespace {

#define STAGES "products_avx2.h"
#include "avx2_processor.h"

#pragma GCC push_options
#ifdef EDGERT_HAS_AMX
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16")
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
namespace avx512 {
#include "transpose.h"
#include "products_vnni.h"
#include "products_panels.h"
#ifdef EDGERT_HAS_AMX
#include "amx.h"
#include "products_tiles.h"
#endif
}
#pragma GCC pop_options

constexpr int64_t ALONE = 1 << 16;  // products; below, waking a thread costs more than they do

// How a call is done: first each row, then each piece of the result.
struct Way {
    void (*round[2])(void*, size_t);  // of 4 bits, of 8
    void (*multiply[2])(void*, size_t);
    int64_t (*room)(const Call&);     // bytes that the rounded rows take
    int64_t panel;                    // columns of a piece
    bool parts;                       // a piece may be of some of the rows
};

// For `lines` rows at once, which take so many bytes for `groups` groups.
int64_t room_of(const Call& c, int64_t lines, int64_t groups, int64_t bytes) {
    return (c.M + lines - 1) / lines * ((c.groups + groups - 1) / groups) * bytes;
}

#define STAGES_OF(space, stage) {space::stage##_4, space::stage##_8}
#define ROOM_OF(lines, groups, type) [](const Call& c) { return room_of(c, lines, groups, sizeof(type)); }
const Way AVX2_FEW{STAGES_OF(avx2, round), STAGES_OF(avx2, multiply), ROOM_OF(1, 1, int16_t[GROUP]), 16, false};
const Way AVX2_MANY{STAGES_OF(avx2, round), STAGES_OF(avx2, multiply), ROOM_OF(1, 1, int16_t[GROUP]), 32, true};
const Way FEW{STAGES_OF(avx512, round_few), STAGES_OF(avx512, few), ROOM_OF(1, 4, avx512::Unit), 16, false};
const Way PANELS{STAGES_OF(avx512, round_panels), STAGES_OF(avx512, panels), ROOM_OF(16, 1, avx512::Sixteen),
                 16 * avx512::PANELS, false};
#ifdef EDGERT_HAS_AMX
const Way TILES{STAGES_OF(avx512, round_tiles), STAGES_OF(avx512, tiles), ROOM_OF(32, 1, avx512::Lines[2]), 32, false};
#endif

const bool VNNI = AVX512 && __builtin_cpu_supports("avx512vnni");

// Those of AVX2 alone are used where ONNX Runtime has no instruction of the processor's own for these
// products, or if EDGERT_NATIVE asks for them.
bool faster() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool vnni = __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;  // with vectors of AVX2
    return VNNI || (AVX2 && (limited("avx2") || !(vnni || __builtin_cpu_supports("avx512f"))));
}

// A row's bits are the same by FEW and PANELS, and by both of AVX2.
const Way& way(int64_t rows) {
    if (!VNNI) return rows < 8 ? AVX2_FEW : AVX2_MANY;
    if (rows <= 17) return FEW;  // as many as speculation checks in a step: the bits of single ones
#ifdef EDGERT_HAS_AMX
    if (AMX) return TILES;
#endif
    return PANELS;
}

// Of the thread that called: sessions may run side by side.
thread_local std::vector<int32_t> rounded;
thread_local std::vector<float> steps;

struct Products {
    static constexpr const char* name = "MatMulNBits";
    static constexpr size_t inputs = 4, outputs = 1;
    static Port input(size_t i) {
        switch (i) {
            case 1: return {ORT_UINT8};
            case 3: return {ORT_UINT8, ORT_OPTIONAL};
            default: return {ORT_FLOAT};
        }
    }
    static Port output(size_t) { return {ORT_FLOAT}; }

    const OrtApi* api = nullptr;
    int64_t K = 0, N = 0, bits = 0, block = 0;

    OrtStatus* create(const OrtApi& api, const OrtKernelInfo* info) {
        K = attribute<int64_t>(api, info, "K", 0);
        N = attribute<int64_t>(api, info, "N", 0);
        bits = attribute<int64_t>(api, info, "bits", 4);
        block = attribute<int64_t>(api, info, "block_size", 0);
        constexpr int64_t most = std::numeric_limits<int32_t>::max();
        if (K < 1 || K > most || N < 1 || N > most || (bits != 4 && bits != 8) || block < GROUP ||
            block > MAX_BLOCK || block % GROUP)
            return api.status(ORT_INVALID_ARGUMENT, "sizes that this operator does not have");
        return nullptr;
    }

    OrtStatus* compute(OrtKernelContext* context) const {
        Call c{};
        Shape x, codes, scales, zeros;
        TRY(read(*api, context, 0, &c.x, &x));
        TRY(read(*api, context, 1, &c.codes, &codes));
        TRY(read(*api, context, 2, &c.scales, &scales));
        TRY(read(*api, context, 3, &c.zeros, &zeros));
        c.K = K, c.N = N;
        c.each = block / GROUP;
        c.blocks = (K + block - 1) / block;
        c.groups = c.blocks * c.each;
        c.zero_bytes = (c.blocks * bits + 7) / 8;
        c.middle = 1 << (bits - 1);
        if (!x.rank || x.last() != K || codes.count() != N * c.groups * (GROUP / 8) * bits ||
            scales.count() != N * c.blocks || (c.zeros && zeros.count() != N * c.zero_bytes))
            return refused(*api);
        c.M = x.count() / K;
        x.dims[x.rank - 1] = N;
        TRY(write(*api, context, 0, x, &c.y));
        if (!c.M) return nullptr;

        const Way& by = way(c.M);
        const int64_t room = by.room(c) / sizeof(int32_t) + LINE / sizeof(int32_t);
        if (static_cast<int64_t>(rounded.size()) < room) rounded.resize(room);
        if (static_cast<int64_t>(steps.size()) < c.M) steps.resize(c.M);
        const uintptr_t begin = reinterpret_cast<uintptr_t>(rounded.data());
        c.rounded = reinterpret_cast<void*>((begin + LINE - 1) / LINE * LINE), c.steps = steps.data();
        const bool alone = c.M * N * K < ALONE, few = c.M < 8;  // reading the weights takes longest
        TRY(each_piece(*api, context, by.round[bits == 8], c.M, alone || few, &c));
        c.chunk = c.M;
        c.panel = by.panel;
        c.panels = (N + c.panel - 1) / c.panel;
        if (by.parts && c.M > 2 * ROWS_AT_ONCE) {  // if the columns are few
            const int64_t parts = std::max<int64_t>(1, std::min(c.M / 64, 32 / c.panels));
            c.chunk = (c.M + parts - 1) / parts;
        }
        const int64_t pieces = c.panels * ((c.M + c.chunk - 1) / c.chunk);
        return each_piece(*api, context, by.multiply[bits == 8], pieces, alone, &c, few ? 0 : pieces);
    }
};

const Operator<Products> products;

}  // namespace

OrtStatus* register_products(const OrtApi& api, OrtCustomOpDomain* domain) {
    return AVX2 ? api.add_op(domain, &products) : nullptr;
}

// Whether this processor is one for which these products are the faster ones.
extern "C" __attribute__((visibility("default"))) int edgert_products() { return faster(); }

#else

OrtStatus* register_products(const OrtApi&, OrtCustomOpDomain*) { return nullptr; }

extern "C" __attribute__((visibility("default"))) int edgert_products() { return 0; }

#endif
