#include "profiles.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <tuple>

#include "failure.h"

namespace mra::embed {
namespace {

std::string Describe(const std::vector<Profile>& profiles) {
  std::vector<std::string> texts;
  for (const Profile& profile : profiles) {
    texts.push_back(ByX(profile.min) + " to " + ByX(profile.max) + " (best " + ByX(profile.opt) + ")");
  }
  return Joined(texts, " or ");
}

}  // namespace

std::pair<int, std::vector<int64_t>> PickProfile(const std::vector<Profile>& profiles, const std::vector<int64_t>& shape) {
  // Of several that take it, the one with the least padding, then the one whose best shape is nearest.
  using Candidate = std::tuple<int64_t, int64_t, int, std::vector<int64_t>>;
  std::optional<Candidate> best;
  for (size_t index = 0; index < profiles.size(); ++index) {
    const Profile& profile = profiles[index];
    if (profile.min.size() != shape.size() || profile.max.size() != shape.size()) continue;
    std::vector<int64_t> padded = shape;
    bool inside = true;
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      padded[axis] = std::max(shape[axis], profile.min[axis]);
      inside = inside && padded[axis] <= profile.max[axis];
    }
    if (!inside) continue;
    const Candidate candidate = {Volume(padded), std::abs(Volume(profile.opt) - Volume(shape)), static_cast<int>(index), padded};
    if (!best || candidate < *best) best = candidate;
  }
  if (!best) {
    throw Failure(MRA_CONTRACT_ERROR, "input_ids has shape " + ByX(shape) + ", the engine takes " + Describe(profiles) +
                                          ": change the batch or the length, or build an engine with --max-shapes");
  }
  return {std::get<2>(*best), std::get<3>(*best)};
}

void CopyCommon(const void* from, const std::vector<int64_t>& from_shape, void* to, const std::vector<int64_t>& to_shape,
                size_t item) {
  std::vector<int64_t> common = from_shape;
  for (size_t axis = 0; axis < common.size(); ++axis) common[axis] = std::min(from_shape[axis], to_shape[axis]);
  const int64_t row = common.back();
  const int64_t rows = Volume({common.begin(), common.end() - 1});
  for (int64_t index = 0; index < rows; ++index) {
    int64_t rest = index, from_row = 0, to_row = 0, from_step = 1, to_step = 1;
    for (size_t axis = common.size() - 1; axis-- > 0;) {
      const int64_t place = rest % common[axis];
      rest /= common[axis];
      from_row += place * from_step;
      to_row += place * to_step;
      from_step *= from_shape[axis];
      to_step *= to_shape[axis];
    }
    std::memcpy(static_cast<char*>(to) + static_cast<size_t>(to_row * to_shape.back()) * item,
                static_cast<const char*>(from) + static_cast<size_t>(from_row * from_shape.back()) * item,
                static_cast<size_t>(row) * item);
  }
}

int64_t Volume(const std::vector<int64_t>& shape) {
  int64_t volume = 1;
  for (const int64_t size : shape) volume *= size;
  return volume;
}

std::string ByX(const std::vector<int64_t>& shape) {
  std::vector<std::string> sizes;
  for (const int64_t size : shape) sizes.push_back(std::to_string(size));
  return Joined(sizes, "x");
}

}  // namespace mra::embed
