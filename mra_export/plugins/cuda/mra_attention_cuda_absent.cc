// The CUDA entry points of a library that was built without CUDA.
#include "mra_attention.h"

extern "C" {

MraStatus mra_attention_cuda_workspace_size(const MraAttentionParams*, size_t*) { return MRA_ERROR_NOT_BUILT; }

MraStatus mra_attention_cuda(const MraAttentionParams*, const void*, const void*, const void*, const int32_t*, void*, void*, size_t,
                             void*) {
  return MRA_ERROR_NOT_BUILT;
}

MraStatus mra_attention_cuda_selection(const MraAttentionParams*, const void*, const void*, const int32_t*, uint8_t*, float*, void*,
                                       size_t, void*) {
  return MRA_ERROR_NOT_BUILT;
}

}  // extern "C"
