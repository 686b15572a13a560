// C entry points of the CUDA kernels: checks, workspace, launches. Design and cost: docs/kernels-cuda.md.
#include <initializer_list>

#include "mra_attention.h"
#include "mra_attention_attend_fp32.cuh"
#include "mra_attention_attend_mma.cuh"
#include "mra_attention_device.cuh"
#include "mra_attention_layout.h"
#include "mra_attention_logit.cuh"
#include "mra_attention_low.cuh"
#include "mra_attention_pool.cuh"
#include "mra_attention_select.cuh"

namespace mra {
namespace {

template <typename T>
T* At(void* workspace, const Section& section) {
  return reinterpret_cast<T*>(static_cast<unsigned char*>(workspace) + section.offset);
}

Problem MakeProblem(const MraAttentionParams& params, const Layout& layout, void* workspace) {
  Problem p = {};
  p.real = At<uint32_t>(workspace, layout.real);
  p.query_mean = At<float>(workspace, layout.query_mean);
  p.key_mean = At<float>(workspace, layout.key_mean);
  p.value_sum = At<float>(workspace, layout.value_sum);
  p.logit = At<float>(workspace, layout.logit);
  p.row_key = At<uint32_t>(workspace, layout.row_key);
  p.row_start = At<int32_t>(workspace, layout.row_start);
  p.column = At<uint16_t>(workspace, layout.column);
  p.excluded = At<uint32_t>(workspace, layout.excluded);
  p.work = At<WorkItem>(workspace, layout.work);
  p.arrivals = At<int32_t>(workspace, layout.arrivals);
  p.partial = At<float>(workspace, layout.partial);
  p.low_vector = At<float>(workspace, layout.low_vector);
  p.low_total = At<float>(workspace, layout.low_total);
  p.low_largest = At<float>(workspace, layout.low_largest);
  p.length = params.length;
  p.heads = params.num_heads;
  p.head_size = params.head_size;
  p.blocks = layout.blocks;
  p.words = layout.words;
  p.budget = layout.budget;
  p.chunk = layout.chunk;
  p.slots = layout.slots;
  p.partials = layout.partials;
  p.partial_floats = layout.partial_floats;
  p.logit_stride = layout.logit_stride;
  p.pool_tiles = static_cast<int>(layout.pool_tiles);
  p.pool_threads = layout.pool_threads;
  p.logit_tiles = static_cast<int>(layout.logit_tiles);
  p.low_tiles = static_cast<int>(layout.low_tiles);
  p.first = params.initial_prior_first_n_blocks;
  p.diagonal = params.initial_prior_diagonal_n_blocks;
  p.scale = params.scale;
  p.full = params.approx_mode == MRA_APPROX_FULL;
  p.padding_invariant = params.padding_invariant != 0;
  return p;
}

// Whether every head's rows begin at multiples of 16 bytes in all of these tensors.
bool AllowVectorLoads(const MraAttentionParams& params, std::initializer_list<const void*> tensors) {
  const int bytes = params.dtype == MRA_FLOAT32 ? 4 : 2;
  bool aligned = params.head_size * bytes % kVectorBytes == 0;
  for (const void* tensor : tensors) aligned = aligned && reinterpret_cast<uintptr_t>(tensor) % kVectorBytes == 0;
  return aligned;
}

MraStatus CheckWorkspace(const Layout& layout, const void* workspace, size_t bytes) {
  const bool aligned = reinterpret_cast<uintptr_t>(workspace) % 64 == 0;
  return aligned && bytes >= layout.bytes ? MRA_OK : MRA_ERROR_WORKSPACE;
}

// kTensor: the low-resolution product on tensor cores.
template <bool kTensor, int kTile>
cudaError_t LaunchSelect(const Layout& layout, const Problem& p, cudaStream_t stream) {
  return LaunchKernel(SelectKernel<kTensor, kTile>, layout.heads_total, SelectThreads(kTile), sizeof(SelectShared<kTile>), stream,
                      p);
}

template <bool kTensor, int kDims>
cudaError_t LaunchLow(const Layout& layout, const Problem& p, cudaStream_t stream) {
  const size_t shared = LowSharedBytes(layout.words);
  return LaunchKernel(LowKernel<kTensor, kDims>, layout.heads_total * layout.low_tiles, kLowThreads, shared, stream, p);
}

// Everything before the attention launch: pool and select, or, above kFusedSelectBlocks, pool, logits, select and, in mode "full",
// low resolution.
template <typename T>
cudaError_t LaunchSelection(const MraAttentionParams& params, const Layout& layout, const Problem& p, cudaStream_t stream) {
  constexpr bool kTensor = sizeof(T) == 2;
  const int64_t pools = params.batch * layout.blocks * layout.pool_tiles * (p.full ? 3 : 2);
  cudaError_t error = LaunchKernel(PoolKernel<T>, pools, layout.pool_threads, 0, stream, p);
  if (error != cudaSuccess) return error;
  if (layout.blocks <= kFusedSelectBlocks) {
    const int tile = SelectTile(layout.blocks);
    return tile == 2   ? LaunchSelect<kTensor, 2>(layout, p, stream)
           : tile == 4 ? LaunchSelect<kTensor, 4>(layout, p, stream)
                       : LaunchSelect<kTensor, 8>(layout, p, stream);
  }
  error =
      LaunchKernel(LogitKernel, layout.heads_total * layout.logit_tiles, kLogitThreads, kStageFloats * sizeof(float), stream, p);
  if (error != cudaSuccess) return error;
  error = LaunchKernel(SelectManyKernel, layout.heads_total, kManyThreads, ManySharedBytes(layout.blocks), stream, p);
  if (error != cudaSuccess || !p.full) return error;
  return LowTileDims(params.head_size) == 64 ? LaunchLow<kTensor, 64>(layout, p, stream)
                                             : LaunchLow<kTensor, 128>(layout, p, stream);
}

template <typename T>
cudaError_t LaunchAttendMma(const MraAttentionParams& params, const Layout& layout, const Problem& p, cudaStream_t stream) {
  const int64_t items = layout.heads_total * layout.slots;
  if (!p.vector_loads) {
    return params.head_size <= 64  // the workspace has room for the partial results of 64 dimensions then, not of 128
               ? LaunchKernel(AttendMmaKernel<T, 64, false>, items, kMmaThreads, MmaSharedBytes(64), stream, p)
               : LaunchKernel(AttendMmaKernel<T, 128, false>, items, kMmaThreads, MmaSharedBytes(128), stream, p);
  }
  switch (MmaDims(params.head_size)) {
    case 32:
      return LaunchKernel(AttendMmaKernel<T, 32, true>, items, kMmaThreads, MmaSharedBytes(32), stream, p);
    case 64:
      return LaunchKernel(AttendMmaKernel<T, 64, true>, items, kMmaThreads, MmaSharedBytes(64), stream, p);
    default:
      return LaunchKernel(AttendMmaKernel<T, 128, true>, items, kMmaThreads, MmaSharedBytes(128), stream, p);
  }
}

template <typename T, int kDims, bool kVector>
cudaError_t LaunchFma(int64_t items, const Problem& p, cudaStream_t stream) {
  return LaunchKernel(AttendFmaKernel<T, kDims, kVector>, items, kFp32Threads, Fp32SharedBytes<kDims, FmaProduct>(), stream, p);
}

template <int kDims, bool kVector>
cudaError_t LaunchTf32(int64_t items, const Problem& p, cudaStream_t stream) {
  return LaunchKernel(AttendTfKernel<kDims, kVector>, items, kFp32Threads, Fp32SharedBytes<kDims, Tf32Product>(), stream, p);
}

cudaError_t LaunchAttendFp32(const MraAttentionParams& params, const Layout& layout, const Problem& p, cudaStream_t stream) {
  const int64_t items = layout.heads_total * layout.slots;
  const int dims = params.head_size;
  if (params.float32_mode == MRA_FLOAT32_TF32X3 && dims <= kTf32MostDims) {
    if (!p.vector_loads) return dims <= 64 ? LaunchTf32<64, false>(items, p, stream) : LaunchTf32<128, false>(items, p, stream);
    return dims <= 32   ? LaunchTf32<32, true>(items, p, stream)
           : dims <= 64 ? LaunchTf32<64, true>(items, p, stream)
                        : LaunchTf32<128, true>(items, p, stream);
  }
  if (!p.vector_loads) {
    return dims <= 64    ? LaunchFma<float, 64, false>(items, p, stream)
           : dims <= 128 ? LaunchFma<float, 128, false>(items, p, stream)
                         : LaunchFma<float, 256, false>(items, p, stream);
  }
  return dims <= 32    ? LaunchFma<float, 32, true>(items, p, stream)
         : dims <= 64  ? LaunchFma<float, 64, true>(items, p, stream)
         : dims <= 128 ? LaunchFma<float, 128, true>(items, p, stream)
                       : LaunchFma<float, 256, true>(items, p, stream);
}

template <typename T>
cudaError_t LaunchAttention(const MraAttentionParams& params, const Layout& layout, const Problem& p, cudaStream_t stream) {
  const cudaError_t error = LaunchSelection<T>(params, layout, p, stream);
  if (error != cudaSuccess) return error;
  if constexpr (sizeof(T) == sizeof(float)) {
    return LaunchAttendFp32(params, layout, p, stream);
  } else if (params.head_size <= kMmaMostDims) {
    return LaunchAttendMma<T>(params, layout, p, stream);
  } else {
    return LaunchFma<T, 256, false>(layout.heads_total * layout.slots, p, stream);
  }
}

}  // namespace
}  // namespace mra

extern "C" {

MraStatus mra_attention_cuda_workspace_size(const MraAttentionParams* params, size_t* bytes) {
  if (bytes == nullptr) return MRA_ERROR_NULL_POINTER;
  mra::Layout layout;
  const MraStatus status = mra::MakeLayout(params, &layout);
  if (status == MRA_OK) *bytes = layout.bytes;
  return status;
}

MraStatus mra_attention_cuda(const MraAttentionParams* params, const void* query, const void* key, const void* value,
                             const int32_t* mask, void* context, void* workspace, size_t workspace_bytes, void* stream) {
  mra::Layout layout;
  MraStatus status = mra::MakeLayout(params, &layout);
  if (status != MRA_OK) return status;
  if (!query || !key || !value || !mask || !context || !workspace) return MRA_ERROR_NULL_POINTER;
  status = mra::CheckWorkspace(layout, workspace, workspace_bytes);
  if (status != MRA_OK) return status;
  mra::Problem p = mra::MakeProblem(*params, layout, workspace);
  p.query = query, p.key = key, p.value = value, p.mask = mask, p.context = context;
  p.vector_loads = mra::AllowVectorLoads(*params, {query, key, value, context});
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = params->dtype == MRA_FLOAT32   ? mra::LaunchAttention<float>(*params, layout, p, on)
                            : params->dtype == MRA_FLOAT16 ? mra::LaunchAttention<__half>(*params, layout, p, on)
                                                           : mra::LaunchAttention<__nv_bfloat16>(*params, layout, p, on);
  return error == cudaSuccess ? MRA_OK : MRA_ERROR_CUDA;
}

MraStatus mra_attention_cuda_selection(const MraAttentionParams* params, const void* query, const void* key, const int32_t* mask,
                                       uint8_t* blocks, float* score, void* workspace, size_t workspace_bytes, void* stream) {
  mra::Layout layout;
  MraStatus status = mra::MakeLayout(params, &layout);
  if (status != MRA_OK) return status;
  if (!query || !key || !mask || !blocks || !workspace) return MRA_ERROR_NULL_POINTER;
  status = mra::CheckWorkspace(layout, workspace, workspace_bytes);
  if (status != MRA_OK) return status;
  mra::SelectionOutput out = {mra::MakeProblem(*params, layout, workspace), blocks, score};
  out.problem.query = query, out.problem.key = key, out.problem.mask = mask;
  out.problem.full = false;  // there is no value to pool
  out.problem.keep_logits = true;
  out.problem.vector_loads = mra::AllowVectorLoads(*params, {query, key});
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  cudaError_t error = params->dtype == MRA_FLOAT32   ? mra::LaunchSelection<float>(*params, layout, out.problem, on)
                      : params->dtype == MRA_FLOAT16 ? mra::LaunchSelection<__half>(*params, layout, out.problem, on)
                                                     : mra::LaunchSelection<__nv_bfloat16>(*params, layout, out.problem, on);
  if (error == cudaSuccess) {
    error = mra::LaunchKernel(mra::ExportSelectionKernel, layout.heads_total * layout.blocks, mra::kExportThreads, 0, on, out);
  }
  return error == cudaSuccess ? MRA_OK : MRA_ERROR_CUDA;
}

}  // extern "C"
