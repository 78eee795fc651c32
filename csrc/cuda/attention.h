// Attention on GPUs: what the binding hands to attention_forward.cu and attention_backward.cu.
#pragma once

#include "fastgpt/params.h"
#include "queue.h"

namespace fastgpt {

// 16-bit numbers, headdim = headdim_v = 64, 128 or 256, addresses and strides multiples of 16 bytes. Of
// AttentionParams' options, those of which rows of k and v are keys, windows and no other.
void attention_forward(const AttentionParams& p, int multiprocessors, const Queue& queue);

// The same, of headdim 64 or 128, and dout, dq, dk and dv. Rows of dk and dv that are no key of a sequence,
// all of them where there are no queries, are left as they are. The workspace has so many bytes, at a
// multiple of 16.
void attention_backward(const AttentionBackwardParams& p, void* workspace, const Queue& queue);
int64_t attention_backward_workspace(const AttentionBackwardParams& p);

}  // namespace fastgpt
