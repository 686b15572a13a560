// mra_session_threads BUNDLE THREADS CALLS: what a server does with one session, for the sanitizers. Threads run golden batches and
// ragged ones, break the rules in between, and open and close sessions of their own, all at once. Prints how many calls were right.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "mra_session.hpp"

namespace {

std::atomic<int> answered{0}, refused{0}, wrong{0};

mra::Ints Tokens(int64_t batch, int64_t length, int64_t seed) {
  mra::Ints ids = {std::vector<int64_t>(static_cast<size_t>(batch * length)), {batch, length}};
  for (size_t place = 0; place < ids.values.size(); ++place) ids.values[place] = (static_cast<int64_t>(place) * 7 + seed) % 261;
  return ids;
}

void Expect(bool right) { right ? ++answered : ++wrong; }

void Refused(const mra::Session& session, const mra::Ints& ids, const mra::Ints& mask, const char* words) {
  try {
    session.Run(ids, mask);
    ++wrong;
  } catch (const mra::Error& error) {
    const bool right = error.kind() == MRA_CONTRACT_ERROR && std::string(error.what()).find(words) != std::string::npos;
    right ? ++refused : ++wrong;
  }
}

void Call(const mra::Session& session, const std::vector<std::vector<float>>& alone, int seed) {
  const int64_t length = 1 + seed * 37 % 90;
  const mra::Ints ids = Tokens(1 + seed % 2, length, seed);
  const std::vector<float> values = session.Run(ids)["logits"].Float32();
  const std::vector<float>& wanted = alone[static_cast<size_t>(seed)];
  bool same = values.size() == wanted.size();
  for (size_t place = 0; same && place < values.size(); ++place) same = std::abs(values[place] - wanted[place]) < 1e-4f;
  Expect(same);
  Refused(session, ids, Tokens(1, 200, 0), "pass a mask of the same shape");
  Refused(session, {{-1}, {1, 1}}, {}, "holds -1");
  Refused(session, {{}, {1, 0}}, {}, "must be 1 or more");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const std::string bundle = argv[1];
  const int threads = std::atoi(argv[2]), calls = std::atoi(argv[3]);
  mra::Options options;
  options.intra_op_threads = 1;
  try {
    const mra::Session session(bundle, options);
    std::vector<std::vector<float>> alone;
    for (int seed = 0; seed < calls; ++seed) {
      alone.push_back(session.Run(Tokens(1 + seed % 2, 1 + seed * 37 % 90, seed))["logits"].Float32());
    }
    std::vector<std::thread> callers;
    for (int thread = 0; thread < threads; ++thread) {
      callers.emplace_back([&, thread] {
        try {
          for (int call = 0; call < calls; ++call) Call(session, alone, (call + thread) % calls);
          if (thread % 4 == 0) {
            const mra::Outputs kept = mra::Session(bundle, options).Run(Tokens(1, 5, 0));
            Expect(kept.at(0).Float32().size() == 5 * 261);  // its session is closed
          } else if (thread % 4 == 1) {
            session.Validate();
            Expect(true);
          } else if (thread % 4 == 2) {
            try {
              mra::Session(bundle + "/nothing", options);
              ++wrong;
            } catch (const mra::Error& error) {
              Expect(error.kind() == MRA_BUNDLE_ERROR);
            }
          }
        } catch (const std::exception& error) {
          std::fprintf(stderr, "%s\n", error.what());
          ++wrong;
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
  } catch (const mra::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::printf("%d answered, %d refused, %d wrong\n", answered.load(), refused.load(), wrong.load());
  return wrong.load() == 0 ? 0 : 1;
}
