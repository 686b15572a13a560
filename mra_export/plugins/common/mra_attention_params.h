// The one place that judges MraAttentionParams, for every device.
#ifndef MRA_ATTENTION_PARAMS_H_
#define MRA_ATTENTION_PARAMS_H_

#include "mra_attention.h"

namespace mra {

// MRA_OK, or what is wrong with these parameters. Also proves that B * N * H * D elements can be addressed.
MraStatus CheckParams(const MraAttentionParams* params);

// What the environment variable MRA_ATTENTION_FLOAT32 asks for: MRA_FLOAT32_FMA where it is not set, -1 where it is neither "fma"
// nor "tf32x3". For adapters whose runtime has no option of its own for it.
int32_t Float32ModeFromEnvironment();

// nb = ceil(N / 32).
inline int64_t NumBlocks(const MraAttentionParams& params) {
  return (params.length + MRA_ATTENTION_BLOCK_SIZE - 1) / MRA_ATTENTION_BLOCK_SIZE;
}

}  // namespace mra

#endif  // MRA_ATTENTION_PARAMS_H_
