#include "mra_attention_params.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

namespace mra {

int32_t Float32ModeFromEnvironment() {
  const char* asked = getenv("MRA_ATTENTION_FLOAT32");
  if (asked == nullptr || strcmp(asked, "fma") == 0) return MRA_FLOAT32_FMA;
  return strcmp(asked, "tf32x3") == 0 ? static_cast<int32_t>(MRA_FLOAT32_TF32X3) : -1;
}

MraStatus CheckParams(const MraAttentionParams* params) {
  if (params == nullptr) return MRA_ERROR_NULL_POINTER;
  if (params->struct_size != sizeof(MraAttentionParams)) return MRA_ERROR_STRUCT_SIZE;
  if (params->dtype < MRA_FLOAT32 || params->dtype > MRA_BFLOAT16) return MRA_ERROR_DTYPE;
  if (params->batch < 1) return MRA_ERROR_BATCH;
  if (params->length < 1) return MRA_ERROR_LENGTH;
  if (params->num_heads < 1) return MRA_ERROR_NUM_HEADS;
  if (params->head_size < MRA_ATTENTION_MIN_HEAD_SIZE || params->head_size > MRA_ATTENTION_MAX_HEAD_SIZE) {
    return MRA_ERROR_HEAD_SIZE;
  }
  if (params->num_blocks < 1) return MRA_ERROR_NUM_BLOCKS;
  if (params->approx_mode != MRA_APPROX_FULL && params->approx_mode != MRA_APPROX_SPARSE) return MRA_ERROR_APPROX_MODE;
  if (params->initial_prior_first_n_blocks < 0 || params->initial_prior_diagonal_n_blocks < 0) return MRA_ERROR_PRIOR;
  if (!(params->scale > 0.0f) || !isfinite(params->scale)) return MRA_ERROR_SCALE;
  if (params->padding_invariant != 0 && params->padding_invariant != 1) return MRA_ERROR_FLAG;
  if (params->float32_mode != MRA_FLOAT32_FMA && params->float32_mode != MRA_FLOAT32_TF32X3) return MRA_ERROR_FLAG;

  // Block indices are int32, and 2^40 elements are more than any machine holds: beyond that no product below can overflow.
  const int64_t limit = int64_t{1} << 40;
  int64_t elements = 0;
  if (params->length > INT32_MAX || __builtin_mul_overflow(params->batch, params->length, &elements) || elements > limit ||
      __builtin_mul_overflow(elements, int64_t{params->num_heads} * params->head_size, &elements) || elements > limit) {
    return MRA_ERROR_TOO_LARGE;
  }
  return MRA_OK;
}

}  // namespace mra

extern "C" {

int32_t mra_attention_contract_version(void) { return MRA_ATTENTION_CONTRACT_VERSION; }

const char* mra_status_string(MraStatus status) {
  switch (status) {
    case MRA_OK:
      return "ok";
    case MRA_ERROR_NULL_POINTER:
      return "a required pointer is NULL: pass params, query, key, value, mask, context and workspace";
    case MRA_ERROR_STRUCT_SIZE:
      return "struct_size is not sizeof(MraAttentionParams): caller and library were built from different versions of "
             "mra_attention.h, rebuild one of them";
    case MRA_ERROR_DTYPE:
      return "dtype is unknown: use MRA_FLOAT32, MRA_FLOAT16 or MRA_BFLOAT16";
    case MRA_ERROR_BATCH:
      return "batch is below 1: it must be 1 or more";
    case MRA_ERROR_LENGTH:
      return "length is below 1: it must be 1 or more";
    case MRA_ERROR_NUM_HEADS:
      return "num_heads is below 1: it must be 1 or more";
    case MRA_ERROR_HEAD_SIZE:
      return "head_size is out of range: it must be 8 to 256";
    case MRA_ERROR_NUM_BLOCKS:
      return "num_blocks is below 1: it must be 1 or more";
    case MRA_ERROR_APPROX_MODE:
      return "approx_mode is unknown: use MRA_APPROX_FULL or MRA_APPROX_SPARSE";
    case MRA_ERROR_PRIOR:
      return "initial_prior_first_n_blocks or initial_prior_diagonal_n_blocks is negative: both must be 0 or more";
    case MRA_ERROR_SCALE:
      return "scale is not a positive finite number: pass 1 / sqrt(head_size)";
    case MRA_ERROR_WORKSPACE:
      return "workspace is too small or not 64-byte aligned: ask the workspace_size function with the same parameters and threads";
    case MRA_ERROR_CUDA:
      return "a CUDA launch failed: see cudaGetLastError";
    case MRA_ERROR_NOT_BUILT:
      return "this library was built without that device: rebuild it with the device enabled";
    case MRA_ERROR_FLAG:
      return "padding_invariant or float32_mode is unknown: padding_invariant must be 0 or 1, float32_mode MRA_FLOAT32_FMA or "
             "MRA_FLOAT32_TF32X3";
    case MRA_ERROR_TOO_LARGE:
      return "these shapes need more memory than can be addressed: lower batch or length";
    case MRA_ERROR_CPU_TARGET:
      return "MRA_ATTENTION_CPU_TARGET names an instruction set that this library or machine does not have: unset it, or use one "
             "of "
             "avx512, avx2, baseline (x86-64), neon (aarch64)";
    case MRA_ERROR_THREADS:
      return "num_threads is below 1 or parallel_for is NULL: pass a complete MraThreads, or NULL for one thread";
  }
  return "unknown status: caller and library were built from different versions of mra_attention.h";
}

}  // extern "C"
