// The few vector operations of the CPU kernel, written with GCC / Clang vector extensions; intrinsics only where the extensions
// have no word for it (fused multiply-add, maximum, half precision, transposition). Included by mra_attention_kernels.cc, which is
// compiled once per instruction set: everything here has internal linkage, so that no function built for one set can be linked into
// another.
#ifndef MRA_SIMD_H_
#define MRA_SIMD_H_

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define MRA_INLINE static inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileRows = 8;  // rows of a register tile; its width is two vectors. 16 of 32 registers are accumulators
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileRows = 4;  // 8 of 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kTileRows = 8;  // 16 of 32 registers
#else
constexpr int kLanes = 4;
constexpr int kTileRows = 4;  // 8 of 16 registers
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Shorts __attribute__((vector_size(kLanes * 2)));

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

MRA_INLINE Floats Load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
MRA_INLINE void Store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

MRA_INLINE Ints LoadInts(const int32_t* p) {
  Ints v;
  memcpy(&v, p, sizeof v);
  return v;
}
MRA_INLINE void StoreWords(uint32_t* p, Words v) { memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)
MRA_INLINE Floats Splat(float x) { return (Floats)_mm512_set1_ps(x); }
MRA_INLINE Floats MultiplyAdd(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
// The larger; b where either is NaN.
MRA_INLINE Floats Max(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
MRA_INLINE bool AnyLane(Ints mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }
#elif defined(__AVX2__)
MRA_INLINE Floats Splat(float x) { return (Floats)_mm256_set1_ps(x); }
MRA_INLINE Floats MultiplyAdd(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
MRA_INLINE Floats Max(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
MRA_INLINE bool AnyLane(Ints mask) { return !_mm256_testz_si256((__m256i)mask, (__m256i)mask); }
#else
MRA_INLINE Floats Splat(float x) { return Floats{x, x, x, x}; }
MRA_INLINE Floats Max(Floats a, Floats b) { return a > b ? a : b; }
MRA_INLINE bool AnyLane(Ints mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }
#if defined(__aarch64__)
MRA_INLINE Floats MultiplyAdd(Floats a, Floats b, Floats c) {
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
MRA_INLINE Floats MultiplyAdd(Floats a, Floats b, Floats c) { return a * b + c; }  // may round twice: not for selection
#endif
#endif

// The fused operation, one rounding, on every machine: selection must come out the same bit for bit.
MRA_INLINE Floats FusedMultiplyAdd(Floats a, Floats b, Floats c) {
#if defined(__AVX2__) || defined(__aarch64__)
  return MultiplyAdd(a, b, c);
#else
  Floats r;
  for (int lane = 0; lane < kLanes; ++lane) r[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return r;
#endif
}

MRA_INLINE Ints SplatInt(int32_t x) {
  float bits;
  memcpy(&bits, &x, sizeof bits);
  return (Ints)Splat(bits);
}

// 2^x for x <= 0, exactly 0 below -126.5; relative error below 2e-7; NaN stays NaN.
MRA_INLINE Floats Exp2(Floats x) {
  const Floats shift = Splat(12582912.0f);  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  x = Max(Splat(-127.0f), x);
  const Floats shifted = x + shift;
  const Ints whole = (Ints)shifted - (Ints)shift;
  const Floats f = x - (shifted - shift);  // in [-0.5, 0.5]
  Floats p = Splat(1.53533600e-4f);        // 2^f, minimax
  p = MultiplyAdd(p, f, Splat(1.33988747e-3f));
  p = MultiplyAdd(p, f, Splat(9.61843737e-3f));
  p = MultiplyAdd(p, f, Splat(5.55033247e-2f));
  p = MultiplyAdd(p, f, Splat(2.40226479e-1f));
  p = MultiplyAdd(p, f, Splat(6.93147203e-1f));
  p = MultiplyAdd(p, f, Splat(1.0f));
  const Ints power = (whole + 127) << 23;  // the float 2^whole, 0 for whole = -127
  return p * (Floats)power;                // a product, not an addition to the exponent: NaN must stay NaN
}

// The larger; NaN where either is NaN.
MRA_INLINE Floats MaxOrNan(Floats a, Floats b) { return ((a > b) | (a != a)) ? a : b; }

MRA_INLINE float LargestOrNan(Floats v) {
  float m = v[0];
  for (int lane = 1; lane < kLanes; ++lane) m = v[lane] > m || v[lane] != v[lane] ? v[lane] : m;
  return m;
}

MRA_INLINE float Sum(Floats v) {
  float s = v[0];
  for (int lane = 1; lane < kLanes; ++lane) s += v[lane];
  return s;
}

// One element at a time: half and bfloat16 to float is exact, back rounds to nearest even.

MRA_INLINE float FromBits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
MRA_INLINE uint32_t ToBits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}

MRA_INLINE float ToFloat(float x) { return x; }
MRA_INLINE float ToFloat(BFloat x) { return FromBits(uint32_t{x.bits} << 16); }
MRA_INLINE float ToFloat(Half x) {
  const uint32_t sign = (uint32_t{x.bits} & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31u;
  const uint32_t fraction = x.bits & 1023u;
  if (exponent == 31) return FromBits(sign | 0x7F800000u | (fraction << 13) | (fraction ? 0x400000u : 0u));
  if (exponent != 0) return FromBits(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

MRA_INLINE void FromFloat(float x, float* out) { *out = x; }
MRA_INLINE void FromFloat(float x, BFloat* out) {
  const uint32_t bits = ToBits(x);
  const uint32_t rounded = x != x ? (bits | 0x400000u) : bits + 0x7FFFu + ((bits >> 16) & 1u);
  out->bits = static_cast<uint16_t>(rounded >> 16);
}
MRA_INLINE void FromFloat(float x, Half* out) {
  const uint32_t bits = ToBits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  uint32_t h;
  if (magnitude > 0x7F800000u) {
    h = 0x7E00u;  // NaN
  } else if (magnitude >= 0x477FF000u) {
    h = 0x7C00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 half precision is fixed point in units of 2^-24: adding 0.5 makes float round there.
    h = ToBits(FromBits(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    h = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | h);
}

// kLanes elements of type T to and from float.

MRA_INLINE Floats LoadAs(const float* p) { return Load(p); }
MRA_INLINE void StoreAs(float* p, Floats v) { Store(p, v); }

MRA_INLINE Floats LoadAs(const BFloat* p) {
  Shorts s;
  memcpy(&s, p, sizeof s);
  return (Floats)(__builtin_convertvector(s, Words) << 16);
}
MRA_INLINE void StoreAs(BFloat* p, Floats v) {
  const Words bits = (Words)v;
  const Words rounded = v != v ? (bits | 0x400000u) : bits + 0x7FFFu + ((bits >> 16) & 1u);
  const Shorts s = __builtin_convertvector(rounded >> 16, Shorts);
  memcpy(p, &s, sizeof s);
}

#if defined(__AVX512F__)
MRA_INLINE Floats LoadAs(const Half* p) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
MRA_INLINE void StoreAs(Half* p, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
MRA_INLINE Floats LoadAs(const Half* p) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
MRA_INLINE void StoreAs(Half* p, Floats v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
MRA_INLINE Floats LoadAs(const Half* p) {
  Floats v;
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = ToFloat(p[lane]);
  return v;
}
MRA_INLINE void StoreAs(Half* p, Floats v) {
  for (int lane = 0; lane < kLanes; ++lane) FromFloat(v[lane], p + lane);
}
#endif

// to[c * to_stride + r] = from[r * from_stride + c] for r, c < 8.
MRA_INLINE void Transpose8x8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
#if defined(__AVX2__)
  // Pairs of rows four apart share a register, so that the exchange between register halves is done by the loads.
  __m256 r[8];
  for (int i = 0; i < 4; ++i) {
    const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(from + i * from_stride));
    const __m256 high = _mm256_castps128_ps256(_mm_loadu_ps(from + i * from_stride + 4));
    r[i] = _mm256_insertf128_ps(low, _mm_loadu_ps(from + (i + 4) * from_stride), 1);
    r[i + 4] = _mm256_insertf128_ps(high, _mm_loadu_ps(from + (i + 4) * from_stride + 4), 1);
  }
  for (int half = 0; half < 8; half += 4) {
    const __m256 a = _mm256_unpacklo_ps(r[half], r[half + 1]);
    const __m256 b = _mm256_unpackhi_ps(r[half], r[half + 1]);
    const __m256 c = _mm256_unpacklo_ps(r[half + 2], r[half + 3]);
    const __m256 d = _mm256_unpackhi_ps(r[half + 2], r[half + 3]);
    _mm256_storeu_ps(to + (half + 0) * to_stride, _mm256_shuffle_ps(a, c, 0x44));
    _mm256_storeu_ps(to + (half + 1) * to_stride, _mm256_shuffle_ps(a, c, 0xEE));
    _mm256_storeu_ps(to + (half + 2) * to_stride, _mm256_shuffle_ps(b, d, 0x44));
    _mm256_storeu_ps(to + (half + 3) * to_stride, _mm256_shuffle_ps(b, d, 0xEE));
  }
#else
  for (int c = 0; c < 8; ++c) {
    for (int r = 0; r < 8; ++r) to[c * to_stride + r] = from[r * from_stride + c];
  }
#endif
}

}  // namespace

#endif  // MRA_SIMD_H_
