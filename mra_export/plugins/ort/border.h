// What every file of the ONNX Runtime adapter needs of ONNX Runtime's C API: failures as exceptions inside the library, as statuses
// at its border.
#ifndef MRA_ORT_BORDER_H_
#define MRA_ORT_BORDER_H_

#include <exception>
#include <string>

#include "onnxruntime_c_api.h"

namespace mra_ort {

// A failure on its way to the border, where it becomes an OrtStatus.
struct Failure {
  OrtErrorCode code;
  std::string message;
};

[[noreturn]] inline void Fail(OrtErrorCode code, const std::string& message) { throw Failure{code, message}; }

// Runs body; whatever it throws becomes a status, so that nothing is dropped and no exception leaves the library.
template <class Body>
OrtStatus* AtBorder(const OrtApi& api, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return api.CreateStatus(failure.code, failure.message.c_str());
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return api.CreateStatus(ORT_FAIL, "MraAttention: unknown error");
  }
}

inline void Check(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return;
  const Failure failure = {api.GetErrorCode(status), api.GetErrorMessage(status)};
  api.ReleaseStatus(status);
  throw failure;
}

inline bool Succeeds(const OrtApi& api, OrtStatus* status) {
  if (status != nullptr) api.ReleaseStatus(status);
  return status == nullptr;
}

}  // namespace mra_ort

#endif  // MRA_ORT_BORDER_H_
