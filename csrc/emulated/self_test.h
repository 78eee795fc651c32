#pragma once

#include <string>

namespace fastgpt {

// Runs the kernel of this name in self_test.cu.
void self_test(const std::string& name, float* out);

}  // namespace fastgpt
