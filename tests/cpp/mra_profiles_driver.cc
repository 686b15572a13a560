// The embedding library's profiles for ctypes: tests/embed/test_profiles.py compares them with mra_export/profiles.py.
#include <cstdio>

#include "failure.h"
#include "profiles.h"

using mra::embed::Profile;

// profiles: count * 3 * rank sizes, min, opt and max of each. Writes the shape to run and returns the profile's number, or -1 and
// the message.
extern "C" int driver_pick(const int64_t* profiles, int count, int rank, const int64_t* shape, int64_t* padded, char* message,
                           size_t size) {
  std::vector<Profile> made;
  for (int index = 0; index < count; ++index) {
    const int64_t* next = profiles + index * 3 * rank;
    made.push_back({{next, next + rank}, {next + rank, next + 2 * rank}, {next + 2 * rank, next + 3 * rank}});
  }
  try {
    const auto [picked, to_run] = mra::embed::PickProfile(made, {shape, shape + rank});
    for (int axis = 0; axis < rank; ++axis) padded[axis] = to_run[static_cast<size_t>(axis)];
    return picked;
  } catch (const mra::embed::Failure& failure) {
    std::snprintf(message, size, "%s", failure.what());
    return -1;
  }
}

extern "C" void driver_copy(const void* from, const int64_t* from_shape, void* to, const int64_t* to_shape, int rank, size_t item) {
  mra::embed::CopyCommon(from, {from_shape, from_shape + rank}, to, {to_shape, to_shape + rank}, item);
}
