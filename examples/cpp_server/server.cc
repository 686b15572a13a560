// mra_server BUNDLE PORT: an HTTP server around one mra::Session, on 127.0.0.1. GET /ready gives 200 when it serves.
//   POST /infer   {"input_ids": [[0, 5, 2]], "attention_mask": [[1, 1, 1]]} -> {"logits": {"shape": [1, 3, 261], "values": [...]}}
#include <httplib.h>

#include <csignal>
#include <iostream>
#include <mra_session.hpp>
#include <nlohmann/json.hpp>

using nlohmann::json;
static httplib::Server server;

// Nested lists of equal lengths -> values and shape; the session says whether the shape will do.
static void Flatten(const json& entry, size_t axis, mra::Ints* ints) {
  if (entry.is_number_integer() && axis == ints->shape.size()) return ints->values.push_back(entry.get<int64_t>());
  if (!entry.is_array() || axis > 3) throw std::invalid_argument("inputs are lists of lists of integers");
  if (axis == ints->shape.size() && ints->values.empty()) ints->shape.push_back(static_cast<int64_t>(entry.size()));
  const bool even = axis < ints->shape.size() && ints->shape[axis] == static_cast<int64_t>(entry.size());
  if (!even) throw std::invalid_argument("rows differ in length: pad them, and pass an attention_mask");
  for (const json& inner : entry) Flatten(inner, axis + 1, ints);
}

static mra::Ints Read(const json& request, const char* name) {
  mra::Ints ints;
  if (request.contains(name)) Flatten(request.at(name), 0, &ints);
  return ints;
}

static void Answer(httplib::Response& response, int status, const json& body) {
  response.status = status;
  response.set_content(body.dump(), "application/json");
}

static void Infer(const mra::Session& session, const httplib::Request& request, httplib::Response& response) try {
  const json body = json::parse(request.body);
  const mra::Outputs outputs = session.Run(Read(body, "input_ids"), Read(body, "attention_mask"), Read(body, "token_type_ids"));
  json answer;
  for (size_t index = 0; index < outputs.size(); ++index) {
    const mra::Tensor tensor = outputs.at(index);
    answer[tensor.name] = {{"shape", tensor.shape}, {"values", tensor.Float32()}};
  }
  Answer(response, 200, answer);
} catch (const std::exception& error) {  // what the caller can mend is 400
  const auto* failure = dynamic_cast<const mra::Error*>(&error);
  Answer(response, !failure || failure->kind() == MRA_CONTRACT_ERROR ? 400 : 500, {{"error", error.what()}});
}

int main(int argc, char** argv) try {
  if (argc != 3) throw std::invalid_argument("usage: mra_server BUNDLE PORT");
  const mra::Session session(argv[1]);
  session.Validate();
  server.set_payload_max_length(1 << 20);
  server.Get("/ready", [](const auto&, auto& response) { Answer(response, 200, {{"ready", true}}); });
  server.Post("/infer", [&](const auto& request, auto& response) { Infer(session, request, response); });
  std::signal(SIGTERM, [](int) { server.stop(); });  // calls in flight are answered
  std::cout << "listening on 127.0.0.1:" << argv[2] << std::endl;
  return server.listen("127.0.0.1", std::stoi(argv[2])) ? 0 : 1;
} catch (const std::exception& error) {
  return std::cerr << error.what() << "\n", 1;
}
