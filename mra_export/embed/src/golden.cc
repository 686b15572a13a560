#include "golden.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <tuple>

#include "failure.h"
#include "npz.h"

namespace mra::embed {
namespace {

constexpr double kFreeShare = 0.99;  // FREE_SHARE and LONE of mra_export/parity.py, which says why
constexpr float kLone = 300;

// TOLERANCES[dtype].model_free of mra_export/contract.py.
double Tolerance(const std::string& dtype) {
  return dtype == "fp32" ? 2e-3 : dtype == "fp16" ? 1e-1 : dtype == "bf16" ? 5e-1 : 1.0;
}

// What is kept of an output. tokens: those of the rows, numbered through (batch, length); columns: the values that are kept of
// every token; at most one of the two, none for a whole output.
struct Part {
  std::string name;
  std::string words;  // for the row's name
  Array array;
  std::vector<int64_t> tokens, columns;
};

struct Batch {
  std::map<std::string, Array> inputs;
  std::vector<Part> outputs;  // whole ones in the file's order, then each sampled one's two parts
};

// golden_file.Sampled: "tokens" and "rows", "columns" and "values" of one output.
void AddSampled(std::map<std::string, std::map<std::string, Array>> arrays, Batch* batch) {
  for (auto& [name, rows] : arrays["rows"]) {
    for (const auto& [side, chosen, what] :
         {std::tuple{"rows", "tokens", " tokens"}, std::tuple{"values", "columns", " values a token"}}) {
      auto& of_side = arrays[side];
      const auto array = of_side.find(name);
      const auto indices = arrays[chosen].find(name);
      if (array == of_side.end() || indices == arrays[chosen].end()) throw NpzError(name + " has no " + side + " or no " + chosen);
      const Array& index = indices->second;
      const std::vector<int64_t>& shape = array->second.shape;
      const std::vector<int64_t> numbers = index.descr == "<i8" ? index.As<int64_t>() : std::vector<int64_t>();
      const int64_t axis = shape.empty() ? 0 : side == std::string("rows") ? shape.front() : shape.back();
      if (numbers.empty() || index.shape.size() != 1 || axis != index.shape[0] ||
          *std::min_element(numbers.begin(), numbers.end()) < 0)
        throw NpzError(std::string(chosen) + " of " + name + " do not fit its " + side);
      Part part{name, ", " + std::to_string(numbers.size()) + what, array->second, {}, {}};
      (side == std::string("rows") ? part.tokens : part.columns) = numbers;
      batch->outputs.push_back(std::move(part));
    }
  }
}

std::map<int, Batch> ReadBatches(const Bundle& bundle) {
  const std::string path = bundle.File(kGolden);
  std::map<int, Batch> batches;
  std::map<int, std::map<std::string, std::map<std::string, Array>>> sampled;
  try {
    for (auto& [key, array] : ReadNpz(path)) {
      const size_t first = key.find('/'), second = key.find('/', first + 1);
      if (second == std::string::npos) throw NpzError("array " + Quoted(key) + " is not side/batch/name");
      const std::string side = key.substr(0, first), name = key.substr(second + 1);
      const int number = std::stoi(key.substr(first + 1, second - first - 1));
      Batch& batch = batches[number];
      if (side == "inputs") {
        batch.inputs[name] = std::move(array);
      } else if (side == "outputs") {
        batch.outputs.push_back({name, "", std::move(array), {}, {}});
      } else if (side == "tokens" || side == "rows" || side == "columns" || side == "values") {
        sampled[number][side][name] = std::move(array);
      } else {
        throw NpzError("array " + Quoted(key) + " belongs to neither inputs nor outputs");
      }
    }
    for (auto& [number, arrays] : sampled) AddSampled(std::move(arrays), &batches[number]);
    for (const auto& [index, batch] : batches) {
      if (batch.inputs.count("input_ids") == 0) throw NpzError("batch " + std::to_string(index) + " has no input_ids");
      for (const auto& [name, array] : batch.inputs) {
        if (array.descr != "<i8") throw NpzError(name + " is of type " + array.descr + ", not int64");
      }
      for (const Part& part : batch.outputs) {
        if (part.array.descr != "<f4") throw NpzError(part.name + " is of type " + part.array.descr + ", not float32");
      }
    }
  } catch (const std::exception& error) {
    throw Failure(MRA_BUNDLE_ERROR,
                  path + " cannot be read as golden inputs and outputs (" + error.what() + "): export the bundle again");
  }
  return batches;
}

double Quantile(std::vector<float> values, double share) {
  const auto index = static_cast<std::ptrdiff_t>(std::ceil(share * static_cast<double>(values.size()))) - 1;
  std::nth_element(values.begin(), values.begin() + index, values.end());
  return values[static_cast<size_t>(index)];
}

float Median(std::vector<float> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

// needs: what each kept value needs; width: values of a token, 1 where a token has one.
double FreeTolerance(const std::vector<float>& needs, size_t width) {
  double tolerance = Quantile(needs, kFreeShare);
  if (width == 1) return tolerance;
  const double common = tolerance;
  for (size_t start = 0; start < needs.size(); start += width) {
    const std::vector<float> token(needs.begin() + static_cast<std::ptrdiff_t>(start),
                                   needs.begin() + static_cast<std::ptrdiff_t>(start + width));
    if (*std::max_element(token.begin(), token.end()) <= common) continue;
    const float lone = kLone * Median(token);
    for (const float need : token) {
      if (need > lone) tolerance = std::max<double>(tolerance, need);
    }
  }
  return tolerance;
}

// Whether an output has one entry per token: its leading axes are the inputs'.
bool PerToken(const Manifest& manifest, const std::string& output) {
  const auto& wanted = manifest.inputs.at(0).axes;
  for (const TensorInfo& tensor : manifest.outputs) {
    if (tensor.name != output) continue;
    return tensor.axes.size() >= wanted.size() && std::equal(wanted.begin(), wanted.end(), tensor.axes.begin());
  }
  return false;
}

std::string Text(const char* format, double first, double second) {
  char text[128];
  std::snprintf(text, sizeof text, format, first, second);
  return text;
}

// The shape that the actual output must have for this part of it to be comparable, or why there is none.
bool Fits(const Output& actual, const Part& part, std::string* reason) {
  const std::vector<int64_t>& shape = actual.shape;
  if (!part.tokens.empty() || !part.columns.empty()) {
    const int64_t token = part.tokens.empty() ? 0 : *std::max_element(part.tokens.begin(), part.tokens.end());
    const int64_t column = part.columns.empty() ? 0 : *std::max_element(part.columns.begin(), part.columns.end());
    if (shape.size() != 3 || token >= shape[0] * shape[1] || column >= shape[2]) {
      *reason = "shape " + ShapeText(shape) + " has no token " + std::to_string(token) + " or no value " + std::to_string(column);
      return false;
    }
  }
  std::vector<int64_t> found = shape;
  if (!part.tokens.empty()) found = {static_cast<int64_t>(part.tokens.size()), shape[2]};
  if (!part.columns.empty()) found.back() = static_cast<int64_t>(part.columns.size());
  if (found != part.array.shape) *reason = "shape " + ShapeText(found) + ", expected " + ShapeText(part.array.shape);
  return found == part.array.shape;
}

// Where value `index` of the part stands in the actual output.
size_t Place(const Output& actual, const Part& part, size_t index) {
  const size_t width = actual.shape.empty() ? 1 : static_cast<size_t>(actual.shape.back());
  if (!part.tokens.empty()) return static_cast<size_t>(part.tokens[index / width]) * width + index % width;
  const size_t kept = part.columns.size();
  return kept == 0 ? index : index / kept * width + static_cast<size_t>(part.columns[index % kept]);
}

void Judge(const Manifest& manifest, const Output& actual, const Part& part, const Array* mask, GoldenResult* row) {
  const std::vector<float> wanted = part.array.As<float>();
  if (!Fits(actual, part, &row->reason)) return;
  std::vector<int64_t> keep;  // over the leading axes; empty: all
  if (mask != nullptr && part.tokens.empty() && PerToken(manifest, actual.name)) keep = mask->As<int64_t>();
  const size_t per_place = keep.empty() ? 1 : wanted.size() / keep.size();
  std::vector<float> needs;
  size_t nan = 0, infinite = 0;
  for (size_t index = 0; index < wanted.size(); ++index) {
    const float found = ToFloat32(actual, Place(actual, part, index)), right = wanted[index];
    nan += std::isnan(found) + std::isnan(right);
    infinite += std::isinf(found) + std::isinf(right);
    if (!keep.empty() && keep[index / per_place] == 0) continue;
    const double error = std::abs(static_cast<double>(found) - right);
    row->max_abs = std::max(row->max_abs, error);
    needs.push_back(static_cast<float>(error / (1.0 + std::abs(static_cast<double>(right)))));
  }
  if (nan > 0 || infinite > 0) {
    row->max_abs = row->needed = std::numeric_limits<double>::infinity();
    row->reason = std::to_string(nan) + " NaN and " + std::to_string(infinite) + " Inf: never accepted";
    return;
  }
  if (needs.empty()) {
    row->reason = "nothing to compare: no position is kept";
    return;
  }
  const size_t rank = part.array.shape.size(),
               kept_axes = keep.empty() ? std::max<size_t>(rank, 2) - 1 : manifest.inputs[0].axes.size();
  row->needed = FreeTolerance(needs, rank > kept_axes ? static_cast<size_t>(part.array.shape.back()) : 1);
  if (row->needed <= row->tolerance) {
    row->status = "pass";
  } else {
    row->reason = Text("needs a tolerance of %.2e, allowed %.2e", row->needed, row->tolerance);
  }
}

float FromHalf(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

float ToFloat32(const Output& output, size_t index) {
  const void* data = output.data.get();
  if (output.type == MRA_ELEMENT_FLOAT32) return static_cast<const float*>(data)[index];
  const uint16_t half = static_cast<const uint16_t*>(data)[index];
  if (output.type == MRA_ELEMENT_FLOAT16) return FromHalf(half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::vector<GoldenResult> CompareGolden(const Bundle& bundle, const Backend& backend) {
  std::vector<GoldenResult> rows;
  for (const auto& [index, batch] : ReadBatches(bundle)) {
    const Array& ids = batch.inputs.at("input_ids");
    GoldenResult row;
    for (const int64_t size : ids.shape) row.name += (row.name.empty() ? "golden " : "x") + std::to_string(size);
    row.tolerance = Tolerance(bundle.manifest.dtype);
    row.status = "skip";
    const auto refused = backend.Refuses(ids.shape);
    if (refused) {
      row.reason = *refused;
      rows.push_back(row);
      continue;
    }
    std::vector<MraInput> inputs;
    std::vector<std::vector<int64_t>> data;
    data.reserve(batch.inputs.size());  // what inputs points into must not move
    for (const auto& [name, array] : batch.inputs) {
      data.push_back(array.As<int64_t>());
      inputs.push_back({name.c_str(), data.back().data(), array.shape.data(), array.shape.size()});
    }
    const std::vector<Output> outputs = backend.Run(Prepare(bundle.manifest, inputs.data(), inputs.size()));
    const auto mask = batch.inputs.find("attention_mask");
    const std::string batch_name = row.name;
    for (const Part& part : batch.outputs) {
      row.name = batch_name + part.words;
      row.output = part.name;
      row.status = "fail";
      row.reason = "this output is missing";
      row.max_abs = row.needed = 0;
      for (const Output& output : outputs) {
        if (output.name != part.name) continue;
        row.reason.clear();
        Judge(bundle.manifest, output, part, mask == batch.inputs.end() ? nullptr : &mask->second, &row);
      }
      rows.push_back(row);
    }
  }
  return rows;
}

}  // namespace mra::embed
