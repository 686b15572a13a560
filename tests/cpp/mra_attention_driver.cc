// Serves the CPU functions of the C API over stdin and stdout, so that tests can call a build that their own process cannot load:
// another architecture's, under an emulator. tests/plugins/driven_library.py is the other end.
//
// Every call runs in memory of exactly the documented size: it ends where it must not be touched, and has sentinels before it.
// Requests and answers are (id, size, payload) with uint64 id and size, in this machine's byte order; several requests may be under
// way at once, and their answers come in any order.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "mra_attention.h"
#include "mra_threads.h"

namespace {

constexpr int kServers = 8;  // calls that may be under way at once
constexpr unsigned char kSentinel = 0xA5;
constexpr size_t kWorkspaceAlignment = 64;

enum Function : uint8_t { kTarget, kContractVersion, kStatusString, kWorkspaceSize, kAttention, kSelection };
enum Argument : uint8_t { kAddress, kInput, kOutput, kWorkspace };
enum Threads : uint8_t { kNone, kStd, kOpenMP, kShuffled, kNoLoop };

[[noreturn]] void Die(const char* why) {
  std::fprintf(stderr, "mra_attention_driver: %s\n", why);
  std::_Exit(3);
}

size_t PageSize() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// `size` bytes whose end is as close to an inaccessible page as their alignment allows. Sentinels fill the rest.
class Guarded {
 public:
  Guarded(size_t size, size_t alignment) : size_(size) {
    const size_t page = PageSize();
    const size_t room = (size + alignment - 1) / alignment * alignment;
    mapped_ = (room + page - 1) / page * page + 2 * page;
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) Die("no memory");
    whole_ = static_cast<unsigned char*>(memory);
    if (mprotect(whole_ + mapped_ - page, page, PROT_NONE) != 0) Die("mprotect failed");
    std::memset(whole_, kSentinel, mapped_ - page);
    data_ = whole_ + mapped_ - page - room;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(whole_, mapped_); }

  unsigned char* data() const { return data_; }
  size_t size() const { return size_; }

  bool SentinelsStay() const {
    const auto is_sentinel = [](unsigned char byte) { return byte == kSentinel; };
    return std::all_of(whole_, data_, is_sentinel) && std::all_of(data_ + size_, whole_ + mapped_ - PageSize(), is_sentinel);
  }

 private:
  size_t size_;
  size_t mapped_;
  unsigned char* whole_;
  unsigned char* data_;
};

class Reader {
 public:
  explicit Reader(const std::vector<char>& payload) : next_(payload.data()), end_(next_ + payload.size()) {}

  const char* Bytes(size_t size) {
    if (size > static_cast<size_t>(end_ - next_)) Die("a request is cut short");
    const char* bytes = next_;
    next_ += size;
    return bytes;
  }
  template <class T>
  T Take() {
    T value;
    std::memcpy(&value, Bytes(sizeof value), sizeof value);
    return value;
  }

 private:
  const char* next_;
  const char* end_;
};

template <class T>
void Append(std::string* answer, T value) {
  answer->append(reinterpret_cast<const char*>(&value), sizeof value);
}

// One pointer of a call: an address that the function must not follow, or memory.
class Pointer {
 public:
  explicit Pointer(Reader* request) : kind_(request->Take<Argument>()) {
    const uint64_t number = request->Take<uint64_t>();  // the address, or the size in bytes
    if (kind_ == kAddress) {
      address_ = reinterpret_cast<void*>(static_cast<uintptr_t>(number));
      return;
    }
    const size_t alignment = kind_ == kWorkspace ? kWorkspaceAlignment : request->Take<uint8_t>();
    memory_.reset(new Guarded(number, alignment));
    if (kind_ == kInput) {
      content_ = request->Bytes(number);
      std::memcpy(memory_->data(), content_, number);
    } else {
      std::memset(memory_->data(), request->Take<uint8_t>(), number);
    }
    address_ = memory_->data();
  }

  void* address() const { return address_; }
  const Guarded* output() const { return kind_ == kOutput ? memory_.get() : nullptr; }

  // What the call did that it must not have done, or nullptr.
  const char* Wrong() const {
    if (memory_ == nullptr) return nullptr;
    if (!memory_->SentinelsStay()) return "was written outside its bounds";
    if (content_ && std::memcmp(content_, memory_->data(), memory_->size()) != 0) return "is an input and was written";
    return nullptr;
  }

 private:
  Argument kind_;
  void* address_ = nullptr;
  const char* content_ = nullptr;  // of an input, before the call
  std::unique_ptr<Guarded> memory_;
};

// One thread that takes the tasks in a random order.
void ShuffledFor(void*, int64_t count, void (*task)(void* arg, int64_t index), void* arg) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937_64(static_cast<uint64_t>(count)));
  for (const int64_t index : order) task(arg, index);
}

void* GompParallel() {
  static void* const found = [] {
    void* runtime = dlopen("libgomp.so.1", RTLD_NOW);
    void* symbol = runtime ? dlsym(runtime, "GOMP_parallel") : nullptr;
    if (symbol == nullptr) Die("libgomp.so.1 has no GOMP_parallel here");
    return symbol;
  }();
  return found;
}

// An MraThreads and the pool that it points to.
class Pool {
 public:
  explicit Pool(Reader* request) : kind_(request->Take<Threads>()), count_(request->Take<int32_t>()) {
    threads_.num_threads = count_;
    if (kind_ == kStd) {
      threads_.pool = &count_;
      threads_.parallel_for = mra_parallel_for_std;
    } else if (kind_ == kOpenMP) {
      openmp_.num_threads = static_cast<unsigned>(count_);
      *reinterpret_cast<void**>(&openmp_.gomp_parallel) = GompParallel();
      threads_.pool = &openmp_;
      threads_.parallel_for = mra_parallel_for_openmp;
    } else if (kind_ == kShuffled) {
      threads_.parallel_for = ShuffledFor;
    }
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  const MraThreads* threads() const { return kind_ == kNone ? nullptr : &threads_; }

 private:
  Threads kind_;
  int32_t count_;
  MraOpenMPPool openmp_ = {};
  MraThreads threads_ = {};
};

const MraAttentionParams* TakeParams(Reader* request, MraAttentionParams* params) {
  if (!request->Take<uint8_t>()) return nullptr;
  *params = request->Take<MraAttentionParams>();
  return params;
}

// attention and selection: both take params, six pointers, the workspace's size and threads. Answers with what went wrong (a length
// and a text), the status, and the outputs.
std::string Call(Function function, Reader* request) {
  static const char* const names[2][6] = {{"query", "key", "value", "mask", "context", "workspace"},
                                          {"query", "key", "mask", "blocks", "score", "workspace"}};
  MraAttentionParams storage;
  const MraAttentionParams* params = TakeParams(request, &storage);
  std::vector<std::unique_ptr<Pointer>> pointers;
  void* p[6];
  for (void*& address : p) {
    pointers.push_back(std::make_unique<Pointer>(request));
    address = pointers.back()->address();
  }
  const size_t bytes = request->Take<uint64_t>();
  const Pool pool(request);
  const MraStatus status =
      function == kAttention
          ? mra_attention_cpu(params, p[0], p[1], p[2], static_cast<const int32_t*>(p[3]), p[4], p[5], bytes, pool.threads())
          : mra_attention_cpu_selection(params, p[0], p[1], static_cast<const int32_t*>(p[2]), static_cast<uint8_t*>(p[3]),
                                        static_cast<float*>(p[4]), p[5], bytes, pool.threads());
  std::string wrong;
  std::string outputs;
  for (size_t n = 0; n < pointers.size(); ++n) {
    if (const char* why = pointers[n]->Wrong()) {
      wrong += std::string(wrong.empty() ? "" : "; ") + names[function == kAttention ? 0 : 1][n] + " " + why;
    }
    if (const Guarded* output = pointers[n]->output()) {
      outputs.append(reinterpret_cast<const char*>(output->data()), output->size());
    }
  }
  std::string answer;
  Append<uint64_t>(&answer, wrong.size());
  answer += wrong;
  Append<int32_t>(&answer, status);
  return answer + outputs;
}

std::string Answer(Reader* request) {
  std::string answer;
  const auto function = request->Take<Function>();
  switch (function) {
    case kTarget: {
      const char* name = mra_attention_cpu_target();
      return name ? name : "";
    }
    case kContractVersion:
      Append<int32_t>(&answer, mra_attention_contract_version());
      return answer;
    case kStatusString:
      return mra_status_string(static_cast<MraStatus>(request->Take<int32_t>()));
    case kWorkspaceSize: {
      MraAttentionParams storage;
      const MraAttentionParams* params = TakeParams(request, &storage);
      const int32_t num_threads = request->Take<int32_t>();
      const bool wanted = request->Take<uint8_t>() != 0;
      size_t bytes = request->Take<uint64_t>();
      Append<int32_t>(&answer, mra_attention_cpu_workspace_size(params, num_threads, wanted ? &bytes : nullptr));
      Append<uint64_t>(&answer, bytes);
      return answer;
    }
    case kAttention:
    case kSelection:
      return Call(function, request);
  }
  Die("a request asks for an unknown function");
}

void Serve(std::mutex* input, std::mutex* output) {
  for (;;) {
    uint64_t head[2];  // id, size
    std::vector<char> payload;
    {
      const std::lock_guard<std::mutex> lock(*input);
      if (std::fread(head, sizeof head, 1, stdin) != 1) return;
      payload.resize(head[1]);
      if (std::fread(payload.data(), 1, payload.size(), stdin) != payload.size()) Die("a request is cut short");
    }
    Reader request(payload);
    const std::string answer = Answer(&request);
    head[1] = answer.size();
    const std::lock_guard<std::mutex> lock(*output);
    if (std::fwrite(head, sizeof head, 1, stdout) != 1 || std::fwrite(answer.data(), 1, answer.size(), stdout) != answer.size() ||
        std::fflush(stdout) != 0) {
      Die("an answer cannot be written");
    }
  }
}

}  // namespace

int main() {
  std::mutex input, output;
  std::vector<std::thread> servers;
  for (int n = 0; n < kServers; ++n) servers.emplace_back(Serve, &input, &output);
  for (std::thread& server : servers) server.join();
  return 0;
}
