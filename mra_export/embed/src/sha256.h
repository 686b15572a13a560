// SHA-256 (FIPS 180-4) of files and bytes: what the manifest lists.
#ifndef MRA_EMBED_SHA256_H_
#define MRA_EMBED_SHA256_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace mra::embed {

class Sha256 {
 public:
  void Update(const void* data, size_t bytes);
  std::string HexDigest();  // ends it

 private:
  void Block(const uint8_t* block);

  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> rest_ = {};
  uint64_t bytes_ = 0;
};

}  // namespace mra::embed

#endif  // MRA_EMBED_SHA256_H_
