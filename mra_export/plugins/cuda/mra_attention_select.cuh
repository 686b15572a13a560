// Select: steps 2 to 5 of docs/operator.md, one CTA per (batch row, head): row maxima, the K-th largest (class, score), the row
// lists in flat order, and the attention launch's work list. Up to kFusedSelectBlocks blocks, SelectKernel computes the logits too,
// keeps a head's keys in registers, and adds the low-resolution part; above, SelectManyKernel reads what LogitKernel left.
//
// Every rounding is fixed (docs/kernels.md, "selection contract"), so that CPU, GPU and emulator choose the same blocks.
#ifndef MRA_ATTENTION_SELECT_CUH_
#define MRA_ATTENTION_SELECT_CUH_

#include "mra_attention_device.cuh"
#include "mra_attention_logit.cuh"
#include "mra_attention_low.cuh"
#include "mra_attention_order.cuh"

namespace mra {

// -----------------------------------------------------------------------------------------------------------------------------------
// Up to kFusedSelectBlocks blocks.

constexpr int kSelectColumns = 64;  // key blocks of a step of the low-resolution product
constexpr int kSelectDims = 64;     // dimensions likewise

// The kTile (logits of a thread: kTile x kTile) of this many blocks: 16 kTile rows hold them.
inline int SelectTile(int blocks) { return blocks <= 32 ? 2 : blocks <= 64 ? 4 : 8; }

__host__ __device__ constexpr int SelectThreads(int tile) { return tile == 2 ? 256 : 512; }

// Dynamic shared memory for up to 16 kTile blocks.
template <int kTile>
struct SelectShared {
  static constexpr int kRows = 16 * kTile;
  static constexpr int kStride = kRows + 4;  // a multiple of 4, not of 8: the low-resolution product's fragments meet in no bank
  float stage[kStageFloats];                 // of the logits; then RadixSelect's histogram; then block sums of value
  float logit[kRows * kStride];              // then weights
  float tokens[kRows];                       // real tokens of each block
  uint32_t live[kRows / 32];                 // bit j = block j has a real token
  int32_t class_count[kClasses];
  RowCount rows[kRows];
  int32_t start[kRows];
  InfiniteColumns<kSelectColumns> infinite;
};
static_assert(kHistogramInts <= kStageFloats && kSelectColumns * LowValueStride(kSelectDims) <= kStageFloats, "stage");
static_assert(sizeof(SelectShared<8>) <= 99 * 1024, "what every architecture has");

// The head's low-resolution part, whose weights are in s.logit. `values` is under way with the first ones.
template <bool kTensor, int kTile>
__device__ __forceinline__ void SelectLow(const Problem& p, int64_t head, SelectShared<kTile>& s,
                                          ValueChunk<kTensor, SelectThreads(kTile), kSelectColumns, kSelectDims>& values) {
  constexpr int kStride = SelectShared<kTile>::kStride;
  int turn = 0;
#pragma unroll 1
  for (int first_dim = 0; first_dim < p.head_size; first_dim += kSelectDims) {
    LowSums<kTensor, kSelectDims> sums(SelectShared<kTile>::kRows);
#pragma unroll 1
    for (int first_column = 0; first_column < p.blocks; first_column += kSelectColumns) {
      const int left = (p.blocks - first_column + 7) / 8 * 8;
      const int columns = left < kSelectColumns ? left : kSelectColumns;
      if (turn > 0) {
        values.Load(p, head, first_column, first_dim);
        __syncthreads();  // the values before have been read
      }
      values.Store(s.stage, &s.infinite, ++turn);
      __syncthreads();
      sums.Add(s.logit + first_column, kStride, s.stage, columns);
      sums.AddInfinite(p, head, s.logit + first_column, kStride, s.infinite, turn, first_column,
                       p.blocks - first_column < columns ? p.blocks - first_column : columns, first_dim);
    }
    sums.Write(p, head, 0, first_dim);
  }
}

template <bool kTensor, int kTile>
__global__ void __launch_bounds__(SelectThreads(kTile), kTile == 2 ? 2 : 1) SelectKernel(Problem p) {
  MRA_DYNAMIC_SHARED(memory);
  SelectShared<kTile>& s = *reinterpret_cast<SelectShared<kTile>*>(memory);
  constexpr int kRows = SelectShared<kTile>::kRows, kStride = SelectShared<kTile>::kStride;
  constexpr int kThreads = SelectThreads(kTile), kWarps = kThreads / 32;
  constexpr int kEach = kRows / kWarps;  // rows of a warp: warp, warp + kWarps, ...
  constexpr int kWords = kRows / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int nb = p.blocks;
  const int64_t head = blockIdx.x;
  const bool choose_all = p.budget == nb * nb;

  if (warp < kWords) {
    const int j = threadIdx.x;
    const uint32_t real = j < nb ? p.real[head / p.heads * nb + j] : 0u;
    s.tokens[j] = static_cast<float>(__popc(real));
    const uint32_t live = __ballot_sync(kWarp, real != 0u);
    if (lane == 0) s.live[warp] = live;
  }
  if (threadIdx.x < kClasses) s.class_count[threadIdx.x] = 0;
  if (threadIdx.x < kSelectColumns) s.infinite.column[threadIdx.x] = 0;
  if (threadIdx.x == 0) s.infinite.any = 0;

  if (!choose_all || p.keep_logits) {
    float logit[kTile][kTile];
    LogitTile<kTile, kThreads>(p, head, 0, 0, s.stage, logit);
    if (threadIdx.x < kLogitThreads) {
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
        const int i = TilePlace<kTile>(LogitRow(), r);
#pragma unroll
        for (int c = 0; c < kTile; ++c) {
          const int j = TilePlace<kTile>(LogitColumn(), c);
          s.logit[i * kStride + j] = logit[r][c];
          if (p.keep_logits && i < nb && j < nb) p.logit[(head * nb + i) * p.logit_stride + j] = logit[r][c];
        }
      }
    }
  }
  __syncthreads();

  const ClassThreshold by_class = FindClass<kThreads>(p, s.live, s.class_count);
  const auto is_live = [&](int block) { return s.live[block / 32] >> (block % 32) & 1u; };
  uint32_t key[kEach][kWords];  // of pair (warp + kWarps r, lane + 32 w)
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const int i = warp + kWarps * r;
    float logit[kWords];
    float largest = -INFINITY;  // fmaxf: NaN never becomes the maximum
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int j = lane + 32 * w;
      logit[w] = s.logit[i * kStride + j];
      if (j < nb && (!p.padding_invariant || is_live(j))) largest = fmaxf(largest, logit[w]);
    }
    const uint32_t row_key = __reduce_max_sync(kWarp, MaximumKey(largest));
    if (p.keep_logits && lane == 0 && i < nb) p.row_key[head * nb + i] = row_key;
    const float row_max = p.padding_invariant && !is_live(i) ? 0.0f : MaximumOf(row_key);  // 0: no live pair
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t equal = lane + 32 * w < nb ? kWarp : 0u, above = 0u;
      if (!by_class.plain) {
        const ClassBits bits(p, s.live, i, w);
        equal = bits.Equal(by_class.of), above = bits.Above(by_class.of);
      }
      key[r][w] = equal >> lane & 1u ? ScoreKey(logit[w], row_max) : kNever;
      if (above >> lane & 1u) key[r][w] = kAlways;
      if (i >= nb) key[r][w] = kNever;
    }
  }

  Threshold threshold = {kAlways - 1u, 0};  // only higher classes
  if (by_class.remaining > 0) {
    const auto for_each = [&](const auto& visit) {
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) visit(key[r][w] == kAlways ? kNever : key[r][w]);
      }
    };
    threshold = RadixSelect<kThreads>(for_each, reinterpret_cast<int32_t*>(s.stage), by_class.remaining, false);
  }

  // Lane w keeps the row's words w: pairs at the threshold or above, and at it.
  uint32_t found[kEach], equal[kEach];
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const int i = warp + kWarps * r;
    found[r] = equal[r] = 0u;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32_t found_word = __ballot_sync(kWarp, key[r][w] >= threshold.key && key[r][w] != kNever);
      const uint32_t equal_word = __ballot_sync(kWarp, key[r][w] == threshold.key);
      if (lane == w) found[r] = found_word, equal[r] = equal_word;
    }
    const uint32_t sum = static_cast<uint32_t>(
        __reduce_add_sync(kWarp, static_cast<int>(__popc(found[r]) | static_cast<unsigned>(__popc(equal[r])) << 16)));
    if (i >= nb) continue;
    if (lane < p.words) p.excluded[(head * nb + i) * p.words + lane] = found[r];
    if (lane == 0) s.rows[i] = RowCount::Found(sum & 0xffffu, sum >> 16);
  }
  __syncthreads();
  if (warp == 0) MakeRows(p, head, threshold.ties, s.rows, s.start);

  // The other warps need not wait for that: weights of the low-resolution part, in place of the logits.
  ValueChunk<kTensor, kThreads, kSelectColumns, kSelectDims> values;
  if (p.full) {
    values.Load(p, head, 0, 0);
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const int i = warp + kWarps * r;
      float* row = s.logit + i * kStride;
      bool used[kWords];
      float largest = -INFINITY;  // fmaxf: NaN never becomes the maximum
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint32_t excluded = __shfl_sync(kWarp, found[r], w);
        used[w] = (s.live[w] & ~excluded) >> lane & 1u;
        if (used[w]) largest = fmaxf(largest, row[lane + 32 * w]);
      }
      largest = WarpMaximum(largest);
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const float weight = used[w] ? LowWeight<kTensor>(row[lane + 32 * w], largest) : 0.0f;
        row[lane + 32 * w] = weight;
        total += weight * s.tokens[lane + 32 * w];
      }
      for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kWarp, total, step);
      if (lane == 0 && i < nb) {
        p.low_largest[head * nb + i] = largest;
        p.low_total[head * nb + i] = total;
      }
    }
  }
  __syncthreads();

#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const int i = warp + kWarps * r;
    if (i >= nb) continue;
    const RowCount row = s.rows[i];
    uint32_t chosen = found[r];
    if (row.Partly()) chosen = (found[r] & ~equal[r]) | FirstSet<kWords>(equal[r], row.Equal(), lane);
    WriteColumns<kWords>(chosen, 0, lane, p.column + head * p.budget + s.start[i]);
  }
  if (p.full) SelectLow<kTensor, kTile>(p, head, s, values);
}

// -----------------------------------------------------------------------------------------------------------------------------------
// More blocks.

constexpr int kManyThreads = 1024;
constexpr int kManyWarps = kManyThreads / 32;
constexpr int kUnitWords = 8;  // words of a row that a warp loads at a time: a unit
constexpr int kUnitPairs = 32 * kUnitWords;
constexpr int kCandidates = 16 * kManyThreads;        // keys that fit on chip
constexpr int kGroupPairs = kManyWarps * kUnitPairs;  // pairs that a CTA sees between two looks at how many there are

struct ManyShared {
  int32_t histogram[kHistogramInts];
  uint32_t candidate[kCandidates];  // then where each row's list begins
  uint32_t live[kMaxBlocks / 32];
  int32_t class_count[kClasses];
  int32_t candidates;
  union Row {
    float largest;
    RowCount count;
  } rows[kMaxBlocks];  // as many as there are blocks
};
static_assert(sizeof(ManyShared) <= 99 * 1024 && kMaxBlocks <= kCandidates, "what every architecture has");
inline size_t ManySharedBytes(int blocks) { return sizeof(ManyShared) - sizeof(ManyShared::Row) * (kMaxBlocks - blocks); }

// kUnitWords words of one row's logits, a warp's at a time, and their keys.
struct Unit {
  const Problem& p;
  const float* head_logit;
  const uint32_t* live;
  const ClassThreshold& by_class;
  int row, first_word;
  float logit[kUnitWords];

  __device__ __forceinline__ void Load(int i, int word) {
    row = i, first_word = word;
    const float* from = head_logit + int64_t{i} * p.logit_stride + 32 * word + threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kUnitWords; ++n) logit[n] = word + n < p.words ? __ldcg(from + 32 * n) : 0.0f;
  }
  template <typename Visit>  // visit(n, key) for word n of the unit
  __device__ __forceinline__ void ForEachKey(float largest, const Visit& visit) const {
    const int lane = threadIdx.x % 32;
    uint32_t lane_equal = 0u, lane_above = 0u;  // of the word that this lane stands for
    if (!by_class.plain && lane < kUnitWords && first_word + lane < p.words) {
      const ClassBits bits(p, live, row, first_word + lane);
      lane_equal = bits.Equal(by_class.of), lane_above = bits.Above(by_class.of);
    }
#pragma unroll
    for (int n = 0; n < kUnitWords; ++n) {
      uint32_t key = ScoreKey(logit[n], largest);
      if (by_class.plain) {
        if (32 * (first_word + n) + lane >= p.blocks) key = kNever;
      } else {
        const uint32_t equal = __shfl_sync(kWarp, lane_equal, n), above = __shfl_sync(kWarp, lane_above, n);
        if (!(equal >> lane & 1u)) key = above >> lane & 1u ? kAlways : kNever;
      }
      visit(n, key);
    }
  }
};

// Appends the key of each lane that has one to keep.
__device__ __forceinline__ void Append(ManyShared& s, bool keeps, uint32_t key) {
  const int lane = threadIdx.x % 32;
  const uint32_t keepers = __ballot_sync(kWarp, keeps);
  if (keepers == 0u) return;
  int at = 0;
  if (lane == 0) at = atomicAdd(&s.candidates, __popc(keepers));
  at = __shfl_sync(kWarp, at, 0) + __popc(keepers & ((1u << lane) - 1u));
  if (keeps) s.candidate[at] = key;
}

// The threshold among the candidates.
__device__ __forceinline__ Threshold SelectCandidate(ManyShared& s, int remaining) {
  const int count = s.candidates;
  const auto for_each = [&](const auto& visit) {
    for (int n = threadIdx.x; n < count; n += kManyThreads) visit(s.candidate[n]);
  };
  return RadixSelect<kManyThreads>(for_each, s.histogram, remaining, true);
}

// Leaves `remaining` candidates, the largest: of those that equal the last one as many as are needed.
__device__ __forceinline__ uint32_t DropCandidates(ManyShared& s, int remaining) {
  const Threshold threshold = SelectCandidate(s, remaining);
  constexpr int kEach = kCandidates / kManyThreads;
  uint32_t own[kEach];
  const int count = s.candidates;
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const int at = n * kManyThreads + threadIdx.x;
    own[n] = at < count ? s.candidate[at] : kNever;
  }
  __syncthreads();
  if (threadIdx.x == 0) s.candidates = 0;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kEach; ++n) Append(s, own[n] > threshold.key, own[n]);
  __syncthreads();
  for (int at = s.candidates + threadIdx.x; at < remaining; at += kManyThreads) s.candidate[at] = threshold.key;
  __syncthreads();
  if (threadIdx.x == 0) s.candidates = remaining;
  __syncthreads();
  return threshold.key;
}

// One CTA per head. Reads the logits twice: once for the threshold, keeping only keys that can still be chosen, and once for what
// is above it. Where so many are to be chosen that they do not fit on chip, up to three times for the threshold.
__global__ void __launch_bounds__(kManyThreads, 1) SelectManyKernel(Problem p) {
  MRA_DYNAMIC_SHARED(memory);
  ManyShared& s = *reinterpret_cast<ManyShared*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int nb = p.blocks;
  const int64_t head = blockIdx.x;
  const uint32_t* real = p.real + head / p.heads * nb;

  for (int word = warp; word < p.words; word += kManyWarps) {
    const int j = word * 32 + lane;
    const uint32_t live = __ballot_sync(kWarp, j < nb && real[j] != 0u);
    if (lane == 0) s.live[word] = live;
  }
  for (int i = threadIdx.x; i < nb; i += kManyThreads) {
    const bool no_pair = p.padding_invariant && real[i] == 0u;
    s.rows[i].largest = no_pair ? 0.0f : MaximumOf(p.row_key[head * nb + i]);
  }
  if (threadIdx.x < kClasses) s.class_count[threadIdx.x] = 0;
  if (threadIdx.x == 0) s.candidates = 0;
  __syncthreads();

  const ClassThreshold by_class = FindClass<kManyThreads>(p, s.live, s.class_count);
  Unit unit{p, p.logit + head * nb * p.logit_stride, s.live, by_class, 0, 0, {}};
  const int row_units = (p.words + kUnitWords - 1) / kUnitWords;
  const int units = nb * row_units;
  const auto load = [&](int n) {
    if (n < units) unit.Load(n / row_units, n % row_units * kUnitWords);
  };

  Threshold threshold = {kAlways - 1u, 0};  // only higher classes
  if (by_class.remaining > kCandidates - kGroupPairs) {
    const auto for_each = [&](const auto& visit) {
      for (int n = warp; n < units; n += kManyWarps) {
        load(n);
        unit.ForEachKey(s.rows[unit.row].largest, [&](int, uint32_t key) { visit(key == kAlways ? kNever : key); });
      }
    };
    threshold = RadixSelect<kManyThreads>(for_each, s.histogram, by_class.remaining, false);
  } else if (by_class.remaining > 0) {
    uint32_t bound = kNever;  // as many keys as are to be chosen are at least this
    load(warp);
#pragma unroll 1
    for (int first = 0; first < units; first += kManyWarps) {
      if (first + warp < units) {
        unit.ForEachKey(s.rows[unit.row].largest, [&](int, uint32_t key) { Append(s, key > bound && key != kAlways, key); });
      }
      load(first + kManyWarps + warp);
      __syncthreads();
      const int count = s.candidates;
      __syncthreads();
      if (count > kCandidates - kGroupPairs) bound = DropCandidates(s, by_class.remaining);
    }
    threshold = SelectCandidate(s, by_class.remaining);
  }

  // A row's words, counts, and the largest logit that is left to low resolution. The row is a warp's own, its maximum no longer
  // needed.
  uint32_t* head_excluded = p.excluded + head * nb * p.words;
  for (int i = warp; i < nb; i += kManyWarps) {
    const float row_max = s.rows[i].largest;
    int found = 0, equal = 0;
    float largest = -INFINITY;
    for (int word = 0; word < p.words; word += kUnitWords) {
      unit.Load(i, word);
      uint32_t own = 0u;
      unit.ForEachKey(row_max, [&](int n, uint32_t key) {
        const bool is_found = key >= threshold.key && key != kNever;
        const uint32_t found_word = __ballot_sync(kWarp, is_found);
        equal += __popc(__ballot_sync(kWarp, key == threshold.key));
        if (lane == n) own = found_word;
        const uint32_t live = word + n < p.words ? s.live[word + n] : 0u;
        if (live >> lane & 1u && !is_found) largest = fmaxf(largest, unit.logit[n]);
      });
      found += __popc(own);
      if (lane < kUnitWords && word + lane < p.words) head_excluded[i * p.words + word + lane] = own;
    }
    found = __reduce_add_sync(kWarp, found);
    __syncwarp();
    if (lane == 0) s.rows[i].count = RowCount::Found(found, equal);
    if (p.full) {
      largest = WarpMaximum(largest);
      if (lane == 0) p.low_largest[head * nb + i] = largest;
    }
  }
  __syncthreads();
  int32_t* start = reinterpret_cast<int32_t*>(s.candidate);
  RowCount* rows = &s.rows[0].count;
  static_assert(sizeof(ManyShared::Row) == sizeof(RowCount), "an array of one is one of the other");
  if (warp == 0) MakeRows(p, head, threshold.ties, rows, start);
  __syncthreads();

  uint32_t next = lane < p.words && warp < nb ? head_excluded[warp * p.words + lane] : 0u;
  for (int i = warp; i < nb; i += kManyWarps) {
    const RowCount row = rows[i];
    uint16_t* column = p.column + head * p.budget + start[i];
    int ties = row.Equal();
    for (int word = 0; word < p.words; word += 32) {
      uint32_t chosen = next;
      const bool same_row = word + 32 < p.words;
      const int next_row = same_row ? i : i + kManyWarps, next_word = same_row ? word + 32 + lane : lane;
      next = next_row < nb && next_word < p.words ? head_excluded[next_row * p.words + next_word] : 0u;
      if (row.Partly()) {
        const bool no_pair = p.padding_invariant && real[i] == 0u;
        const float row_max = no_pair ? 0.0f : MaximumOf(p.row_key[head * nb + i]);
        uint32_t equal = 0u;
        for (int part = 0; part < 32 && word + part < p.words; part += kUnitWords) {
          unit.Load(i, word + part);
          unit.ForEachKey(row_max, [&](int n, uint32_t key) {
            const uint32_t equal_word = __ballot_sync(kWarp, key == threshold.key);
            if (lane == part + n) equal = equal_word;
          });
        }
        const uint32_t taken = FirstSet(equal, ties, lane);
        chosen = (chosen & ~equal) | taken;
        ties -= __reduce_add_sync(kWarp, __popc(taken));
      }
      column += WriteColumns(chosen, word, lane, column);
    }
  }
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
  const bool no_pair = p.padding_invariant && p.real[head / p.heads * p.blocks + i] == 0u;
  const float row_max = no_pair ? 0.0f : MaximumOf(p.row_key[row]);
  for (int j = threadIdx.x; j < p.blocks; j += kExportThreads) {
    out.blocks[row * p.blocks + j] = p.excluded[row * p.words + j / 32] >> (j % 32) & 1u;
    if (out.score != nullptr) out.score[row * p.blocks + j] = __fsub_rn(p.logit[row * p.logit_stride + j], row_max);
  }
  __syncthreads();
  const int32_t* row_start = p.row_start + head * (p.blocks + 1);
  for (int n = row_start[i] + threadIdx.x; n < row_start[i + 1]; n += kExportThreads) {
    out.blocks[row * p.blocks + p.column[head * p.budget + n]] = 2;
  }
}

}  // namespace mra

#endif  // MRA_ATTENTION_SELECT_CUH_
