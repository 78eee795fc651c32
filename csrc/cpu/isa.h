// Which instruction set's kernels run. Included by module.cpp and the tests, not by kernels.cpp.
#pragma once

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>
#include <string>
#include <vector>

#include "fastgpt/params.h"

namespace fastgpt {

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_amx;
#ifdef FASTGPT_EMULATE
extern const Kernels kernels_amx_emulated;
#endif
#endif

struct Isa {
  std::string name;
  const Kernels* kernels;
};

#if defined(__x86_64__)
// Linux gives AMX's registers to a process that asks for them (its documentation, x86/xstate).
inline bool may_use_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// What is built in and runs here, best first.
inline std::vector<Isa> supported_isas(bool with_amx) {
  std::vector<Isa> isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool amx = with_amx && avx512 && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_amx();
  if (amx) isas.push_back({"amx", &kernels_amx});
  if (avx512) isas.push_back({"avx512", &kernels_avx512});
  if (avx2) isas.push_back({"avx2", &kernels_avx2});
#endif
  isas.push_back({"baseline", &kernels_baseline});
#if defined(__x86_64__) && defined(FASTGPT_EMULATE)
  if (avx512) isas.push_back({"amx_emulated", &kernels_amx_emulated});
#endif
  return isas;
}

// The one that is asked for, the value of FASTGPT_CPU_ISA; null or empty: the best.
inline Isa choose_isa(const char* asked) {
  if (!asked || !*asked) return supported_isas(true).front();
  for (const Isa& isa : supported_isas(false))  // a process keeps the permission for AMX that it asks for
    if (isa.name == asked) return isa;
  std::vector<Isa> isas = supported_isas(true);
  std::string names;
  for (const Isa& isa : isas) {
    if (isa.name == asked) return isa;
    names += (names.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("FASTGPT_CPU_ISA: got '" + std::string(asked) +
                              "', this processor and build accept: " + names);
}

}  // namespace fastgpt
