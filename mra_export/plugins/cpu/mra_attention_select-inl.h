// Second phase: which block pairs are exact. Everything that decides is done in the order that docs/kernels.md fixes ("The
// selection contract"). Included once per instruction set.
#if defined(MRA_ATTENTION_SELECT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MRA_ATTENTION_SELECT_INL_H_
#undef MRA_ATTENTION_SELECT_INL_H_
#else
#define MRA_ATTENTION_SELECT_INL_H_
#endif

#include <string.h>

#include "mra_attention_pack-inl.h"
#include "mra_attention_problem.h"
#include "mra_attention_simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mra {
namespace HWY_NAMESPACE {

constexpr float kLog2E = 1.44269504088896341f;
const float kInfinity = __builtin_inff();
constexpr int kLowestClass = -2;  // a dead pair without priors
constexpr int kClasses = 6;       // ... to 3, a live pair with all three

// One head's view of its bundle.
struct Head {
  float* logits;         // (nb8, nb32)
  float* row_max;        // (nb8)
  const uint32_t* real;  // (nb)
  float* real_count;     // (nb32)
  int32_t* columns;
  int64_t* row_start;
};

HWY_INLINE Head HeadOf(const Problem& problem, const Bundle& bundle, int64_t head) {
  const BundleBuffers& buffers = bundle.buffers;
  return {buffers.logits + head * problem.nb8 * problem.nb32,
          buffers.row_max + head * problem.nb8,
          buffers.real + head * problem.nb,
          buffers.real_count + head * problem.nb32,
          buffers.columns + head * problem.chosen,
          buffers.row_start + head * (problem.nb + 1)};
}

// l_ij = scale * <qm_i, km_j> and r_i. Columns from nb to nb32 become -inf.
MRA_STAGE void ComputeLogits(const Problem& problem, const Bundle& bundle, int64_t head_index, const Head& head,
                             const WorkerBuffers& worker) {
  const int64_t nb = problem.nb;
  const int64_t nb32 = problem.nb32;
  const int64_t d16 = problem.d16;
  float* query_mean = bundle.buffers.query_mean + head_index * problem.nb8 * d16;
  float* key_mean = bundle.buffers.key_mean + head_index * problem.nb8 * d16;
  // The lower and right edges of the operands.
  memset(query_mean + nb * d16, 0, static_cast<size_t>((problem.nb8 - nb) * d16) * sizeof(float));
  memset(key_mean + nb * d16, 0, static_cast<size_t>((problem.nb8 - nb) * d16) * sizeof(float));
  for (int64_t j = nb; j < nb32; ++j) head.real_count[j] = 0.0f;
  for (int64_t d = 0; d < d16; d += 8) {
    for (int64_t j = 0; j < problem.nb8; j += 8) Transpose8x8(key_mean + j * d16 + d, d16, worker.key_mean + d * nb32 + j, nb32);
    for (int64_t r = d; problem.nb8 < nb32 && r < d + 8; ++r) {
      memset(worker.key_mean + r * nb32 + problem.nb8, 0, static_cast<size_t>(nb32 - problem.nb8) * sizeof(float));
    }
  }

  const Floats scale = hn::Set(kFloats, problem.params->scale);
  const Floats lowest = hn::Set(kFloats, -kInfinity);
  for (int64_t first = 0; first < nb; first += 8) {
    MultiplyPanel<true>(query_mean + first * d16, d16, worker.key_mean, nb32, problem.params->head_size, nb32,
                        head.logits + first * nb32, nb32);
    for (int64_t i = first; i < Smaller(nb, first + 8); ++i) {
      float* row = head.logits + i * nb32;
      for (int64_t j = 0; j < nb32; j += kLanes) {
        hn::StoreU(hn::Mul(hn::LoadU(kFloats, row + j), scale), kFloats, row + j);
      }
      for (int64_t j = nb; j < nb32; ++j) row[j] = -kInfinity;
      Floats largest = lowest;  // NaN never becomes the maximum
      if (!problem.params->padding_invariant) {
        for (int64_t j = 0; j < nb32; j += kLanes) largest = LargerIgnoringNan(largest, hn::LoadU(kFloats, row + j));
        head.row_max[i] = LargestLaneOrNan(largest);
      } else if (head.real[i] != 0) {
        for (int64_t j = 0; j < nb32; j += kLanes) {
          const auto live = hn::Gt(hn::LoadU(kFloats, head.real_count + j), hn::Zero(kFloats));
          largest = LargerIgnoringNan(largest, hn::IfThenElse(live, hn::LoadU(kFloats, row + j), lowest));
        }
        head.row_max[i] = LargestLaneOrNan(largest);
      } else {
        head.row_max[i] = 0.0f;  // no live pair
      }
    }
  }
}

// s = l - r and its order-preserving key: a < b as floats if and only if key(a) < key(b); -0 equals 0; NaN is 0, below everything.
HWY_INLINE Floats Score(Floats logit, Floats row_max) { return hn::Sub(logit, row_max); }
HWY_INLINE Words Key(Floats score) {
  const Ints bits = hn::BitCast(kInts, hn::Add(score, hn::Zero(kFloats)));
  const Words sign = hn::Set(kWords, 0x80000000u);
  const Words flip = hn::Or(hn::BitCast(kWords, hn::BroadcastSignBit(bits)), sign);
  const Words key = hn::Xor(hn::BitCast(kWords, bits), flip);
  return hn::IfThenElseZero(hn::RebindMask(kWords, hn::Eq(score, score)), key);
}

// The classes of row i: prior count - 2 * dead.
HWY_INLINE void ClassifyRow(const Problem& problem, const Head& head, int64_t i, const int32_t* column_class, int32_t* row_class) {
  const int64_t first = problem.params->initial_prior_first_n_blocks;
  const int64_t diagonal = problem.params->initial_prior_diagonal_n_blocks;
  const int32_t bonus = i < first;
  const bool dead = head.real[i] == 0;
  for (int64_t j = 0; j < problem.nb; ++j) row_class[j] = bonus + (dead ? (j < first) - 2 : column_class[j]);
  if (diagonal > 0) {
    const int64_t from = i - diagonal / 2 > 0 ? i - diagonal / 2 : 0;
    const int64_t to = Smaller(i + diagonal / 2, problem.nb - 1);
    for (int64_t j = from; j <= to; ++j) ++row_class[j];
  }
}

// The count-th largest of keys[0, size), 1 <= count <= size; *larger: how many are above it. Destroys keys. Linear: a histogram of
// the leading 8 bits finds the bucket, which alone is kept for the next 8.
inline uint32_t SelectKey(uint32_t* keys, int64_t size, int64_t count, int64_t* larger) {
  *larger = 0;
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    // Two histograms in turn: keys with the same digit follow each other often, and each count would wait for the last.
    int64_t histogram[2][256] = {};
    int64_t n = 0;
    for (; n + 2 <= size; n += 2) {
      ++histogram[0][keys[n] >> shift & 255u];
      ++histogram[1][keys[n + 1] >> shift & 255u];
    }
    if (n < size) ++histogram[0][keys[n] >> shift & 255u];
    uint32_t digit = 255;
    for (;; --digit) {
      const int64_t here = histogram[0][digit] + histogram[1][digit];
      if (*larger + here >= count) break;
      *larger += here;
    }
    prefix |= digit << shift;
    int64_t kept = 0;
    for (n = 0; n < size; ++n) {
      const uint32_t key = keys[n];
      keys[kept] = key;
      kept += (key >> shift & 255u) == digit;
    }
    size = kept;
  }
  return prefix;
}

// The boundary of the selection: a pair is chosen if its class is higher, or equal and its key higher, or both equal and it is
// among the first `ties` such pairs in flat order; the remaining such pairs are excluded too.
struct Boundary {
  int32_t pair_class;
  uint32_t key;
  int64_t ties;
};

MRA_STAGE Boundary FindBoundary(const Problem& problem, const Head& head, bool one_class, const WorkerBuffers& worker) {
  const int64_t nb = problem.nb;
  int64_t counts[kClasses] = {};
  if (one_class) {
    counts[0 - kLowestClass] = nb * nb;
  } else {
    for (int64_t i = 0; i < nb; ++i) {
      ClassifyRow(problem, head, i, worker.column_class, worker.row_class);
      for (int64_t j = 0; j < nb; ++j) ++counts[worker.row_class[j] - kLowestClass];
    }
  }
  int32_t pair_class = kLowestClass + kClasses - 1;
  int64_t higher = 0;
  while (higher + counts[pair_class - kLowestClass] < problem.chosen) higher += counts[pair_class-- - kLowestClass];
  const int64_t needed = problem.chosen - higher;
  // Every pair of the class is chosen: no key has to be compared.
  if (needed == counts[pair_class - kLowestClass]) return {pair_class, 0, needed};

  int64_t size = 0;
  const Ints wanted = hn::Set(kInts, pair_class);
  for (int64_t i = 0; i < nb; ++i) {
    const float* row = head.logits + i * problem.nb32;
    const Floats row_max = hn::Set(kFloats, head.row_max[i]);
    if (one_class) {
      for (int64_t j = 0; j < nb; j += kLanes) {
        hn::StoreU(Key(Score(hn::LoadU(kFloats, row + j), row_max)), kWords, worker.keys + size + j);
      }
      size += nb;
    } else {
      ClassifyRow(problem, head, i, worker.column_class, worker.row_class);
      for (int64_t j = 0; j < nb; j += kLanes) {
        const Words keys = Key(Score(hn::LoadU(kFloats, row + j), row_max));
        const auto kept = hn::RebindMask(kWords, hn::Eq(hn::LoadU(kInts, worker.row_class + j), wanted));
        size += static_cast<int64_t>(hn::CompressStore(keys, kept, kWords, worker.keys + size));
      }
    }
  }
  int64_t larger = 0;
  const uint32_t key = SelectKey(worker.keys, size, needed, &larger);
  return {pair_class, key, needed - larger};
}

// Writes the chosen live columns row by row; turns logits into low-resolution logits in units of log2, -inf where they do not
// count, and row_max into their maximum.
MRA_STAGE void Choose(const Problem& problem, const Head& head, bool one_class, Boundary boundary, const WorkerBuffers& worker,
                      uint8_t* blocks, float* score) {
  const int64_t nb = problem.nb;
  const bool full = problem.params->approx_mode == MRA_APPROX_FULL;
  const Ints boundary_class = hn::Set(kInts, boundary.pair_class);
  const Words boundary_key = hn::Set(kWords, boundary.key);
  const Floats lowest = hn::Set(kFloats, -kInfinity);
  int64_t count = 0;
  for (int64_t i = 0; i < nb; ++i) {
    head.row_start[i] = count;
    if (!one_class) ClassifyRow(problem, head, i, worker.column_class, worker.row_class);
    float* row = head.logits + i * problem.nb32;
    const Floats row_max = hn::Set(kFloats, head.row_max[i]);
    const bool low_row = full && head.real[i] != 0;
    Floats largest = lowest;
    for (int64_t j = 0; j < nb; j += kLanes) {
      const Floats logit = hn::LoadU(kFloats, row + j);
      const Floats s = Score(logit, row_max);
      const Words key = Key(s);
      const auto key_above = hn::RebindMask(kInts, hn::Gt(key, boundary_key));
      const auto key_tied = hn::RebindMask(kInts, hn::Eq(key, boundary_key));
      auto above = key_above;
      auto tied = key_tied;
      if (!one_class) {
        const Ints pair_class = hn::LoadU(kInts, worker.row_class + j);
        const auto same = hn::Eq(pair_class, boundary_class);
        above = hn::Or(hn::Gt(pair_class, boundary_class), hn::And(same, key_above));
        tied = hn::And(same, key_tied);
      }
      const size_t lanes = static_cast<size_t>(Smaller(kLanes, nb - j));
      const uint64_t there = (uint64_t{1} << lanes) - 1;
      const uint64_t above_bits = hn::BitsFromMask(kInts, above) & there;
      for (uint64_t bits = hn::BitsFromMask(kInts, hn::Or(above, tied)) & there; bits != 0; bits &= bits - 1) {
        const int lane = __builtin_ctzll(bits);
        const bool chosen = (above_bits >> lane & 1) != 0 || boundary.ties-- > 0;
        if (blocks) blocks[i * nb + j + lane] = chosen ? 2 : 1;
        if (chosen && head.real[i] != 0 && head.real[j + lane] != 0) head.columns[count++] = static_cast<int32_t>(j + lane);
      }
      if (score) hn::StoreN(s, kFloats, score + i * nb + j, lanes);
      Floats low = lowest;
      if (low_row) {
        const auto live = hn::Gt(hn::LoadU(kFloats, head.real_count + j), hn::Zero(kFloats));
        const auto counts_low = hn::AndNot(hn::RebindMask(kFloats, hn::Or(above, tied)), live);
        low = hn::IfThenElse(counts_low, hn::Mul(logit, hn::Set(kFloats, kLog2E)), lowest);
      }
      hn::StoreU(low, kFloats, row + j);
      largest = LargerOrNan(low, largest);  // a row with a NaN must end as NaN, not as a row without weights
    }
    head.row_max[i] = LargestLaneOrNan(largest);
  }
  head.row_start[nb] = count;
}

HWY_NOINLINE void SelectHead(const Problem& problem, const Bundle& bundle, int64_t head_index, int64_t worker_index) {
  const MraAttentionParams& params = *problem.params;
  const WorkerBuffers& worker = problem.workers[worker_index];
  const Head head = HeadOf(problem, bundle, head_index);
  const int64_t nb = problem.nb;
  ComputeLogits(problem, bundle, head_index, head, worker);

  bool one_class = params.initial_prior_first_n_blocks == 0 && params.initial_prior_diagonal_n_blocks == 0;
  for (int64_t j = 0; j < nb; ++j) {
    worker.column_class[j] = (j < params.initial_prior_first_n_blocks) - (head.real[j] == 0 ? 2 : 0);
    one_class &= head.real[j] != 0;
  }
  for (int64_t j = nb; j < problem.nb32; ++j) worker.row_class[j] = kLowestClass - 1;  // no class: never chosen

  const int64_t flat = (bundle.first_head + head_index) * nb * nb;
  uint8_t* blocks = problem.blocks ? problem.blocks + flat : nullptr;
  float* score = problem.score ? problem.score + flat : nullptr;
  if (blocks) memset(blocks, 0, static_cast<size_t>(nb * nb));
  Choose(problem, head, one_class, FindBoundary(problem, head, one_class, worker), worker, blocks, score);
}

}  // namespace HWY_NAMESPACE
}  // namespace mra
HWY_AFTER_NAMESPACE();

#endif  // include guard per target
