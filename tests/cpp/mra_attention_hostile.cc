// Runs the CPU kernel over hostile shapes and contents, in memory of exactly the documented size. Built with sanitizers by
// tests/plugins/test_sanitized.py and for 64-bit ARM by test_aarch64.py; exits 1 with a line that names the case when a result is
// wrong.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "mra_attention.h"
#include "mra_threads.h"

namespace {

struct Random {
  uint64_t state;
  uint32_t Next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  int64_t Below(int64_t n) { return static_cast<int64_t>(Next()) % n; }
  float Float() { return static_cast<float>(Next()) / 1073741824.0f - 1.0f; }
};

struct FreeAligned {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, FreeAligned>;

// Exactly `bytes` bytes at an address that is aligned to `alignment` and no more, so that reading past either end is seen.
Memory Allocate(size_t bytes, size_t alignment) {
  void* p = nullptr;
  if (posix_memalign(&p, alignment < sizeof(void*) ? sizeof(void*) : alignment, bytes ? bytes : 1) != 0) std::abort();
  std::memset(p, 0xFF, bytes);  // NaN in every type
  return Memory(p);
}

enum Content { kFinite, kSpecial, kConstant, kContents };

uint16_t ToBFloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

void Fill(Random* random, int content, int32_t dtype, int64_t count, void* out) {
  const float special[] = {std::numeric_limits<float>::quiet_NaN(),
                           std::numeric_limits<float>::infinity(),
                           -std::numeric_limits<float>::infinity(),
                           3e38f,
                           -3e38f,
                           1e-40f,
                           -0.0f};
  for (int64_t n = 0; n < count; ++n) {
    float x = content == kConstant ? 0.5f : random->Float();
    if (content == kSpecial && random->Below(50) == 0) x = special[random->Below(7)];
    if (dtype == MRA_FLOAT32) {
      static_cast<float*>(out)[n] = x;
    } else if (dtype == MRA_BFLOAT16) {
      static_cast<uint16_t*>(out)[n] = ToBFloat(x);
    } else {  // any bits are a half
      static_cast<uint16_t*>(out)[n] = content == kConstant ? 0x3800
                                       : content == kSpecial
                                           ? static_cast<uint16_t>(random->Next())
                                           : static_cast<uint16_t>(random->Below(0x3C00) | random->Below(2) << 15);
    }
  }
}

bool IsZeroOrFinite(int32_t dtype, const void* data, int64_t index, bool want_zero) {
  if (dtype == MRA_FLOAT32) {
    const float x = static_cast<const float*>(data)[index];
    return want_zero ? x == 0 : std::isfinite(x);
  }
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  const uint16_t exponent = dtype == MRA_FLOAT16 ? 0x7C00 : 0x7F80;
  return want_zero ? bits == 0 : (bits & exponent) != exponent;
}

bool RunCase(int number, int64_t batch, int64_t length, int32_t heads, int32_t head_size, int64_t budget, Random* random) {
  MraAttentionParams params = {};
  params.struct_size = sizeof params;
  params.dtype = number % 3;
  params.batch = batch;
  params.length = length;
  params.num_heads = heads;
  params.head_size = head_size;
  params.num_blocks = budget;
  params.approx_mode = static_cast<int32_t>(random->Below(2));
  params.initial_prior_first_n_blocks = random->Below(2) ? 0 : static_cast<int32_t>(random->Below(5));
  params.initial_prior_diagonal_n_blocks = random->Below(2) ? 0 : static_cast<int32_t>(random->Below(5));
  params.padding_invariant = static_cast<int32_t>(random->Below(2));
  params.scale = 0.25f;
  const int content = static_cast<int>(random->Below(kContents));

  const int64_t count = batch * length * heads * head_size;
  const size_t element = params.dtype == MRA_FLOAT32 ? 4 : 2;
  Memory tensors[4];  // query, key, value, context
  for (Memory& tensor : tensors) {
    tensor = Allocate(static_cast<size_t>(count) * element, element);
    Fill(random, content, params.dtype, count, tensor.get());
  }
  Memory mask = Allocate(static_cast<size_t>(batch * length) * 4, 4);
  int32_t* tokens = static_cast<int32_t*>(mask.get());
  const int64_t density = random->Below(5);  // 0: all masked
  for (int64_t n = 0; n < batch * length; ++n) tokens[n] = density == 4 || random->Below(4) < density ? 1 - 2 * (n % 7 == 0) : 0;

  const int64_t nb = (length + 31) / 32;
  const int64_t pairs = batch * heads * nb * nb;
  Memory blocks = Allocate(static_cast<size_t>(pairs), 1);
  Memory score = Allocate(static_cast<size_t>(pairs) * 4, 4);
  std::vector<char> first_result;
  for (int32_t num_threads = 1; num_threads <= 3; num_threads += 2) {
    const MraThreads threads = {&num_threads, num_threads, mra_parallel_for_std};
    size_t bytes = 0;
    MraStatus status = mra_attention_cpu_workspace_size(&params, num_threads, &bytes);
    Memory workspace = Allocate(bytes, 64);
    if (status == MRA_OK) {
      status = mra_attention_cpu(&params, tensors[0].get(), tensors[1].get(), tensors[2].get(), tokens, tensors[3].get(),
                                 workspace.get(), bytes, &threads);
    }
    if (status == MRA_OK) {
      status = mra_attention_cpu_selection(&params, tensors[0].get(), tensors[1].get(), tokens, static_cast<uint8_t*>(blocks.get()),
                                           static_cast<float*>(score.get()), workspace.get(), bytes, &threads);
    }
    if (status != MRA_OK) {
      std::fprintf(stderr, "case %d: %s\n", number, mra_status_string(status));
      return false;
    }
    const char* context = static_cast<const char*>(tensors[3].get());
    if (first_result.empty()) {
      first_result.assign(context, context + static_cast<size_t>(count) * element);
    } else if (std::memcmp(first_result.data(), context, first_result.size()) != 0) {
      std::fprintf(stderr, "case %d: %d threads give another result than 1\n", number, num_threads);
      return false;
    }
  }
  const int64_t hidden = int64_t{heads} * head_size;
  for (int64_t n = 0; n < count; ++n) {
    const bool masked = tokens[n / hidden] == 0;
    if ((masked || content != kSpecial) && !IsZeroOrFinite(params.dtype, tensors[3].get(), n, masked)) {
      std::fprintf(stderr, "case %d: context[%lld] is %s\n", number, static_cast<long long>(n), masked ? "not 0" : "not finite");
      return false;
    }
  }
  const uint8_t* states = static_cast<const uint8_t*>(blocks.get());
  for (int64_t head = 0; head < batch * heads; ++head) {
    int64_t chosen = 0;
    for (int64_t n = 0; n < nb * nb; ++n) chosen += states[head * nb * nb + n] == 2;
    if (chosen != (budget < nb * nb ? budget : nb * nb)) {
      std::fprintf(stderr, "case %d: head %lld has %lld chosen pairs\n", number, static_cast<long long>(head),
                   static_cast<long long>(chosen));
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  if (mra_attention_cpu_target() == nullptr) {
    std::fprintf(stderr, "MRA_ATTENTION_CPU_TARGET is not there\n");
    return 2;
  }
  const int64_t lengths[] = {1, 2, 31, 32, 33, 63, 65, 100, 255, 257, 300};
  const int32_t sizes[] = {8, 9, 15, 16, 17, 20, 31, 32, 33, 40, 64, 100, 255, 256};
  Random random = {12345};
  for (int number = 0; number < cases; ++number) {
    const int64_t length = lengths[random.Below(11)];
    const int64_t nb = (length + 31) / 32;
    const int64_t budget = random.Below(3) == 0 ? INT64_MAX : 1 + random.Below(nb * nb + 1);
    if (!RunCase(number, 1 + random.Below(3), length, 1 + static_cast<int32_t>(random.Below(3)), sizes[random.Below(14)], budget,
                 &random)) {
      return 1;
    }
  }
  // Many blocks in little memory, and more heads than one group of packed heads holds.
  if (!RunCase(3, 1, 5000, 1, 8, 700, &random) || !RunCase(4, 40, 70, 8, 256, 3, &random)) return 1;
  std::printf("%s: %d cases\n", mra_attention_cpu_target(), cases + 2);
  return 0;
}
