// The one place that judges MraAttentionParams, for every device.
#ifndef MRA_ATTENTION_PARAMS_H_
#define MRA_ATTENTION_PARAMS_H_

#include "mra_attention.h"

namespace mra {

// MRA_OK, or what is wrong with these parameters. Also proves that B * N * H * D elements can be addressed.
MraStatus CheckParams(const MraAttentionParams* params);

// nb = ceil(N / 32).
inline int64_t NumBlocks(const MraAttentionParams& params) {
  return (params.length + MRA_ATTENTION_BLOCK_SIZE - 1) / MRA_ATTENTION_BLOCK_SIZE;
}

}  // namespace mra

#endif  // MRA_ATTENTION_PARAMS_H_
