// The bundle's golden batches, and how far a session's answers are from PyTorch's: mra_export/parity.py's judgement.
#ifndef MRA_EMBED_GOLDEN_H_
#define MRA_EMBED_GOLDEN_H_

#include <string>
#include <vector>

#include "backend.h"
#include "bundle.h"
#include "mra_session.h"

namespace mra::embed {

struct GoldenResult {
  std::string name, output, status, reason;
  double max_abs = 0, needed = 0, tolerance = 0;
};

// Throws Failure where the file cannot be read or a batch cannot be run.
std::vector<GoldenResult> CompareGolden(const Bundle& bundle, const Backend& backend);

float ToFloat32(const Output& output, size_t index);

}  // namespace mra::embed

#endif  // MRA_EMBED_GOLDEN_H_
