// Sizes, work cutting and workspace of the CUDA kernels. Host code, plain C++; all of it depends on shapes and attributes only, so
// a captured CUDA graph stays valid for new data.
#ifndef MRA_ATTENTION_LAYOUT_H_
#define MRA_ATTENTION_LAYOUT_H_

#include <stddef.h>
#include <stdint.h>

#include "../common/mra_attention_params.h"

namespace mra {

constexpr int kBlock = MRA_ATTENTION_BLOCK_SIZE;
constexpr int kMaxBlocks = 4096;         // nb = ceil(N / 32); N to 131072. The select kernel keeps a number per block row on chip
constexpr int kFusedSelectBlocks = 128;  // up to here one CTA holds all of a head's logits in shared memory
constexpr int kShortRow = 32;            // rows of up to this many chosen blocks are never split
constexpr int kPoolMostThreads = 128;
constexpr int kVectorBytes = 16;  // of a token, that one thread loads at once
constexpr int kAttendThreads = 128;
constexpr int kLogitTile = 128;   // block rows and columns of a CTA of the logit launch
constexpr int kLowTileRows = 64;  // block rows of a CTA of the low-resolution launch

// The attention kernel is compiled for these widths; a head takes the smallest that holds it.
inline int PaddedHeadSize(int head_size) { return head_size <= 64 ? 64 : head_size <= 128 ? 128 : 256; }

struct Section {
  size_t offset = 0;
  size_t bytes = 0;
};

// Everything the launches need to know about one call's shapes. BH = B * H, nb blocks, K = chosen pairs per head.
struct Layout {
  int64_t heads_total = 0;  // BH
  int blocks = 0;           // nb
  int words = 0;            // ceil(nb / 32): words of a row of the excluded bitmap
  int budget = 0;           // K = min(num_blocks, nb^2)
  int chunk = 0;            // a block row with more chosen blocks is cut into chunks of this many, merged in order
  int slots = 0;            // work items per head: at least as many as any selection can need
  int partials = 0;         // unmerged chunk results per head, likewise
  int partial_floats = 0;   // floats of one of those
  int logit_stride = 0;     // floats from one row of logits to the next
  int64_t pool_tiles = 0;   // CTAs of the pool launch per token block and tensor
  int pool_threads = 0;     // of each
  int64_t logit_tiles = 0;  // CTAs of the logit launch per head (nb > kFusedSelectBlocks)
  int64_t low_tiles = 0;    // CTAs of the low-resolution launch per head (likewise)

  Section real;        // (B, nb) uint32: bit t = token t of the block is real
  Section query_mean;  // (BH, nb, D) float
  Section key_mean;    // (BH, nb, D) float
  Section value_sum;   // (BH, nb, D) float
  Section logit;       // (BH, nb, logit_stride) float: l_ij; above kFusedSelectBlocks -inf from column nb on
  Section row_key;     // (BH, nb) uint32: r_i as an integer of the same order, 0 where there is none
  Section row_start;   // (BH, nb + 1) int32: where block row i begins in `column`
  Section column;      // (BH, K) uint16: key blocks of the chosen pairs, in flat order
  Section excluded;    // (BH, nb, words) uint32
  Section work;        // (BH, slots) WorkItem
  Section arrivals;    // (BH, nb) int32: chunks of the row that are done
  Section partial;     // (BH, partials, partial_floats) float

  // The low-resolution part of each block row, in mode "full": over all j that are not excluded and have a real token
  Section low_vector;   // (BH, nb, D) float: sum of exp(l_ij - low_largest) times the block's sum of value
  Section low_total;    // (BH, nb) float: sum of exp(l_ij - low_largest) times the block's number of real tokens
  Section low_largest;  // (BH, nb) float: the largest such l_ij, -inf if there is no such j
  size_t bytes = 0;
};

// One CTA's share of the attention launch.
struct alignas(16) WorkItem {
  int32_t row;      // block row i; -1: nothing to do
  int32_t chunk;    // which chunk of the row's chosen blocks
  int32_t chunks;   // how many the row has
  int32_t partial;  // index of the row's first partial result, if chunks > 1
};

// Dimensions that a CTA of the low-resolution launch covers.
inline int LowTileDims(int head_size) { return head_size <= 64 ? 64 : 128; }

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// MRA_OK and a filled layout, or why these parameters cannot be run.
inline MraStatus MakeLayout(const MraAttentionParams* params, Layout* layout) {
  const MraStatus status = CheckParams(params);
  if (status != MRA_OK) return status;
  const int64_t nb = NumBlocks(*params);
  const int64_t heads_total = params->batch * params->num_heads;
  if (nb > kMaxBlocks) return MRA_ERROR_TOO_LARGE;

  Layout& l = *layout;
  l = Layout();
  l.heads_total = heads_total;
  l.blocks = static_cast<int>(nb);
  l.words = static_cast<int>(CeilDiv(nb, 32));
  l.budget = static_cast<int>(params->num_blocks < nb * nb ? params->num_blocks : nb * nb);
  // Twice the mean keeps the partial results below a float copy of the context, whatever the budget.
  const int64_t mean_row = CeilDiv(l.budget, nb);
  l.chunk = static_cast<int>(2 * mean_row > kShortRow ? 2 * mean_row : kShortRow);
  // Row i of n_i blocks takes max(1, ceil(n_i / chunk)) items, and ceil(n / c) <= 1 + n / c; a split row has n > chunk, so at most
  // 2 n / c chunks.
  l.slots = nb > l.chunk ? static_cast<int>(nb + l.budget / l.chunk) : l.blocks;
  l.partials = nb > l.chunk ? 2 * (l.budget / l.chunk) : 0;
  const int padded = PaddedHeadSize(params->head_size);
  l.partial_floats = kAttendThreads * (kBlock * padded / kAttendThreads + 4);
  l.logit_stride = l.words * 32;
  const int vector = kVectorBytes / (params->dtype == MRA_FLOAT32 ? 4 : 2);
  const int64_t vectors = CeilDiv(int64_t{params->num_heads} * params->head_size, vector);
  l.pool_tiles = CeilDiv(vectors, kPoolMostThreads);
  l.pool_threads = static_cast<int>(CeilDiv(CeilDiv(vectors, l.pool_tiles), 32) * 32);
  l.logit_tiles = CeilDiv(nb, kLogitTile) * CeilDiv(nb, kLogitTile);
  l.low_tiles = CeilDiv(nb, kLowTileRows) * CeilDiv(params->head_size, LowTileDims(params->head_size));

  // CheckParams keeps B * N * H * D below 2^40, so no product here overflows; a grid has at most 2^31 - 1 CTAs.
  const int64_t grid_limit = INT32_MAX;
  if (params->batch * nb > grid_limit / (3 * l.pool_tiles) || heads_total > grid_limit / l.slots || heads_total > grid_limit / nb ||
      heads_total > grid_limit / l.logit_tiles || heads_total > grid_limit / l.low_tiles) {
    return MRA_ERROR_TOO_LARGE;
  }

  const auto add = [&l](int64_t elements, size_t element_bytes) {
    Section section{l.bytes, static_cast<size_t>(elements) * element_bytes};
    constexpr size_t kAlign = 256, kGap = 64;  // the gap lets tests see a write past a section's end
    l.bytes = (section.offset + section.bytes + kGap + kAlign - 1) / kAlign * kAlign;
    return section;
  };
  l.real = add(params->batch * nb, sizeof(uint32_t));
  const int64_t pooled = heads_total * nb * params->head_size;
  l.query_mean = add(pooled, sizeof(float));
  l.key_mean = add(pooled, sizeof(float));
  const bool full = params->approx_mode == MRA_APPROX_FULL;
  l.value_sum = add(full ? pooled : 0, sizeof(float));
  l.logit = add(heads_total * nb * l.logit_stride, sizeof(float));
  l.row_key = add(heads_total * nb, sizeof(uint32_t));
  l.row_start = add(heads_total * (nb + 1), sizeof(int32_t));
  l.column = add(heads_total * l.budget, sizeof(uint16_t));
  l.excluded = add(heads_total * nb * l.words, sizeof(uint32_t));
  l.work = add(heads_total * l.slots, sizeof(WorkItem));
  l.arrivals = add(heads_total * nb, sizeof(int32_t));
  l.partial = add(heads_total * l.partials * l.partial_floats, sizeof(float));
  l.low_vector = add(full ? pooled : 0, sizeof(float));
  l.low_total = add(full ? heads_total * nb : 0, sizeof(float));
  l.low_largest = add(full ? heads_total * nb : 0, sizeof(float));
  return MRA_OK;
}

}  // namespace mra

#endif  // MRA_ATTENTION_LAYOUT_H_
