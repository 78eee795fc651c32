// What attention's forward and backward on Hopper share: how they walk tiles, and what they do with them.
#pragma once

#include <string>

#include "attention.h"
#include "hopper.h"
#include "mma.h"

namespace fastgpt {

// Of each thread of a block of three warpgroups, until they share them out anew (benchmarks/cuda_report.py).
constexpr int kLaunchedRegisters = 168;

inline std::string describe(const AttentionParams& p) {
  return "batch " + std::to_string(p.batch) + ", " + std::to_string(p.seqlen_q) + " queries, " +
         std::to_string(p.seqlen_k) + " keys, heads " + std::to_string(p.nheads) + " of " +
         std::to_string(p.nheads_k) + ", headdim " + std::to_string(p.headdim) +
         (p.dtype == DType::bf16 ? ", bf16" : ", fp16");
}

// Packed sequences in blocks of `size` rows: sequence b's begin at first_block, so that each has room for all
// that it can have; edges are its cu_seqlens. The blocks of all are no more than total / size + batch.
__device__ __forceinline__ int first_block(const int32_t* edges, int size, int b) {
  return edges[b] / size + b;
}
// The sequence that a block is of, in b, and which of its blocks it is.
__device__ __forceinline__ int of_sequence(const int32_t* edges, int64_t batch, int size, int block, int& b) {
  int low = 0, high = static_cast<int>(batch);
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (first_block(edges, size, middle) <= block)
      low = middle;
    else
      high = middle;
  }
  b = low;
  return block - first_block(edges, size, low);
}

constexpr int kStages = 2;  // buffers that the copies are ahead by

__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef FASTGPT_EMULATE
  return __builtin_exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// A warpgroup's accumulators (64, N) rounded to T: the layout of accumulators is that of factors in
// registers.
template <class T, int N>
__device__ __forceinline__ void round_factors(uint32_t (&factors)[N / 16][4], const float (&d)[N / 2]) {
#pragma unroll
  for (int c = 0; c < N / 16; c++)
#pragma unroll
    for (int i = 0; i < 4; i++) factors[c][i] = pack_pair<T>(d[8 * c + 2 * i], d[8 * c + 2 * i + 1]);
}

// These factors to tiles of 64 columns, by a warp whose 16 rows begin at `row`.
template <class T, int N, int kRows>
__device__ __forceinline__ void write_tiles(T (&tiles)[N / kTileColumns][kRows][kTileColumns], int row,
                                            int lane, const uint32_t (&factors)[N / 16][4]) {
  int own = row + lane % 16, half = lane / 16;
#pragma unroll
  for (int c = 0; c < N / 16; c++)
    store_matrices(reinterpret_cast<unsigned char*>(tiles[c / 4]) + tile_offset(own, c % 4 * 2 + half),
                   factors[c]);
}

// By a warp: zeros in the rows from `first` on.
template <class T, int kTiles, int kRows>
__device__ __forceinline__ void clear_rows(T (&tiles)[kTiles][kRows][kTileColumns], int first, int lane) {
#pragma unroll 1
  for (int t = 0; t < kTiles; t++)
    for (int at = first * 8 + lane; at < kRows * 8; at += 32)
      store_chunk(reinterpret_cast<uint4*>(tiles[t]) + at, uint4{0, 0, 0, 0});
}

// A warpgroup's accumulators become 64 rows of a tensor, by way of its rows of `tiles`, which nobody else
// reads or writes any more. Where fewer than 64 are to be written, its threads write them; else the copy
// engine does, and has read the tiles when this returns, for the warpgroup's first thread.
template <class T, int D, int kRows>
__device__ __forceinline__ void store_rows(T (&tiles)[D / kTileColumns][kRows][kTileColumns],
                                           const float (&d)[D / 2], int group, int warp, int lane,
                                           int own_barrier, const TensorMap* map, const Tensor& to,
                                           int64_t first_row, int rows, int head, int sequence) {
  uint32_t factors[D / 16][4];
  round_factors<T, D>(factors, d);
  if (rows < 64) {
    int row = 16 * warp + lane / 4;
    T* first = static_cast<T*>(to.data) + sequence * to.batch_stride + head * to.head_stride + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (row + 8 * r >= rows) continue;
      T* at = first + (first_row + row + 8 * r) * to.seq_stride;
#pragma unroll
      for (int i = 0; i < D / 8; i++)
        *reinterpret_cast<uint32_t*>(at + 8 * i) = factors[i / 2][i % 2 * 2 + r];
    }
    return;
  }
  write_tiles<T, D>(tiles, 64 * group + 16 * warp, lane, factors);
  fence_proxy_async();
  named_barrier_sync(own_barrier, 128);
  if (warp == 0 && lane == 0) {
    for (int t = 0; t < D / kTileColumns; t++)
      tma_store(map, tiles[t][64 * group], t * kTileColumns, static_cast<int>(first_row), head, sequence);
    tma_commit();
    tma_wait_read();
  }
}

}  // namespace fastgpt
