// Philox4x32-10 (Salmon et al. 2011), the random bits of dropout: a pure function of key and counter.
#pragma once

#include <cstdint>

#include "fastgpt/mask.h"

namespace fastgpt {

// Turns the counter into the four random words. Word is uint32_t or a vector of them;
// Multiply::wide(a, m, high, low) gives both halves of the 64-bit products a * m.
//
// The words of the key are the halves of the seed. Attention's dropout counts
// (j / 4, i, batch * nheads + head, offset) and uses word j % 4 for key j; that of norms counts
// (column / 4, low half of the row, high half, offset) and uses word column % 4.
template <class Multiply, class Word>
FASTGPT_HD void philox(Word (&counter)[4], uint32_t key_low, uint32_t key_high) {
  for (int round = 0; round < 10; round++) {
    Word high0, low0, high2, low2;
    Multiply::wide(counter[0], 0xD2511F53u, high0, low0);
    Multiply::wide(counter[2], 0xCD9E8D57u, high2, low2);
    counter[0] = high2 ^ counter[1] ^ key_low;
    counter[1] = low2;
    counter[2] = high0 ^ counter[3] ^ key_high;
    counter[3] = low0;
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
}

}  // namespace fastgpt
