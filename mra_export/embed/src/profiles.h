// An engine's optimisation profiles: from a call's shape to its profile, and padding to it, as mra_export/profiles.py does it.
#ifndef MRA_EMBED_PROFILES_H_
#define MRA_EMBED_PROFILES_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace mra::embed {

struct Profile {
  std::vector<int64_t> min, opt, max;  // of every input
};

// The profile for a call of this shape, and the shape to run: the same, or padded up to the profile's minimum. Throws Failure
// naming all profiles where none takes it.
std::pair<int, std::vector<int64_t>> PickProfile(const std::vector<Profile>& profiles, const std::vector<int64_t>& shape);

// Copies the part that two row-major tensors of the same rank (1 or more) and of items of that many bytes have in common.
void CopyCommon(const void* from, const std::vector<int64_t>& from_shape, void* to, const std::vector<int64_t>& to_shape,
                size_t item);

int64_t Volume(const std::vector<int64_t>& shape);
std::string ByX(const std::vector<int64_t>& shape);  // "2x33"

}  // namespace mra::embed

#endif  // MRA_EMBED_PROFILES_H_
