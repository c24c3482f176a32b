// Each file of operators adds its own to the domain.

#pragma once

#include "ort_api.h"

OrtStatus* register_attention(const OrtApi& api, OrtCustomOpDomain* domain);
OrtStatus* register_products(const OrtApi& api, OrtCustomOpDomain* domain);
OrtStatus* register_rowwise(const OrtApi& api, OrtCustomOpDomain* domain);
