/* mra_attention: MRA attention (Zeng et al., ICML 2022), plain C API. Meaning of the operator: docs/operator.md.
 *
 * The library allocates nothing, keeps no state, prints nothing and starts no thread of its own: memory and threads come from the
 * caller. Every function may be called from several threads at once, each call with its own workspace.
 */
#ifndef MRA_ATTENTION_H_
#define MRA_ATTENTION_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define MRA_API __declspec(dllexport)
#else
#define MRA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by every change of meaning or of a struct below; equals CONTRACT_VERSION in mra_export/contract.py. */
#define MRA_ATTENTION_CONTRACT_VERSION 1
#define MRA_ATTENTION_BLOCK_SIZE 32
#define MRA_ATTENTION_MIN_HEAD_SIZE 8
#define MRA_ATTENTION_MAX_HEAD_SIZE 256

typedef enum MraStatus {
  MRA_OK = 0,
  MRA_ERROR_NULL_POINTER = 1,
  MRA_ERROR_STRUCT_SIZE = 2, /* struct_size is not that of this header: caller and library differ in version */
  MRA_ERROR_DTYPE = 3,
  MRA_ERROR_BATCH = 4,
  MRA_ERROR_LENGTH = 5,
  MRA_ERROR_NUM_HEADS = 6,
  MRA_ERROR_HEAD_SIZE = 7,
  MRA_ERROR_NUM_BLOCKS = 8,
  MRA_ERROR_APPROX_MODE = 9,
  MRA_ERROR_PRIOR = 10,
  MRA_ERROR_SCALE = 11,
  MRA_ERROR_WORKSPACE = 12,  /* workspace smaller than mra_attention_*_workspace_size, or not 64-byte aligned */
  MRA_ERROR_CUDA = 13,       /* a CUDA launch failed */
  MRA_ERROR_NOT_BUILT = 14,  /* this library was built without that device */
  MRA_ERROR_FLAG = 15,       /* padding_invariant is neither 0 nor 1, or float32_mode is unknown */
  MRA_ERROR_TOO_LARGE = 16,  /* tensors or workspace of these shapes exceed what can be addressed */
  MRA_ERROR_CPU_TARGET = 17, /* MRA_ATTENTION_CPU_TARGET names instructions that the library or the machine does not have */
  MRA_ERROR_THREADS = 18     /* num_threads below 1, or no parallel_for */
} MraStatus;

typedef enum MraDtype { MRA_FLOAT32 = 0, MRA_FLOAT16 = 1, MRA_BFLOAT16 = 2 } MraDtype;

typedef enum MraApproxMode { MRA_APPROX_FULL = 0, MRA_APPROX_SPARSE = 1 } MraApproxMode;

/* How mra_attention_cuda multiplies float32 tensors. TF32X3: on tensor cores, every float as two tf32, whose products are right to
 * about 2^-21, for heads of up to 128 dimensions; larger ones take FMA. The CPU kernel always takes FMA. */
typedef enum MraFloat32Mode { MRA_FLOAT32_FMA = 0, MRA_FLOAT32_TF32X3 = 1 } MraFloat32Mode;

typedef struct MraAttentionParams {
  uint32_t struct_size;                    /* sizeof(MraAttentionParams) */
  int32_t dtype;                           /* MraDtype of query, key, value and context */
  int64_t batch;                           /* B >= 1 */
  int64_t length;                          /* N >= 1 tokens, any number */
  int32_t num_heads;                       /* H >= 1 */
  int32_t head_size;                       /* D, 8 to 256 */
  int64_t num_blocks;                      /* K >= 1 exact 32 x 32 blocks per batch row and head */
  int32_t approx_mode;                     /* MraApproxMode */
  int32_t initial_prior_first_n_blocks;    /* F >= 0 */
  int32_t initial_prior_diagonal_n_blocks; /* G >= 0; 0: no diagonal prior */
  int32_t padding_invariant;               /* 0 or 1 */
  float scale;                             /* factor on each logit, positive and finite */
  int32_t float32_mode;                    /* MraFloat32Mode; without effect on selection and on 16-bit types */
} MraAttentionParams;

/* The caller's threads. parallel_for(pool, count, task, arg) calls task(arg, i) once for each i in [0, count), on any threads in
 * any order, and returns when all are done. mra_threads.h has two ready-made ones. */
typedef struct MraThreads {
  void* pool;
  int32_t num_threads; /* >= 1: how many may run at once, a hint for how finely to cut the work */
  void (*parallel_for)(void* pool, int64_t count, void (*task)(void* arg, int64_t index), void* arg);
} MraThreads;

/* The header's MRA_ATTENTION_CONTRACT_VERSION that the library was built with. */
MRA_API int32_t mra_attention_contract_version(void);

/* One English sentence for a status; never NULL. */
MRA_API const char* mra_status_string(MraStatus status);

/* The instruction set that mra_attention_cpu runs on here: "amx_bf16", "avx512_bf16", "avx512", "avx2", "neon" or "baseline"; the
 * environment variable MRA_ATTENTION_CPU_TARGET, read at the first call, asks for one of them. NULL: it asks for one that is not
 * there. */
MRA_API const char* mra_attention_cpu_target(void);

/* Bytes of workspace that mra_attention_cpu needs for these parameters, for up to num_threads threads. Depends on shapes only. */
MRA_API MraStatus mra_attention_cpu_workspace_size(const MraAttentionParams* params, int32_t num_threads, size_t* bytes);

/* query, key, value, context: (B, N, H * D) of params->dtype, contiguous. mask: (B, N) int32, 0 = padding, anything else a real
 * token. workspace: 64-byte aligned. threads: NULL runs on the calling thread alone. The result is bitwise the same for any
 * threads. */
MRA_API MraStatus mra_attention_cpu(const MraAttentionParams* params, const void* query, const void* key, const void* value,
                                    const int32_t* mask, void* context, void* workspace, size_t workspace_bytes,
                                    const MraThreads* threads);

/* What mra_attention_cpu selects, for tests and for comparing runtimes. blocks: (B, H, nb, nb) uint8 with nb = ceil(N / 32): 2
 * chosen, 1 excluded but not chosen (tied with the last chosen one), 0 neither. score: NULL or (B, H, nb, nb) float32, l_ij - r_i.
 * Workspace, mask and threads as above. */
MRA_API MraStatus mra_attention_cpu_selection(const MraAttentionParams* params, const void* query, const void* key,
                                              const int32_t* mask, uint8_t* blocks, float* score, void* workspace,
                                              size_t workspace_bytes, const MraThreads* threads);

/* CUDA. A library that was built without it answers MRA_ERROR_NOT_BUILT. Pointers other than params and bytes are device memory;
 * stream is a cudaStream_t, NULL the legacy default stream. The work is queued on it and the call returns at once: nothing is
 * allocated or synchronised, and launches depend on params alone, so the call may be captured into a CUDA graph. Compute
 * capability 8.0 and newer. MRA_ERROR_TOO_LARGE: N above 131072, or more than 2^31 - 1 CTAs. */

/* Bytes of workspace that mra_attention_cuda needs for these parameters. Depends on params only; needs no GPU. */
MRA_API MraStatus mra_attention_cuda_workspace_size(const MraAttentionParams* params, size_t* bytes);

/* As mra_attention_cpu. workspace: 64-byte aligned, its content does not matter; in use until the queued work is done. The same
 * inputs give the same bits at every call. MRA_ERROR_CUDA: a launch was refused. */
MRA_API MraStatus mra_attention_cuda(const MraAttentionParams* params, const void* query, const void* key, const void* value,
                                     const int32_t* mask, void* context, void* workspace, size_t workspace_bytes,
                                     void* stream /* cudaStream_t */);

/* As mra_attention_cpu_selection, whose selection it equals bit for bit. blocks and score are device memory. */
MRA_API MraStatus mra_attention_cuda_selection(const MraAttentionParams* params, const void* query, const void* key,
                                               const int32_t* mask, uint8_t* blocks, float* score, void* workspace,
                                               size_t workspace_bytes, void* stream /* cudaStream_t */);

#ifdef __cplusplus
}
#endif

#endif /* MRA_ATTENTION_H_ */
