// What cuda_emulation_ptx.h declares.
#include "cuda_emulation_ptx.h"

namespace mra_emulation {
namespace {

void CheckAddress(const char* instruction, const void* shared, const char* file, int line) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(shared), start = reinterpret_cast<uintptr_t>(current->shared_memory);
  const std::string where = std::string(instruction) + " of shared memory at byte " + std::to_string(int64_t(address - start));
  if (address % 16 != 0) Refuse(where + ": not a multiple of 16", file, line);
  if (address < start || address + 16 > start + SharedBytes()) {
    Refuse(where + ": outside its " + std::to_string(SharedBytes()) + " bytes", file, line);
  }
}

struct MatrixOperands {
  uint32_t* r;
  const void* row;
  bool transposed;
};

void LoadMatrices(void* const* lanes) {
  const auto of = [&](int lane) { return static_cast<const MatrixOperands*>(lanes[lane]); };
  const auto element = [&](int matrix, int row, int column) {
    uint16_t bits;
    memcpy(&bits, static_cast<const unsigned char*>(of(8 * matrix + row)->row) + 2 * column, 2);
    return uint32_t{bits};
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
      const uint32_t low = of(lane)->transposed ? element(matrix, 2 * t, g) : element(matrix, g, 2 * t);
      const uint32_t high = of(lane)->transposed ? element(matrix, 2 * t + 1, g) : element(matrix, g, 2 * t + 1);
      of(lane)->r[matrix] = low | high << 16;
    }
  }
}

struct TileOperands {
  TileType type;
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// Toward zero.
float Truncate(double x) {
  const float nearest = static_cast<float>(x);
  if (!(fabs(static_cast<double>(nearest)) > fabs(x)) || nearest == INFINITY || nearest == -INFINITY) return nearest;
  return nextafterf(nearest, 0.0f);
}

float Element(TileType type, uint32_t word, int half) {
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * half);
  if (type == TileType::kTf32) return __uint_as_float(word & 0xffffe000u);
  return type == TileType::kHalf ? __half2float(__half{bits}) : __bfloat162float(__nv_bfloat16{bits});
}

void MultiplyTiles(void* const* lanes) {
  const auto of = [&](int lane) { return static_cast<const TileOperands*>(lanes[lane]); };
  const TileType type = of(0)->type;
  const int depth = type == TileType::kTf32 ? 8 : 16, per_word = type == TileType::kTf32 ? 1 : 2;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < per_word; ++half) {
      for (int n = 0; n < 4; ++n) a[g + n % 2 * 8][per_word * t + half + n / 2 * (depth / 2)] = Element(type, of(lane)->a[n], half);
      for (int n = 0; n < 2; ++n) b[per_word * t + half + n * (depth / 2)][g] = Element(type, of(lane)->b[n], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int n = 0; n < 4; ++n) {
      const int row = g + n / 2 * 8, column = 2 * t + n % 2;
      float sum[16];
      for (int k = 0; k < depth; ++k) sum[k] = a[row][k] * b[k][column];  // exact: 11 bits times 11 bits
      for (int width = depth / 2; width > 0; width /= 2) {
        for (int k = 0; k < width; ++k) sum[k] += sum[k + width];
      }
      float* c = &of(lane)->c[n];
      *c = Truncate(static_cast<double>(*c) + sum[0]);
    }
  }
}

void ReadSource(AsyncCopy* copy) {
  // In order, as memcpy need not: a fault is then reported at the first byte that is out of bounds.
  const volatile unsigned char* from = static_cast<const unsigned char*>(copy->from);
  for (int n = 0; n < 16 && !copy->is_read; ++n) copy->bytes[n] = from[n];
  copy->is_read = true;
}

}  // namespace

void LoadMatrix(uint32_t* r, const void* row, bool transposed, const char* file, int line) {
  CheckAddress("ldmatrix", row, file, line);
  MatrixOperands operands = {r, row, transposed};
  MeetWarp(WarpFunction::kLoadMatrix, &operands, LoadMatrices, file, line);
}

void Multiply(TileType type, float* c, const uint32_t* a, uint32_t b0, uint32_t b1, const char* file, int line) {
  TileOperands operands = {type, c, a, {b0, b1}};
  MeetWarp(WarpFunction::kMultiply, &operands, MultiplyTiles, file, line);
}

void StartCopy(void* shared, const void* global, bool valid, const char* file, int line) {
  CheckAddress("cp.async", shared, file, line);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
    Refuse("cp.async from a global address that is not a multiple of 16", file, line);
  AsyncCopy copy = {static_cast<unsigned char*>(shared), global, current->copy_groups, !valid, {}};
  if (NextRandom() % 4 == 0) ReadSource(&copy);
  memset(shared, 0xff, 16);
  current->copies.push_back(copy);
}

void CommitCopies() { ++current->copy_groups; }

void AwaitCopies(int pending_groups) {
  std::vector<AsyncCopy> kept;
  for (AsyncCopy& copy : current->copies) {
    if (copy.group >= current->copy_groups - pending_groups) {
      kept.push_back(copy);
      continue;
    }
    ReadSource(&copy);
    memcpy(copy.to, copy.bytes, 16);
  }
  current->copies.swap(kept);
}

void ReadSomeSources() {
  for (AsyncCopy& copy : current->copies) {
    if (NextRandom() % 4 == 0) ReadSource(&copy);
  }
}

void CheckNoCopies() {
  if (current->copies.empty()) return;
  Refuse("returned with " + std::to_string(current->copies.size()) + " cp.async that it has not waited for", nullptr, 0);
}

}  // namespace mra_emulation
