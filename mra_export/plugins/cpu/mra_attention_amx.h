// AMX: whether this process may use matrix tiles, and how a function says that it does.
#ifndef MRA_ATTENTION_AMX_H_
#define MRA_ATTENTION_AMX_H_

#if defined(MRA_AMX_EMULATED)
#include "amx_emulation.h"
#define MRA_USES_TILES __attribute__((noinline))
#elif defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#define MRA_USES_TILES __attribute__((noinline, target("amx-tile,amx-bf16")))
#endif

namespace mra {

// True if the CPU has bfloat16 tiles and Linux lets this process use them, for which it has to be asked once.
bool HasTiles();

}  // namespace mra

#endif  // MRA_ATTENTION_AMX_H_
