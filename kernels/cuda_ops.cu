// cuda_ops - the GPU's value of the op table.
#include "ops.h"

#ifndef __CUDACC__
const Ops *cuda_ops(std::string *why_not) {
    *why_not = "this program was built without CUDA (make CUDA=1 needs nvcc)";
    return nullptr;
}
#endif
