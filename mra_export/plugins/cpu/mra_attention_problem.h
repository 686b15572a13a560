// What the C entry points (mra_attention_cpu.cc) hand to the kernels (mra_attention_kernels.cc, one build per instruction set).
// Plain data only: a header included by objects built for different instruction sets must define no function that could be shared.
#ifndef MRA_ATTENTION_PROBLEM_H_
#define MRA_ATTENTION_PROBLEM_H_

#include <stdint.h>

#include "mra_attention.h"

// Marks a stage that benchmarks/cpu_stages.py tells from the others: a function of its own in a profiling build, what the compiler
// likes elsewhere.
#if defined(MRA_PROFILE)
#define MRA_STAGE __attribute__((noinline))
#else
#define MRA_STAGE
#endif

namespace mra {

constexpr int kBlock = MRA_ATTENTION_BLOCK_SIZE;
constexpr int kPanel = 8;         // rows of a packed left operand: [depth][8]
constexpr int kPackBlocks = 16;   // blocks packed by one work item: 16 columns of key_mean are one cache line
constexpr int kChunkBlocks = 4;   // chosen blocks taken in one softmax step
constexpr int64_t kRowCost = 64;  // cost of a block row apart from its products, in rows of low-resolution blocks

// Packed inputs and selection of one group of (batch row, head) pairs, float32. nb8, nb32, d8, d32: rounded up to multiples of 8
// and 32.
struct GroupBuffers {
  float* key_panels;   // (heads, nb, 4, D, 8): K in panels of 8 tokens, masked tokens 0
  float* value_rows;   // (heads, nb, 32, d8): V, masked tokens 0
  float* value_sum;    // (heads, nb, d32): sum of V over the block
  float* query_mean;   // (heads, nb8 / 8, D, 8)
  float* key_mean;     // (heads, D, nb32)
  float* logits;       // (heads, nb8, nb32): l_ij, then log2(e) * l_ij where the low resolution counts and -inf elsewhere
  float* row_max;      // (heads, nb8): r_i, then the largest low-resolution logit of the row in units of log2
  uint32_t* real;      // (heads, nb): bit t: token t of the block is real
  float* real_count;   // (heads, nb32): c_j
  int32_t* columns;    // (heads, capacity): live chosen j, row after row, ascending
  int64_t* row_start;  // (heads, nb + 1): where a row's columns begin
};

// Buffers of one worker.
struct WorkerBuffers {
  uint32_t* keys;         // (nb8 * nb32): order-preserving keys of one class
  int32_t* column_class;  // (nb32): class of a column apart from its row
  int32_t* row_class;     // (nb32)
  float* queries;         // (D, 32): scaled query tokens of a block row, transposed
  float* weights;         // (kChunkBlocks * 32, 32): logits, then weights: key token by query token
  float* output;          // (d8, 32)
  float* rows;            // (32, d8) staging for transposition
  float* low_weights;     // (nb32, 8): low-resolution weights of 8 block rows, transposed
  float* low_rows;        // (8, nb32): the same before the transposition
  float* low_output;      // (8, d32)
};

struct Problem {
  const MraAttentionParams* params;
  const void* query;
  const void* key;
  const void* value;
  const int32_t* mask;
  void* context;
  uint8_t* blocks;  // mra_attention_cpu_selection's outputs; NULL otherwise
  float* score;
  int64_t nb, nb8, nb32, d8, d32;
  int64_t chosen;      // min(K, nb * nb)
  int64_t first_head;  // of the group, counted over batch rows and heads
  int64_t heads;       // in the group
  int64_t pieces;      // that attend cuts each head into
  GroupBuffers group;
  WorkerBuffers* workers;
};

struct Kernels {
  // Packs blocks [kPackBlocks * chunk, kPackBlocks * (chunk + 1)) of one head.
  void (*pack)(const Problem& problem, int64_t head, int64_t chunk);
  // Chooses the exact blocks of one head whose chunks are all packed.
  void (*select)(const Problem& problem, int64_t head, int64_t worker);
  // Computes the context of one of problem.pieces equal-cost runs of block rows of one head that is selected.
  void (*attend)(const Problem& problem, int64_t head, int64_t piece, int64_t worker);
};

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace baseline {
extern const Kernels kKernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kKernels;
}
#else
namespace baseline {
extern const Kernels kKernels;
}
#endif

}  // namespace mra

#endif  // MRA_ATTENTION_PROBLEM_H_
