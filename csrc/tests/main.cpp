// fastgpt_tests [instruction set] [seed]: the CPU kernels of one set, called as module.cpp calls them,
// without Python. Without arguments: the best set of this processor, a seed of its own.

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../cpu/isa.h"
#include "primitives.h"
#include "tests.h"

namespace fastgpt {

extern const Primitives primitives_baseline;
#if defined(__x86_64__)
extern const Primitives primitives_avx2;
extern const Primitives primitives_avx512;
extern const Primitives primitives_amx;
extern const Primitives primitives_amx_emulated;
#endif

// Each call's own, so that a kernel can neither use what an earlier one left nor more than it asked for.
static std::unique_ptr<test::Guarded> scratch_memory, outer_scratch_memory;
static float* take(std::unique_ptr<test::Guarded>& memory, int64_t floats) {
  memory.reset();
  memory = std::make_unique<test::Guarded>(floats * sizeof(float), 64);
  return reinterpret_cast<float*>(memory->data);
}
float* scratch(int64_t floats) { return take(scratch_memory, floats); }
float* outer_scratch(int64_t floats) { return take(outer_scratch_memory, floats); }

namespace test {
namespace {

constexpr int kSkipped = 77;  // what ctest takes for skipped

const Primitives* primitives_of([[maybe_unused]] const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "amx") return &primitives_amx;
  if (isa == "amx_emulated") return &primitives_amx_emulated;
  if (isa == "avx512") return &primitives_avx512;
  if (isa == "avx2") return &primitives_avx2;
#endif
  return &primitives_baseline;
}

void report_fault(int) {
  // Only what a signal handler may call.
  const char* parts[] = {"FAILED ", context.c_str(),
                         ": reached past the end of a buffer, or wrote an input\n"};
  for (const char* part : parts)
    if (write(STDOUT_FILENO, part, std::strlen(part)) < 0) break;
  _exit(1);
}

}  // namespace

void begin_case(const char* op, const char* name, Storage type) {
  const char* types[] = {"fp32", "bf16", "fp16", "bool", "int8", "e4m3"};
  context = std::string(op) + ", " + name + ", " + types[static_cast<int>(type)];
}

}  // namespace test
}  // namespace fastgpt

int main(int argc, char** argv) {
  using namespace fastgpt;
  using namespace fastgpt::test;
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // a fault ends the program without flushing
  Isa isa;
  try {
    isa = choose_isa(argc > 1 ? argv[1] : nullptr);
  } catch (const std::invalid_argument& error) {
    std::printf("%s\n", error.what());
    return kSkipped;
  }
  uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}();
  std::printf("kernels %s, seed %llu\n", isa.name.c_str(), static_cast<unsigned long long>(seed));
  signal(SIGSEGV, report_fault);
  signal(SIGBUS, report_fault);
  kernels = isa.kernels;
  has_matrix_unit = isa.name.rfind("amx", 0) == 0;
  primitives = primitives_of(isa.name);
  void (*tests[])() = {test_primitives, test_attention, test_decode, test_merge, test_norm, test_linear};
  for (auto test : tests) {
    generator.seed(seed);
    test();
  }
  scratch_memory.reset();
  outer_scratch_memory.reset();
  std::printf(failures ? "%d failures\n" : "passed\n", failures);
  return failures ? 1 : 0;
}
