// Launch 2, select: steps 2 to 5 of docs/operator.md, one CTA per (batch row, head). Block logits, row maxima, a radix select of
// the K-th largest (class, score), the row lists in flat order, and the attention launch's work list. Up to kFusedSelectBlocks
// blocks the logits stay in shared memory; above, LogitKernel runs first and they are read from the workspace.
//
// Every rounding is fixed (docs/kernels.md, "selection contract"), so that CPU, GPU and emulator choose the same blocks.
#ifndef MRA_ATTENTION_SELECT_CUH_
#define MRA_ATTENTION_SELECT_CUH_

#include "mra_attention_device.cuh"

namespace mra {

constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kLogitDepth = 16;                // dimensions staged at a time
constexpr int kStageRow = kLogitTileRows + 1;  // padded: no bank conflicts while storing
constexpr int kStageColumn = kLogitTileColumns + 1;
constexpr int kStageFloats = kLogitDepth * (kStageRow + kStageColumn);
constexpr int kDigits = 256;
constexpr int kClasses = 6;      // prior count - 2 * dead is -2 to 3
constexpr int kClassOffset = 2;  // makes it 0 to 5

// Dynamic shared memory of the select launch. All offsets are multiples of 4 bytes.
struct SelectShared {
  float* stage;        // kStageFloats
  float* row_max;      // nb
  int32_t* row_above;  // nb: pairs above the threshold; then where the row's list begins
  int32_t* row_equal;  // nb: pairs at the threshold; then how many of them come before this row
  uint32_t* live;      // words: bit j = block j has a real token
  int32_t* histogram;  // kDigits
  int32_t* found;      // [0] digit, [1] how many are still to be taken inside it
  float* logit;        // nb * nb if the logits are kept here
};

__host__ __device__ inline size_t SelectSharedFloats(int blocks, int words) {
  const size_t logits = blocks <= kFusedSelectBlocks ? static_cast<size_t>(blocks) * blocks : 0;
  return kStageFloats + 3 * static_cast<size_t>(blocks) + words + kDigits + 2 + logits;
}

__device__ __forceinline__ SelectShared CarveSelectShared(unsigned char* memory, const Problem& p) {
  SelectShared s;
  s.stage = reinterpret_cast<float*>(memory);
  s.row_max = s.stage + kStageFloats;
  s.row_above = reinterpret_cast<int32_t*>(s.row_max + p.blocks);
  s.row_equal = s.row_above + p.blocks;
  s.live = reinterpret_cast<uint32_t*>(s.row_equal + p.blocks);
  s.histogram = reinterpret_cast<int32_t*>(s.live + p.words);
  s.found = s.histogram + kDigits;
  s.logit = reinterpret_cast<float*>(s.found + 2);
  return s;
}

// l_ij for the tile of 64 x 128 pairs at (row, column), by kSelectThreads threads of 4 x 4 pairs. Each is one chain of fused
// multiply-adds over the head's dimensions in ascending order, then one product with the scale. Written to the workspace, and to
// shared_logit (nb x nb) unless that is null.
__device__ __forceinline__ void LogitTile(const Problem& p, int64_t head, int row, int column, float* stage, float* shared_logit) {
  float* stage_query = stage;                          // (kLogitDepth, kStageRow)
  float* stage_key = stage + kLogitDepth * kStageRow;  // (kLogitDepth, kStageColumn)
  const int64_t base = head * p.blocks * p.head_size;
  const int tx = threadIdx.x % 32, ty = threadIdx.x / 32;  // columns tx + 32 c, rows ty + 16 r
  float acc[4][4] = {};
  for (int depth = 0; depth < p.head_size; depth += kLogitDepth) {
    __syncthreads();  // the previous depth, or tile, has been read
    const int d = threadIdx.x % kLogitDepth;
    for (int n = threadIdx.x / kLogitDepth; n < kLogitTileRows + kLogitTileColumns; n += kSelectThreads / kLogitDepth) {
      const bool is_query = n < kLogitTileRows;
      const int block = is_query ? row + n : column + n - kLogitTileRows;
      float x = 0.0f;
      if (block < p.blocks && depth + d < p.head_size) {
        x = (is_query ? p.query_mean : p.key_mean)[base + int64_t{block} * p.head_size + depth + d];
      }
      if (is_query) {
        stage_query[d * kStageRow + n] = x;
      } else {
        stage_key[d * kStageColumn + n - kLogitTileRows] = x;
      }
    }
    __syncthreads();
    const int count = p.head_size - depth < kLogitDepth ? p.head_size - depth : kLogitDepth;
    for (int k = 0; k < count; ++k) {
      float q[4], x[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) q[r] = stage_query[k * kStageRow + ty + 16 * r];
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = stage_key[k * kStageColumn + tx + 32 * c];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[r][c] = __fmaf_rn(q[r], x[c], acc[r][c]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int i = row + ty + 16 * r, j = column + tx + 32 * c;
      if (i >= p.blocks || j >= p.blocks) continue;
      const float logit = __fmul_rn(p.scale, acc[r][c]);
      p.logit[(head * p.blocks + i) * p.blocks + j] = logit;
      if (shared_logit != nullptr) shared_logit[i * p.blocks + j] = logit;
    }
  }
}

// One CTA per head and tile of its logits.
__global__ void __launch_bounds__(kSelectThreads, 2) LogitKernel(Problem p) {
  MRA_DYNAMIC_SHARED(memory);
  const int64_t head = blockIdx.x / p.logit_tiles;
  const int tile = blockIdx.x % p.logit_tiles;
  const int across = (p.blocks + kLogitTileColumns - 1) / kLogitTileColumns;
  LogitTile(p, head, tile / across * kLogitTileRows, tile % across * kLogitTileColumns, reinterpret_cast<float*>(memory), nullptr);
}

__device__ __forceinline__ bool IsLive(const SelectShared& s, int block) { return (s.live[block / 32] >> (block % 32)) & 1u; }

// prior count - 2 * dead of pair (i, j), plus kClassOffset.
__device__ __forceinline__ int PairClass(const Problem& p, const SelectShared& s, int i, int j) {
  const int distance = i < j ? j - i : i - j;
  const int priors = (i < p.first) + (j < p.first) + (p.diagonal > 0 && distance <= p.diagonal / 2);
  return kClassOffset + priors - (IsLive(s, i) && IsLive(s, j) ? 0 : 2);
}

// s_ij as an unsigned number of the same order: -0 equals +0, NaN is below everything.
__device__ __forceinline__ uint32_t ScoreKey(float logit, float row_max) {
  const float score = __fadd_rn(__fsub_rn(logit, row_max), 0.0f);
  if (!(score == score)) return 0u;
  const uint32_t bits = __float_as_uint(score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Warp w takes rows w, w + kSelectWarps, ...; visit(i, j, j < nb) is called by all 32 lanes together.
template <typename Visit>
__device__ __forceinline__ void ForEachPair(const Problem& p, const Visit& visit) {
  for (int i = threadIdx.x / 32; i < p.blocks; i += kSelectWarps) {
    for (int j = threadIdx.x % 32; j < p.words * 32; j += 32) visit(i, j, j < p.blocks);
  }
}

// The largest digit with at least s.found[1] entries in histogram[digit..]; found becomes {digit, how many to take inside it}. By
// warp 0.
__device__ __forceinline__ void FindDigit(const SelectShared& s) {
  constexpr int kPerLane = kDigits / 32;
  const int lane = threadIdx.x % 32;
  const int remaining = s.found[1];
  int own = 0;
  for (int n = 0; n < kPerLane; ++n) own += s.histogram[lane * kPerLane + n];
  int from_here = own;  // entries in this lane's digits and all higher ones
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_down_sync(kWarp, from_here, step);
    if (lane + step < 32) from_here += other;
  }
  int above = from_here - own;
  if (above < remaining && remaining <= from_here) {
    int digit = lane * kPerLane + kPerLane - 1;
    while (above + s.histogram[digit] < remaining) above += s.histogram[digit--];
    s.found[0] = digit;
    s.found[1] = remaining - above;
  }
}

// Sum of `value` over this lane and the lower ones.
__device__ __forceinline__ int WarpScan(int value, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kWarp, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// Steps 3 to 5 for one head whose l_ij are at `logit` (nb x nb, shared or global memory); read after a barrier.
__device__ __forceinline__ void SelectHead(const Problem& p, int64_t head, const SelectShared& s, const float* logit) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int nb = p.blocks;
  const uint32_t* real = p.real + head / p.heads * nb;

  for (int word = warp; word < p.words; word += kSelectWarps) {
    const int j = word * 32 + lane;
    const uint32_t bits = __ballot_sync(kWarp, j < nb && real[j] != 0);
    if (lane == 0) s.live[word] = bits;
  }
  for (int n = threadIdx.x; n < kDigits; n += kSelectThreads) s.histogram[n] = 0;
  if (threadIdx.x == 0) s.found[1] = p.budget;
  __syncthreads();

  for (int i = warp; i < nb; i += kSelectWarps) {
    float largest = -INFINITY;  // fmaxf: NaN never becomes the maximum
    for (int j = lane; j < nb; j += 32) {
      if (!p.padding_invariant || IsLive(s, j)) largest = fmaxf(largest, logit[i * nb + j]);
    }
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(kWarp, largest, step));
    if (p.padding_invariant && !IsLive(s, i)) largest = 0.0f;  // no live pair
    if (lane == 0) {
      s.row_max[i] = largest;
      p.row_max[head * nb + i] = largest;
      p.arrivals[head * nb + i] = 0;
    }
  }

  // The class of the K-th pair. Few classes, so counted by ballots.
  int class_count = 0;  // of the class equal to this lane
  ForEachPair(p, [&](int i, int j, bool inside) {
    const int pair_class = inside ? PairClass(p, s, i, j) : -1;
    for (int k = 0; k < kClasses; ++k) {
      const int count = __popc(__ballot_sync(kWarp, pair_class == k));
      if (lane == k) class_count += count;
    }
  });
  if (lane < kClasses && class_count > 0) atomicAdd(&s.histogram[lane], class_count);
  __syncthreads();
  if (warp == 0) FindDigit(s);
  __syncthreads();
  const int threshold_class = s.found[0];

  // Its key, eight bits at a time.
  uint32_t threshold = 0, known = 0;  // known: mask of the bits already found
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int n = threadIdx.x; n < kDigits; n += kSelectThreads) s.histogram[n] = 0;
    __syncthreads();
    ForEachPair(p, [&](int i, int j, bool inside) {
      int digit = -1;
      if (inside && PairClass(p, s, i, j) == threshold_class) {
        const uint32_t key = ScoreKey(logit[i * nb + j], s.row_max[i]);
        if ((key & known) == threshold) digit = static_cast<int>(key >> shift & 255u);
      }
      const unsigned peers = __match_any_sync(kWarp, digit);  // scores crowd into few digits: one atomic for each
      if (digit >= 0 && lane == __ffs(static_cast<int>(peers)) - 1) atomicAdd(&s.histogram[digit], __popc(peers));
    });
    __syncthreads();
    if (warp == 0) FindDigit(s);
    __syncthreads();
    threshold |= static_cast<uint32_t>(s.found[0]) << shift;
    known |= 255u << shift;
  }
  const int ties = s.found[1];  // how many of the pairs at the threshold are chosen: the first ones in flat order

  const auto compare = [&](int i, int j, bool inside) {  // 1 above the threshold, 0 at it, -1 below
    if (!inside) return -1;
    const int pair_class = PairClass(p, s, i, j);
    if (pair_class != threshold_class) return pair_class > threshold_class ? 1 : -1;
    const uint32_t key = ScoreKey(logit[i * nb + j], s.row_max[i]);
    return key > threshold ? 1 : key == threshold ? 0 : -1;
  };
  for (int i = warp; i < nb; i += kSelectWarps) {
    int above = 0, equal = 0;
    for (int j = lane; j < p.words * 32; j += 32) {
      const int order = compare(i, j, j < nb);
      above += __popc(__ballot_sync(kWarp, order > 0));
      equal += __popc(__ballot_sync(kWarp, order == 0));
    }
    if (lane == 0) {
      s.row_above[i] = above;
      s.row_equal[i] = equal;
    }
  }
  __syncthreads();

  // Row starts and the work list: full chunks from the front, the rows' remainders from the back, so that long items start first.
  if (warp == 0) {
    int32_t* row_start = p.row_start + head * (nb + 1);
    WorkItem* work = p.work + head * p.slots;
    int all_equal = 0, all_chosen = 0, all_full = 0, all_rest = 0, all_partial = 0;
    for (int first = 0; first < nb; first += 32) {
      const int i = first + lane;
      const int equal = i < nb ? s.row_equal[i] : 0;
      const int equal_end = all_equal + WarpScan(equal, lane);
      const int equal_before = equal_end - equal;
      const int left = ties > equal_before ? ties - equal_before : 0;
      const int chosen = i < nb ? s.row_above[i] + (equal < left ? equal : left) : 0;
      const int chosen_end = all_chosen + WarpScan(chosen, lane);
      const int full = chosen / p.chunk;
      const int rest = i < nb && (chosen % p.chunk != 0 || chosen == 0) ? 1 : 0;
      const int partial = full + rest > 1 ? full + rest : 0;
      const int full_end = all_full + WarpScan(full, lane);
      const int rest_end = all_rest + WarpScan(rest, lane);
      const int partial_end = all_partial + WarpScan(partial, lane);
      if (i < nb) {
        s.row_equal[i] = equal_before;
        s.row_above[i] = chosen_end - chosen;
        row_start[i] = chosen_end - chosen;
        for (int n = 0; n < full; ++n) work[full_end - full + n] = WorkItem{i, n, full + rest, partial_end - partial};
        if (rest) work[p.slots - rest_end] = WorkItem{i, full, full + rest, partial_end - partial};
      }
      all_equal = __shfl_sync(kWarp, equal_end, 31);
      all_chosen = __shfl_sync(kWarp, chosen_end, 31);
      all_full = __shfl_sync(kWarp, full_end, 31);
      all_rest = __shfl_sync(kWarp, rest_end, 31);
      all_partial = __shfl_sync(kWarp, partial_end, 31);
    }
    if (lane == 0) row_start[nb] = all_chosen;
    for (int n = all_full + lane; n < p.slots - all_rest; n += 32) work[n] = WorkItem{-1, 0, 0, 0};
  }
  __syncthreads();

  const uint32_t lower_lanes = (1u << lane) - 1u;
  for (int i = warp; i < nb; i += kSelectWarps) {
    uint16_t* column = p.column + head * p.budget + s.row_above[i];
    uint32_t* excluded = p.excluded + (head * nb + i) * p.words;
    int equal_before = s.row_equal[i];
    for (int j = lane; j < p.words * 32; j += 32) {
      const int order = compare(i, j, j < nb);
      const uint32_t above = __ballot_sync(kWarp, order > 0);
      const uint32_t equal = __ballot_sync(kWarp, order == 0);
      const bool is_chosen = order > 0 || (order == 0 && equal_before + __popc(equal & lower_lanes) < ties);
      const uint32_t chosen = __ballot_sync(kWarp, is_chosen);
      if (is_chosen) column[__popc(chosen & lower_lanes)] = static_cast<uint16_t>(j);
      if (lane == 0) excluded[j / 32] = above | equal;
      column += __popc(chosen);
      equal_before += __popc(equal);
    }
  }
}

// One CTA per head.
__global__ void __launch_bounds__(kSelectThreads, 2) SelectKernel(Problem p) {
  MRA_DYNAMIC_SHARED(memory);
  const SelectShared s = CarveSelectShared(memory, p);
  const int64_t head = blockIdx.x;
  if (p.blocks > kFusedSelectBlocks) {
    SelectHead(p, head, s, p.logit + head * p.blocks * p.blocks);
    return;
  }
  for (int row = 0; row < p.blocks; row += kLogitTileRows) LogitTile(p, head, row, 0, s.stage, s.logit);
  SelectHead(p, head, s, s.logit);
}

// What was selected, for tests and for comparing runtimes: one CTA per head and block row.
// blocks: (BH, nb, nb) uint8, 2 chosen, 1 excluded only, 0 neither. score: null or (BH, nb, nb) float.
struct SelectionOutput {
  Problem problem;
  uint8_t* blocks;
  float* score;
};

constexpr int kExportThreads = 128;

__global__ void __launch_bounds__(kExportThreads) ExportSelectionKernel(SelectionOutput out) {
  const Problem& p = out.problem;
  const int64_t row = blockIdx.x;  // head * nb + i
  const int64_t head = row / p.blocks;
  const int i = static_cast<int>(row % p.blocks);
  for (int j = threadIdx.x; j < p.blocks; j += kExportThreads) {
    out.blocks[row * p.blocks + j] = p.excluded[row * p.words + j / 32] >> (j % 32) & 1u;
    if (out.score != nullptr) out.score[row * p.blocks + j] = __fsub_rn(p.logit[row * p.blocks + j], p.row_max[row]);
  }
  __syncthreads();
  const int32_t* row_start = p.row_start + head * (p.blocks + 1);
  for (int n = row_start[i] + threadIdx.x; n < row_start[i + 1]; n += kExportThreads) {
    out.blocks[row * p.blocks + p.column[head * p.budget + n]] = 2;
  }
}

}  // namespace mra

#endif  // MRA_ATTENTION_SELECT_CUH_
