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
        StoreTileVector<kTile>(s.logit + i * kStride, LogitColumn(), logit[r]);
        if (!p.keep_logits || i >= nb) continue;
#pragma unroll
        for (int c = 0; c < kTile; ++c) {
          const int j = TilePlace<kTile>(LogitColumn(), c);
          if (j < nb) p.logit[(head * nb + i) * p.logit_stride + j] = logit[r][c];
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
    threshold = RadixSelect<kThreads, false>(for_each, reinterpret_cast<int32_t*>(s.stage), by_class.remaining);
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

constexpr int kManyThreads = 512;
constexpr int kManyWarps = kManyThreads / 32;
constexpr int kUnitWords = 16;  // words of a row that a warp loads at a time: a unit
constexpr int kUnitPairs = 32 * kUnitWords;
constexpr int kCandidates = 32 * kManyThreads;        // keys that fit on chip
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

// kUnitWords words of one row's scores, a warp's at a time: lane n has the logits of columns n + 32 w.
struct Unit {
  int row, word;
  float logit[kUnitWords];

  __device__ __forceinline__ void Load(const Problem& p, const float* head_logit, int of_row, int first_word) {
    row = of_row, word = first_word;
    const float* from = head_logit + int64_t{row} * p.logit_stride + 32 * word + threadIdx.x % 32;
    if (word + kUnitWords <= p.words) {
#pragma unroll
      for (int n = 0; n < kUnitWords; ++n) logit[n] = __ldcg(from + 32 * n);
      return;
    }
    const int left = p.words - word;
#pragma unroll
    for (int n = 0; n < kUnitWords; ++n) logit[n] = -INFINITY;
#pragma unroll
    for (int n = 0; n < kUnitWords; ++n) {
      if (n >= left) break;
      logit[n] = __ldcg(from + 32 * n);
    }
  }
};

// Columns of a unit by class, lane n having those of its word n: pairs that scores decide about, and pairs of higher classes.
struct UnitClasses {
  uint32_t equal, above;

  __device__ __forceinline__ UnitClasses(const Problem& p, const uint32_t* live, const ClassThreshold& by_class, int row,
                                         int word) {
    const int lane = threadIdx.x % 32, own = word + lane;
    equal = above = 0u;
    if (lane >= kUnitWords || own >= p.words) return;
    if (by_class.plain) {
      const int left = p.blocks - 32 * own;
      equal = left >= 32 ? kWarp : (1u << left) - 1u;
    } else {
      const ClassBits bits(p, live, row, own);
      equal = bits.Equal(by_class.of), above = bits.Above(by_class.of);
    }
  }
};

// A threshold as a score. NaN, which is below every other one, is reached by all of those.
struct ScoreThreshold {
  float score;
  bool is_nan;

  __device__ __forceinline__ explicit ScoreThreshold(uint32_t key)
      : score(key == kNotANumber ? -INFINITY : MaximumOf(key)), is_nan(key == kNotANumber) {}
};

// The threshold among the candidates.
__device__ __forceinline__ Threshold SelectCandidate(ManyShared& s, int remaining) {
  const int count = s.candidates;
  const auto for_each = [&](const auto& visit) {
    for (int n = threadIdx.x; n < count; n += kManyThreads) visit(s.candidate[n]);
  };
  return RadixSelect<kManyThreads, true>(for_each, s.histogram, remaining);
}

// Leaves `remaining` candidates, the largest: of those that equal the last one, whose key is returned, as many as are needed.
__device__ __forceinline__ uint32_t DropCandidates(ManyShared& s, int remaining) {
  const int lane = threadIdx.x % 32;
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
  int kept = 0;
#pragma unroll
  for (int n = 0; n < kEach; ++n) kept += own[n] > threshold.key;
  const int end = WarpScan(kept, lane);
  int at = lane == 31 ? atomicAdd(&s.candidates, end) : 0;
  at = __shfl_sync(kWarp, at, 31) + end - kept;
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    if (own[n] > threshold.key) s.candidate[at++] = own[n];
  }
  __syncthreads();
  for (int n = s.candidates + threadIdx.x; n < remaining; n += kManyThreads) s.candidate[n] = threshold.key;
  __syncthreads();
  if (threadIdx.x == 0) s.candidates = remaining;
  __syncthreads();
  return threshold.key;
}

// The threshold, in one reading of the logits: keys that can still be chosen are kept on chip, and the lowest of them dropped
// before there are too many.
__device__ __forceinline__ Threshold FindThreshold(const Problem& p, ManyShared& s, const ClassThreshold& by_class,
                                                   const float* head_logit) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t lower_lanes = (1u << lane) - 1u;
  const int row_units = (p.words + kUnitWords - 1) / kUnitWords;
  const int units = p.blocks * row_units;
  bool bounded = false;  // whether as many keys as are to be chosen are at least `bound`
  float bound = -INFINITY;
  Unit unit = {};
  if (warp < units) unit.Load(p, head_logit, warp / row_units, warp % row_units * kUnitWords);
#pragma unroll 1
  for (int first = 0; first < units; first += kManyWarps) {
    if (first + warp < units) {
      const UnitClasses classes(p, s.live, by_class, unit.row, unit.word);
      const float row_max = s.rows[unit.row].largest;
      uint32_t keep[kUnitWords];
      int kept = 0;
#pragma unroll
      for (int n = 0; n < kUnitWords; ++n) {
        unit.logit[n] = __fsub_rn(unit.logit[n], row_max);
        keep[n] = __ballot_sync(kWarp, unit.logit[n] > bound || !bounded) & __shfl_sync(kWarp, classes.equal, n);
        kept += __popc(keep[n]);
      }
      if (kept > 0) {
        int at = lane == 0 ? atomicAdd(&s.candidates, kept) : 0;
        at = __shfl_sync(kWarp, at, 0);
#pragma unroll
        for (int n = 0; n < kUnitWords; ++n) {
          if (keep[n] == 0u) continue;
          if (keep[n] >> lane & 1u) s.candidate[at + __popc(keep[n] & lower_lanes)] = OrderKey(unit.logit[n], kNotANumber);
          at += __popc(keep[n]);
        }
      }
    }
    const int next = first + kManyWarps + warp;
    if (next < units) unit.Load(p, head_logit, next / row_units, next % row_units * kUnitWords);
    __syncthreads();
    const int count = s.candidates;
    __syncthreads();
    if (count > kCandidates - kGroupPairs) {
      const uint32_t last = DropCandidates(s, by_class.remaining);
      bounded = last != kNotANumber;
      bound = MaximumOf(last);
    }
  }
  return SelectCandidate(s, by_class.remaining);
}

// The same where more are to be chosen than fit on chip: three readings.
__device__ __forceinline__ Threshold FindThresholdSlowly(const Problem& p, ManyShared& s, const ClassThreshold& by_class,
                                                         const float* head_logit) {
  const auto for_each = [&](const auto& visit) {
    for (int i = threadIdx.x / 32; i < p.blocks; i += kManyWarps) {
      const float row_max = s.rows[i].largest;
      for (int word = 0; word < p.words; word += kUnitWords) {
        Unit unit;
        unit.Load(p, head_logit, i, word);
        const UnitClasses classes(p, s.live, by_class, i, word);
#pragma unroll
        for (int n = 0; n < kUnitWords; ++n) {
          const uint32_t equal = __shfl_sync(kWarp, classes.equal, n);
          visit(equal >> threadIdx.x % 32 & 1u ? ScoreKey(unit.logit[n], row_max) : kNever);
        }
      }
    }
  };
  return RadixSelect<kManyThreads, true>(for_each, s.histogram, by_class.remaining);
}

// Each row's words of pairs at or above the threshold, how many there are, and the largest logit that is left to low resolution. A
// row's maximum in s.rows is no longer needed after that.
__device__ __forceinline__ void FindRows(const Problem& p, int64_t head, ManyShared& s, const ClassThreshold& by_class,
                                         const float* head_logit, const ScoreThreshold& threshold) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t* head_excluded = p.excluded + head * p.blocks * p.words;
  Unit next = {};
  if (warp < p.blocks) next.Load(p, head_logit, warp, 0);
  for (int i = warp; i < p.blocks; i += kManyWarps) {
    const float row_max = s.rows[i].largest;
    int found_count = 0, equal_count = 0;
    float largest = -INFINITY;  // fmaxf: NaN never becomes the maximum
#pragma unroll 1
    for (int word = 0; word < p.words; word += kUnitWords) {
      const Unit unit = next;
      if (word + kUnitWords < p.words) {
        next.Load(p, head_logit, i, word + kUnitWords);
      } else if (i + kManyWarps < p.blocks) {
        next.Load(p, head_logit, i + kManyWarps, 0);
      }
      const UnitClasses classes(p, s.live, by_class, i, word);
      uint32_t reached = 0u, equal = 0u;  // lane n: word n
      float unit_largest = -INFINITY;     // of those below the threshold
#pragma unroll
      for (int n = 0; n < kUnitWords; ++n) {
        const float score = __fsub_rn(unit.logit[n], row_max);
        const bool is_reached = score >= threshold.score;
        const uint32_t reached_word = __ballot_sync(kWarp, is_reached);
        const uint32_t equal_word = __ballot_sync(kWarp, score == threshold.score);
        if (lane == n) reached = reached_word, equal = equal_word;
        if (!is_reached) unit_largest = fmaxf(unit_largest, unit.logit[n]);
      }
      equal = (threshold.is_nan ? ~reached : equal) & classes.equal;
      const uint32_t found = (reached & classes.equal) | equal | classes.above;
      found_count += __popc(found), equal_count += __popc(equal);
      const bool has_word = lane < kUnitWords && word + lane < p.words;
      if (has_word) head_excluded[i * p.words + word + lane] = found;
      if (by_class.plain) {
        largest = fmaxf(largest, unit_largest);
      } else if (p.full) {
        const uint32_t used = has_word ? s.live[word + lane] & ~found : 0u;
#pragma unroll
        for (int n = 0; n < kUnitWords; ++n) {
          if (__shfl_sync(kWarp, used, n) >> lane & 1u) largest = fmaxf(largest, unit.logit[n]);
        }
      }
    }
    found_count = __reduce_add_sync(kWarp, found_count), equal_count = __reduce_add_sync(kWarp, equal_count);
    if (lane == 0) s.rows[i].count = RowCount::Found(found_count, equal_count);
    if (!p.full) continue;
    largest = WarpMaximum(largest);
    if (lane == 0) p.low_largest[head * p.blocks + i] = largest;
  }
}

// Lane n's word `word` + n of row i: the first `ties` of its pairs that equal the threshold.
__device__ __forceinline__ uint32_t FirstTies(const Problem& p, ManyShared& s, const ClassThreshold& by_class,
                                              const float* head_logit, const ScoreThreshold& threshold, int i, float row_max,
                                              int word, int ties, uint32_t* all) {
  const int lane = threadIdx.x % 32;
  uint32_t equal = 0u;
  for (int part = 0; part < 32 && word + part < p.words; part += kUnitWords) {
    Unit unit;
    unit.Load(p, head_logit, i, word + part);
    const UnitClasses classes(p, s.live, by_class, i, word + part);
#pragma unroll
    for (int n = 0; n < kUnitWords; ++n) {
      const float score = __fsub_rn(unit.logit[n], row_max);
      const uint32_t equal_word = __ballot_sync(kWarp, threshold.is_nan ? !(score == score) : score == threshold.score);
      const uint32_t of_class = __shfl_sync(kWarp, classes.equal, n);
      if (lane == part + n) equal = equal_word & of_class;
    }
  }
  *all = equal;
  return FirstSet(equal, ties, lane);
}

// One CTA per head. Reads the logits twice: once for the threshold and once for what is above it.
__global__ void __launch_bounds__(kManyThreads, 1) SelectManyKernel(Problem p) {
  MRA_DYNAMIC_SHARED(memory);
  ManyShared& s = *reinterpret_cast<ManyShared*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int nb = p.blocks;
  const int64_t head = blockIdx.x;
  const uint32_t* real = p.real + head / p.heads * nb;
  const auto row_maximum = [&](int i) {
    return p.padding_invariant && real[i] == 0u ? 0.0f : MaximumOf(p.row_key[head * nb + i]);  // 0: no live pair
  };

  for (int word = warp; word < p.words; word += kManyWarps) {
    const int j = word * 32 + lane;
    const uint32_t live = __ballot_sync(kWarp, j < nb && real[j] != 0u);
    if (lane == 0) s.live[word] = live;
  }
  for (int i = threadIdx.x; i < nb; i += kManyThreads) s.rows[i].largest = row_maximum(i);
  if (threadIdx.x < kClasses) s.class_count[threadIdx.x] = 0;
  if (threadIdx.x == 0) s.candidates = 0;
  __syncthreads();

  const ClassThreshold by_class = FindClass<kManyThreads>(p, s.live, s.class_count);
  const float* head_logit = p.logit + head * nb * p.logit_stride;
  Threshold threshold = {kAlways, 0};  // only higher classes
  if (by_class.remaining > kCandidates - kGroupPairs) {
    threshold = FindThresholdSlowly(p, s, by_class, head_logit);
  } else if (by_class.remaining > 0) {
    threshold = FindThreshold(p, s, by_class, head_logit);
  }
  const ScoreThreshold score_threshold(threshold.key);
  FindRows(p, head, s, by_class, head_logit, score_threshold);
  __syncthreads();
  int32_t* start = reinterpret_cast<int32_t*>(s.candidate);
  static_assert(sizeof(ManyShared::Row) == sizeof(RowCount), "an array of one is one of the other");
  RowCount* rows = &s.rows[0].count;
  if (warp == 0) MakeRows(p, head, threshold.ties, rows, start);
  __syncthreads();

  const uint32_t* head_excluded = p.excluded + head * nb * p.words;
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
        uint32_t equal;
        const uint32_t taken = FirstTies(p, s, by_class, head_logit, score_threshold, i, row_maximum(i), word, ties, &equal);
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
