// What the kernel needs beyond Highway's own operations. Included once per instruction set (hwy/foreach_target.h).
#if defined(MRA_ATTENTION_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MRA_ATTENTION_SIMD_INL_H_
#undef MRA_ATTENTION_SIMD_INL_H_
#else
#define MRA_ATTENTION_SIMD_INL_H_
#endif

#include <math.h>
#include <stdint.h>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace mra {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// At most 16 lanes. Fixed at compile time, so that vectors may stand in arrays.
using FloatTag = hn::CappedTag<float, 16>;
using WordTag = hn::RebindToUnsigned<FloatTag>;
using IntTag = hn::RebindToSigned<FloatTag>;
using Floats = hn::Vec<FloatTag>;
using Words = hn::Vec<WordTag>;
using Ints = hn::Vec<IntTag>;
constexpr FloatTag kFloats{};
constexpr WordTag kWords{};
constexpr IntTag kInts{};
constexpr int kLanes = static_cast<int>(hn::MaxLanes(FloatTag()));

// Rows of a register tile, whose width is two vectors: as many accumulators as hide the latency of a multiply-add and leave
// registers for the operands.
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE2
constexpr int kTileRows = 4;  // 8 of 16 registers
#else
constexpr int kTileRows = 8;  // 16 of 32 registers
#endif
constexpr int kTileColumns = 2 * kLanes;

// The fused operation, one rounding, on every machine: selection must come out the same bit for bit.
HWY_INLINE Floats FusedMultiplyAdd(Floats a, Floats b, Floats c) {
#if HWY_NATIVE_FMA
  return hn::MulAdd(a, b, c);
#else
  HWY_ALIGN float x[kLanes], y[kLanes], z[kLanes];
  hn::Store(a, kFloats, x);
  hn::Store(b, kFloats, y);
  hn::Store(c, kFloats, z);
  for (int lane = 0; lane < kLanes; ++lane) z[lane] = fmaf(x[lane], y[lane], z[lane]);
  return hn::Load(kFloats, z);
#endif
}

// 2^x for x <= 0, exactly 0 below -126.5; relative error below 2e-7; NaN stays NaN.
HWY_INLINE Floats Exp2(Floats x) {
  const Floats shift = hn::Set(kFloats, 12582912.0f);  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  x = hn::IfThenElse(hn::Lt(x, hn::Set(kFloats, -127.0f)), hn::Set(kFloats, -127.0f), x);
  const Floats shifted = hn::Add(x, shift);
  const Ints whole = hn::Sub(hn::BitCast(kInts, shifted), hn::BitCast(kInts, shift));
  const Floats f = hn::Sub(x, hn::Sub(shifted, shift));  // in [-0.5, 0.5]
  Floats p = hn::Set(kFloats, 1.53533600e-4f);           // 2^f, minimax
  p = hn::MulAdd(p, f, hn::Set(kFloats, 1.33988747e-3f));
  p = hn::MulAdd(p, f, hn::Set(kFloats, 9.61843737e-3f));
  p = hn::MulAdd(p, f, hn::Set(kFloats, 5.55033247e-2f));
  p = hn::MulAdd(p, f, hn::Set(kFloats, 2.40226479e-1f));
  p = hn::MulAdd(p, f, hn::Set(kFloats, 6.93147203e-1f));
  p = hn::MulAdd(p, f, hn::Set(kFloats, 1.0f));
  const Ints power = hn::ShiftLeft<23>(hn::Add(whole, hn::Set(kInts, 127)));  // the float 2^whole, 0 for whole = -127
  return hn::Mul(p, hn::BitCast(kFloats, power));  // a product, not an addition to the exponent: NaN must stay NaN
}

// The larger; the first operand where the second is NaN, so that a NaN is never the maximum of a run that starts without one.
HWY_INLINE Floats LargerIgnoringNan(Floats largest, Floats x) { return hn::IfThenElse(hn::Gt(x, largest), x, largest); }

// The larger; NaN where either is NaN.
HWY_INLINE Floats LargerOrNan(Floats a, Floats b) { return hn::IfThenElse(hn::Or(hn::Gt(a, b), hn::IsNaN(a)), a, b); }

HWY_INLINE float LargestLaneOrNan(Floats v) {
  HWY_ALIGN float lanes[kLanes];
  hn::Store(v, kFloats, lanes);
  float m = lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) m = lanes[lane] > m || lanes[lane] != lanes[lane] ? lanes[lane] : m;
  return m;
}

// Elements of the operator's types and their conversion; half and bfloat16 to float is exact, back rounds to nearest even.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
using ShortTag = hn::Rebind<uint16_t, FloatTag>;
using HalfTag = hn::Rebind<hwy::float16_t, FloatTag>;
constexpr ShortTag kShorts{};

HWY_INLINE Floats Widen(BFloat, hn::Vec<ShortTag> bits) {
  return hn::BitCast(kFloats, hn::ShiftLeft<16>(hn::PromoteTo(kWords, bits)));
}

// In integers: the CPU's own conversion takes numbers below the normal range for 0.
HWY_INLINE hn::Vec<ShortTag> Narrow(BFloat, Floats v) {
  const Words bits = hn::BitCast(kWords, v);
  const Words high = hn::ShiftRight<16>(bits);
  const Words odd = hn::And(high, hn::Set(kWords, 1u));
  const Words rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(kWords, 0x7FFFu))));
  const Words quiet = hn::Or(high, hn::Set(kWords, 0x40u));
  return hn::TruncateTo(kShorts, hn::IfThenElse(hn::RebindMask(kWords, hn::IsNaN(v)), quiet, rounded));
}

#if HWY_TARGET == HWY_SSE2 || HWY_TARGET == HWY_EMU128
// No instruction for half precision here, and Highway's stand-in knows no NaN.
HWY_INLINE Floats Widen(Half, hn::Vec<ShortTag> half) {
  const Words bits = hn::PromoteTo(kWords, half);
  const Words sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(kWords, 0x8000u)));
  const Words magnitude = hn::And(bits, hn::Set(kWords, 0x7FFFu));
  const Words shifted = hn::ShiftLeft<13>(magnitude);
  const Words normal = hn::Add(shifted, hn::Set(kWords, 112u << 23));
  Words special = hn::Add(shifted, hn::Set(kWords, 224u << 23));  // infinity and NaN, which becomes a quiet one
  special = hn::IfThenElse(hn::Gt(magnitude, hn::Set(kWords, 0x7C00u)), hn::Or(special, hn::Set(kWords, 0x400000u)), special);
  const Floats small = hn::Mul(hn::ConvertTo(kFloats, hn::BitCast(kInts, magnitude)), hn::Set(kFloats, 0x1p-24f));
  Words result = hn::IfThenElse(hn::Lt(magnitude, hn::Set(kWords, 0x400u)), hn::BitCast(kWords, small), normal);
  result = hn::IfThenElse(hn::Ge(magnitude, hn::Set(kWords, 0x7C00u)), special, result);
  return hn::BitCast(kFloats, hn::Or(result, sign));
}
HWY_INLINE hn::Vec<ShortTag> Narrow(Half, Floats v) {
  const Words bits = hn::BitCast(kWords, v);
  const Words sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(kWords, 0x8000u));
  const Words magnitude = hn::And(bits, hn::Set(kWords, 0x7FFFFFFFu));
  // Below 2^-14 half precision is fixed point in units of 2^-24: adding 0.5 makes float round there.
  const Floats half = hn::Set(kFloats, 0.5f);
  const Words small = hn::Sub(hn::BitCast(kWords, hn::Add(hn::BitCast(kFloats, magnitude), half)), hn::BitCast(kWords, half));
  const Words odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(kWords, 1u));
  const Words rebased = hn::Sub(magnitude, hn::Set(kWords, 112u << 23));
  Words result = hn::ShiftRight<13>(hn::Add(rebased, hn::Add(odd, hn::Set(kWords, 0xFFFu))));
  result = hn::IfThenElse(hn::Lt(magnitude, hn::Set(kWords, 113u << 23)), small, result);
  // 65520 and above round to infinity.
  result = hn::IfThenElse(hn::Ge(magnitude, hn::Set(kWords, 0x477FF000u)), hn::Set(kWords, 0x7C00u), result);
  result = hn::IfThenElse(hn::RebindMask(kWords, hn::IsNaN(v)), hn::Set(kWords, 0x7E00u), result);
  return hn::TruncateTo(kShorts, hn::Or(result, sign));
}
#else
HWY_INLINE Floats Widen(Half, hn::Vec<ShortTag> bits) { return hn::PromoteTo(kFloats, hn::BitCast(HalfTag(), bits)); }
HWY_INLINE hn::Vec<ShortTag> Narrow(Half, Floats v) { return hn::BitCast(kShorts, hn::DemoteTo(HalfTag(), v)); }
#endif

HWY_INLINE Floats LoadAs(const float* p) { return hn::LoadU(kFloats, p); }
template <class T>
HWY_INLINE Floats LoadAs(const T* p) {
  return Widen(T(), hn::LoadU(kShorts, &p->bits));
}
// The first count elements, 0 < count <= kLanes; the other lanes are 0.
HWY_INLINE Floats LoadFirst(const float* p, size_t count) { return hn::LoadN(kFloats, p, count); }
template <class T>
HWY_INLINE Floats LoadFirst(const T* p, size_t count) {
  return Widen(T(), hn::LoadN(kShorts, &p->bits, count));
}
HWY_INLINE void StoreFirst(Floats v, float* p, size_t count) { hn::StoreN(v, kFloats, p, count); }
template <class T>
HWY_INLINE void StoreFirst(Floats v, T* p, size_t count) {
  hn::StoreN(Narrow(T(), v), kShorts, &p->bits, count);
}
HWY_INLINE void StoreAs(Floats v, float* p) { hn::StoreU(v, kFloats, p); }
template <class T>
HWY_INLINE void StoreAs(Floats v, T* p) {
  hn::StoreU(Narrow(T(), v), kShorts, &p->bits);
}

// to[c * to_stride + r] = from[r * from_stride + c] for r, c < 8.
HWY_INLINE void Transpose8x8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  // 4 x 4 in each 128-bit part: as many parts as a vector has, up to two, take rows (or columns) four apart.
  using Tag = hn::CappedTag<float, 8>;
  using Pairs = hn::Repartition<uint64_t, Tag>;
  constexpr Tag d{};
  constexpr Pairs pairs{};
  constexpr int kParts = static_cast<int>(hn::MaxLanes(Tag())) / 4;
  const auto load = [&](int row, int column) HWY_ATTR {
    const float* p = from + row * from_stride + column;
#if HWY_MAX_BYTES >= 32
    const hn::Half<Tag> half;
    return hn::Combine(d, hn::LoadU(half, p + 4 * from_stride), hn::LoadU(half, p));
#else
    return hn::LoadU(d, p);
#endif
  };
  for (int column = 0; column < 8; column += 4) {
    for (int row = 0; row < 8; row += 4 * kParts) {
      const auto r0 = load(row, column), r1 = load(row + 1, column), r2 = load(row + 2, column), r3 = load(row + 3, column);
      const auto a = hn::BitCast(pairs, hn::InterleaveLower(d, r0, r1)), b = hn::BitCast(pairs, hn::InterleaveUpper(d, r0, r1));
      const auto e = hn::BitCast(pairs, hn::InterleaveLower(d, r2, r3)), f = hn::BitCast(pairs, hn::InterleaveUpper(d, r2, r3));
      float* out = to + column * to_stride + row;
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(pairs, a, e)), d, out);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(pairs, a, e)), d, out + to_stride);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(pairs, b, f)), d, out + 2 * to_stride);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(pairs, b, f)), d, out + 3 * to_stride);
    }
  }
}

// acc[r][c] += sum over k < depth of a[r * a_row + k * a_step] * b[k * b_row + c], one chain of (fused) multiply-adds per element,
// k ascending.
template <bool kFused>
HWY_INLINE void MultiplyTile(const float* HWY_RESTRICT a, int64_t a_row, int64_t a_step, const float* HWY_RESTRICT b, int64_t b_row,
                             int64_t depth, Floats (&acc)[kTileRows][2]) {
  for (int64_t k = 0; k < depth; ++k) {
    const Floats b0 = hn::LoadU(kFloats, b);
    const Floats b1 = hn::LoadU(kFloats, b + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Floats x = hn::Set(kFloats, a[r * a_row]);
      acc[r][0] = kFused ? FusedMultiplyAdd(x, b0, acc[r][0]) : hn::MulAdd(x, b0, acc[r][0]);
      acc[r][1] = kFused ? FusedMultiplyAdd(x, b1, acc[r][1]) : hn::MulAdd(x, b1, acc[r][1]);
    }
    a += a_step;
    b += b_row;
  }
}

HWY_INLINE void ClearTile(Floats (&acc)[kTileRows][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) acc[r][0] = acc[r][1] = hn::Zero(kFloats);
}

HWY_INLINE void StoreTile(const Floats (&acc)[kTileRows][2], float* c, int64_t c_row) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    hn::StoreU(acc[r][0], kFloats, c + r * c_row);
    hn::StoreU(acc[r][1], kFloats, c + r * c_row + kLanes);
  }
}

// c (8 x columns) = a (8 x depth) times b (depth x columns); columns a multiple of 32.
template <bool kFused>
HWY_INLINE void MultiplyPanel(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, int64_t columns,
                              float* c, int64_t c_row) {
  for (int row = 0; row < 8; row += kTileRows) {
    for (int64_t column = 0; column < columns; column += kTileColumns) {
      Floats acc[kTileRows][2];
      ClearTile(acc);
      MultiplyTile<kFused>(a + row * a_row, a_row, 1, b + column, b_row, depth, acc);
      StoreTile(acc, c + row * c_row + column, c_row);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace mra
HWY_AFTER_NAMESPACE();

#endif  // include guard per target
