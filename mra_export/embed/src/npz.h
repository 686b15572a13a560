// numpy's .npz as np.savez writes it: a zip archive of .npy files, stored without compression.
#ifndef MRA_EMBED_NPZ_H_
#define MRA_EMBED_NPZ_H_

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace mra::embed {

struct NpzError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// descr: numpy's, such as "<i8" or "<f4". bytes: row-major.
struct Array {
  std::string descr;
  std::vector<int64_t> shape;
  std::string bytes;

  template <class Number>
  std::vector<Number> As() const {
    std::vector<Number> values(bytes.size() / sizeof(Number));
    if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(Number));
    return values;
  }
};

// (name, array) in the archive's order. Throws NpzError.
std::vector<std::pair<std::string, Array>> ReadNpz(const std::string& path);

}  // namespace mra::embed

#endif  // MRA_EMBED_NPZ_H_
