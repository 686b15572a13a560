// What the attention kernels share (launch 3, attend: step 6 of docs/operator.md). One CTA per work item: 32 query tokens against
// up to `chunk` chosen key blocks, with online softmax in float32. The last CTA of a row to finish merges the row's chunks in
// order, adds the low-resolution part and writes the context, so results do not depend on timing.
//
// Exponents are to the base 2: scale * log2(e) is one factor, and ex2 is what the hardware has.
#ifndef MRA_ATTENTION_ATTEND_CUH_
#define MRA_ATTENTION_ATTEND_CUH_

#include "mra_attention_device.cuh"
#include "mra_attention_ptx.cuh"

namespace mra {

// 2^(x - reference) of online softmax: a reference of -inf means "no weight yet", where x is -inf too and the weight 0.
__device__ __forceinline__ float Weight2(float x, float reference) { return Exp2(x - (reference == -INFINITY ? 0.0f : reference)); }

// Every `step`-th chosen key block of a work item that has a real token, in order, the same for all lanes of a warp. Thirty-two
// entries are looked up at a time, one by each lane.
struct KeyBlocks {
  const uint16_t* column;  // the row's list
  const uint32_t* real;    // (nb) of the batch row
  int next;                // first entry that has not been looked up
  int end;
  int step = 1;
  uint32_t pending = 0;  // lanes whose block is still to come
  int block = 0;         // this lane's
  uint32_t tokens = 0;   // its real tokens

  // The next block and its real tokens, or real tokens 0: there is none left.
  __device__ __forceinline__ uint32_t Take(int* taken) {
    while (pending == 0) {
      if (next >= end) return 0;
      const int entry = next + step * static_cast<int>(threadIdx.x % 32);
      block = entry < end ? column[entry] : 0;
      tokens = entry < end ? real[block] : 0;
      pending = __ballot_sync(kWarp, tokens != 0);
      next += 32 * step;
    }
    const int lane = __ffs(static_cast<int>(pending)) - 1;
    pending &= pending - 1;
    *taken = __shfl_sync(kWarp, block, lane);
    return __shfl_sync(kWarp, tokens, lane);
  }
};

// A thread's share of a row's softmax state. Which query tokens its rows are, and which dimensions its values, is the kernel's.
template <int kRows, int kValues>
struct RowState {
  float output[kRows][kValues] = {};  // sum of weight * value, relative to 2^largest
  float total[kRows] = {};            // sum of weights, likewise
  float largest[kRows];               // largest logit, times log2(e)

  __device__ __forceinline__ RowState() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) largest[r] = -INFINITY;
  }

  static constexpr int kFloats = kRows * (kValues + 2);

  // This state's numbers, `stride` floats apart.
  __device__ __forceinline__ void Store(float* to, int stride) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int n = 0; n < kValues; ++n) to[(r * kValues + n) * stride] = output[r][n];
      to[(kRows * kValues + r) * stride] = total[r];
      to[(kRows * (kValues + 1) + r) * stride] = largest[r];
    }
  }

  // Adds a stored state, of which read(n) is number n.
  template <typename Read>
  __device__ __forceinline__ void Add(Read read) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float other = read(kRows * (kValues + 1) + r);
      const float common = fmaxf(largest[r], other);
      const float own_weight = Weight2(largest[r], common), other_weight = Weight2(other, common);
      largest[r] = common;
      total[r] = own_weight * total[r] + other_weight * read(kRows * kValues + r);
#pragma unroll
      for (int n = 0; n < kValues; ++n) output[r][n] = own_weight * output[r][n] + other_weight * read(r * kValues + n);
    }
  }
};

// Stores this chunk's state; true in the CTA that is the row's last to do so, after reading all chunks back, merged in order. The
// first kThreads threads of the CTA have the state; all must call it. is_last: shared.
template <int kThreads, int kRows, int kValues>
__device__ __forceinline__ bool MergeChunks(const Problem& p, int64_t head, const WorkItem& item, int32_t* is_last,
                                            RowState<kRows, kValues>* state) {
  const float* row_partial = p.partial + (head * p.partials + item.partial) * p.partial_floats + threadIdx.x;
  const bool has_state = threadIdx.x < kThreads;
  if (has_state) state->Store(const_cast<float*>(row_partial) + int64_t{item.chunk} * p.partial_floats, kThreads);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *is_last = atomicAdd(&p.arrivals[head * p.blocks + item.row], 1) == item.chunks - 1;
  __syncthreads();
  if (!*is_last) return false;
  __threadfence();
  if (!has_state) return true;
  *state = RowState<kRows, kValues>();
  for (int chunk = 0; chunk < item.chunks; ++chunk) {
    const float* from = row_partial + int64_t{chunk} * p.partial_floats;
    state->Add([&](int n) { return __ldcg(from + n * kThreads); });  // other CTAs wrote these, so not through this SM's L1
  }
  return true;
}

}  // namespace mra

#endif  // MRA_ATTENTION_ATTEND_CUH_
