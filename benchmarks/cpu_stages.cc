// Runs the CPU kernel on one thread, again and again, for a profiler: benchmarks/cpu_stages.py builds, runs and reads it.
// Prints the instruction set and the milliseconds of the median call.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "mra_attention.h"

namespace {

[[noreturn]] void Fail(const char* what) {
  fprintf(stderr, "%s\n", what);
  exit(1);
}

void Check(MraStatus status) {
  if (status != MRA_OK) Fail(mra_status_string(status));
}

}  // namespace

// Inputs: a file of query, key and value, each (1, N, H * D) of the dtype, one after the other.
int main(int argc, char** argv) {
  if (argc != 10) {
    Fail("usage: mra_attention_stages INPUTS DTYPE LENGTH HEADS HEAD_SIZE NUM_BLOCKS FIRST_N_BLOCKS DIAGONAL_N_BLOCKS CALLS");
  }
  MraAttentionParams params = {};
  params.struct_size = sizeof params;
  params.dtype = atoi(argv[2]);
  params.batch = 1;
  params.length = atoll(argv[3]);
  params.num_heads = atoi(argv[4]);
  params.head_size = atoi(argv[5]);
  params.num_blocks = atoll(argv[6]);
  params.initial_prior_first_n_blocks = atoi(argv[7]);
  params.initial_prior_diagonal_n_blocks = atoi(argv[8]);
  params.scale = 0.125f;
  const int calls = atoi(argv[9]);
  size_t workspace_bytes = 0;
  Check(mra_attention_cpu_workspace_size(&params, 1, &workspace_bytes));

  const size_t element = params.dtype == MRA_FLOAT32 ? 4 : 2;
  const size_t bytes = static_cast<size_t>(params.length) * params.num_heads * params.head_size * element;
  std::vector<char> inputs(3 * bytes);
  FILE* file = fopen(argv[1], "rb");
  if (file == nullptr || fread(inputs.data(), 1, inputs.size(), file) != inputs.size()) Fail("the inputs cannot be read");
  fclose(file);
  const std::vector<int32_t> mask(params.length, 1);
  std::vector<char> context(bytes);
  char* workspace = static_cast<char*>(aligned_alloc(64, (workspace_bytes + 63) / 64 * 64));
  if (workspace == nullptr) Fail("no memory for the workspace");

  std::vector<double> times;
  for (int call = 0; call < calls; ++call) {
    const auto start = std::chrono::steady_clock::now();
    Check(mra_attention_cpu(&params, inputs.data(), inputs.data() + bytes, inputs.data() + 2 * bytes, mask.data(), context.data(),
                            workspace, workspace_bytes, nullptr));
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  printf("%s %.6f\n", mra_attention_cpu_target(), times[times.size() / 2]);
  free(workspace);
  return 0;
}
