// The TensorRT plugin as TensorRT would drive it, without TensorRT: creator, fields, shapes, formats, workspace, serialise, a copy
// for each context, enqueue on device memory, several contexts at once, a captured CUDA graph. Results are compared with the dense
// formula and, bit for bit, with the C API. One line for each check; exit status 1 if one failed.
#include <NvInferRuntime.h>
#include <stdint.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "attention_case.h"
#include "device_memory.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& num_creators);

#ifdef MRA_CUDA_EMULATION
// What the plugin's error paths ask of the CUDA runtime.
extern "C" cudaError_t cudaGetLastError() { return cudaErrorLaunchFailure; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return "a CUDA error"; }
#endif

namespace mra_test {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::IPluginV3OneBuild;
using nvinfer1::IPluginV3OneRuntime;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorRTPhase;

constexpr DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};  // by MraDtype

int failures = 0;

void Expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::printf("FAIL %s\n", what.c_str());
}

template <typename Capability>
Capability* Get(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}
IPluginV3OneBuild* Build(IPluginV3* plugin) { return Get<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD); }
IPluginV3OneRuntime* Runtime(IPluginV3* plugin) { return Get<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME); }

nvinfer1::IPluginCreatorV3One* Creator() {
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* creators = getCreators(count);
  if (count != 1) Die("getCreators", "the library brings another number of creators than one");
  return static_cast<nvinfer1::IPluginCreatorV3One*>(creators[0]);
}

IPluginV3* Create(const MraAttentionParams& p, TensorRTPhase phase) {
  const char* mode = p.approx_mode == MRA_APPROX_FULL ? "full" : "sparse";
  const PluginField fields[] = {
      {"num_heads", &p.num_heads, PluginFieldType::kINT32, 1},
      {"num_blocks", &p.num_blocks, PluginFieldType::kINT64, 1},
      {"scale", &p.scale, PluginFieldType::kFLOAT32, 1},
      {"approx_mode", mode, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(mode))},
      {"initial_prior_first_n_blocks", &p.initial_prior_first_n_blocks, PluginFieldType::kINT32, 1},
      {"initial_prior_diagonal_n_blocks", &p.initial_prior_diagonal_n_blocks, PluginFieldType::kINT32, 1},
      {"padding_invariant", &p.padding_invariant, PluginFieldType::kINT32, 1},
  };
  const PluginFieldCollection collection{sizeof(fields) / sizeof(fields[0]), fields};
  return Creator()->createPlugin("layer", &collection, phase);
}

// query, key, value, mask, context of a layer. Dynamic: batch and length from 1 to those of p.
struct Descs {
  PluginTensorDesc fixed[5] = {};
  DynamicPluginTensorDesc dynamic[5] = {};

  explicit Descs(const MraAttentionParams& p) {
    for (int i = 0; i < 5; ++i) {
      PluginTensorDesc& desc = fixed[i];
      desc.type = i == 3 ? DataType::kINT32 : kTypes[p.dtype];
      desc.format = nvinfer1::TensorFormat::kLINEAR;
      desc.dims.nbDims = i == 3 ? 2 : 3;
      desc.dims.d[0] = p.batch;
      desc.dims.d[1] = p.length;
      if (i != 3) desc.dims.d[2] = int64_t{p.num_heads} * p.head_size;
      dynamic[i].desc = desc;
      dynamic[i].desc.dims.d[0] = dynamic[i].desc.dims.d[1] = -1;
      dynamic[i].min = dynamic[i].opt = dynamic[i].max = desc.dims;
      dynamic[i].min.d[0] = dynamic[i].min.d[1] = 1;
    }
  }
};

// The plugin of a built and reloaded engine: made while building, asked everything a build asks, serialised, made again.
struct Loaded {
  IPluginV3* plugin = nullptr;
  size_t workspace_bytes = 0;  // for shapes up to those it was built for
  ~Loaded() { delete plugin; }
};

void BuildAndReload(const MraAttentionParams& largest, const std::string& name, Loaded* loaded) {
  const Descs descs(largest);
  IPluginV3* const built = Create(largest, TensorRTPhase::kBUILD);
  if (built == nullptr) Die(name.c_str(), "the creator refused the fields");
  IPluginV3OneBuild* const build = Build(built);
  const DataType inputs[] = {descs.fixed[0].type, descs.fixed[1].type, descs.fixed[2].type, descs.fixed[3].type};
  DataType output = DataType::kUINT8;
  Expect(build->getNbOutputs() == 1, name + ": one output");
  Expect(build->getOutputDataTypes(&output, 1, inputs, 4) == 0 && output == inputs[0], name + ": context has query's type");
  for (int32_t position = 0; position < 5; ++position) {
    Expect(build->supportsFormatCombination(position, descs.dynamic, 4, 1), name + ": linear tensors of one type are taken");
    DynamicPluginTensorDesc other[5];
    std::memcpy(other, descs.dynamic, sizeof(other));
    other[position].desc.type = DataType::kINT8;
    Expect(!build->supportsFormatCombination(position, other, 4, 1), name + ": int8 is refused");
  }
  Expect(build->configurePlugin(descs.dynamic, 4, descs.dynamic + 4, 1) == 0, name + ": configurePlugin");
  loaded->workspace_bytes = build->getWorkspaceSize(descs.dynamic, 4, descs.dynamic + 4, 1);
  IPluginV3* const copy = built->clone();
  loaded->plugin = Creator()->createPlugin("layer", Runtime(copy)->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
  delete copy;
  delete built;
  if (loaded->plugin == nullptr) Die(name.c_str(), "the creator refused the fields that the plugin serialised");
}

// One call's device memory.
struct Call {
  explicit Call(const Inputs& in, size_t workspace_bytes)
      : query(in.query.bytes),
        key(in.key.bytes),
        value(in.value.bytes),
        mask(in.mask),
        context(in.query.bytes.size()),
        workspace(workspace_bytes) {}

  int32_t Enqueue(IPluginV3* plugin, const MraAttentionParams& params, Stream stream) const {
    const Descs descs(params);
    const void* const inputs[] = {query.get(), key.get(), value.get(), mask.get()};
    void* const outputs[] = {context.get()};
    return Runtime(plugin)->enqueue(descs.fixed, descs.fixed + 4, inputs, outputs, workspace.get(),
                                    static_cast<cudaStream_t>(stream));
  }
  std::vector<unsigned char> Bytes() const { return context.Read<unsigned char>(); }

  Buffer query, key, value, mask, context, workspace;
};

std::vector<uint8_t> Selection(const Inputs& in, const Call& call, Stream stream) {
  size_t bytes = 0;
  mra_attention_cuda_workspace_size(&in.params, &bytes);
  const Buffer states(static_cast<size_t>(in.params.batch * in.params.num_heads * in.blocks() * in.blocks())), workspace(bytes);
  Expect(mra_attention_cuda_selection(&in.params, call.query.get(), call.key.get(), call.mask.as<int32_t>(), states.as<uint8_t>(),
                                      nullptr, workspace.get(), bytes, stream) == MRA_OK,
         "mra_attention_cuda_selection");
  Synchronize();
  return states.Read<uint8_t>();
}

// The context of the C API for the same inputs.
std::vector<unsigned char> Direct(const Inputs& in, Stream stream) {
  size_t bytes = 0;
  mra_attention_cuda_workspace_size(&in.params, &bytes);
  const Call call(in, bytes);
  Expect(mra_attention_cuda(&in.params, call.query.get(), call.key.get(), call.value.get(), call.mask.as<int32_t>(),
                            call.context.get(), call.workspace.get(), bytes, stream) == MRA_OK,
         "mra_attention_cuda");
  Synchronize();
  return call.Bytes();
}

// Shapes within one engine's profile, smallest, odd and largest, through one context and one workspace.
void Shapes(Case c, MraDtype dtype, Stream stream) {
  const std::string name = Name(c, dtype);
  Loaded loaded;
  BuildAndReload(MakeInputs(c, dtype, 1).params, name, &loaded);
  IPluginV3* const context = Runtime(loaded.plugin)->attachToContext(nullptr);
  double worst = 0;
  const int64_t lengths[] = {1, c.length / 2 + 1, c.length}, batches[] = {c.batch, 1, c.batch};
  for (int i = 0; i < 3; ++i) {
    Case smaller = c;
    smaller.length = lengths[i];
    smaller.batch = batches[i];
    const Inputs in = MakeInputs(smaller, dtype, 2 + static_cast<uint64_t>(i));
    const Descs descs(in.params);
    Expect(Runtime(context)->onShapeChange(descs.fixed, 4, descs.fixed + 4, 1) == 0, name + ": onShapeChange");
    const Call call(in, loaded.workspace_bytes);
    Expect(call.Enqueue(context, in.params, stream) == 0, name + ": enqueue");
    Synchronize();
    Expect(call.Bytes() == Direct(in, stream), name + ": the plugin and the C API give other bits");
    const double share = Judge(Values(call.Bytes(), dtype), Dense(in, Selection(in, call, stream)), dtype);
    Expect(share <= 1, name + ": the error is " + std::to_string(share) + " times the tolerance");
    worst = share > worst ? share : worst;
  }
  delete context;
  std::printf("ok   %s: 3 shapes, %.2f of the tolerance\n", name.c_str(), worst);
}

// Several contexts of one plugin, each on a stream of its own, enqueued before any is waited for.
void Contexts() {
  const Case c{2, 500, 4, 64, 60, true, 1, 1, false, Masking::kPadding};
  constexpr int kContexts = 4;
  Loaded loaded;
  BuildAndReload(MakeInputs(c, MRA_FLOAT16, 1).params, "contexts", &loaded);
  std::vector<Inputs> inputs;
  std::vector<Call> calls;
  std::vector<IPluginV3*> contexts;
  std::vector<Stream> streams;
  for (int i = 0; i < kContexts; ++i) {
    inputs.push_back(MakeInputs(c, MRA_FLOAT16, 10 + static_cast<uint64_t>(i)));
    calls.emplace_back(inputs.back(), loaded.workspace_bytes);
    contexts.push_back(Runtime(loaded.plugin)->attachToContext(nullptr));
    streams.push_back(NewStream());
  }
  for (int i = 0; i < kContexts; ++i) {
    Expect(calls[i].Enqueue(contexts[i], inputs[i].params, streams[i]) == 0, "contexts: enqueue");
  }
  Synchronize();
  for (int i = 0; i < kContexts; ++i) {
    Expect(calls[i].Bytes() == Direct(inputs[i], streams[i]), "contexts: one beside others gives other bits");
    delete contexts[i];
    DeleteStream(streams[i]);
  }
  std::printf("ok   %d contexts at once\n", kContexts);
}

void Refusals(Stream stream) {
  const Case c{1, 64, 1, 8, 2, true, 0, 0, false, Masking::kNone};
  Inputs in = MakeInputs(c, MRA_FLOAT32, 1);
  Loaded loaded;
  BuildAndReload(in.params, "refusals", &loaded);
  const Call call(in, loaded.workspace_bytes);
  std::fprintf(stderr, "(two messages of the plugin about refused input follow)\n");
  const PluginField unknown[] = {{"block_size", &in.params.num_heads, PluginFieldType::kINT32, 1}};
  const PluginFieldCollection collection{1, unknown};
  Expect(Creator()->createPlugin("layer", &collection, TensorRTPhase::kBUILD) == nullptr, "an unknown field was accepted");
  in.params.head_size = 4;
  Expect(call.Enqueue(loaded.plugin, in.params, stream) != 0, "head size 4 was accepted");
  std::printf("ok   2 refusals\n");
}

#ifndef MRA_CUDA_EMULATION
void Graph() {
  const Case c{1, 1152, 2, 64, 230, true, 2, 1, false, Masking::kPadding};
  const Stream stream = NewStream();
  const Inputs in = MakeInputs(c, MRA_BFLOAT16, 1);
  Loaded loaded;
  BuildAndReload(in.params, "graph", &loaded);
  const Call call(in, loaded.workspace_bytes);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  Expect(call.Enqueue(loaded.plugin, in.params, stream) == 0, "graph: enqueue");
  Check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  Check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  for (uint64_t seed = 2; seed < 5; ++seed) {
    const Inputs next = MakeInputs(c, MRA_BFLOAT16, seed);
    Upload(call.query.get(), next.query.bytes.data(), call.query.bytes());
    Upload(call.key.get(), next.key.bytes.data(), call.key.bytes());
    Upload(call.value.get(), next.value.bytes.data(), call.value.bytes());
    Upload(call.mask.get(), next.mask.data(), call.mask.bytes());
    Check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    Synchronize();
    Expect(call.Bytes() == Direct(next, stream), "graph: a replay with new data differs from a plain call");
  }
  Check(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
  Check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  DeleteStream(stream);
  std::printf("ok   a captured graph, 3 replays with new data\n");
}
#endif

int Main() {
  Expect(std::strcmp(Creator()->getPluginName(), "MraAttention") == 0, "the plugin's name");
  Expect(std::strcmp(Creator()->getPluginVersion(), "1") == 0, "the plugin's version");
  Expect(std::strcmp(Creator()->getPluginNamespace(), "") == 0, "the plugin's namespace");
  const Stream stream = NewStream();
  for (const MraDtype dtype : {MRA_FLOAT32, MRA_FLOAT16, MRA_BFLOAT16}) {
    Shapes({2, 131, 2, 64, 9, true, 1, 1, false, Masking::kPadding}, dtype, stream);
    Shapes({3, 300, 3, 40, 30, false, 0, 0, true, Masking::kHoles}, dtype, stream);
  }
  Contexts();
  Refusals(stream);
#ifndef MRA_CUDA_EMULATION
  Graph();
#endif
  DeleteStream(stream);
  std::printf("%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace mra_test

int main() { return mra_test::Main(); }
