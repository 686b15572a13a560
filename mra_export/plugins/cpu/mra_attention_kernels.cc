// The CPU kernel of MraAttention, for every instruction set that the compiler knows. Meaning: docs/operator.md ("Meaning, exactly",
// points 1 to 6); design and the selection contract: docs/kernels.md. The phases are in the -inl.h files beside this one.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "mra_attention_kernels.cc"
#include "hwy/foreach_target.h"
//
#include <string.h>

#include "hwy/highway.h"
#include "mra_attention_amx-inl.h"
#include "mra_attention_amx.h"
#include "mra_attention_attend-inl.h"
#include "mra_attention_pack-inl.h"
#include "mra_attention_problem.h"
#include "mra_attention_select-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mra {
namespace HWY_NAMESPACE {

// BFloatProducts: the products that bfloat16 inputs take. float32 and float16 inputs always take FloatProducts.
template <class BFloatProducts>
void Pack(const Problem& problem, const Bundle& bundle, int64_t chunk, int64_t worker) {
  switch (problem.params->dtype) {
    case MRA_FLOAT16:
      return PackChunk<Half, FloatProducts>(problem, bundle, chunk, worker);
    case MRA_BFLOAT16:
      return PackChunk<BFloat, BFloatProducts>(problem, bundle, chunk, worker);
    default:
      return PackChunk<float, FloatProducts>(problem, bundle, chunk, worker);
  }
}

template <class BFloatProducts>
void Attend(const Problem& problem, const Bundle& bundle, int64_t head, int64_t piece, int64_t worker) {
  switch (problem.params->dtype) {
    case MRA_FLOAT16:
      return AttendPiece<Half, FloatProducts>(problem, bundle, head, piece, worker);
    case MRA_BFLOAT16:
      return AttendPiece<BFloat, BFloatProducts>(problem, bundle, head, piece, worker);
    default:
      return AttendPiece<float, FloatProducts>(problem, bundle, head, piece, worker);
  }
}

#if HWY_NATIVE_DOT_BF16
const Kernels kKernels = {Pack<PairProducts>, SelectHead, Attend<PairProducts>};
const Kernels kTileKernels = {Pack<TileProducts>, SelectHead, Attend<TileProducts>};
#else
const Kernels kKernels = {Pack<FloatProducts>, SelectHead, Attend<FloatProducts>};
#endif

}  // namespace HWY_NAMESPACE
}  // namespace mra
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mra {

CpuTarget FindCpuTarget(const char* wanted) {
  const struct {
    int64_t target;
    CpuTarget found;
    bool tiles;
  } best_first[] = {
#if HWY_TARGETS & HWY_AVX3_SPR
      {HWY_AVX3_SPR, {"amx_bf16", &N_AVX3_SPR::kTileKernels}, true},
      {HWY_AVX3_SPR, {"avx512_bf16", &N_AVX3_SPR::kKernels}, false},
#endif
#if HWY_TARGETS & HWY_AVX3_ZEN4
      {HWY_AVX3_ZEN4, {"amx_bf16", &N_AVX3_ZEN4::kTileKernels}, true},
      {HWY_AVX3_ZEN4, {"avx512_bf16", &N_AVX3_ZEN4::kKernels}, false},
#endif
#if HWY_TARGETS & HWY_AVX3
      {HWY_AVX3, {"avx512", &N_AVX3::kKernels}, false},
#endif
#if HWY_TARGETS & HWY_AVX2
      {HWY_AVX2, {"avx2", &N_AVX2::kKernels}, false},
#endif
#if HWY_TARGETS & HWY_NEON_WITHOUT_AES
      {HWY_NEON_WITHOUT_AES, {"neon", &N_NEON_WITHOUT_AES::kKernels}, false},
#endif
#if HWY_TARGETS & HWY_SSE2
      {HWY_SSE2, {"baseline", &N_SSE2::kKernels}, false},
#endif
#if HWY_TARGETS & HWY_EMU128
      {HWY_EMU128, {"baseline", &N_EMU128::kKernels}, false},
#endif
  };
  const int64_t supported = hwy::SupportedTargets();
  for (const auto& one : best_first) {
    if ((supported & one.target) == 0) continue;
    if (wanted != nullptr && *wanted != '\0' && strcmp(wanted, one.found.name) != 0) continue;
    if (!one.tiles || HasTiles()) return one.found;
  }
  return {nullptr, nullptr};
}

}  // namespace mra
#endif  // HWY_ONCE
