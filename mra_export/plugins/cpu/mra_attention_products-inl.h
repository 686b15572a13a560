// The two products of an exact block pair, and the layouts that they read. Each struct here is one way to do them:
//   FloatProducts   float32 multiply-adds, for every input type
//   PairProducts    logits by the CPU's bfloat16 pair products with float32 sums, for bfloat16 inputs; a product of two bfloat16 is
//                   exact in float32, so the logits are those of FloatProducts but for the order of additions
// (mra_attention_amx-inl.h has a third.) The vector dimension is the query token throughout: logits are K (32 x D) times Q^T (D x
// 32), the output V^T (D x 32) times weights (32 x 32). So the softmax needs no sums across lanes, and K and V are read as they
// are. Included once per instruction set.
#if defined(MRA_ATTENTION_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MRA_ATTENTION_PRODUCTS_INL_H_
#undef MRA_ATTENTION_PRODUCTS_INL_H_
#else
#define MRA_ATTENTION_PRODUCTS_INL_H_
#endif

#include "mra_attention_problem.h"
#include "mra_attention_simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mra {
namespace HWY_NAMESPACE {

constexpr int kQueryVectors = kBlock / kLanes;

struct FloatProducts {
  static constexpr bool kFloatKeys = true;
  static constexpr bool kFloatValues = true;

  // to (d16, 32) = rows (32, d16) transposed.
  static HWY_INLINE void PackQueries(const float* rows, const Problem& problem, float* to) {
    for (int64_t d = 0; d < problem.d16; d += 8) {
      for (int t = 0; t < kBlock; t += 8) Transpose8x8(rows + t * problem.d16 + d, problem.d16, to + d * kBlock + t, kBlock);
    }
  }
  static void PackKeys(const float*, const Problem&, float*) {}
  static void PackValues(const float*, const Problem&, float*) {}

  // logits (32 x 32) = one block pair's <k_b, q_a>, key token by query token; raises `largest`, (kQueryVectors).
  static HWY_INLINE void Logits(const Problem& problem, const float* keys, const float* queries, float* logits, Floats* largest) {
    const int64_t D = problem.params->head_size;
    const int64_t d16 = problem.d16;
    for (int t = 0; t < kBlock; t += kTileRows) {
#pragma GCC unroll 4
      for (int v = 0; v < kQueryVectors; v += 2) {
        Floats acc[kTileRows][2];
        ClearTile(acc);
        MultiplyTile<false>(keys + t * d16, d16, 1, queries + v * kLanes, kBlock, D, acc);
        StoreTile(acc, logits + t * kBlock + v * kLanes, kBlock);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
          largest[v] = LargerIgnoringNan(largest[v], acc[r][0]);
          largest[v + 1] = LargerIgnoringNan(largest[v + 1], acc[r][1]);
        }
      }
    }
  }

  // output (d16 x 32) = output * decay + sum over blocks of V^T weights. first: there is no output yet.
  static HWY_INLINE void Values(const Problem& problem, const float* const* values, int64_t blocks, const WorkerBuffers& worker,
                                const Floats* decay, bool first) {
    const int64_t d16 = problem.d16;
    for (int64_t d = 0; d < problem.params->head_size; d += kTileRows) {
#pragma GCC unroll 4
      for (int v = 0; v < kQueryVectors; v += 2) {
        float* out = worker.output + d * kBlock + v * kLanes;
        Floats acc[kTileRows][2];
        if (first) {
          ClearTile(acc);
        } else {
#pragma GCC unroll 8
          for (int r = 0; r < kTileRows; ++r) {
            acc[r][0] = hn::Mul(hn::LoadU(kFloats, out + r * kBlock), decay[v]);
            acc[r][1] = hn::Mul(hn::LoadU(kFloats, out + r * kBlock + kLanes), decay[v + 1]);
          }
        }
        for (int64_t n = 0; n < blocks; ++n) {
          MultiplyTile<false>(values[n] + d, 1, d16, worker.weights + n * kBlock * kBlock + v * kLanes, kBlock, kBlock, acc);
        }
        StoreTile(acc, out, kBlock);
      }
    }
  }

  // Before and after a run of the above on one thread.
  static void Begin() {}
  static void End() {}
};

#if HWY_NATIVE_DOT_BF16

// packed: queries (d16 / 2, 32, 2), keys (32, d16) in bfloat16.
struct PairProducts : FloatProducts {
  static constexpr bool kFloatKeys = false;

  using PairTag = hn::Repartition<hwy::bfloat16_t, FloatTag>;

  // The high halves of two rows of float32 that are bfloat16 already, element by element: (low, high).
  static HWY_INLINE Words Pair(Floats low, Floats high) {
    const Words mask = hn::Set(kWords, 0xFFFF0000u);
    return hn::Or(hn::ShiftRight<16>(hn::BitCast(kWords, low)), hn::And(hn::BitCast(kWords, high), mask));
  }

  static HWY_INLINE void PackQueries(const float* rows, const Problem& problem, float* to) {
    HWY_ALIGN float transposed[8 * kBlock];
    uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
    for (int64_t d = 0; d < problem.d16; d += 8) {
      for (int t = 0; t < kBlock; t += 8) Transpose8x8(rows + t * problem.d16 + d, problem.d16, transposed + t, kBlock);
      for (int row = 0; row < 8; row += 2, pairs += kBlock) {
        for (int t = 0; t < kBlock; t += kLanes) {
          const float* low = transposed + row * kBlock + t;
          hn::StoreU(Pair(hn::LoadU(kFloats, low), hn::LoadU(kFloats, low + kBlock)), kWords, pairs + t);
        }
      }
    }
  }

  static HWY_INLINE void PackKeys(const float* rows, const Problem& problem, float* to) {
    uint16_t* out = reinterpret_cast<uint16_t*>(to);
    for (int64_t n = 0; n < kBlock * problem.d16; n += kLanes) {
      const Words bits = hn::ShiftRight<16>(hn::BitCast(kWords, hn::LoadU(kFloats, rows + n)));
      hn::StoreU(hn::TruncateTo(kShorts, bits), kShorts, out + n);
    }
  }

  static HWY_INLINE void Logits(const Problem& problem, const float* keys, const float* queries, float* logits, Floats* largest) {
    const int64_t pairs = problem.d16 / 2;
    const uint32_t* key_pairs = reinterpret_cast<const uint32_t*>(keys);
    const uint32_t* query_pairs = reinterpret_cast<const uint32_t*>(queries);
    for (int t = 0; t < kBlock; t += kTileRows) {
      Floats acc[kTileRows][2];
      ClearTile(acc);
      const uint32_t* a = key_pairs + t * pairs;
      const uint32_t* b = query_pairs;
      static_assert(kQueryVectors == 2, "pair products are there on 512-bit vectors only");
      for (int64_t k = 0; k < pairs; ++k, ++a, b += kBlock) {
        const auto b0 = hn::BitCast(PairTag(), hn::LoadU(kWords, b));
        const auto b1 = hn::BitCast(PairTag(), hn::LoadU(kWords, b + kLanes));
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
          const auto x = hn::BitCast(PairTag(), hn::Set(kWords, a[r * pairs]));
          Floats unused = hn::Zero(kFloats);
          acc[r][0] = hn::ReorderWidenMulAccumulate(kFloats, x, b0, acc[r][0], unused);
          acc[r][1] = hn::ReorderWidenMulAccumulate(kFloats, x, b1, acc[r][1], unused);
        }
      }
      StoreTile(acc, logits + t * kBlock, kBlock);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        largest[0] = LargerIgnoringNan(largest[0], acc[r][0]);
        largest[1] = LargerIgnoringNan(largest[1], acc[r][1]);
      }
    }
  }
};

#endif  // HWY_NATIVE_DOT_BF16

}  // namespace HWY_NAMESPACE
}  // namespace mra
HWY_AFTER_NAMESPACE();

#endif  // include guard per target
