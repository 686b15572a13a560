// AMX tiles in plain C++, as Intel's manual defines them for bfloat16, so that the tile kernel is tested on any machine. A tile
// that is used before the configuration is loaded, or after it was released, ends the program.
#ifndef AMX_EMULATION_H_
#define AMX_EMULATION_H_

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace amx_emulation {

struct State {
  bool configured = false;
  int rows[8];
  int row_bytes[8];
  alignas(64) uint8_t tiles[8][16][64];
};

inline State& ThisThread() {
  static thread_local State state;
  return state;
}

inline State& Configured(const char* what) {
  State& state = ThisThread();
  if (!state.configured) {
    fprintf(stderr, "AMX: %s without a tile configuration\n", what);
    abort();
  }
  return state;
}

inline void LoadConfig(const void* memory) {
  const uint8_t* bytes = static_cast<const uint8_t*>(memory);
  State& state = ThisThread();
  if (bytes[0] != 1 || bytes[1] != 0) abort();
  for (int t = 0; t < 8; ++t) {
    uint16_t row_bytes;
    memcpy(&row_bytes, bytes + 16 + 2 * t, 2);
    state.row_bytes[t] = row_bytes;
    state.rows[t] = bytes[48 + t];
    if (state.rows[t] > 16 || state.row_bytes[t] > 64) abort();
  }
  memset(state.tiles, 0, sizeof state.tiles);
  state.configured = true;
}

inline void Release() { ThisThread().configured = false; }

inline void Zero(int t) { memset(Configured("tilezero").tiles[t], 0, sizeof State::tiles[0]); }

inline void Load(int t, const void* base, int64_t stride) {
  State& state = Configured("tileloadd");
  memset(state.tiles[t], 0, sizeof state.tiles[t]);
  for (int r = 0; r < state.rows[t]; ++r) {
    memcpy(state.tiles[t][r], static_cast<const uint8_t*>(base) + r * stride, static_cast<size_t>(state.row_bytes[t]));
  }
}

inline void Store(int t, void* base, int64_t stride) {
  State& state = Configured("tilestored");
  for (int r = 0; r < state.rows[t]; ++r) {
    memcpy(static_cast<uint8_t*>(base) + r * stride, state.tiles[t][r], static_cast<size_t>(state.row_bytes[t]));
  }
}

// As the hardware has it, a subnormal number counts as 0.
inline float Widen(const uint8_t* bytes) {
  uint16_t half;
  memcpy(&half, bytes, 2);
  if ((half & 0x7f80) == 0) half &= 0x8000;
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// c (m x n float) += a (m x 2k bfloat16) times b (k rows of n pairs).
inline void Multiply(int c, int a, int b) {
  State& state = Configured("tdpbf16ps");
  if (state.row_bytes[a] / 4 != state.rows[b] || state.rows[a] != state.rows[c] || state.row_bytes[b] != state.row_bytes[c])
    abort();
  for (int m = 0; m < state.rows[c]; ++m) {
    for (int k = 0; k < state.rows[b]; ++k) {
      for (int n = 0; n < state.row_bytes[c] / 4; ++n) {
        float sum;
        memcpy(&sum, state.tiles[c][m] + 4 * n, 4);
        sum += Widen(state.tiles[a][m] + 4 * k) * Widen(state.tiles[b][k] + 4 * n);
        sum += Widen(state.tiles[a][m] + 4 * k + 2) * Widen(state.tiles[b][k] + 4 * n + 2);
        memcpy(state.tiles[c][m] + 4 * n, &sum, 4);
      }
    }
  }
}

}  // namespace amx_emulation

#define _tile_loadconfig(config) amx_emulation::LoadConfig(config)
#define _tile_release() amx_emulation::Release()
#define _tile_zero(t) amx_emulation::Zero(t)
#define _tile_loadd(t, base, stride) amx_emulation::Load(t, base, stride)
#define _tile_stored(t, base, stride) amx_emulation::Store(t, base, stride)
#define _tile_dpbf16ps(c, a, b) amx_emulation::Multiply(c, a, b)

#endif  // AMX_EMULATION_H_
