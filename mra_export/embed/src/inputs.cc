#include "inputs.h"

#include <algorithm>

#include "failure.h"

namespace mra::embed {
namespace {

const std::vector<std::string> kNames = {"input_ids", "attention_mask", "token_type_ids"};

struct Given {
  const int64_t* data = nullptr;
  std::vector<int64_t> shape;
};

[[noreturn]] void Refuse(const std::string& message) { throw Failure(MRA_CONTRACT_ERROR, message); }

const char* Axes(size_t rank) { return rank == 3 ? "(batch, choices, length)" : "(batch, length)"; }

void CheckRange(const std::string& name, const int64_t* data, size_t elements, int64_t limit, const char* limit_name) {
  const auto [low, high] = std::minmax_element(data, data + elements);
  if (*low >= 0 && *high < limit) return;
  Refuse(name + " holds " + std::to_string(*low < 0 ? *low : *high) + ", the model's " + limit_name + " is " +
         std::to_string(limit) + ": pass values from 0 to " + std::to_string(limit - 1));
}

// given: in the caller's order.
void CheckShapes(const Manifest& manifest, const Given& ids, const std::vector<std::pair<std::string, Given>>& given) {
  const size_t rank = manifest.inputs.empty() ? 2 : manifest.inputs[0].axes.size();
  if (ids.data == nullptr) Refuse(std::string("input_ids is missing: pass token ids of shape ") + Axes(rank));
  const std::string shape = ShapeText(ids.shape);
  if (ids.shape.size() != rank) {
    Refuse("input_ids has shape " + shape + ": pass " + std::to_string(rank) + " axes, " + Axes(rank));
  }
  if (*std::min_element(ids.shape.begin(), ids.shape.end()) < 1) {
    Refuse("input_ids has shape " + shape + ": every axis must be 1 or more");
  }
  if (ids.shape.back() > manifest.max_length) {
    Refuse("input_ids has length " + std::to_string(ids.shape.back()) + ", the model's max_position_embeddings is " +
           std::to_string(manifest.max_length) + ": cut the input to " + std::to_string(manifest.max_length) + " tokens or fewer");
  }
  for (const auto& [name, entry] : given) {
    if (entry.shape != ids.shape) {
      Refuse(name + " has shape " + ShapeText(entry.shape) + ", input_ids " + shape + ": pass " +
             (name == "attention_mask" ? "a mask" : name) + " of the same shape");
    }
  }
}

}  // namespace

Prepared Prepare(const Manifest& manifest, const MraInput* inputs, size_t count) {
  std::vector<std::pair<std::string, Given>> given;
  for (size_t index = 0; index < count; ++index) {
    const std::string name = inputs[index].name == nullptr ? "(null)" : inputs[index].name;
    if (std::find(kNames.begin(), kNames.end(), name) == kNames.end()) {
      Refuse(name + " is not an input of this model: pass " + Joined(kNames));
    }
    for (const auto& [other, entry] : given) {
      if (other == name) Refuse(name + " is given twice: pass it once");
    }
    if (inputs[index].rank > 0 && inputs[index].shape == nullptr) Refuse(name + " has no shape: pass one size for each axis");
    if (inputs[index].data == nullptr) continue;
    given.push_back({name, {inputs[index].data, {inputs[index].shape, inputs[index].shape + inputs[index].rank}}});
  }
  const auto find = [&](const std::string& name) {
    for (const auto& [other, entry] : given) {
      if (other == name) return entry;
    }
    return Given();
  };
  const Given ids = find(kNames[0]), mask = find(kNames[1]), types = find(kNames[2]);
  CheckShapes(manifest, ids, given);
  size_t elements = 1;
  for (const int64_t size : ids.shape) {
    if (__builtin_mul_overflow(elements, static_cast<size_t>(size), &elements)) {
      Refuse("input_ids has shape " + ShapeText(ids.shape) + ": it is larger than memory can be");
    }
  }
  CheckRange("input_ids", ids.data, elements, manifest.vocab_size, "vocab_size");
  if (types.data != nullptr) CheckRange("token_type_ids", types.data, elements, manifest.type_vocab_size, "type_vocab_size");

  Prepared prepared = {ids.shape, {}, {}};
  for (const TensorInfo& input : manifest.inputs) {
    std::vector<int64_t> values(elements, input.name == kNames[1] ? 1 : 0);
    if (input.name == kNames[0]) {
      values.assign(ids.data, ids.data + elements);
    } else if (input.name == kNames[1] && mask.data != nullptr) {
      std::transform(mask.data, mask.data + elements, values.begin(), [](int64_t value) { return value != 0; });
    } else if (input.name == kNames[2] && types.data != nullptr) {
      values.assign(types.data, types.data + elements);
    }
    prepared.names.push_back(input.name);
    prepared.values.push_back(std::move(values));
  }
  return prepared;
}

}  // namespace mra::embed
