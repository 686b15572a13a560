// The scheduler behind cuda_emulation.h, and what tests call to steer it (the C functions at the end).
#include "cuda_emulation.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda_emulation_ptx.h"

namespace mra_emulation {

Thread* current = nullptr;

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kResident = 4;                // CTAs that run at the same time, if the order is drawn from a seed
constexpr size_t kSharedLimit = 99 * 1024;  // what compute capability 8.6, 8.9 and 12.0 allow a CTA
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuardBytes = 1 << 20;
constexpr int kFaultExit = 97;

// ---------------------------------------------------------------------------------------------------------------------------------
// Switching between stacks.

typedef void* Context;  // the stack pointer, below the saved registers

extern "C" void mra_emulation_switch(Context* save, Context load);
#if defined(__x86_64__)
asm(R"(
.text
.globl mra_emulation_switch
.hidden mra_emulation_switch
.type mra_emulation_switch, @function
mra_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int kReturnWord = 6, kFrameWords = 8;  // the 8th word keeps the stack aligned at the function's entry
#elif defined(__aarch64__)
asm(R"(
.text
.globl mra_emulation_switch
.hidden mra_emulation_switch
.type mra_emulation_switch, %function
mra_emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr int kReturnWord = 11, kFrameWords = 20;
#else
#error "the emulation switches stacks on x86-64 and aarch64 only"
#endif

void SwitchContext(Context* save, Context* load) { mra_emulation_switch(save, *load); }

void PrepareContext(Context* context, unsigned char* stack, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(stack + kStackBytes) - kFrameWords;
  memset(frame, 0, kFrameWords * sizeof(void*));
  frame[kReturnWord] = reinterpret_cast<void*>(entry);
  *context = frame;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Scheduling.

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber : Thread {
  Context context;
  State state;
  const char* file;
  int line;
  struct Slot* slot;
  WarpFunction function;
  uint32_t mask, value, result;
  int source;
  void* operands;  // MeetWarp's
};

// A buffer between inaccessible pages. Reads and writes outside it fault.
struct Guarded {
  unsigned char* mapping;
  size_t mapping_bytes;
  unsigned char* data;
  size_t bytes;
  std::string name;
};

// What one CTA runs in.
struct Slot {
  Fiber fibers[kMaxThreads];
  unsigned char* stacks = nullptr;
  Guarded shared;             // kSharedLimit bytes; a CTA's share ends where it ends, up to the 16 bytes its start is aligned to
  uint32_t ready[kMaxWarps];  // bit n of a warp: its lane n can run
  int warp_order[kMaxWarps];  // which warp runs first
  bool strict_order = true;   // a warp runs as long as it can before the next one does; else any warp may
  int at_barrier = 0;
  int running = 0;  // threads that have not returned
  int64_t block = -1;
};

struct Launched {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

struct Machine {
  std::mutex mutex;  // one launch at a time
  uint64_t seed = 0;
  uint64_t random = 1;
  Slot slots[kResident];
  int resident = 0;            // slots in use
  int turn = 0;                // the slot that runs
  uint64_t switch_period = 1;  // about how many picks a slot keeps its turn for
  bool hold = false;           // it keeps it until it can run no more
  int threads = 0;
  int warps = 0;
  size_t shared_bytes = 0;
  std::vector<int64_t> pending;  // CTAs still to be started, last one first
  Context main;
  void (*entry)(const void*) = nullptr;
  const void* argument = nullptr;
  std::string error;
  std::vector<Launched> log;
  int fail_after = -1;  // launches that still succeed before one is refused
};
Machine machine;

Fiber* Self() { return static_cast<Fiber*>(current); }

void Wake(Fiber* fiber) {
  fiber->state = State::kReady;
  fiber->slot->ready[fiber->index.x / 32] |= 1u << (fiber->index.x % 32);
}

// A ready fiber of this CTA, no longer marked so; null if all wait or are done.
Fiber* TakeReady(Slot* slot) {
  const int start = slot->strict_order ? 0 : static_cast<int>(NextRandom() % static_cast<unsigned>(machine.warps));
  for (int n = 0; n < machine.warps; ++n) {
    const int warp = slot->warp_order[(start + n) % machine.warps];
    const uint32_t ready = slot->ready[warp];
    if (ready == 0) continue;
    const int turn = machine.seed != 0 ? static_cast<int>(NextRandom() % 32) : 0;
    const uint32_t from_turn = ready >> turn << turn;
    const int lane = __builtin_ctz(from_turn != 0 ? from_turn : ready);
    slot->ready[warp] &= ~(1u << lane);
    return &slot->fibers[32 * warp + lane];
  }
  return nullptr;
}

Fiber* TakeReady() {
  if (machine.resident > 1 && !machine.hold && NextRandom() % machine.switch_period == 0) {
    machine.turn = (machine.turn + 1) % machine.resident;
  }
  for (int n = 0; n < machine.resident; ++n) {
    Fiber* next = TakeReady(&machine.slots[machine.turn]);
    if (next != nullptr) return next;
    machine.turn = (machine.turn + 1) % machine.resident;
    machine.hold = false;
  }
  return nullptr;
}

// Runs the next ready fiber, or the launcher if there is none.
void Leave() {
  Fiber* self = Self();
  Fiber* next = self->slot->running == 0 ? nullptr : TakeReady();  // a CTA that is done is replaced by the launcher
  if (next == self) return;
  if (next == nullptr) {
    SwitchContext(&self->context, &machine.main);
    return;
  }
  current = next;
  SwitchContext(&self->context, &next->context);
}

// "cuda.cu:12"
std::string Place(const char* file, int line) {
  const char* slash = strrchr(file, '/');
  return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}

void FiberMain() {
  machine.entry(machine.argument);
  CheckNoCopies();
  Self()->state = State::kDone;
  --Self()->slot->running;
  Leave();
  abort();  // a finished fiber is never resumed
}

// Who waits where, for a CTA that can make no progress.
std::string DescribeWaiters(const Slot& slot) {
  std::map<std::string, std::vector<int>> groups;
  for (int t = 0; t < machine.threads; ++t) {
    const Fiber& f = slot.fibers[t];
    const std::string place = f.file ? Place(f.file, f.line) : "";
    const std::string what = f.state == State::kDone        ? "have exited"
                             : f.state == State::kAtBarrier ? "wait in __syncthreads at " + place
                                                            : "wait in a warp function at " + place;
    groups[what].push_back(t);
  }
  std::string text = "CTA " + std::to_string(slot.block) + " is stuck:";
  for (const auto& group : groups) {
    text += " " + std::to_string(group.second.size()) + " threads (first " + std::to_string(group.second.front()) + ") " +
            group.first + ";";
  }
  return text;
}

Guarded MapGuarded(const char* name, size_t bytes, bool at_end) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t inner = (bytes + page - 1) / page * page;
  Guarded g;
  g.mapping_bytes = inner + 2 * kGuardBytes;
  void* raw = mmap(nullptr, g.mapping_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) abort();
  g.mapping = static_cast<unsigned char*>(raw);
  if (inner != 0 && mprotect(g.mapping + kGuardBytes, inner, PROT_READ | PROT_WRITE) != 0) abort();
  g.data = g.mapping + kGuardBytes + (at_end ? inner - bytes : 0);
  g.bytes = bytes;
  g.name = name;
  memset(g.data, 0xff, bytes);  // NaN in every float format
  return g;
}

std::vector<Guarded>& Buffers() {
  static std::vector<Guarded> buffers;
  return buffers;
}

// Gives the slot its stacks and its shared memory, once. Each stack has an inaccessible neighbour below.
void Furnish(Slot* slot) {
  if (slot->stacks != nullptr) return;
  void* raw =
      mmap(nullptr, kMaxThreads * 2 * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) abort();
  slot->stacks = static_cast<unsigned char*>(raw);
  for (int t = 0; t < kMaxThreads; ++t) mprotect(slot->stacks + t * 2 * kStackBytes, kStackBytes, PROT_NONE);
  slot->shared = MapGuarded("shared memory", kSharedLimit, true);
}

size_t SharedRounded() { return (machine.shared_bytes + 15) / 16 * 16; }

// Puts the next pending CTA into the slot.
void Start(Slot* slot) {
  slot->block = machine.pending.back();
  machine.pending.pop_back();
  unsigned char* shared = slot->shared.data + kSharedLimit - SharedRounded();
  memset(shared, 0xff, SharedRounded());
  // Half of the CTAs run one warp as far ahead of the others as barriers let it, which shows barriers that are missing.
  slot->strict_order = machine.seed == 0 || NextRandom() % 2 == 0;
  for (int n = 0; n < machine.warps; ++n) slot->warp_order[n] = n;
  for (int n = machine.warps - 1; n > 0 && machine.seed != 0; --n) {
    std::swap(slot->warp_order[n], slot->warp_order[NextRandom() % static_cast<unsigned>(n + 1)]);
  }
  slot->at_barrier = 0;
  slot->running = machine.threads;
  for (int t = 0; t < machine.threads; ++t) {
    Fiber& f = slot->fibers[t];
    f.index = {static_cast<unsigned>(t), 0, 0};
    f.block = {static_cast<unsigned>(slot->block), 0, 0};
    f.shared_memory = shared;
    f.copies.clear();
    f.copy_groups = 0;
    f.slot = slot;
    f.file = nullptr;
    PrepareContext(&f.context, slot->stacks + t * 2 * kStackBytes + kStackBytes, FiberMain);
    Wake(&f);
  }
}

// Whether the CTA that ran in the slot left the bytes after its shared memory alone.
bool CheckShared(const Slot& slot) {
  const unsigned char* end = slot.shared.data + kSharedLimit;
  const unsigned char* limit = end - SharedRounded() + machine.shared_bytes;
  for (const unsigned char* p = limit; p < end; ++p) {
    if (*p == 0xff) continue;
    machine.error = "CTA " + std::to_string(slot.block) + " wrote " + std::to_string(p - limit) + " bytes past its " +
                    std::to_string(machine.shared_bytes) + " bytes of shared memory";
    return false;
  }
  return true;
}

// Runs all pending CTAs; false, with machine.error, if one cannot go on.
bool RunPending() {
  machine.resident = 0;
  machine.turn = 0;
  int busy = 0;
  while (machine.resident < (machine.seed != 0 ? kResident : 1) && !machine.pending.empty()) {
    Furnish(&machine.slots[machine.resident]);
    Start(&machine.slots[machine.resident++]);
    ++busy;
  }
  while (busy > 0) {
    Fiber* next = TakeReady();
    if (next == nullptr) {
      for (int n = 0; n < machine.resident; ++n) {
        if (machine.slots[n].running != 0) machine.error = DescribeWaiters(machine.slots[n]);
      }
      return false;
    }
    current = next;
    SwitchContext(&machine.main, &next->context);  // comes back when a CTA is done, none can go on, or one is refused
    current = nullptr;
    if (!machine.error.empty()) return false;
    for (int n = 0; n < machine.resident; ++n) {
      Slot* slot = &machine.slots[n];
      if (slot->running != 0 || slot->block < 0) continue;
      if (!CheckShared(*slot)) return false;
      slot->block = -1;
      --busy;
      if (!machine.pending.empty()) {
        Start(slot);
        ++busy;
      }
    }
  }
  return true;
}

// Says that this lane waits in a warp function; true if all lanes of the mask wait in the same.
bool ArriveInWarp(WarpFunction function, uint32_t mask, const char* file, int line) {
  ReadSomeSources();
  Fiber* self = Self();
  self->state = State::kInWarp;
  self->file = file;
  self->line = line;
  self->function = function;
  self->mask = mask;
  const Fiber* warp = &self->slot->fibers[self->index.x / 32 * 32];
  bool complete = mask >> Lane() & 1u;  // a lane outside its own mask waits for ever
  for (int n = 0; n < 32 && complete; ++n) {
    if (!(mask >> n & 1u)) continue;
    const Fiber& f = warp[n];
    complete = f.state == State::kInWarp && f.function == function && f.mask == mask && f.line == line &&
               strcmp(f.file, file) == 0 && (function != WarpFunction::kShuffle || mask >> f.source & 1u);
  }
  return complete;
}

}  // namespace

uint64_t NextRandom() {  // xorshift64
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random;
}

size_t SharedBytes() { return machine.shared_bytes; }

void Refuse(const std::string& what, const char* file, int line) {
  machine.error = "thread " + std::to_string(current->index.x) + " of CTA " + std::to_string(current->block.x) + " " + what +
                  (file != nullptr ? " at " + Place(file, line) : "");
  SwitchContext(&Self()->context, &machine.main);
  abort();  // the launch is over
}

int Lane() { return static_cast<int>(current->index.x % 32); }

void AfterAtomic() {
  if (machine.resident < 2 || NextRandom() % 4 != 0) return;
  machine.hold = true;
  machine.turn = static_cast<int>(NextRandom() % static_cast<unsigned>(machine.resident));
  Wake(Self());
  Leave();
}

void SyncThreads(const char* file, int line) {
  ReadSomeSources();
  Fiber* self = Self();
  self->state = State::kAtBarrier;
  self->file = file;
  self->line = line;
  Slot* slot = self->slot;
  if (++slot->at_barrier == machine.threads) {
    bool same = true;
    for (int t = 0; t < machine.threads; ++t) same &= slot->fibers[t].line == line && strcmp(slot->fibers[t].file, file) == 0;
    if (same) {  // else nobody wakes, and the launch reports who waits where
      slot->at_barrier = 0;
      for (int t = 0; t < machine.threads; ++t) Wake(&slot->fibers[t]);
    }
  }
  Leave();
}

uint32_t CallWarp(WarpFunction function, uint32_t mask, uint32_t value, int source, const char* file, int line) {
  Fiber* self = Self();
  self->value = value;
  self->source = source;
  Fiber* warp = &self->slot->fibers[self->index.x / 32 * 32];
  if (ArriveInWarp(function, mask, file, line)) {
    uint32_t ballot = 0, sum = 0, maximum = 0;
    for (int n = 0; n < 32; ++n) {
      if (!(mask >> n & 1u)) continue;
      ballot |= warp[n].value != 0 ? 1u << n : 0u;
      sum += warp[n].value;
      maximum = std::max(maximum, warp[n].value);
    }
    for (int n = 0; n < 32; ++n) {
      if (!(mask >> n & 1u)) continue;
      uint32_t result = ballot;
      if (function == WarpFunction::kShuffle) result = warp[warp[n].source].value;
      if (function == WarpFunction::kAdd) result = sum;
      if (function == WarpFunction::kMaximum) result = maximum;
      if (function == WarpFunction::kMatch) {
        result = 0;
        for (int m = 0; m < 32; ++m) result |= (mask >> m & 1u) && warp[m].value == warp[n].value ? 1u << m : 0u;
      }
      warp[n].result = result;
      Wake(&warp[n]);
    }
  }
  Leave();
  return self->result;
}

void MeetWarp(WarpFunction function, void* operands, void (*compute)(void* const* operands), const char* file, int line) {
  Fiber* self = Self();
  self->operands = operands;
  Fiber* warp = &self->slot->fibers[self->index.x / 32 * 32];
  if (ArriveInWarp(function, 0xffffffffu, file, line)) {
    void* all[32];
    for (int n = 0; n < 32; ++n) all[n] = warp[n].operands;
    compute(all);
    for (int n = 0; n < 32; ++n) Wake(&warp[n]);
  }
  Leave();
}

cudaError_t Launch(void (*entry)(const void*), const void* argument, int64_t blocks, int threads, size_t shared_bytes) {
  std::lock_guard<std::mutex> lock(machine.mutex);
  machine.error.clear();
  machine.log.push_back({blocks, threads, static_cast<int64_t>(shared_bytes)});
  if (machine.fail_after >= 0 && machine.fail_after-- == 0) {
    machine.error = "launch refused: the test asked for it";
    return cudaErrorLaunchFailure;
  }
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > kMaxThreads || threads % 32 != 0 ||
      shared_bytes > kSharedLimit) {
    machine.error = "launch refused: " + std::to_string(blocks) + " CTAs of " + std::to_string(threads) + " threads with " +
                    std::to_string(shared_bytes) + " bytes of shared memory";
    return cudaErrorInvalidValue;
  }
  machine.random = machine.seed * 0x9e3779b97f4a7c15u + 1;
  machine.entry = entry;
  machine.argument = argument;
  const uint64_t periods[] = {16, 256, 4096};
  machine.switch_period = periods[NextRandom() % 3];
  machine.threads = threads;
  machine.warps = threads / 32;
  machine.shared_bytes = shared_bytes;
  machine.pending.clear();
  for (int64_t n = blocks - 1; n >= 0; --n) machine.pending.push_back(n);
  for (int64_t n = blocks - 1; n > 0 && machine.seed != 0; --n)
    std::swap(machine.pending[n], machine.pending[NextRandom() % (n + 1)]);
  if (!RunPending()) return cudaErrorLaunchFailure;
  return cudaSuccess;
}

namespace {

void OnFault(int, siginfo_t* info, void*) {
  const unsigned char* address = static_cast<const unsigned char*>(info->si_addr);
  char text[512];
  int length = snprintf(text, sizeof text, "mra_emulation: access to unmapped memory");
  std::vector<Guarded> candidates = Buffers();
  for (const Slot& slot : machine.slots) {
    if (slot.stacks != nullptr) candidates.push_back(slot.shared);
  }
  for (const Guarded& g : candidates) {
    if (address < g.mapping || address >= g.mapping + g.mapping_bytes) continue;
    const bool below = address < g.data;
    const long long distance = below ? g.data - address : address - (g.data + g.bytes);
    length = snprintf(text, sizeof text, "mra_emulation: access out of bounds: %lld bytes %s %s (%zu bytes)", distance,
                      below ? "before the start of" : "past the end of", g.name.c_str(), g.bytes);
  }
  if (current != nullptr) {
    length += snprintf(text + length, sizeof text - length, ", thread %u of CTA %u, launch %zu", current->index.x, current->block.x,
                       machine.log.size());
  }
  text[length++] = '\n';
  const ssize_t written = write(STDERR_FILENO, text, length);
  _exit(written == length ? kFaultExit : kFaultExit + 1);
}

}  // namespace
}  // namespace mra_emulation

// ---------------------------------------------------------------------------------------------------------------------------------
// For tests.

extern "C" {
using namespace mra_emulation;

// Order of fibers and CTAs from now on; 0: ascending.
void mra_emulation_seed(uint64_t seed) { machine.seed = seed; }

// Why the last launch failed; "" if it did not.
const char* mra_emulation_error() { return machine.error.c_str(); }

// The launches so far, three numbers each: CTAs, threads, bytes of shared memory. Returns how many there were and forgets them.
int mra_emulation_launches(int64_t* numbers, int most) {
  const int count = static_cast<int>(machine.log.size());
  for (int n = 0; n < count && n < most; ++n) {
    numbers[3 * n] = machine.log[n].blocks;
    numbers[3 * n + 1] = machine.log[n].threads;
    numbers[3 * n + 2] = machine.log[n].shared_bytes;
  }
  machine.log.clear();
  return count;
}

// Refuses one launch after `launches` more have succeeded.
void mra_emulation_fail_after(int launches) { machine.fail_after = launches; }

// A buffer of NaN bytes between inaccessible pages, at their end or at their start. Never freed: for short-lived test processes.
void* mra_emulation_allocate(const char* name, size_t bytes, int at_end) {
  Buffers().push_back(MapGuarded(name, bytes, at_end != 0));
  return Buffers().back().data;
}

// From now on an access out of bounds prints what was hit and by whom, and ends the process with status 97.
void mra_emulation_catch_faults() {
  static unsigned char stack[64 * 1024];
  stack_t alternate = {};
  alternate.ss_sp = stack;
  alternate.ss_size = sizeof stack;
  sigaltstack(&alternate, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = OnFault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

uint32_t mra_emulation_half_to_float(uint16_t bits) { return __float_as_uint(__half2float(__half{bits})); }
uint32_t mra_emulation_bfloat_to_float(uint16_t bits) { return __float_as_uint(__bfloat162float(__nv_bfloat16{bits})); }
uint16_t mra_emulation_float_to_half(uint32_t bits) { return __float2half_rn(__uint_as_float(bits)).bits; }
uint16_t mra_emulation_float_to_bfloat(uint32_t bits) { return __float2bfloat16_rn(__uint_as_float(bits)).bits; }
}
