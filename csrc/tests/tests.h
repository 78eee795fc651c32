// The tests of each op, which main.cpp runs.
#pragma once

#include "check.h"

namespace fastgpt {
namespace test {

constexpr Storage kDTypes[] = {Storage::f32, Storage::bf16, Storage::f16};

void begin_case(const char* op, const char* name, Storage type);

void test_primitives();
void test_attention();
void test_decode();
void test_merge();
void test_norm();
void test_linear();

}  // namespace test
}  // namespace fastgpt
