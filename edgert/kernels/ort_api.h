// The part of ONNX Runtime's C interface that a custom operator needs, declared by hand: its Python
// wheels bring the library without the header.
//
// Functions of OrtApi are only ever appended, so a place in the table is for good; these places
// hold from interface version 17 (KernelContext_ParallelFor) on.
// Source: include/onnxruntime/core/session/onnxruntime_c_api.h, github.com/microsoft/onnxruntime.

#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

constexpr uint32_t ORT_API_VERSION = 23;        // of the oldest ONNX Runtime that edgert takes
constexpr uint32_t ORT_CUSTOM_OP_VERSION = 18;  // the last that changed OrtCustomOp below

enum OrtErrorCode { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum OrtElementType { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_INT32 = 6, ORT_INT64 = 7 };
enum OrtCharacteristic { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };

struct OrtApi {
    void* table[275];

    template <typename... Arguments>
    OrtStatus* call(int place, Arguments... arguments) const {
        return reinterpret_cast<OrtStatus* (*)(Arguments...)>(table[place])(arguments...);
    }
    OrtStatus* status(OrtErrorCode code, const char* message) const {
        return call(0, code, message);
    }
    OrtStatus* create_domain(const char* name, OrtCustomOpDomain** out) const {
        return call(26, name, out);
    }
    OrtStatus* add_op(OrtCustomOpDomain* domain, const struct OrtCustomOp* op) const {
        return call(27, domain, op);
    }
    OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
        return call(28, options, domain);
    }
    OrtStatus* data(OrtValue* value, void** out) const { return call(51, value, out); }
    OrtStatus* rank(const OrtTensorTypeAndShapeInfo* info, size_t* out) const {
        return call(61, info, out);
    }
    OrtStatus* dims(const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t count) const {
        return call(62, info, out, count);
    }
    OrtStatus* shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) const {
        return call(65, value, out);
    }
    OrtStatus* attribute(const OrtKernelInfo* info, const char* name, float* out) const {
        return call(85, info, name, out);
    }
    OrtStatus* attribute(const OrtKernelInfo* info, const char* name, int64_t* out) const {
        return call(86, info, name, out);
    }
    OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** out) const {
        return call(90, context, index, out);
    }
    OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank,
                      OrtValue** out) const {
        return call(91, context, index, dims, rank, out);
    }
    void release(OrtStatus* status) const {
        reinterpret_cast<void (*)(OrtStatus*)>(table[93])(status);
    }
    void release(OrtTensorTypeAndShapeInfo* info) const {
        reinterpret_cast<void (*)(OrtTensorTypeAndShapeInfo*)>(table[99])(info);
    }
    // `batches` 0: as many as there are threads
    OrtStatus* parallel_for(const OrtKernelContext* context, void (*body)(void*, size_t),
                            size_t total, size_t batches, void* data) const {
        return call(274, context, body, total, batches, data);
    }
};

struct OrtApiBase {
    const OrtApi* (*GetApi)(uint32_t version);
    const char* (*GetVersionString)();
};

struct OrtCustomOp {
    uint32_t version;
    void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
    const char* (*GetName)(const OrtCustomOp*);
    const char* (*GetExecutionProviderType)(const OrtCustomOp*);
    OrtElementType (*GetInputType)(const OrtCustomOp*, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp*);
    OrtElementType (*GetOutputType)(const OrtCustomOp*, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp*);
    void (*KernelCompute)(void*, OrtKernelContext*);
    void (*KernelDestroy)(void*);
    OrtCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
    OrtCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
    int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp*);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
    OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
    OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
    int (*GetStartVersion)(const OrtCustomOp*);
    int (*GetEndVersion)(const OrtCustomOp*);
    size_t (*GetMayInplace)(int**, int**);
    void (*ReleaseMayInplace)(int*, int*);
    size_t (*GetAliasMap)(int**, int**);
    void (*ReleaseAliasMap)(int*, int*);
};
