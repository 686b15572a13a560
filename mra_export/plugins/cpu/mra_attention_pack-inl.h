// First phase: block sums and means, and the inputs in the layout that the products read. Included once per instruction set.
#if defined(MRA_ATTENTION_PACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MRA_ATTENTION_PACK_INL_H_
#undef MRA_ATTENTION_PACK_INL_H_
#else
#define MRA_ATTENTION_PACK_INL_H_
#endif

#include <string.h>

#include "hwy/cache_control.h"
#include "mra_attention_problem.h"
#include "mra_attention_simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mra {
namespace HWY_NAMESPACE {

constexpr float kEpsilon = 1e-6f;
constexpr int kTokensAhead = 8;

HWY_INLINE int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// kVectors columns of LoadBlock; last: elements of the last vector.
template <int kVectors, class T>
HWY_INLINE void LoadColumns(const T* HWY_RESTRICT source, int64_t token_stride, uint32_t real, size_t last,
                            float* HWY_RESTRICT rows, int64_t stride, float* HWY_RESTRICT sum) {
  Floats total[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) total[v] = hn::Zero(kFloats);
  for (int t = 0; t < kBlock; ++t, source += token_stride, rows += stride) {
    // Tokens are far apart, and no hardware follows such steps. The hint is for data that is read once: it should not drive packed
    // inputs out of the caches. Past the tensor's end this asks for nothing that is used.
    const T* ahead = source + kTokensAhead * token_stride;
    for (int64_t n = 0; n < kVectors * kLanes; n += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(ahead + n, 0, 0);
    if (HWY_LIKELY(real >> t & 1u)) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const bool whole = v + 1 < kVectors || last == kLanes;
        const Floats x = whole ? LoadAs(source + v * kLanes) : LoadFirst(source + v * kLanes, last);
        hn::StoreU(x, kFloats, rows + v * kLanes);
        total[v] = hn::Add(total[v], x);
      }
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) hn::StoreU(hn::Zero(kFloats), kFloats, rows + v * kLanes);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) hn::StoreU(total[v], kFloats, sum + v * kLanes);
}

// rows (32 x d16) = a block's real tokens as float32, everything else 0; sum (d16) = their sum in ascending order. source: token 0
// of the block, the head's first element.
template <class T>
MRA_STAGE void LoadBlock(const T* source, int64_t token_stride, uint32_t real, int64_t head_size, float* rows, int64_t d16,
                         float* sum) {
  constexpr int kStrip = 4 * kLanes;
  int64_t d = 0;
  for (; d + kStrip <= head_size; d += kStrip) {
    LoadColumns<4>(source + d, token_stride, real, kLanes, rows + d, d16, sum + d);
  }
  for (; d < head_size; d += kLanes) {
    LoadColumns<1>(source + d, token_stride, real, static_cast<size_t>(Smaller(kLanes, head_size - d)), rows + d, d16, sum + d);
  }
  // What is left up to d16, where vectors are shorter than that.
  for (; d < d16; d += kLanes) {
    for (int t = 0; t < kBlock; ++t) hn::StoreU(hn::Zero(kFloats), kFloats, rows + t * d16 + d);
    hn::StoreU(hn::Zero(kFloats), kFloats, sum + d);
  }
}

HWY_INLINE void StoreMean(const float* sum, float divisor, int64_t d16, float* mean) {
  const Floats by = hn::Set(kFloats, divisor);
  for (int64_t d = 0; d < d16; d += kLanes) hn::StoreU(hn::Div(hn::LoadU(kFloats, sum + d), by), kFloats, mean + d);
}

template <class T, class Products>
MRA_STAGE void PackBlocks(const Problem& problem, const Bundle& bundle, int64_t first, int64_t last, const WorkerBuffers& worker) {
  const MraAttentionParams& params = *problem.params;
  const BundleBuffers& to = bundle.buffers;
  const int64_t nb = problem.nb;
  const int64_t d16 = problem.d16;
  const int64_t head_size = params.head_size;
  const int64_t hidden = params.num_heads * head_size;
  const int64_t block_size = kBlock * d16;
  HWY_ALIGN float sum[MRA_ATTENTION_MAX_HEAD_SIZE + kLanes];
  const T* const tensors[] = {static_cast<const T*>(problem.query), static_cast<const T*>(problem.key),
                              static_cast<const T*>(problem.value)};

  for (int64_t j = first; j < last; ++j) {
    const int64_t start = j * kBlock;
    const int64_t tokens = Smaller(kBlock, params.length - start);
    // One tensor after the other, all heads of the bundle: a token's heads are neighbours in memory.
    for (int tensor = 0; tensor < 3 && tensors[tensor] != nullptr; ++tensor) {
      uint32_t real = 0;
      for (int64_t head = 0; head < bundle.heads; ++head) {
        const int64_t global_head = bundle.first_head + head;
        const int64_t batch_row = global_head / params.num_heads;
        if (head == 0 || global_head % params.num_heads == 0) {
          const int32_t* mask = problem.mask + batch_row * params.length + start;
          real = 0;
          for (int64_t t = 0; t < tokens; ++t) real |= static_cast<uint32_t>(mask[t] != 0) << t;
        }
        const float count = static_cast<float>(__builtin_popcount(real));
        const T* source =
            tensors[tensor] + (batch_row * params.length + start) * hidden + global_head % params.num_heads * head_size;
        const int64_t block = head * nb + j;
        if (tensor == 0) {
          to.real[block] = real;
          to.real_count[head * problem.nb32 + j] = count;
          LoadBlock(source, hidden, real, head_size, worker.rows, d16, sum);
          StoreMean(sum, count + kEpsilon, d16, to.query_mean + (head * problem.nb8 + j) * d16);
          if (problem.value != nullptr) Products::PackQueries(worker.rows, problem, to.queries + block * block_size);
        } else if (tensor == 1) {
          float* const rows = Products::kFloatKeys ? to.keys + block * block_size : worker.rows;
          LoadBlock(source, hidden, real, head_size, rows, d16, sum);
          StoreMean(sum, count + kEpsilon, d16, to.key_mean + (head * problem.nb8 + j) * d16);
          if (!Products::kFloatKeys) Products::PackKeys(worker.rows, problem, to.keys + block * block_size);
        } else {
          float* const rows = Products::kFloatValues ? to.values + block * block_size : worker.rows;
          LoadBlock(source, hidden, real, head_size, rows, d16, sum);
          float* const value_sum = to.value_sum + block * problem.d32;
          memcpy(value_sum, sum, static_cast<size_t>(d16) * sizeof(float));
          for (int64_t d = d16; d < problem.d32; ++d) value_sum[d] = 0.0f;
          if (!Products::kFloatValues) Products::PackValues(worker.rows, problem, to.values + block * block_size);
        }
      }
    }
  }
}

template <class T, class Products>
HWY_NOINLINE void PackChunk(const Problem& problem, const Bundle& bundle, int64_t chunk, int64_t worker) {
  const int64_t first = chunk * kPackBlocks;
  PackBlocks<T, Products>(problem, bundle, first, Smaller(problem.nb, first + kPackBlocks), problem.workers[worker]);
}

}  // namespace HWY_NAMESPACE
}  // namespace mra
HWY_AFTER_NAMESPACE();

#endif  // include guard per target
