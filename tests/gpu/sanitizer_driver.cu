// The CUDA kernels through the C API over hostile shapes, without torch: what compute-sanitizer runs in minutes instead of hours.
// Every buffer is an allocation of its exact size; workspace and outputs start unwritten, so that initcheck sees what is read too
// early. Results are compared with the dense formula. One line for each call; exit status 1 at the first wrong one.
//
//   sanitizer_driver [--quick]     --quick: the smaller half of the shapes
#include <cstdio>
#include <cstring>

#include "attention_case.h"
#include "device_memory.h"

namespace mra_test {
namespace {

// Odd lengths, heads of every compiled width and odd ones between, all and one of the blocks, rows that are split into chunks (36
// block rows, the first two whole), more than 128 block rows (another selection kernel), tied scores.
constexpr Case kCases[] = {
    {1, 1, 1, 8, 1, true, 0, 0, false, Masking::kNone},         {3, 33, 2, 9, 2, false, 0, 1, false, Masking::kHoles},
    {2, 100, 3, 31, 5, true, 1, 0, true, Masking::kPadding},    {2, 96, 2, 64, 1000, true, 0, 0, false, Masking::kDeadRow},
    {1, 300, 2, 64, 20, true, 0, 1, true, Masking::kPadding},   {1, 70, 1, 256, 3, true, 0, 0, false, Masking::kDeadBlocks},
    {1, 65, 1, 127, 4, false, 1, 3, false, Masking::kHoles},    {1, 384, 1, 32, 36, true, 0, 0, false, Masking::kNone, 96},
    {1, 1150, 2, 64, 110, true, 2, 1, false, Masking::kHoles},  {1, 1150, 1, 12, 300, false, 2, 0, true, Masking::kDeadBlocks},
    {1, 4129, 1, 8, 200, true, 1, 1, false, Masking::kPadding},
};
constexpr int kQuickCases = 8;

bool Ok(MraStatus status, const std::string& name) {
  if (status != MRA_OK) std::printf("FAIL %s: %s\n", name.c_str(), mra_status_string(status));
  return status == MRA_OK;
}

bool Run(const Case& c, MraDtype dtype, Stream stream) {
  const std::string name = Name(c, dtype);
  const Inputs in = MakeInputs(c, dtype, 1);
  const Buffer query(in.query.bytes), key(in.key.bytes), value(in.value.bytes), mask(in.mask);
  size_t workspace_bytes = 0;
  if (!Ok(mra_attention_cuda_workspace_size(&in.params, &workspace_bytes), name)) return false;

  const size_t pairs = static_cast<size_t>(in.params.batch * in.params.num_heads * in.blocks() * in.blocks());
  std::vector<uint8_t> blocks;
  {
    const Buffer states(pairs), score(pairs * sizeof(float)), workspace(workspace_bytes);
    if (!Ok(mra_attention_cuda_selection(&in.params, query.get(), key.get(), mask.as<int32_t>(), states.as<uint8_t>(),
                                         score.as<float>(), workspace.get(), workspace_bytes, stream),
            name)) {
      return false;
    }
    Synchronize();
    blocks = states.Read<uint8_t>();
    score.Read<float>();
  }

  std::vector<unsigned char> first;
  for (int time = 0; time < 2; ++time) {
    const Buffer context(in.query.bytes.size()), workspace(workspace_bytes);
    if (!Ok(mra_attention_cuda(&in.params, query.get(), key.get(), value.get(), mask.as<int32_t>(), context.get(), workspace.get(),
                               workspace_bytes, stream),
            name)) {
      return false;
    }
    Synchronize();
    const std::vector<unsigned char> bytes = context.Read<unsigned char>();
    if (time == 0) first = bytes;
    if (bytes != first) {
      std::printf("FAIL %s: a second call gave other bits\n", name.c_str());
      return false;
    }
  }
  const double share = Judge(Values(first, dtype), Dense(in, blocks), dtype);
  std::printf("%s %s: %.2f of the tolerance\n", share <= 1 ? "ok  " : "FAIL", name.c_str(), share);
  return share <= 1;
}

int Main(bool quick) {
  const Stream stream = NewStream();
  int calls = 0;
  for (const MraDtype dtype : {MRA_FLOAT32, MRA_FLOAT16, MRA_BFLOAT16}) {
    int index = 0;
    for (const Case& c : kCases) {
      if (quick && index++ >= kQuickCases) break;
      if (!Run(c, dtype, stream)) return 1;
      std::fflush(stdout);
      ++calls;
    }
  }
  DeleteStream(stream);
  std::printf("%d shapes, all right\n", calls);
  return 0;
}

}  // namespace
}  // namespace mra_test

int main(int argc, char** argv) { return mra_test::Main(argc > 1 && std::strcmp(argv[1], "--quick") == 0); }
