// Attention on GPUs: what the binding hands to attention_forward.cu.
#pragma once

#include "fastgpt/params.h"
#include "queue.h"

namespace fastgpt {

// 16-bit numbers, headdim = headdim_v = 64, 128 or 256, addresses and strides multiples of 16 bytes. Of
// AttentionParams' options, those of which rows of k and v are keys, windows and no other.
void attention_forward(const AttentionParams& p, int multiprocessors, const Queue& queue);

}  // namespace fastgpt
