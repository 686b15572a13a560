// The two products of an exact block pair on AMX matrix tiles, for bfloat16 inputs. The logits are those of PairProducts but for
// the order of additions. A weight is not bfloat16: it goes in as the sum of three, which holds all 24 bits of a float32, so that
// this is float32 arithmetic too. Included once per instruction set; tests/cpp/amx_emulation.h stands in for a CPU that has no
// tiles.
#if defined(MRA_ATTENTION_AMX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MRA_ATTENTION_AMX_INL_H_
#undef MRA_ATTENTION_AMX_INL_H_
#else
#define MRA_ATTENTION_AMX_INL_H_
#endif

#include <string.h>

#include "mra_attention_amx.h"
#include "mra_attention_problem.h"
#include "mra_attention_products-inl.h"
#include "mra_attention_simd-inl.h"

#if HWY_NATIVE_DOT_BF16

HWY_BEFORE_NAMESPACE();
namespace mra {
namespace HWY_NAMESPACE {

// Tiles 0 to 3: sums, 16 x 16 float32, (row half, column half). 4, 5: left operand, 16 rows of 32 bfloat16. 6, 7: right operand, 16
// pairs of rows, 16 columns of (low, high).
struct HWY_ALIGN TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Constant: GCC takes _tile_loadconfig for a reader of eight bytes, and would not store the others of a variable.
constexpr TileConfig kTileConfig;

MRA_USES_TILES inline void LoadTileConfig() { _tile_loadconfig(&kTileConfig); }
MRA_USES_TILES inline void ReleaseTiles() { _tile_release(); }

// What was written before, tiles read from memory: GCC does not know that _tile_loadd reads any.
MRA_USES_TILES inline void FinishStores() { __asm__ volatile("" : : : "memory"); }

// to (32 x 32 float32) = a (32 x depth bfloat16) times b (depth / 2, 32, 2); depth a multiple of 32.
MRA_USES_TILES inline void MultiplyTiles(const uint16_t* a, int64_t depth, const uint16_t* b, float* to) {
  FinishStores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t row_bytes = depth * 2;
  for (int64_t k = 0; k < depth; k += 32) {
    _tile_loadd(4, a + k, row_bytes);
    _tile_loadd(5, a + 16 * depth + k, row_bytes);
    _tile_loadd(6, b + k * kBlock, kBlock * 4);
    _tile_loadd(7, b + k * kBlock + 32, kBlock * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, kBlock * 4);
  _tile_stored(1, to + 16, kBlock * 4);
  _tile_stored(2, to + 16 * kBlock, kBlock * 4);
  _tile_stored(3, to + 16 * kBlock + 16, kBlock * 4);
}

// to (16 x 32 float32) += sum over blocks of 16 rows of V^T (32 bfloat16 each) times the block's weights, (3 planes, blocks, 16,
// 32, 2).
MRA_USES_TILES inline void AddValueTiles(const uint16_t* const* values, int64_t row, int64_t blocks, const uint16_t* planes,
                                         float* to) {
  FinishStores();
  _tile_loadd(0, to, kBlock * 4);
  _tile_loadd(1, to + 16, kBlock * 4);
  for (int64_t n = 0; n < blocks; ++n) {
    _tile_loadd(4, values[n] + row * kBlock, kBlock * 2);
    for (int plane = 0; plane < 3; ++plane) {
      const uint16_t* weights = planes + (plane * kChunkBlocks + n) * kBlock * kBlock;
      _tile_loadd(6, weights, kBlock * 4);
      _tile_loadd(7, weights + 32, kBlock * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  _tile_stored(0, to, kBlock * 4);
  _tile_stored(1, to + 16, kBlock * 4);
}

// The nearest bfloat16, as a float32.
HWY_INLINE Floats RoundToBFloat(Floats v) { return Widen(BFloat(), Narrow(BFloat(), v)); }

// packed: queries (d32 / 2, 32, 2), keys (32, d32), values (d16, 32), all bfloat16.
struct TileProducts : PairProducts {
  static constexpr bool kFloatValues = false;

  static HWY_INLINE void PackQueries(const float* rows, const Problem& problem, float* to) {
    PairProducts::PackQueries(rows, problem, to);
    memset(reinterpret_cast<uint32_t*>(to) + problem.d16 / 2 * kBlock, 0,
           static_cast<size_t>((problem.d32 - problem.d16) / 2 * kBlock) * 4);
  }

  static HWY_INLINE void PackKeys(const float* rows, const Problem& problem, float* to) {
    uint16_t* out = reinterpret_cast<uint16_t*>(to);
    for (int t = 0; t < kBlock; ++t, rows += problem.d16, out += problem.d32) {
      for (int64_t d = 0; d < problem.d16; d += kLanes)
        hn::StoreU(Narrow(BFloat(), hn::LoadU(kFloats, rows + d)), kShorts, out + d);
      memset(out + problem.d16, 0, static_cast<size_t>(problem.d32 - problem.d16) * 2);
    }
  }

  static HWY_INLINE void PackValues(const float* rows, const Problem& problem, float* to) {
    HWY_ALIGN float transposed[8 * kBlock];
    uint16_t* out = reinterpret_cast<uint16_t*>(to);
    for (int64_t d = 0; d < problem.d16; d += 8, out += 8 * kBlock) {
      for (int t = 0; t < kBlock; t += 8) Transpose8x8(rows + t * problem.d16 + d, problem.d16, transposed + t, kBlock);
      for (int n = 0; n < 8 * kBlock; n += kLanes)
        hn::StoreU(Narrow(BFloat(), hn::LoadU(kFloats, transposed + n)), kShorts, out + n);
    }
  }

  static HWY_INLINE void Logits(const Problem& problem, const float* keys, const float* queries, float* logits, Floats* largest) {
    MultiplyTiles(reinterpret_cast<const uint16_t*>(keys), problem.d32, reinterpret_cast<const uint16_t*>(queries), logits);
    for (int t = 0; t < kBlock; ++t) {
      for (int v = 0; v < kQueryVectors; ++v) {
        largest[v] = LargerIgnoringNan(largest[v], hn::LoadU(kFloats, logits + t * kBlock + v * kLanes));
      }
    }
  }

  static HWY_INLINE void Values(const Problem& problem, const float* const* values, int64_t blocks, const WorkerBuffers& worker,
                                const Floats* decay, bool first) {
    uint32_t* const pairs = static_cast<uint32_t*>(worker.planes);
    constexpr int64_t kPlane = kChunkBlocks * kBlock * kBlock / 2;  // pairs
    for (int64_t key = 0; key < blocks * kBlock; key += 2) {
      for (int v = 0; v < kQueryVectors; ++v) {
        const float* w = worker.weights + key * kBlock + v * kLanes;
        Floats low = hn::LoadU(kFloats, w);
        Floats high = hn::LoadU(kFloats, w + kBlock);
        for (int plane = 0; plane < 3; ++plane) {
          const Floats low_part = RoundToBFloat(low);
          const Floats high_part = RoundToBFloat(high);
          hn::StoreU(Pair(low_part, high_part), kWords, pairs + plane * kPlane + key / 2 * kBlock + v * kLanes);
          low = hn::Sub(low, low_part);
          high = hn::Sub(high, high_part);
        }
      }
    }
    const uint16_t* blocks_of_values[kChunkBlocks];
    for (int64_t n = 0; n < blocks; ++n) blocks_of_values[n] = reinterpret_cast<const uint16_t*>(values[n]);
    for (int64_t d = 0; d < problem.d16; d += 16) {
      float* out = worker.output + d * kBlock;
      for (int64_t n = 0; n < 16 * kBlock; n += kBlock) {
        for (int v = 0; v < kQueryVectors; ++v) {
          float* o = out + n + v * kLanes;
          hn::StoreU(first ? hn::Zero(kFloats) : hn::Mul(hn::LoadU(kFloats, o), decay[v]), kFloats, o);
        }
      }
      AddValueTiles(blocks_of_values, d, blocks, static_cast<const uint16_t*>(worker.planes), out);
    }
  }

  static void Begin() { LoadTileConfig(); }
  static void End() { ReleaseTiles(); }
};

}  // namespace HWY_NAMESPACE
}  // namespace mra
HWY_AFTER_NAMESPACE();

#endif  // HWY_NATIVE_DOT_BF16

#endif  // include guard per target
