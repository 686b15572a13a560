// The order of block pairs (docs/kernels.md, "selection contract") and the radix select that finds the last chosen one. Everything
// here is integers, so the order in which threads count does not matter.
#ifndef MRA_ATTENTION_ORDER_CUH_
#define MRA_ATTENTION_ORDER_CUH_

#include "mra_attention_device.cuh"

namespace mra {

// A pair's key: its score as an unsigned number of the same order, -0 equal to +0, NaN below everything; kNever and kAlways for
// pairs whose class is below or above that of the last chosen one.
constexpr uint32_t kNever = 0u, kNotANumber = 1u, kAlways = 0xffffffffu;

__device__ __forceinline__ uint32_t OrderKey(float x, uint32_t of_nan) {
  const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
  const uint32_t flip = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u;
  return x == x ? bits ^ flip : of_nan;
}

__device__ __forceinline__ uint32_t ScoreKey(float logit, float row_max) {
  return OrderKey(__fsub_rn(logit, row_max), kNotANumber);
}

// For maxima, which a NaN never is: 0 is "none", -infinity as a float.
__device__ __forceinline__ uint32_t MaximumKey(float x) { return OrderKey(x, 0u); }
__device__ __forceinline__ float MaximumOf(uint32_t key) {
  if (key == 0u) return -INFINITY;
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// The largest of the warp's numbers; NaN where there is no other is -infinity.
__device__ __forceinline__ float WarpMaximum(float x) { return MaximumOf(__reduce_max_sync(kWarp, MaximumKey(x))); }

// Sum of `value` over this lane and the lower ones, for kLanes lanes from 0.
template <int kLanes = 32>
__device__ __forceinline__ int WarpScan(int value, int lane) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int other = __shfl_up_sync(kWarp, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// Sum of `value` over this lane and the higher ones.
__device__ __forceinline__ int WarpScanDown(int value, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_down_sync(kWarp, value, step);
    if (lane + step < 32) value += other;
  }
  return value;
}

// -----------------------------------------------------------------------------------------------------------------------------------
// Classes: prior count - 2 * dead, plus 2: 0 to 5. A row's are the same three bits for 32 columns at a time.

constexpr int kClasses = 6;
constexpr int kPlainClass = 2;  // no prior, both blocks live

// live: words of a bitmap, bit j = block j has a real token.
struct ClassBits {
  uint32_t inside;  // columns that exist
  uint32_t bit[3];

  __device__ __forceinline__ ClassBits(const Problem& p, const uint32_t* live, int row, int word) {
    const int before = 32 * word;
    inside = FirstBits(p.blocks - before);
    const uint32_t row_first = row < p.first ? kWarp : 0u;
    const uint32_t column_first = FirstBits(p.first - before);
    const int reach = p.diagonal / 2;  // at most 2^30, so nothing here overflows
    const uint32_t near = p.diagonal > 0 ? FirstBits(row + reach + 1 - before) & ~FirstBits(row - reach - before) : 0u;
    const uint32_t pair_live = live[row / 32] >> (row % 32) & 1u ? live[word] : 0u;
    const uint32_t two = (row_first & column_first) | (near & (row_first | column_first));
    bit[0] = row_first ^ column_first ^ near;
    bit[1] = two ^ pair_live;
    bit[2] = two & pair_live;
  }
  // Columns of class `of`, and of a higher one. Class -1 is below all.
  __device__ __forceinline__ uint32_t Equal(int of) const {
    uint32_t equal = of < 0 ? 0u : inside;
#pragma unroll
    for (int n = 0; n < 3; ++n) equal &= of >> n & 1 ? bit[n] : ~bit[n];
    return equal;
  }
  __device__ __forceinline__ uint32_t Above(int of) const {
    uint32_t above = 0u, equal = kWarp;
#pragma unroll
    for (int n = 2; n >= 0; --n) {
      if (of >> n & 1) {
        equal &= bit[n];
      } else {
        above |= equal & bit[n];
        equal &= ~bit[n];
      }
    }
    return (of < 0 ? kWarp : above) & inside;
  }

 private:
  static __device__ __forceinline__ uint32_t FirstBits(int count) {
    return count <= 0 ? 0u : count >= 32 ? kWarp : (1u << count) - 1u;
  }
};

// Which pairs a score decides about: those of class `of`, of which `remaining` are chosen. Higher classes are chosen, all of them.
// plain: there is only one class.
struct ClassThreshold {
  bool plain;
  int of;
  int remaining;
};

// By the whole CTA. live: shared, read after a barrier; class_count: kClasses in shared memory, 0 and behind a barrier.
template <int kThreads>
__device__ __forceinline__ ClassThreshold FindClass(const Problem& p, const uint32_t* live, int32_t* class_count) {
  const int lane = threadIdx.x % 32;
  int dead = 0;
  for (int word = 0; word < p.words; ++word) dead |= __popc(live[word]) != (p.blocks - 32 * word < 32 ? p.blocks - 32 * word : 32);
  const int pairs = p.blocks * p.blocks;
  if (p.budget == pairs) return {false, -1, 0};
  if (p.first == 0 && p.diagonal == 0 && !dead) return {true, kPlainClass, p.budget};

  int count[kClasses] = {};
  for (int n = threadIdx.x; n < p.blocks * p.words; n += kThreads) {
    const ClassBits bits(p, live, n / p.words, n % p.words);
#pragma unroll
    for (int k = 0; k < kClasses; ++k) count[k] += __popc(bits.Equal(k));
  }
#pragma unroll
  for (int k = 0; k < kClasses; ++k) {
    const int sum = __reduce_add_sync(kWarp, count[k]);
    if (lane == 0 && sum != 0) atomicAdd(&class_count[k], sum);
  }
  __syncthreads();
  int of = kClasses - 1, remaining = p.budget;
  while (class_count[of] < remaining) remaining -= class_count[of--];
  if (class_count[of] == remaining) return {false, of - 1, 0};  // all of it, so that no score decides
  return {false, of, remaining};
}

// -----------------------------------------------------------------------------------------------------------------------------------
// The threshold among keys: pairs above it are chosen, and the first `ties` in flat order of those that equal it.

struct Threshold {
  uint32_t key;
  int ties;
};
constexpr int kAllTies = INT32_MAX;

constexpr int kDigits = 2048;                     // 11 bits, 11 bits, 10 bits
constexpr int kHistogramInts = 2 * kDigits + 32;  // of shared memory, for RadixSelect

// The `remaining`-th largest key of those that for_each(visit) calls visit(key) with, kNever left out; there must be as many. By
// the whole CTA, for_each by every thread with its own share. kExact: key is one of them; else it may end as soon as it has told
// chosen keys from others. `histogram` may be in use until a barrier: it begins with one and ends without.
template <int kThreads, bool kExact, typename ForEachKey>
__device__ __forceinline__ Threshold RadixSelect(const ForEachKey& for_each, int32_t* histogram, int remaining) {
  constexpr int kWarps = kThreads / 32;
  constexpr int kOwn = kDigits / kThreads;  // digits that a thread sums
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t* warp_count = histogram + 2 * kDigits;

  __syncthreads();
#pragma unroll
  for (int n = 0; n < kOwn; ++n) histogram[n * kThreads + threadIdx.x] = 0;
  __syncthreads();
  uint32_t known = 0;
#pragma unroll
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    const uint32_t digits = pass == 2 ? 1024u : 2048u;
    int32_t* counts = histogram + pass % 2 * kDigits;
    for_each([&](uint32_t key) {
      const bool same = pass == 0 || (key ^ known) >> (pass == 1 ? 21 : 10) == 0u;
      if (key != kNever && same) atomicAdd(&counts[key >> shift & (digits - 1u)], 1);
    });
    __syncthreads();
    int own = 0;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) own += counts[threadIdx.x * kOwn + n];
    const int sum = __reduce_add_sync(kWarp, own);
    if (lane == 0) warp_count[warp] = sum;
    if (pass < 2) {
#pragma unroll
      for (int n = 0; n < kOwn; ++n) histogram[(pass + 1) % 2 * kDigits + n * kThreads + threadIdx.x] = 0;
    }
    __syncthreads();

    // Every warp for itself: which warp's digits, which lane's of those, which digit.
    const int of_warp = lane < kWarps ? warp_count[lane] : 0;
    const int from_warp = WarpScanDown(of_warp, lane);
    const int in_warp = 31 - __clz(__ballot_sync(kWarp, from_warp >= remaining));
    remaining -= __shfl_sync(kWarp, from_warp - of_warp, in_warp);
    int of_lane = 0;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) of_lane += counts[(in_warp * 32 + lane) * kOwn + n];
    const int from_lane = WarpScanDown(of_lane, lane);
    const int in_lane = 31 - __clz(__ballot_sync(kWarp, from_lane >= remaining));
    remaining -= __shfl_sync(kWarp, from_lane - of_lane, in_lane);
    int digit = (in_warp * 32 + in_lane) * kOwn + kOwn - 1;
    while (counts[digit] < remaining) remaining -= counts[digit--];

    known |= static_cast<uint32_t>(digit) << shift;
    if (!kExact && counts[digit] == remaining) return {known != kNever ? known : kNever + 1u, kAllTies};
  }
  return {known, remaining};
}

// -----------------------------------------------------------------------------------------------------------------------------------
// Row lists and the attention launch's work.

// What a row has: pairs at or above the threshold, and how many of them are at it. After MakeRows: the chosen pairs, how many of
// the ties are among them, and whether that leaves some out.
struct RowCount {
  uint32_t packed;

  static __device__ __forceinline__ RowCount Found(int all, int equal) {
    return {static_cast<uint32_t>(all) | static_cast<uint32_t>(equal) << 16};
  }
  static __device__ __forceinline__ RowCount Chosen(int chosen, int ties, bool partly) {
    return {static_cast<uint32_t>(chosen) | static_cast<uint32_t>(ties) << 16 | (partly ? 1u << 31 : 0u)};
  }
  __device__ __forceinline__ int Count() const { return static_cast<int>(packed & 0xffffu); }
  __device__ __forceinline__ int Equal() const { return static_cast<int>(packed >> 16 & 0x7fffu); }
  __device__ __forceinline__ bool Partly() const { return packed >> 31; }
};
static_assert(kMaxBlocks < 1 << 15, "RowCount");

// Row starts and the work list, by warp 0: full chunks from the front, the rows' remainders from the back, so that long items start
// first. rows: shared, Found, becomes Chosen. start: (nb), shared.
__device__ __forceinline__ void MakeRows(const Problem& p, int64_t head, int ties, RowCount* rows, int32_t* start) {
  const int lane = threadIdx.x % 32;
  const int nb = p.blocks;
  const int each = (nb + 31) / 32;  // consecutive rows of a lane
  const int begin = lane * each < nb ? lane * each : nb;
  const int end = begin + each < nb ? begin + each : nb;
  int equal = 0;
  for (int i = begin; i < end; ++i) equal += rows[i].Equal();
  int equal_before = WarpScan(equal, lane) - equal;

  int chosen = 0, full = 0, rest = 0, partial = 0;
  for (int i = begin; i < end; ++i) {
    const RowCount row = rows[i];
    const int left = ties > equal_before ? ties - equal_before : 0;
    const int taken = row.Equal() < left ? row.Equal() : left;
    equal_before += row.Equal();
    const int count = row.Count() - row.Equal() + taken;
    rows[i] = RowCount::Chosen(count, taken, taken != row.Equal());
    const int row_full = count / p.chunk;
    const int row_rest = count % p.chunk != 0 || count == 0 ? 1 : 0;
    chosen += count, full += row_full, rest += row_rest;
    partial += row_full + row_rest > 1 ? row_full + row_rest : 0;
  }
  const int chosen_end = WarpScan(chosen, lane), full_end = WarpScan(full, lane);
  const int rest_end = WarpScan(rest, lane), partial_end = WarpScan(partial, lane);
  const int all_full = __shfl_sync(kWarp, full_end, 31), all_rest = __shfl_sync(kWarp, rest_end, 31);

  int32_t* row_start = p.row_start + head * (nb + 1);
  WorkItem* work = p.work + head * p.slots;
  chosen = chosen_end - chosen, full = full_end - full, rest = rest_end - rest, partial = partial_end - partial;
  for (int i = begin; i < end; ++i) {
    const int count = rows[i].Count();
    start[i] = chosen;
    row_start[i] = chosen;
    const int row_full = count / p.chunk;
    const int row_rest = count % p.chunk != 0 || count == 0 ? 1 : 0;
    const int chunks = row_full + row_rest;
    for (int n = 0; n < row_full; ++n) work[full + n] = WorkItem{i, n, chunks, partial};
    if (row_rest) work[p.slots - 1 - rest] = WorkItem{i, row_full, chunks, partial};
    chosen += count, full += row_full, rest += row_rest;
    partial += chunks > 1 ? chunks : 0;
  }
  if (lane == 31) row_start[nb] = chosen_end;
  for (int n = all_full + lane; n < p.slots - all_rest; n += 32) work[n] = WorkItem{-1, 0, 0, 0};
}

// The first `count` bits set in the lanes' words, lane 0's first; kLanes lanes have some.
template <int kLanes = 32>
__device__ __forceinline__ uint32_t FirstSet(uint32_t bits, int count, int lane) {
  const int own = __popc(bits);
  const int left = count - (WarpScan<kLanes>(own, lane) - own);
  for (int extra = own - (left > 0 ? left : 0); extra > 0; --extra) bits &= ~(1u << (31 - __clz(bits)));
  return bits;
}

// Writes the columns that are set in the lanes' words, lane n's being columns 32 (word + n)..., in ascending order. Returns how
// many.
template <int kLanes = 32>
__device__ __forceinline__ int WriteColumns(uint32_t bits, int word, int lane, uint16_t* column) {
  const int end = WarpScan<kLanes>(__popc(bits), lane);
  int at = end - __popc(bits);
  while (bits != 0) {
    column[at++] = static_cast<uint16_t>(32 * (word + lane) + __ffs(static_cast<int>(bits)) - 1);
    bits &= bits - 1u;
  }
  return __shfl_sync(kWarp, end, kLanes - 1);
}

}  // namespace mra

#endif  // MRA_ATTENTION_ORDER_CUH_
