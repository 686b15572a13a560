#include "mra_attention_amx.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(MRA_AMX_EMULATED)
#include <cpuid.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mra {

bool HasTiles() {
#if defined(MRA_AMX_EMULATED)
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kOsXsave = 1u << 27;                    // leaf 1, ecx
  constexpr unsigned kTilesAndBFloat = 1u << 24 | 1u << 22;  // leaf 7, edx
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kOsXsave) == 0) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTilesAndBFloat) != kTilesAndBFloat) return false;
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t kTileState = 3u << 17;  // the operating system keeps tiles over a task switch
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM, Linux 5.16
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace mra
