/* Two ready-made MraThreads for callers without a pool of their own. */
#ifndef MRA_THREADS_H_
#define MRA_THREADS_H_

#include "mra_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A pool that the process already has: gomp_parallel is the address of GOMP_parallel in the OpenMP runtime that is loaded (libgomp,
 * or LLVM's or Intel's, which export it too). A second pool on the same cores would fight with the first one. */
typedef struct MraOpenMPPool {
  void (*gomp_parallel)(void (*task)(void*), void* data, unsigned num_threads, unsigned flags);
  unsigned num_threads;
} MraOpenMPPool;

/* MraThreads::parallel_for on an MraOpenMPPool. */
MRA_API void mra_parallel_for_openmp(void* pool, int64_t count, void (*task)(void* arg, int64_t index), void* arg);

/* MraThreads::parallel_for that starts its threads at each call. pool: the number of threads, a const int32_t*. A thread that the
 * system refuses is made up for by the others. */
MRA_API void mra_parallel_for_std(void* pool, int64_t count, void (*task)(void* arg, int64_t index), void* arg);

#ifdef __cplusplus
}
#endif

#endif /* MRA_THREADS_H_ */
