// A failure on its way to the C border, where it becomes an MraError; and values in Python's spelling, because the messages are the
// Python runtime's, word for word (tests/embed/test_errors.py).
#ifndef MRA_EMBED_FAILURE_H_
#define MRA_EMBED_FAILURE_H_

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "mra_session.h"

namespace mra::embed {

struct Failure : std::runtime_error {
  Failure(MraErrorKind kind_, const std::string& message) : std::runtime_error(message), kind(kind_) {}
  MraErrorKind kind;
};

// "(2, 100)", "(5,)", "()".
inline std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t axis = 0; axis < shape.size(); ++axis) text += (axis ? ", " : "") + std::to_string(shape[axis]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

// "'text'", or with double quotes where it holds a single one.
inline std::string Quoted(const std::string& text) {
  const char quote = text.find('\'') != std::string::npos && text.find('"') == std::string::npos ? '"' : '\'';
  std::string quoted(1, quote);
  for (const char letter : text) {
    const auto code = static_cast<unsigned char>(letter);
    char escaped[5];
    if (letter == quote || letter == '\\') {
      quoted += {'\\', letter};
    } else if (letter == '\n') {
      quoted += "\\n";
    } else if (letter == '\r') {
      quoted += "\\r";
    } else if (letter == '\t') {
      quoted += "\\t";
    } else if (code < 0x20 || code == 0x7f) {
      std::snprintf(escaped, sizeof escaped, "\\x%02x", code);
      quoted += escaped;
    } else {
      quoted += letter;
    }
  }
  return quoted + quote;
}

inline std::string Joined(const std::vector<std::string>& texts, const char* between = ", ") {
  std::string joined;
  for (size_t index = 0; index < texts.size(); ++index) joined += (index ? between : "") + texts[index];
  return joined;
}

}  // namespace mra::embed

#endif  // MRA_EMBED_FAILURE_H_
