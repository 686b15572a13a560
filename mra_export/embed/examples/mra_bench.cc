// mra_bench BUNDLE: checks the golden outputs, then times calls from one or more threads.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <mra_session.hpp>
#include <random>
#include <thread>

namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

mra::Ints RandomTokens(int64_t vocab_size, std::vector<int64_t> shape) {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  std::mt19937_64 random(0);
  std::uniform_int_distribution<int64_t> token(0, vocab_size - 1);
  mra::Ints ids = {std::vector<int64_t>(static_cast<size_t>(elements)), std::move(shape)};
  for (int64_t& id : ids.values) id = token(random);
  return ids;
}

}  // namespace

int main(int argc, char** argv) {
  std::string bundle;
  mra::Options options;
  int64_t batch = 1, length = 0, choices = 0;
  int threads = 1, calls = 20;
  CLI::App app("Time a bundle: every thread makes the same calls through one session. The golden outputs are checked first.");
  app.add_option("bundle", bundle, "folder that mra-export export wrote")->required();
  app.add_option("--backend", options.backend, "onnxruntime or tensorrt")->capture_default_str();
  app.add_option("--device", options.device, "cpu or cuda");
  app.add_option("--intra-op-threads", options.intra_op_threads, "threads of one ONNX Runtime call; 0: its default")
      ->capture_default_str();
  app.add_option("--batch", batch, "rows of a call")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--length", length, "tokens of a row; 0: the model's longest")->capture_default_str();
  app.add_option("--choices", choices, "choices of a row, for multiple choice");
  app.add_option("--threads", threads, "threads that call at once")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--calls", calls, "timed calls of each thread")->check(CLI::PositiveNumber)->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  try {
    const auto opened = Clock::now();
    const mra::Session session(bundle, options);
    const double load = Seconds(Clock::now() - opened);
    session.Validate();
    if (length == 0) length = session.max_length();
    const std::vector<int64_t> shape =
        choices > 0 ? std::vector<int64_t>{batch, choices, length} : std::vector<int64_t>{batch, length};
    const mra::Ints ids = RandomTokens(session.vocab_size(), shape);
    for (int warm = 0; warm < 2; ++warm) session.Run(ids);

    std::vector<std::vector<double>> times(static_cast<size_t>(threads));
    std::vector<std::thread> callers;
    const auto start = Clock::now();
    for (std::vector<double>& own : times) {
      callers.emplace_back([&] {
        for (int call = 0; call < calls; ++call) {
          const auto before = Clock::now();
          session.Run(ids);
          own.push_back(Seconds(Clock::now() - before));
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    const double total = Seconds(Clock::now() - start);

    std::vector<double> all;
    for (const std::vector<double>& own : times) all.insert(all.end(), own.begin(), own.end());
    std::sort(all.begin(), all.end());
    const auto at = [&](double share) { return all[static_cast<size_t>(share * static_cast<double>(all.size() - 1))] * 1e3; };
    std::printf("%s on %s, batch %lld, length %lld, %d threads, %zu calls\n", session.backend().c_str(), session.device().c_str(),
                static_cast<long long>(batch), static_cast<long long>(length), threads, all.size());
    std::printf("load %.2f s; a call: min %.2f ms, median %.2f ms, p99 %.2f ms; %.1f rows/s\n", load, at(0), at(0.5), at(0.99),
                static_cast<double>(batch) * static_cast<double>(all.size()) / total);
  } catch (const mra::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
