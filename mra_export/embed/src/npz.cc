#include "npz.h"

#include <cctype>
#include <cstdlib>

#include "bundle.h"

namespace mra::embed {
namespace {

// Little-endian numbers out of a file, never beyond its end.
class Bytes {
 public:
  explicit Bytes(const std::string& file) : file_(file) {}
  uint64_t Number(size_t at, size_t size) const {
    Need(at, size);
    uint64_t number = 0;
    for (size_t index = size; index-- > 0;) number = number << 8 | static_cast<uint8_t>(file_[at + index]);
    return number;
  }
  std::string Text(size_t at, size_t size) const {
    Need(at, size);
    return file_.substr(at, size);
  }

 private:
  void Need(size_t at, size_t size) const {
    if (at > file_.size() || size > file_.size() - at) throw NpzError("it ends too early");
  }
  const std::string& file_;
};

// The text after "key": in an .npy header, which is a Python dictionary.
std::string HeaderValue(const std::string& header, const std::string& key) {
  const size_t found = header.find("'" + key + "':");
  if (found == std::string::npos) throw NpzError("an array has no " + key);
  const size_t start = header.find_first_not_of(' ', found + key.size() + 3);
  return start == std::string::npos ? "" : header.substr(start);
}

Array ReadNpy(const std::string& file) {
  const Bytes bytes(file);
  if (file.compare(0, 6, "\x93NUMPY") != 0) throw NpzError("an entry is not an .npy file");
  const size_t width = bytes.Number(6, 1) == 1 ? 2 : 4;
  const size_t length = bytes.Number(8, width), data = 8 + width + length;
  const std::string header = bytes.Text(8 + width, length);
  Array array;
  const std::string descr = HeaderValue(header, "descr"), shape = HeaderValue(header, "shape");
  array.descr = descr.substr(1, descr.find('\'', 1) - 1);
  if (HeaderValue(header, "fortran_order").compare(0, 5, "False") != 0) throw NpzError("an array is in Fortran's order");
  const uint64_t item = std::strtoull(array.descr.c_str() + (array.descr.size() > 2 ? 2 : array.descr.size()), nullptr, 10);
  uint64_t wanted = item;
  const char* next = shape.c_str() + 1;
  while (*next != '\0' && *next != ')') {
    if (!std::isdigit(static_cast<unsigned char>(*next))) {
      ++next;
      continue;
    }
    char* end = nullptr;
    array.shape.push_back(std::strtoll(next, &end, 10));
    next = end;
    if (__builtin_mul_overflow(wanted, static_cast<uint64_t>(array.shape.back()), &wanted)) throw NpzError("an array is too large");
  }
  if (item == 0 || file.size() - data != wanted) throw NpzError("an array has not as many bytes as its shape says");
  array.bytes = file.substr(data);
  return array;
}

}  // namespace

std::vector<std::pair<std::string, Array>> ReadNpz(const std::string& path) {
  const std::string file = ReadFile(path);
  const Bytes bytes(file);
  // The archive's end: signature, ..., entries, size and place of the directory. np.savez leaves no comment behind it.
  const size_t end = file.rfind("PK\x05\x06");
  if (end == std::string::npos) throw NpzError("it is no zip archive");
  const uint64_t entries = bytes.Number(end + 10, 2);
  size_t at = bytes.Number(end + 16, 4);
  std::vector<std::pair<std::string, Array>> arrays;
  for (uint64_t entry = 0; entry < entries; ++entry) {
    if (bytes.Text(at, 4) != "PK\x01\x02") throw NpzError("its directory is damaged");
    const uint64_t method = bytes.Number(at + 10, 2), size = bytes.Number(at + 24, 4), local = bytes.Number(at + 42, 4);
    const size_t name_size = bytes.Number(at + 28, 2);
    std::string name = bytes.Text(at + 46, name_size);
    if (method != 0) throw NpzError(name + " is compressed, and np.savez compresses nothing");
    if (size == 0xffffffff || local == 0xffffffff) throw NpzError(name + " is larger than 4 GB");
    at += 46 + name_size + bytes.Number(at + 30, 2) + bytes.Number(at + 32, 2);
    const size_t data = local + 30 + bytes.Number(local + 26, 2) + bytes.Number(local + 28, 2);
    if (name.size() > 4 && name.compare(name.size() - 4, 4, ".npy") == 0) name.resize(name.size() - 4);
    arrays.emplace_back(name, ReadNpy(bytes.Text(data, size)));
  }
  return arrays;
}

}  // namespace mra::embed
