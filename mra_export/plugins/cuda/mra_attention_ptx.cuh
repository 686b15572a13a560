// The tensor-core and asynchronous-copy instructions of sm_80 and newer that CUDA C++ has no function for: one wrapper each, with
// the operands' layouts as in the PTX ISA ("Matrix fragments"). Below, g = lane / 4 and t = lane % 4.
#ifndef MRA_ATTENTION_PTX_CUH_
#define MRA_ATTENTION_PTX_CUH_

#include "cuda_backend.h"

#ifdef MRA_CUDA_EMULATION
#include "cuda_emulation_ptx.h"
#else

namespace mra {

__device__ __forceinline__ uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory, by the whole warp. row: lane n's is row n % 8 of matrix n / 8, 16
// bytes at a multiple of 16. r[i] = elements (g, 2 t) and (g, 2 t + 1) of matrix i, the first in the low half.
__device__ __forceinline__ void LoadMatrix4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// The same, each matrix transposed: r[i] = elements (2 t, g) and (2 t + 1, g) of matrix i.
__device__ __forceinline__ void LoadMatrix4Transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// C (16 x 8, float) += A (16 x 16, T) B (16 x 8, T), by the whole warp. Two T a word, the lower index in the low half:
// a[0] = A(g, 2 t..), a[1] = A(g + 8, 2 t..), a[2] = A(g, 2 t + 8..), a[3] = A(g + 8, 2 t + 8..); b0 = B(2 t.., g),
// b1 = B(2 t + 8.., g); c[0..1] = C(g, 2 t..), c[2..3] = C(g + 8, 2 t..).
template <typename T>
__device__ __forceinline__ void MultiplyTile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void MultiplyTile<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void MultiplyTile<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// C (16 x 8, float) += A (16 x 8) B (8 x 8), by the whole warp, from floats whose low 13 bits the hardware ignores:
// a[0] = A(g, t), a[1] = A(g + 8, t), a[2] = A(g, t + 4), a[3] = A(g + 8, t + 4); b0 = B(t, g), b1 = B(t + 4, g); C as above.
__device__ __forceinline__ void MultiplyTileTf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// To nearest, ties away from zero. The result's low 13 bits are not specified: mask them before it is used as a float.
__device__ __forceinline__ uint32_t RoundToTf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Starts to copy 16 bytes, past L1; both addresses are multiples of 16. valid = false: 16 zero bytes, `global` is not read. The
// copy is there for this thread after the wait that covers its group, for others after a barrier that follows.
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(SharedAddress(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes this thread's group of copies.
__device__ __forceinline__ void CopyAsyncCommit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits for all of this thread's groups but the kPending closed last.
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// 2^x to 2^-22 of itself; results below 2^-126 become 0.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats as T, rounded to nearest even, in one word: `low` in its low half.
template <typename T>
__device__ __forceinline__ uint32_t PackPair(float low, float high);
template <>
__device__ __forceinline__ uint32_t PackPair<__half>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
__device__ __forceinline__ uint32_t PackPair<__nv_bfloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

}  // namespace mra

#endif  // MRA_CUDA_EMULATION
#endif  // MRA_ATTENTION_PTX_CUH_
