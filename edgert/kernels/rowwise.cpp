// Operators on rows: RMSNorm, residual addition with RMSNorm, and the gate of SwiGLU.
//
// In a decode step there is one row, which takes a microsecond or two; each node of ONNX Runtime's
// takes more than that to be called. So what three or four nodes do, one does.
//
//   SimplifiedLayerNormalization      the inputs and outputs of ONNX Runtime's
//   SkipSimplifiedLayerNormalization  those of com.microsoft
//   GatedSilu                         x [..., 2 F] -> silu(x[..., :F]) * x[..., F:]; its axis is the last
//
// Sources: RMSNorm (arXiv 1910.07467), SwiGLU (arXiv 2002.05202); onnxruntime docs/ContribOperators.md.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "operator.h"
#include "processor.h"
#include "registered.h"

namespace {

constexpr int WIDE = 8;           // floats in a vector
constexpr int64_t PIECE = 16384;  // numbers that one thread takes at once; below, it stays alone

// One call: `count` rows of `width` numbers in pieces of whole rows.
struct Rows {
    const float *x, *skip, *weight;
    float *y, *total;
    int64_t count, width, skip_rows, each;
    float epsilon;

    int64_t first(size_t piece) const {
        return std::min<int64_t>(count, static_cast<int64_t>(piece) * each);
    }
};

#define STAGES "rowwise_stages.h"
#include "each_processor.h"

OrtStatus* run(const OrtApi& api, const OrtKernelContext* context, void (*stage)(void*, size_t),
               Rows& rows) {
    if (!rows.count || !rows.width) return nullptr;
    rows.each = std::max<int64_t>(1, PIECE / rows.width);
    const int64_t pieces = (rows.count + rows.each - 1) / rows.each;
    return each_piece(api, context, stage, pieces, pieces == 1, &rows);
}

struct Epsilon {
    const OrtApi* api = nullptr;
    float epsilon = 0;

    OrtStatus* create(const OrtApi& api, const OrtKernelInfo* info) {
        epsilon = attribute(api, info, "epsilon", 1e-5f);
        if (attribute<int64_t>(api, info, "axis", -1) != -1)
            return api.status(ORT_INVALID_ARGUMENT, "only the last axis is normed");
        return nullptr;
    }
};

struct Norm : Epsilon {
    static constexpr const char* name = "SimplifiedLayerNormalization";
    static constexpr size_t inputs = 2, outputs = 1;
    static Port input(size_t) { return {ORT_FLOAT}; }
    static Port output(size_t) { return {ORT_FLOAT}; }

    OrtStatus* compute(OrtKernelContext* context) const {
        Rows rows{};
        Shape x, weight;
        TRY(read(*api, context, 0, &rows.x, &x));
        TRY(read(*api, context, 1, &rows.weight, &weight));
        rows.width = x.last();
        if (weight.count() != rows.width) return refused(*api);
        rows.count = rows.width ? x.count() / rows.width : 0;
        rows.epsilon = epsilon;
        TRY(write(*api, context, 0, x, &rows.y));
        return run(*api, context, CHOSEN(norm), rows);
    }
};

struct SkipNorm : Epsilon {
    static constexpr const char* name = "SkipSimplifiedLayerNormalization";
    static constexpr size_t inputs = 4, outputs = 4;
    static Port input(size_t i) { return {ORT_FLOAT, i == 3 ? ORT_OPTIONAL : ORT_REQUIRED}; }
    static Port output(size_t i) { return {ORT_FLOAT, i ? ORT_OPTIONAL : ORT_REQUIRED}; }

    OrtStatus* compute(OrtKernelContext* context) const {
        Rows rows{};
        Shape x, skip, weight;
        const float* bias = nullptr;
        TRY(read(*api, context, 0, &rows.x, &x));
        TRY(read(*api, context, 1, &rows.skip, &skip));
        TRY(read(*api, context, 2, &rows.weight, &weight));
        TRY(read(*api, context, 3, &bias));
        rows.width = x.last();
        if (bias || weight.count() != rows.width || skip.last() != rows.width) return refused(*api);
        rows.count = rows.width ? x.count() / rows.width : 0;
        rows.skip_rows = rows.width ? skip.count() / rows.width : 0;
        if (rows.count && (!rows.skip_rows || rows.count % rows.skip_rows)) return refused(*api);
        rows.epsilon = epsilon;
        TRY(write(*api, context, 0, x, &rows.y));
        TRY(write(*api, context, 3, x, &rows.total));
        return run(*api, context, CHOSEN(skip_norm), rows);
    }
};

struct GatedSilu {
    static constexpr const char* name = "GatedSilu";
    static constexpr size_t inputs = 1, outputs = 1;
    static Port input(size_t) { return {ORT_FLOAT}; }
    static Port output(size_t) { return {ORT_FLOAT}; }

    const OrtApi* api = nullptr;
    int64_t axis = -1;

    OrtStatus* create(const OrtApi& api, const OrtKernelInfo* info) {
        axis = attribute<int64_t>(api, info, "axis", -1);
        return nullptr;
    }

    OrtStatus* compute(OrtKernelContext* context) const {
        Rows rows{};
        Shape x;
        TRY(read(*api, context, 0, &rows.x, &x));
        const int64_t last = static_cast<int64_t>(x.rank) - 1;
        if (last < 0 || (axis != -1 && axis != last) || x.last() % 2) return refused(*api);
        rows.width = x.last() / 2;
        rows.count = rows.width ? x.count() / x.last() : 0;
        x.dims[last] = rows.width;
        TRY(write(*api, context, 0, x, &rows.y));
        return run(*api, context, CHOSEN(gate), rows);
    }
};

const Operator<Norm> norm;
const Operator<SkipNorm> skip_norm;
const Operator<GatedSilu> gated_silu;

}  // namespace

OrtStatus* register_rowwise(const OrtApi& api, OrtCustomOpDomain* domain) {
    TRY(api.add_op(domain, &norm));
    TRY(api.add_op(domain, &skip_norm));
    return api.add_op(domain, &gated_silu);
}
