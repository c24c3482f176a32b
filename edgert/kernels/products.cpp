// Products with weights of 4 or 8 bits in blocks, as one ONNX Runtime operator: the inputs, outputs
// and attributes of com.microsoft.MatMulNBits with scales in float32.
//
// Activations are rounded to 16 bits, a row at a time by its largest; codes become 16 bits as they
// are read, so that one instruction multiplies and adds pairs of them, twice as many as of floats.
// Weights are used as they lie in the file: nothing is packed when a model is loaded, and the pages
// are those of the file. A row's result does not depend on the number of rows, nor of threads, bit
// for bit: a prompt read at once and a token at a time agree.
//
// Processors that multiply bytes by an instruction of their own (VNNI, or those of Arm) do better
// with ONNX Runtime's kernels, which use it: see edgert_products.
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

constexpr int64_t ALONE = 1 << 16;  // products; below, waking a thread costs more than they do
constexpr int64_t FEW = 8;          // rows for which reading the weights takes longest

// Of the thread that called: sessions may run side by side.
thread_local std::vector<int16_t> rounded;
thread_local std::vector<float> steps;

#define STAGES "products_stages.h"
#include "avx2_processor.h"

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

        const int64_t padded = c.groups * GROUP;
        if (static_cast<int64_t>(rounded.size()) < c.M * padded) rounded.resize(c.M * padded);
        if (static_cast<int64_t>(steps.size()) < c.M) steps.resize(c.M);
        c.rounded = rounded.data(), c.steps = steps.data();
        const bool alone = c.M * N * K < ALONE;
        TRY(each_piece(*api, context, bits == 4 ? avx2::round_split : avx2::round_straight, c.M,
                       alone || c.M < FEW, &c));
        c.chunk = c.M;
        c.panel = c.M < FEW ? 16 : 32;
        c.panels = (N + c.panel - 1) / c.panel;
        if (c.M > 2 * ROWS_AT_ONCE) {  // parts of the rows, if the columns are few
            const int64_t parts = std::max<int64_t>(1, std::min(c.M / 64, 32 / c.panels));
            c.chunk = (c.M + parts - 1) / parts;
        }
        const int64_t pieces = c.panels * ((c.M + c.chunk - 1) / c.chunk);
        return each_piece(*api, context, bits == 4 ? avx2::multiply_4 : avx2::multiply_8, pieces, alone,
                          &c, c.M < FEW ? 0 : pieces);
    }
};

const Operator<Products> products;

}  // namespace

OrtStatus* register_products(const OrtApi& api, OrtCustomOpDomain* domain) {
    return AVX2 ? api.add_op(domain, &products) : nullptr;
}

// Whether this processor is one for which these products are the faster ones.
extern "C" __attribute__((visibility("default"))) int edgert_products() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool vnni = __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;  // that of AVX2
    return AVX2 && !vnni && !__builtin_cpu_supports("avx512f");
}

#else

OrtStatus* register_products(const OrtApi&, OrtCustomOpDomain*) { return nullptr; }

extern "C" __attribute__((visibility("default"))) int edgert_products() { return 0; }

#endif
