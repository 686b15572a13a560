// mra_attention_ptx.cuh for the host: the same functions, lane by lane.
//
// Hostile where the hardware may be: an asynchronous copy leaves NaN behind until this thread's wait covers it, and reads its
// source at a random time between; a thread that returns with copies pending, a misaligned address and one outside the CTA's shared
// memory fail the launch; every lane must be there. A product's terms are summed pairwise and added to C with truncation, as tensor
// cores do: their exact order is not documented, so nothing may rest on it. Exp2 is off by up to one unit in the last place.
#ifndef MRA_CUDA_EMULATION_PTX_H_
#define MRA_CUDA_EMULATION_PTX_H_

#include "cuda_emulation.h"

namespace mra_emulation {

enum class TileType { kHalf, kBfloat16, kTf32 };

void LoadMatrix(uint32_t* r, const void* row, bool transposed, const char* file, int line);
void Multiply(TileType type, float* c, const uint32_t* a, uint32_t b0, uint32_t b1, const char* file, int line);
void StartCopy(void* shared, const void* global, bool valid, const char* file, int line);
void CommitCopies();
void AwaitCopies(int pending_groups);
// For the scheduler: called at each rendezvous, and when a thread returns.
void ReadSomeSources();
void CheckNoCopies();

}  // namespace mra_emulation

namespace mra {

// The default arguments are the caller's file and line.
#define MRA_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void LoadMatrix4(uint32_t (&r)[4], const void* row, MRA_CALLER) { mra_emulation::LoadMatrix(r, row, false, file, line); }

inline void LoadMatrix4Transposed(uint32_t (&r)[4], const void* row, MRA_CALLER) {
  mra_emulation::LoadMatrix(r, row, true, file, line);
}

template <typename T>
void MultiplyTile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, MRA_CALLER);
template <>
inline void MultiplyTile<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* file, int line) {
  mra_emulation::Multiply(mra_emulation::TileType::kHalf, c, a, b0, b1, file, line);
}
template <>
inline void MultiplyTile<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* file,
                                        int line) {
  mra_emulation::Multiply(mra_emulation::TileType::kBfloat16, c, a, b0, b1, file, line);
}

inline void MultiplyTileTf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, MRA_CALLER) {
  mra_emulation::Multiply(mra_emulation::TileType::kTf32, c, a, b0, b1, file, line);
}

inline uint32_t RoundToTf32(float x) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffffffu;
  const uint32_t unspecified = bits * 0x9e3779b9u >> 19;  // 13 bits
  return ((magnitude == 0x7f800000u ? bits : bits + 0x1000u) & 0xffffe000u) | unspecified;
}

inline void CopyAsync16(void* shared, const void* global, bool valid, MRA_CALLER) {
  mra_emulation::StartCopy(shared, global, valid, file, line);
}

inline void CopyAsyncCommit() { mra_emulation::CommitCopies(); }

template <int kPending>
void CopyAsyncWait() {
  mra_emulation::AwaitCopies(kPending);
}

inline float Exp2(float x) {
  const float y = exp2f(x);
  if (!(y >= 0x1p-126f)) return y != y ? y : 0.0f;
  if (fabsf(x) < 0x1p-126f || y == INFINITY) return y;
  const uint32_t bits = __float_as_uint(y), off = __float_as_uint(x) * 0x9e3779b9u >> 30;  // 0 to 3: the last two change nothing
  return __uint_as_float(off == 0 ? bits + 1 : off == 1 && bits > 0x00800000u ? bits - 1 : bits);
}

template <typename T>
uint32_t PackPair(float low, float high);
template <>
inline uint32_t PackPair<__half>(float low, float high) {
  return __float2half_rn(low).bits | static_cast<uint32_t>(__float2half_rn(high).bits) << 16;
}
template <>
inline uint32_t PackPair<__nv_bfloat16>(float low, float high) {
  return __float2bfloat16_rn(low).bits | static_cast<uint32_t>(__float2bfloat16_rn(high).bits) << 16;
}

#undef MRA_CALLER

}  // namespace mra

#endif  // MRA_CUDA_EMULATION_PTX_H_
