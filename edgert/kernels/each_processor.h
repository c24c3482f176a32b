// Includes vector.h and the file named by STAGES once for each kind of processor.

namespace any_processor {
#include "vector.h"
#include STAGES
}

#include "avx2_processor.h"
#include "avx512_processor.h"
