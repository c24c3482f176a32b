// What every operator here needs of ONNX Runtime, beyond its declarations: inputs with their shapes,
// attributes with a default, and the table of functions that describes an operator.

#pragma once

#include <cstdint>
#include <cstring>

#include "ort_api.h"

#define TRY(expression) \
    if (OrtStatus* failed = (expression)) return failed

struct Shape {
    int64_t dims[4] = {};
    size_t rank = 0;

    int64_t count() const {
        int64_t product = 1;
        for (size_t i = 0; i < rank; i++) product *= dims[i];
        return product;
    }
    bool operator==(const Shape& other) const {
        return rank == other.rank && !std::memcmp(dims, other.dims, sizeof dims);
    }
    int64_t last() const { return rank ? dims[rank - 1] : 1; }
};

inline OrtStatus* refused(const OrtApi& api) {
    return api.status(ORT_INVALID_ARGUMENT, "a shape or a position that this operator does not take");
}

// The data of an input and its shape; null for one that is left out.
template <typename T>
OrtStatus* read(const OrtApi& api, const OrtKernelContext* context, size_t index, const T** data,
                Shape* shape = nullptr) {
    const OrtValue* value = nullptr;
    *data = nullptr;
    TRY(api.input(context, index, &value));
    if (!value) return nullptr;
    void* found = nullptr;
    TRY(api.data(const_cast<OrtValue*>(value), &found));
    *data = static_cast<const T*>(found);
    if (!shape) return nullptr;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    TRY(api.shape(value, &info));
    OrtStatus* failed = api.rank(info, &shape->rank);
    if (!failed && shape->rank > 4) failed = refused(api);
    if (!failed) failed = api.dims(info, shape->dims, shape->rank);
    api.release(info);
    return failed;
}

// Where to write an output; null for one that nobody reads.
template <typename T>
OrtStatus* write(const OrtApi& api, OrtKernelContext* context, size_t index, const Shape& shape,
                 T** data) {
    OrtValue* value = nullptr;
    *data = nullptr;
    TRY(api.output(context, index, shape.dims, shape.rank, &value));
    if (!value) return nullptr;
    void* found = nullptr;
    TRY(api.data(value, &found));
    *data = static_cast<T*>(found);
    return nullptr;
}

template <typename T>
T attribute(const OrtApi& api, const OrtKernelInfo* info, const char* name, T otherwise) {
    if (OrtStatus* missing = api.attribute(info, name, &otherwise)) api.release(missing);
    return otherwise;
}

// The pieces of a call: in this thread if they are so little that waking another costs more, else
// side by side, in `batches` parts (0: as many as there are threads).
inline OrtStatus* each_piece(const OrtApi& api, const OrtKernelContext* context,
                             void (*stage)(void*, size_t), int64_t count, bool alone, void* call,
                             int64_t batches = 0) {
    if (!alone) return api.parallel_for(context, stage, count, batches, call);
    for (int64_t i = 0; i < count; i++) stage(call, i);
    return nullptr;
}

struct Port {
    OrtElementType type;
    OrtCharacteristic kind = ORT_REQUIRED;
};

// An operator whose kernel is a `Kernel`: it has `name`, `inputs`, `outputs`, the functions
// `input(index)` and `output(index)` for its ports, `create`, which sets it up by the attributes,
// and `compute`. All calls share the kernel, and may come side by side.
template <typename Kernel>
struct Operator : OrtCustomOp {
    Operator() : OrtCustomOp{} {
        version = ORT_CUSTOM_OP_VERSION;
        GetName = [](const OrtCustomOp*) { return Kernel::name; };
        GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
        GetInputType = [](const OrtCustomOp*, size_t i) { return Kernel::input(i).type; };
        GetInputTypeCount = [](const OrtCustomOp*) { return Kernel::inputs; };
        GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return Kernel::input(i).kind; };
        GetOutputType = [](const OrtCustomOp*, size_t i) { return Kernel::output(i).type; };
        GetOutputTypeCount = [](const OrtCustomOp*) { return Kernel::outputs; };
        GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) { return Kernel::output(i).kind; };
        GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
        GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
        GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
        GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
        GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
        GetStartVersion = [](const OrtCustomOp*) { return 1; };
        GetEndVersion = [](const OrtCustomOp*) { return 1; };
        CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info,
                            void** out) -> OrtStatus* {
            Kernel kernel;
            TRY(kernel.create(*api, info));
            kernel.api = api;
            *out = new Kernel(kernel);
            return nullptr;
        };
        KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
            return static_cast<const Kernel*>(kernel)->compute(context);
        };
        KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    }
};
