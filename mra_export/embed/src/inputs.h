// What a session accepts: checks names, shapes and values before any work, and fills in what may be left out, as
// mra_export/inputs.py does, with the same words.
#ifndef MRA_EMBED_INPUTS_H_
#define MRA_EMBED_INPUTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "bundle.h"
#include "mra_session.h"

namespace mra::embed {

struct Prepared {
  std::vector<int64_t> shape;                // of every input
  std::vector<std::string> names;            // the graph's inputs, in its order
  std::vector<std::vector<int64_t>> values;  // one for each name
};

// Throws Failure naming the input, its value and the fix.
Prepared Prepare(const Manifest& manifest, const MraInput* inputs, size_t count);

}  // namespace mra::embed

#endif  // MRA_EMBED_INPUTS_H_
