// Keys of ragged lengths, cut evenly: how decode.cu's blocks share a batch with num_splits = 0.
//
// A sequence of n tiles of keys is n + 1 units: the last one stands for what it costs by itself, and gives
// one without keys to somebody. All sequences' units, one after another, are cut into `count` ranges
//
//   [floor(i units / count), floor((i + 1) units / count)),  units = sum over b of (tiles_b + 1)
//
// and a block walks through one of them, from sequence to sequence (Stream-K, Osama et al. 2023,
// arXiv:2301.03598): none has more than the mean, rounded up, however lengths differ. A sequence with its
// tiles in several ranges is cut, into a part in each; of a range, two sequences can be cut, one that it
// opens and one that goes on in it. There are never more than `most` ranges, so what is allocated and
// launched depends on shapes alone.
//
// FlashAttention-3 and FlashMLA compute the like in a launch before; here each block sums the lengths up: a
// read of each 128th, and a barrier, where a launch takes some 2 us (of thousands of sequences it may take as
// long). Held by tests/test_decode_cuda.py.
#pragma once

#include <cstdint>

#include "device.h"

namespace fastgpt {

FASTGPT_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTGPT_HD int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

struct Ranges {
  int64_t units, count;

  // As many as there may be; or, unless that gives a block more than a tile beyond the mean, rounded up, as
  // many fewer as cut equal lengths least: the same number for each sequence, or of sequences in each. batch
  // and most are 1 or more.
  FASTGPT_HD Ranges(int64_t units, int64_t batch, int64_t most) : units(units), count(least(most, units)) {
    int64_t whole = batch <= most ? most / batch * batch : divide_up(batch, divide_up(batch, most));
    int64_t tiles = batch <= most ? units - batch : units;
    if (divide_up(units, whole) <= divide_up(tiles, most) + 1) count = least(whole, units);
  }
  FASTGPT_HD int64_t begin(int64_t range) const { return range * units / count; }
  // The range that has a unit.
  FASTGPT_HD int64_t of(int64_t unit) const { return ((unit + 1) * count - 1) / units; }
};

// A range and one of its sequences.
struct Walk {
  int64_t b;
  int64_t start, size;  // where the range begins, in units from the sequence's first, and how many it has

  FASTGPT_HD int64_t begin() const { return largest(start, 0); }  // of its tiles of the sequence
  FASTGPT_HD int64_t end(int64_t tiles) const { return least(start + size, tiles); }
  // Whether it has more of the sequence than what that costs by itself.
  FASTGPT_HD bool takes_part(int64_t tiles) const { return start < largest(tiles, 1); }
  FASTGPT_HD bool opens() const { return start <= 0; }
  FASTGPT_HD bool cuts(int64_t tiles) const { return start > 0 || start + size < tiles; }
  // The next sequence; false where the range ends before it.
  FASTGPT_HD bool next(int64_t tiles) {
    b++;
    start -= tiles + 1;
    return start + size > 0;
  }
};

}  // namespace fastgpt
