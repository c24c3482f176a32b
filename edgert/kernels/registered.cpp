#include "registered.h"

#include <cstdlib>

#include "operator.h"
#include "processor.h"

// What ONNX Runtime calls when the library is given to a session.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(ORT_API_VERSION);
    if (!api) std::abort();  // nothing else could say it; Python looks at the version before
    static OrtCustomOpDomain* domain = nullptr;  // one for all sessions, as long as the process
    if (!domain) {
        OrtCustomOpDomain* fresh = nullptr;
        TRY(api->create_domain("edgert.kernel", &fresh));
        TRY(register_attention(*api, fresh));
        TRY(register_rowwise(*api, fresh));
        TRY(register_products(*api, fresh));
        domain = fresh;
    }
    return api->add_domain(options, domain);
}

// The newest instructions of this processor that are used, as a person names them.
extern "C" __attribute__((visibility("default"))) const char* edgert_instructions() {
#ifdef EDGERT_HAS_AMX
    if (AMX) return "AVX-512 and AMX";
#endif
#ifdef EDGERT_HAS_AVX2
    if (AVX512) return "AVX-512";
    if (AVX2) return "AVX2";
#endif
    return "";
}
