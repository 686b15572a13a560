// What the C entry points (mra_attention_cpu.cc) hand to the kernels (mra_attention_kernels.cc, compiled for several instruction
// sets). Plain data only.
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
constexpr int kPackBlocks = 4;    // blocks packed by one work item
constexpr int kChunkBlocks = 4;   // chosen blocks taken in one softmax step
constexpr int64_t kRowCost = 64;  // cost of a block row apart from its products, in rows of low-resolution blocks

// Packed inputs and selection of one bundle of (batch row, head) pairs; masked tokens are 0. Float32, but for those that a kernel
// with bfloat16 products packs as it likes into the same room. nb8, nb32, d16, d32: rounded up to multiples of 8, 16 and 32.
struct BundleBuffers {
  float* queries;      // (heads, nb, d16, 32): transposed
  float* keys;         // (heads, nb, 32, d16)
  float* values;       // (heads, nb, 32, d16)
  float* value_sum;    // (heads, nb, d32): sum of V over the block
  float* query_mean;   // (heads, nb8, d16)
  float* key_mean;     // (heads, nb8, d16)
  float* logits;       // (heads, nb8, nb32): l_ij, then log2(e) * l_ij where the low resolution counts and -inf elsewhere
  float* row_max;      // (heads, nb8): r_i, then the largest low-resolution logit of the row in units of log2
  uint32_t* real;      // (heads, nb): bit t: token t of the block is real
  float* real_count;   // (heads, nb32): c_j
  int32_t* columns;    // (heads, chosen): live chosen j, row after row, ascending
  int64_t* row_start;  // (heads, nb + 1): where a row's columns begin
};

// Buffers of one worker.
struct WorkerBuffers {
  float* key_mean;        // (d16, nb32): a head's, transposed
  uint32_t* keys;         // (nb8 * nb32): order-preserving keys of one class
  int32_t* column_class;  // (nb32): class of a column apart from its row
  int32_t* row_class;     // (nb32)
  float* weights;         // (kChunkBlocks * 32, 32): logits, then weights: key token by query token
  float* output;          // (d16, 32)
  float* rows;            // (32, d16) staging for transposition
  float* low_weights;     // (8, nb32): low-resolution weights of 8 block rows
  float* low_output;      // (8, d32)
  void* planes;           // (3, kChunkBlocks * 16, 32, 2) bfloat16: weights as sums of three, for kernels with matrix tiles
};

struct Problem {
  const MraAttentionParams* params;
  const void* query;
  const void* key;
  const void* value;  // NULL for mra_attention_cpu_selection
  const int32_t* mask;
  void* context;
  uint8_t* blocks;  // mra_attention_cpu_selection's outputs; NULL otherwise
  float* score;
  int64_t nb, nb8, nb32, d16, d32;
  int64_t chosen;  // min(K, nb * nb)
  WorkerBuffers* workers;
};

// Heads that are worked on together.
struct Bundle {
  BundleBuffers buffers;
  int64_t first_head;  // counted over batch rows and heads
  int64_t heads;
  int64_t pieces;  // that attend cuts each head into
};

struct Kernels {
  // Packs blocks [kPackBlocks * chunk, kPackBlocks * (chunk + 1)) of a bundle's heads.
  void (*pack)(const Problem& problem, const Bundle& bundle, int64_t chunk, int64_t worker);
  // Chooses the exact blocks of one head, counted from the bundle's first, all of whose chunks are packed.
  void (*select)(const Problem& problem, const Bundle& bundle, int64_t head, int64_t worker);
  // Computes the context of one of bundle.pieces equal-cost runs of block rows of one head that is selected.
  void (*attend)(const Problem& problem, const Bundle& bundle, int64_t head, int64_t piece, int64_t worker);
};

struct CpuTarget {
  const char* name;
  const Kernels* kernels;  // NULL: asked for, but not there
};

// The best instruction set that the library and the machine have, or the one of that name; `wanted` NULL or empty: any.
CpuTarget FindCpuTarget(const char* wanted);

}  // namespace mra

#endif  // MRA_ATTENTION_PROBLEM_H_
