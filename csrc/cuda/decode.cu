// Attention of new queries over a KV cache (Flash-Decoding, Dao et al. 2023), for sm_80 and later.
//
//   s = softcap(softmax_scale q k) - slope |i + sk - sq - j|,  out = softmax(s) v,  lse = log sum exp(s)
//
// q, out (batch, seqlen_q, nheads, dim) in fp32, bf16 or fp16; the caches (batch, capacity, nheads_k, dim),
// or paged, in q's type, int8 or fp8-e4m3; k_new, v_new (batch, seqlen_new, nheads_k, dim) in q's type; any
// strides, the last one 1. headdim and headdim_v up to 256. Products of 16-bit q are those of mma.sync, with
// p rounded to q's type, those of fp32 are fp32's; they accumulate in fp32, and softmax, lse and the parts'
// results are fp32.
//
// A block owns parts of the keys of one head of k, one after another, for 16 rows. A row is one query of one
// head; all heads of a group share their keys, so row r is query r / group of head r % group of the group.
// With num_splits, the keys of each sequence are cut into that many parts of equal size, and a block has one:
// a sequence's result does not depend on the batch. With num_splits = 0, blocks have parts of several
// sequences, and equally many tiles of keys, however lengths differ (balance.h). Lengths are read on the GPU:
// the grid depends on shapes alone. The block's warps take tiles of a part in turn, each with softmax state
// (m, l, acc), pipeline and shared memory of its own, and meet at its end. Where a sequence has several
// parts, a second kernel merges them. Both add up in a fixed order, without atomics: the same bits every
// time.
//
// What bounds this is memory: a warp has kStages tiles of k and of v of which all but a half of one are
// always under way (cp.async, 16 bytes a copy), 48 KiB of a block or more, of which two or three are on
// a multiprocessor. Rows are swizzled, so that neither copies nor ldmatrix have bank conflicts. Caches whose
// rows are not whole chunks of 16 bytes, aligned to that, are read element by element.
//
// New keys are rotated (Su et al. 2021, arXiv:2104.09864), quantised and appended here as well: a launch for
// them would take as long as a short cache. No block reads from a cache what another writes. All take the
// keys that were there from the caches and the new ones, as they are to be stored, from k_new and v_new; of
// the blocks of the part that has them, that of the first rows writes them, whether its rows see them or not.
//
// Lengths are not checked on a GPU. Negative ones are 0; new keys that have no place in the cache or no row
// in the rotary tables are left out, and queries without such a row give NaN. A row that sees no key: out =
// 0, lse = -inf. Held by tests/test_decode.py.
#include "decode.h"

#include <cmath>
#include <type_traits>

#include "async_copy.h"
#include "balance.h"
#include "device.h"
#include "launch.h"
#include "mma.h"

namespace fastgpt {
namespace {

// Storage types of quantised caches; like f16 and bf16, by their bits.
struct s8 {
  uint8_t bits;
};
struct e4m3 {
  uint8_t bits;
};

constexpr int kRows = 16;         // of a block: those of mma.sync
constexpr int kMostResident = 3;  // blocks of a multiprocessor: registers are left for
constexpr int kResident = 2;      // blocks of a multiprocessor that num_splits = 0 provides for
constexpr int kLeastTiles = 2;    // of a warp in a part of num_splits = 0
constexpr int kPipelineBytes = 64 << 10;
constexpr float kInfinity = INFINITY;

// A block's range, with num_splits = 0, and the part that it is at.
struct Plan {
  Walk walk;
  Ranges ranges;
  int64_t origin;          // the range's first unit
  int64_t b, tiles, slot;  // of the part: the sequence, its tiles; where results go, -1 for out and lse
};

// What a kernel is compiled for: rows of up to kDim elements. Not measured on hardware yet.
template <class Q, class C, int kDim>
struct Shape {
  typedef Q Query;
  typedef C Cache;
  static constexpr int kWidth = kDim;
  static constexpr int kWarps = kDim == 256 ? 2 : 4;  // acc takes kDim / 2 registers
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kMostTileBytes = kPipelineBytes / kWarps / 4;
  static constexpr int kRowBytes = kDim * sizeof(C);
  static constexpr int kKeys =
      kMostTileBytes / kRowBytes < 32 ? kMostTileBytes / kRowBytes : 32;  // of a tile
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kStages = kPipelineBytes / (2 * kWarps * kTileBytes);
  static constexpr int kChunks = kRowBytes / 16;    // of a row
  static constexpr int kPerChunk = 16 / sizeof(C);  // elements
  static constexpr int kQueryChunks = kDim * sizeof(Q) / 16;
  static constexpr int kQueryBytes = kRows * kDim * sizeof(Q);
  static constexpr bool kMma = sizeof(Q) == 2;
  static constexpr int kProbBytes = kMma ? 0 : kWarps * kRows * kKeys * 4;
  static constexpr int kPlanAt = kPipelineBytes + kQueryBytes + kProbBytes;
  static constexpr int kSharedBytes = kPlanAt + sizeof(Plan);
  static constexpr int kBlockKeys = kWarps * kKeys;
  static_assert(kStages >= 2 && kKeys % 8 == 0);
  static_assert(kSharedBytes <= kLeastShared);
  static_assert(kWarps * kRows * (kDim + 2) * 4 + kRows * kWarps * 4 <= kPipelineBytes);
};

// x, of which the compiler does not know that it is x: addresses that depend on it are computed where they
// are used, and not ahead of a loop, into more registers than there are.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Where chunk `chunk` of row `row` lies in a tile of rows of kChunks: 8 rows' chunks of one number are in 8
// different groups of banks.
template <int kChunks>
__device__ __forceinline__ int place_of(int row, int chunk) {
  return (row * kChunks + (chunk ^ (kChunks >= 8 ? row & 7 : row >> 1 & 3))) * 16;
}

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
template <class T>
__device__ __forceinline__ uint32_t bits_of(T x) {
  return x.bits;
}

template <class T>
__device__ __forceinline__ T element(uint32_t bits) {
  if constexpr (sizeof(T) == 4)
    return __uint_as_float(bits);
  else
    return {static_cast<decltype(T::bits)>(bits)};
}

// A storage type's elements in 32-bit words.
template <class T, int kElements>
struct Words {
  uint32_t words[kElements * sizeof(T) / 4] = {};
  __device__ __forceinline__ void set(int i, uint32_t bits) {
    int at = i * static_cast<int>(sizeof(T));
    words[at / 4] |= bits << at % 4 * 8;
  }
};

// x as a cache holds it.
template <class Cache>
__device__ __forceinline__ uint32_t stored(float x, float descale) {
  if constexpr (std::is_same_v<Cache, s8>) {
    x /= descale;
    x = x > 127.0f ? 127.0f : x < -127.0f ? -127.0f : x;
    return static_cast<uint8_t>(static_cast<int>(rintf(x)));
  } else if constexpr (std::is_same_v<Cache, e4m3>) {
    uint32_t bits = __float_as_uint(x / descale), magnitude = bits & 0x7fffffff;
    uint32_t sign = bits >> 24 & 0x80;
    if (magnitude > 0x7f800000) return sign | 0x7f;
    if (magnitude > 0x43e00000) magnitude = 0x43e00000;  // 448
    // Below 2^-6, the least normal number, they are multiples of 2^-9, a unit in the last place of 2^14.
    if (magnitude < 121u << 23) return sign | (__float_as_uint(__uint_as_float(magnitude) + 0x1p14f) & 0x7f);
    return sign | (magnitude - (120u << 23) + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  } else {
    return bits_of(from_float<Cache>(x));
  }
}

// Two numbers of a quantised cache, in the lowest bytes of each half of `pair`, in T, which holds all of
// them.
template <class T, class Cache>
__device__ __forceinline__ uint32_t dequantised(uint32_t pair) {
  constexpr bool kBf16 = dtype_of<T> == DType::bf16;
  if constexpr (std::is_same_v<Cache, s8>) {
    // (magic + 7 lowest bits) - (magic + 128 if negative), where a unit in the last place of magic is 1.
    constexpr uint32_t kMagic = kBf16 ? 0x43004300 : 0x64006400, kMinusOne = kBf16 ? 0xbf80bf80 : 0xbc00bc00;
    return multiply_add_pair<T>((pair & 0x00800080) | kMagic, kMinusOne, (pair & 0x007f007f) | kMagic);
  } else {
    // The exponent's bias is 127 or 15 here and 7 there; subnormal numbers come out right, too.
    constexpr uint32_t kFactor = kBf16 ? 0x7b807b80 : 0x5c005c00, kExponent = kBf16 ? 0xff : 0xf8;
    uint32_t magnitude = pair & 0x007f007f, nan = (magnitude + 0x00010001) & 0x00800080;
    uint32_t small = magnitude << (kBf16 ? 4 : 7) | (pair & 0x00800080) << 8;
    return multiply_add_pair<T>(small, kFactor, 0x80008000) | nan * kExponent;
  }
}

__device__ __forceinline__ float dequantised(s8 x) { return static_cast<float>(static_cast<int8_t>(x.bits)); }
__device__ __forceinline__ float dequantised(e4m3 x) {
  uint32_t magnitude = x.bits & 0x7fu;
  float y = __uint_as_float((x.bits & 0x80u) << 24 | magnitude << 20) * 0x1p120f;
  return magnitude == 0x7f ? NAN : y;
}

__device__ __forceinline__ float descale_of(const DeviceDecode& p, const float* descale, int64_t b,
                                            int64_t head_k) {
  return descale ? descale[b * p.descale_batch_stride + head_k] : 1.0f;
}

// Four neighbouring elements of row `row` of a tile.
template <class S>
__device__ __forceinline__ void load_four(const unsigned char* tile, int row, int column, float (&x)[4]) {
  typedef typename S::Cache Cache;
  const unsigned char* at = tile + place_of<S::kChunks>(row, column / S::kPerChunk);
  if constexpr (sizeof(Cache) == 4) {
    float4 four = *reinterpret_cast<const float4*>(at);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
    uint32_t word = *reinterpret_cast<const uint32_t*>(at + column % S::kPerChunk);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = dequantised(Cache{static_cast<uint8_t>(word >> 8 * i)});
  }
}

// What a block owns. Blocks with the same keys are neighbours; then heads, which are neighbours in memory.
struct Block {
  int group, rows;  // query heads of a head of k, and rows of all blocks for it
  int first_row, head_k;
  int part;  // of all sequences', or range

  __device__ __forceinline__ Block(const DeviceDecode& p, int id) {
    group = static_cast<int>(p.nheads) / static_cast<int>(p.nheads_k);
    rows = static_cast<int>(p.seqlen_q) * group;
    int tiles = rows > 0 ? (rows + kRows - 1) / kRows : 1;
    first_row = id % tiles * kRows;
    id /= tiles;
    head_k = id % static_cast<int>(p.nheads_k);
    part = id / static_cast<int>(p.nheads_k);
  }
};

// A page, or sequence, and a row there.
struct Place {
  int page, row;

  __device__ __forceinline__ int64_t offset(const Tensor& cache) const {
    return page * cache.batch_stride + row * cache.seq_stride;
  }
};

// Where the keys of a sequence are, and which of them its queries see. Keys and rows are numbered in 32 bits,
// as cache_seqlens are.
struct Sequence {
  int pad, cached;  // rows before the first key, keys before the append
  int index;        // in the caches, without pages
  const int32_t* table;
  int page_size;
  Mask mask;  // of the keys that have a place

  __device__ __forceinline__ Sequence(const DeviceDecode& p, int64_t b)
      : mask(p.seqlen_q, 0, p.window_left, p.window_right) {
    constexpr int64_t kMost = INT32_MAX - 4096;  // so that the first key behind a tile has a number
    int64_t before = least(largest(p.cache_seqlens[b], 0), kMost), room = least(p.capacity, kMost);
    int64_t padding = p.cache_leftpad ? least(largest(p.cache_leftpad[b], 0), before) : 0;
    pad = static_cast<int>(padding);
    cached = static_cast<int>(before - padding);
    index = p.cache_batch_idx ? p.cache_batch_idx[b] : static_cast<int>(b);
    table = p.block_table ? p.block_table + b * p.block_table_stride : nullptr;
    page_size = static_cast<int>(least(p.page_size, INT32_MAX));
    if (p.rotary_dim) room = least(room, largest(before, p.positions));
    mask = Mask(p.seqlen_q, cached + p.seqlen_new, p.window_left, p.window_right);
    mask.seqlen_k = least(mask.seqlen_k, largest(room - padding, 0));
  }
  // The first of the keys that queries see or that are to be written, and how many there are up to the last.
  __device__ __forceinline__ int64_t first_key(const DeviceDecode& p) const {
    return p.seqlen_new > 0 ? least(mask.begin(0), cached) : mask.begin(0);
  }
  __device__ __forceinline__ int64_t keys(const DeviceDecode& p) const {
    int64_t end = p.seqlen_new > 0 ? mask.seqlen_k : mask.end(p.seqlen_q - 1);
    return largest(end - first_key(p), 0);
  }
  // Where key j is in the caches.
  __device__ __forceinline__ Place place_of(int j) const {
    int row = pad + j;
    if (!table) return {index, row};
    int block = row / page_size;
    return {__ldg(table + block), row - block * page_size};
  }
};

template <class S>
__device__ __forceinline__ int64_t tiles_of(const DeviceDecode& p, int64_t b) {
  return divide_up(Sequence(p, b).keys(p), S::kBlockKeys);
}

// Fills in the block's plan up to its first part; false where it has none. Each thread sums up neighbouring
// sequences; that whose sequences the range begins in goes through them again.
template <class S>
__device__ __forceinline__ bool find_range(const DeviceDecode& p, int64_t range, Plan& plan) {
  int64_t* sums = shared_memory<int64_t>();
  int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int64_t each = divide_up(p.batch, S::kThreads), b = thread * each, end = least(b + each, p.batch), own = 0;
#pragma unroll 4
  for (int64_t i = b; i < end; i++) own += tiles_of<S>(p, i) + 1;
  int64_t before = own, units = 0;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    int64_t other = __shfl_up_sync(kAllLanes, before, distance);
    if (lane >= distance) before += other;
  }
  if (lane == 31) sums[warp] = before;
  if (thread == 0) plan.walk.size = 0;
  __syncthreads();
  before -= own;
#pragma unroll
  for (int w = 0; w < S::kWarps; w++) {
    if (w < warp) before += sums[w];
    units += sums[w];
  }
  Ranges ranges(units, p.batch, p.parts);
  int64_t origin = ranges.begin(range);
  if (range < ranges.count && origin >= before && origin < before + own) {
    Walk walk{b, origin - before, ranges.begin(range + 1) - origin};
    int64_t tiles = tiles_of<S>(p, b);
    for (; walk.start > tiles; tiles = tiles_of<S>(p, walk.b)) walk.next(tiles);
    if (!walk.takes_part(tiles) && !walk.next(tiles)) walk.size = 0;
    plan.walk = walk;
    plan.ranges = ranges;
    plan.origin = origin;
  }
  __syncthreads();
  return plan.walk.size > 0;
}

// Of the part that a block is at: says in its plan where results go, and in `cuts` of which parts the
// sequence is.
__device__ __forceinline__ void note(const DeviceDecode& p, const Block& block, const Walk& walk,
                                     int64_t tiles, Plan& plan) {
  plan.b = walk.b;
  plan.tiles = tiles;
  plan.slot = p.parts > 1 ? block.part : -1;
  if (!p.cuts) return;
  bool cut = walk.cuts(tiles), opens = walk.opens();
  if (!cut)
    plan.slot = -1;
  else if (opens)
    plan.slot += p.parts;
  if (opens && block.first_row == 0 && block.head_k == 0) {
    // With more sequences than ranges, of the last one that the range opens: no other is cut.
    int32_t* row = p.cuts + 3 * (p.batch > p.parts ? block.part : walk.b);
    int64_t last = plan.origin - walk.start + tiles - 1;  // of the sequence's units
    row[0] = static_cast<int32_t>(walk.b);
    row[1] = block.part;
    row[2] = cut ? static_cast<int32_t>(plan.ranges.of(last)) - block.part + 1 : 1;
  }
}

// Element `column` of a row of q, k_new or, with rotary_dim 0, v_new, rotated as at `position`, rounded to T:
// NaN where the tables have no row for it. Each step is rounded, as it is where this is defined.
template <class T>
__device__ __forceinline__ float rotated(const DeviceDecode& p, int rotary_dim, const T* row, int column,
                                         int64_t position) {
  float x = to_float(row[column]);
  if (column >= rotary_dim) return x;
  if (position >= p.positions) return NAN;
  int pairs = rotary_dim / 2, pair = column, other = column;
  bool first;
  if (p.rotary_interleaved) {
    first = column % 2 == 0;
    other = column ^ 1;
    pair = column / 2;
  } else {
    first = column < pairs;
    other = first ? column + pairs : column - pairs;
    pair = first ? column : other;
  }
  int64_t at = position * pairs + pair;
  float cos, sin;
  if (p.rotary_dtype == DType::f32) {
    cos = static_cast<const float*>(p.rotary_cos)[at];
    sin = static_cast<const float*>(p.rotary_sin)[at];
  } else {
    cos = to_float(static_cast<const T*>(p.rotary_cos)[at]);
    sin = to_float(static_cast<const T*>(p.rotary_sin)[at]);
  }
  float turned = __fmul_rn(to_float(row[other]), sin);
  return to_float(from_float<T>(__fadd_rn(__fmul_rn(x, cos), first ? -turned : turned)));
}

// Begins to copy `keys` rows of a cache, `dim` wide, into a tile; the others become 0. Chunks beyond dim stay
// as they are. `key` is where row lane % kKeys is, or any other row for what is not copied.
template <class S>
__device__ __forceinline__ void copy_tile(unsigned char* tile, const typename S::Cache* key, int keys,
                                          int dim, bool vectors, int lane) {
  typedef typename S::Cache Cache;
  constexpr int kNeighbours = S::kChunks < 32 ? S::kChunks : 32, kSteps = S::kKeys * S::kChunks / 32;
  int own_row = lane / kNeighbours, own_column = lane % kNeighbours * S::kPerChunk;
  auto each = [&](int step, auto copy) {
    int row = step * 32 / S::kChunks + own_row;
    int column = step * 32 % S::kChunks * S::kPerChunk + own_column;
    auto from = reinterpret_cast<const Cache*>(__shfl_sync(kAllLanes, reinterpret_cast<int64_t>(key), row));
    if (column < dim)
      copy(tile + place_of<S::kChunks>(row, column / S::kPerChunk), from + column, column, row < keys);
  };
  if (vectors) {
#pragma unroll
    for (int step = 0; step < kSteps; step++)
      each(step, [](unsigned char* to, const Cache* from, int, bool read) { copy_async(to, from, read); });
  } else {
#pragma unroll 1
    for (int step = 0; step < kSteps; step++)
      each(step, [dim](unsigned char* to, const Cache* from, int column, bool read) {
        Words<Cache, S::kPerChunk> chunk;
#pragma unroll
        for (int e = 0; e < S::kPerChunk; e++)
          if (read && column + e < dim) chunk.set(e, bits_of(from[e]));
        *reinterpret_cast<uint4*>(to) = {chunk.words[0], chunk.words[1], chunk.words[2], chunk.words[3]};
      });
  }
}

// Puts new keys first, first + 1, ... up to `end`, or their values, into a tile as the cache is to hold them,
// and, if this block `writes`, into the cache. `from` and `cache` are the head's.
template <class S>
__device__ __forceinline__ void append_tile(const DeviceDecode& p, const Sequence& sequence,
                                            unsigned char* tile, const typename S::Query* from,
                                            const Tensor& from_tensor, typename S::Cache* cache,
                                            const Tensor& cache_tensor, int first, int end, int dim,
                                            int rotary_dim, float descale, bool writes, int lane) {
  typedef typename S::Cache Cache;
  constexpr int kPerWord = 4 / sizeof(Cache);
  int words = (dim + kPerWord - 1) / kPerWord;
#pragma unroll 1
  for (int i = lane; i < S::kKeys * words; i += 32) {  // chunks beyond dim stay 0
    int row = i / words, column = i % words * kPerWord, j = first + row;
    uint32_t word = 0;
    if (j < end) {
      const typename S::Query* source = from + (j - sequence.cached) * from_tensor.seq_stride;
      Cache* to = cache + sequence.place_of(j).offset(cache_tensor);
#pragma unroll
      for (int e = 0; e < kPerWord; e++) {
        if (column + e >= dim) continue;
        float x = rotated(p, rotary_dim, source, column + e, sequence.pad + j);
        uint32_t bits = stored<Cache>(x, descale);
        word |= bits << 32 / kPerWord * e % 32;
        if (writes) to[column + e] = element<Cache>(bits);
      }
    }
    unsigned char* chunk = tile + place_of<S::kChunks>(row, column / S::kPerChunk);
    reinterpret_cast<uint32_t*>(chunk)[column % S::kPerChunk / kPerWord] = word;
  }
}

// The block's rows of q, rotated. For products with 8-bit keys, the elements of each 16 are in the order in
// which ldmatrix, that takes 16-bit ones, hands the keys' to the lanes: 4 t, ..., 4 t + 3 to those with
// in_group t.
template <class S>
__device__ __forceinline__ void load_queries(const DeviceDecode& p, const Sequence& sequence,
                                             unsigned char* to, const typename S::Query* q,
                                             const Block& block) {
  typedef typename S::Query Query;
  constexpr int kPerChunk = 16 / sizeof(Query);
  int dim = static_cast<int>(p.headdim);
  bool step = p.window_left >= 0 || p.window_right >= 0;
#pragma unroll 4
  for (int i = opaque(static_cast<int>(threadIdx.x)); i < kRows * S::kWidth; i += S::kThreads) {
    int r = i / S::kWidth, column = i % S::kWidth;
    int row = block.first_row + r, query = row / block.group;
    float x = 0.0f;
    if (row < block.rows && column < dim) {
      const Query* source = q + query * p.q.seq_stride + row % block.group * p.q.head_stride;
      x = rotated(p, static_cast<int>(p.rotary_dim), source, column,
                  int64_t{sequence.pad} + sequence.cached + (step ? query : 0));
    }
    if (S::kMma && sizeof(typename S::Cache) == 1) {
      int t = column % 16 / 4, e = column % 4;
      column = column / 16 * 16 + 2 * t + e % 2 + e / 2 * 8;
    }
    Query* chunk = reinterpret_cast<Query*>(to + place_of<S::kQueryChunks>(r, column / kPerChunk));
    chunk[column % kPerChunk] = from_float<Query>(x);
  }
}

// A lane has rows `group` and group + 8 of s and acc, as mma.sync has it: s[n][2 h + e] is row group + 8 h
// and key 8 n + 2 in_group + e.

// s = q k of a tile.
template <class S>
__device__ __forceinline__ void multiply_keys(const unsigned char* q, const unsigned char* k, int lane,
                                              float (&s)[S::kKeys / 8][4]) {
#pragma unroll
  for (int n = 0; n < S::kKeys / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = 0.0f;
  if constexpr (!S::kMma) {
    int group = lane / 4, in_group = lane % 4;
#pragma unroll 1
    for (int column = 0; column < S::kWidth; column += 4) {
      float rows[2][4], key[4];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float4 four =
            *reinterpret_cast<const float4*>(q + place_of<S::kQueryChunks>(group + 8 * h, column / 4));
        rows[h][0] = four.x, rows[h][1] = four.y, rows[h][2] = four.z, rows[h][3] = four.w;
      }
#pragma unroll
      for (int n = 0; n < S::kKeys / 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          load_four<S>(k, 8 * n + 2 * in_group + e, column, key);
#pragma unroll
          for (int d = 0; d < 4; d++) {
            s[n][e] += rows[0][d] * key[d];
            s[n][2 + e] += rows[1][d] * key[d];
          }
        }
    }
  } else {
    typedef typename S::Query Query;
#pragma unroll
    for (int step = 0; step < S::kWidth / 16; step++) {
      uint32_t a[4], b[4];
      load_matrices(a, q + place_of<S::kQueryChunks>(lane & 15, 2 * step + (lane >> 4)));
      if constexpr (sizeof(typename S::Cache) == 2) {
#pragma unroll
        for (int n = 0; n < S::kKeys / 8; n += 2) {
          load_matrices(
              b, k + place_of<S::kChunks>(8 * n + (lane >> 4) * 8 + (lane & 7), 2 * step + (lane >> 3 & 1)));
          multiply_add<Query>(s[n], a, b[0], b[1]);
          multiply_add<Query>(s[n + 1], a, b[2], b[3]);
        }
      } else {
#pragma unroll
        for (int n = 0; n < S::kKeys / 8; n += 4) {
          load_matrices(b, k + place_of<S::kChunks>(8 * n + lane, step));
#pragma unroll
          for (int i = 0; i < 4; i++)
            multiply_add<Query>(s[n + i], a,
                                dequantised<Query, typename S::Cache>(__byte_perm(b[i], 0, 0x4140)),
                                dequantised<Query, typename S::Cache>(__byte_perm(b[i], 0, 0x4342)));
        }
      }
    }
  }
}

// The column of acc[n][e], and of acc[n][2 + e].
template <class S>
__device__ __forceinline__ int column_of(int n, int e, int in_group) {
  if (!S::kMma) return n / 2 * 16 + 4 * in_group + n % 2 * 2 + e;
  if (sizeof(typename S::Cache) == 1) return n / 2 * 16 + 4 * in_group + 2 * e + n % 2;
  return n * 8 + 2 * in_group + e;
}

// acc += p v of a tile. `probs` is the warp's memory for p, without mma.sync.
template <class S>
__device__ __forceinline__ void multiply_values(const float (&p)[S::kKeys / 8][4], const unsigned char* v,
                                                float* probs, int lane, float (&acc)[S::kWidth / 8][4]) {
  if constexpr (!S::kMma) {
    int group = lane / 4, in_group = lane % 4;
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        probs[(group + e / 2 * 8) * S::kKeys + 8 * n + 2 * in_group + e % 2] = p[n][e];
    __syncwarp();
#pragma unroll 1
    for (int key = 0; key < S::kKeys; key++) {
      float first = probs[group * S::kKeys + key], second = probs[(group + 8) * S::kKeys + key];
#pragma unroll
      for (int n = 0; n < S::kWidth / 8; n += 2) {
        float x[4];
        load_four<S>(v, key, n * 8 + 4 * in_group, x);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          acc[n + e / 2][e % 2] += first * x[e];
          acc[n + e / 2][2 + e % 2] += second * x[e];
        }
      }
    }
  } else {
    typedef typename S::Query Query;
#pragma unroll
    for (int step = 0; step < S::kKeys / 16; step++) {
      const float (&left)[4] = p[2 * step], (&right)[4] = p[2 * step + 1];
      uint32_t a[4] = {pack_pair<Query>(left[0], left[1]), pack_pair<Query>(left[2], left[3]),
                       pack_pair<Query>(right[0], right[1]), pack_pair<Query>(right[2], right[3])};
      int row = step * 16 + (lane & 15);
      if constexpr (sizeof(typename S::Cache) == 2) {
#pragma unroll
        for (int n = 0; n < S::kWidth / 8; n += 2) {
          uint32_t b[4];
          load_transposed(b, v + place_of<S::kChunks>(row, n + (lane >> 4)));
          multiply_add<Query>(acc[n], a, b[0], b[1]);
          multiply_add<Query>(acc[n + 1], a, b[2], b[3]);
        }
      } else {
        // An element that ldmatrix transposes is two columns: even ones go to acc[n], odd ones to acc[n + 1].
#pragma unroll
        for (int n = 0; n < S::kWidth / 8; n += 4) {
          uint32_t b[4];
          load_transposed(b, v + place_of<S::kChunks>(row, n / 2 + (lane >> 4)));
#pragma unroll
          for (int i = 0; i < 4; i++) {
            int shift = i % 2 * 8;
            multiply_add<Query>(
                acc[n + i], a, dequantised<Query, typename S::Cache>(b[i / 2 * 2] >> shift & 0x00ff00ff),
                dequantised<Query, typename S::Cache>(b[i / 2 * 2 + 1] >> shift & 0x00ff00ff));
          }
        }
      }
    }
  }
}

// tanh(x): its error is below 1e-7, and relative to x where that is small.
__device__ __forceinline__ float tanh_of(float x) {
  float t = exp2f(fabsf(x) * (-2 * kLog2E)), y = x * x;
  float far = copysignf((1.0f - t) / (1.0f + t), x);
  float near = x * (1 + y * (-1.0f / 3 + y * (2.0f / 15 + y * (-17.0f / 315 + y * (62.0f / 2835)))));
  return y < 0.0625f ? near : far;
}

// What scores are made of, and the softmax state of a lane's two rows; l is the lane's share.
struct Rows {
  float scale, softcap, slopes[2];
  int begin[2], end[2], diagonal[2];  // of the keys that a row sees; i + sk - sq
  float m[2], l[2];

  // Scores of a tile whose first key is `first`, of a range that ends at key `last_end`, become 2^(s - m);
  // the results are what acc is to be multiplied by (online softmax, Milakov & Gimelshein 2018).
  template <int kBlocks>
  __device__ __forceinline__ void softmax(float (&s)[kBlocks][4], bool alibi, int first, int last_end,
                                          int in_group, float (&alpha)[2]) {
#pragma unroll
    for (int n = 0; n < kBlocks; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] *= scale;
    if (softcap != 0.0f) {
#pragma unroll
      for (int n = 0; n < kBlocks; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] = softcap * tanh_of(s[n][e]);
    }
    if (alibi) {
#pragma unroll
      for (int n = 0; n < kBlocks; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          uint32_t j = static_cast<uint32_t>(first + 8 * n + 2 * in_group + e % 2);
          int distance = static_cast<int>(static_cast<uint32_t>(diagonal[e / 2]) - j);
          s[n][e] -= slopes[e / 2] * fabsf(static_cast<float>(distance));
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int low = begin[h] - first, high = (end[h] < last_end ? end[h] : last_end) - first;
      float most = -kInfinity;
#pragma unroll
      for (int n = 0; n < kBlocks; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = s[n][2 * h + e];
          int j = 8 * n + 2 * in_group + e;
          if (j < low || j >= high) x = -kInfinity;
          most = fmaxf(most, x);
        }
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      most = fmaxf(most, m[h]);
      float finite = most == -kInfinity ? 0.0f : most, sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kBlocks; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          s[n][2 * h + e] = exp2f(s[n][2 * h + e] - finite);
          sum += s[n][2 * h + e];
        }
      alpha[h] = exp2f(m[h] - finite);
      l[h] = l[h] * alpha[h] + sum;
      m[h] = most;
    }
  }
};

// out and lse, or those of a part, of the rows whose states the warps have left in shared memory: out in
// base-2 softmax with largest score m, sum l and sum of values acc.
template <class S>
__device__ __forceinline__ void store_rows(const DeviceDecode& p, const Block& block, const Plan& plan) {
  float* acc = shared_memory<float>();
  float* m = acc + S::kWarps * kRows * S::kWidth;
  float* l = m + S::kWarps * kRows;
  float* weights = l + S::kWarps * kRows;  // (kRows, kWarps)
  int thread = opaque(static_cast<int>(threadIdx.x));
  auto place = [&](int r, int64_t& query, int64_t& head) {
    int row = block.first_row + r;
    query = row / block.group;
    head = int64_t{block.head_k} * block.group + row % block.group;
    return row < block.rows;
  };
  if (thread < kRows) {
    float most = -kInfinity, sum = 0.0f, weight[S::kWarps];
#pragma unroll
    for (int w = 0; w < S::kWarps; w++) most = fmaxf(most, m[w * kRows + thread]);
    float finite = most == -kInfinity ? 0.0f : most;
#pragma unroll
    for (int w = 0; w < S::kWarps; w++) {
      weight[w] = exp2f(m[w * kRows + thread] - finite);
      sum += weight[w] * l[w * kRows + thread];
    }
    float inverse = sum == 0.0f ? 0.0f : descale_of(p, p.v_descale, plan.b, block.head_k) / sum;
#pragma unroll
    for (int w = 0; w < S::kWarps; w++) weights[thread * S::kWarps + w] = weight[w] * inverse;
    int64_t query, head;
    if (place(thread, query, head)) {
      float* lse = plan.slot < 0 ? p.lse : p.part_lse;
      lse[((plan.slot < 0 ? plan.b : plan.slot) * p.nheads + head) * p.seqlen_q + query] =
          sum == 0.0f ? -kInfinity : (finite + log2f(sum)) * kLn2;
    }
  }
  __syncthreads();
  for (int i = thread; i < kRows * S::kWidth; i += S::kThreads) {
    int r = i / S::kWidth, column = i % S::kWidth;
    int64_t query, head;
    if (column >= p.headdim_v || !place(r, query, head)) continue;
    float x = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kWarps; w++)
      x += acc[(w * kRows + r) * S::kWidth + column] * weights[r * S::kWarps + w];
    int64_t sequence = plan.slot < 0 ? plan.b : plan.slot;
    int64_t at = ((sequence * p.seqlen_q + query) * p.nheads + head) * p.headdim_v + column;
    if (plan.slot < 0)
      static_cast<typename S::Query*>(p.out)[at] = from_float<typename S::Query>(x);
    else
      p.part_out[at] = x;
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, kMostResident)
    decode_kernel(const __grid_constant__ DeviceDecode p) {
  typedef typename S::Query Query;
  typedef typename S::Cache Cache;
  Plan& plan = *reinterpret_cast<Plan*>(shared_memory<unsigned char>() + S::kPlanAt);
  if (p.cuts) {
    const Block block(p, static_cast<int>(blockIdx.x));
    // A range that opens no sequence cuts none.
    if (p.batch > p.parts && block.first_row == 0 && block.head_k == 0 && threadIdx.x == 0)
      p.cuts[3 * block.part + 2] = 1;
    if (!find_range<S>(p, block.part, plan)) return;
  }
  do {
    unsigned char* shared = shared_memory<unsigned char>();
    unsigned char* shared_q = shared + kPipelineBytes;
    int thread = opaque(static_cast<int>(threadIdx.x));
    int lane = thread & 31;
    int warp = __shfl_sync(kAllLanes, thread / 32, 0);  // the same for all, to the compiler
    int in_group = lane % 4;
    unsigned char* tiles = shared + warp * (2 * S::kStages * S::kTileBytes);
    float* probs = reinterpret_cast<float*>(shared_q + S::kQueryBytes) + warp * kRows * S::kKeys;
    auto tile_k = [&](int stage) { return tiles + 2 * stage * S::kTileBytes; };
    auto tile_v = [&](int stage) { return tiles + (2 * stage + 1) * S::kTileBytes; };

    const Block block(p, opaque(static_cast<int>(blockIdx.x)));
    int64_t head_k = block.head_k;
    Walk walk = p.cuts ? plan.walk : Walk{block.part / p.parts, 0, 0};
    int64_t b = walk.b;
    Sequence sequence(p, b);
    const Mask& mask = sequence.mask;
    int64_t keys = sequence.keys(p), sequence_tiles = divide_up(keys, S::kBlockKeys);
    if (!p.cuts) {
      walk.size = divide_up(sequence_tiles, p.parts);
      walk.start = block.part % p.parts * walk.size;
      if (block.part % p.parts > 0 && walk.start >= sequence_tiles) {
        int row = block.first_row + static_cast<int>(threadIdx.x);
        int64_t head = int64_t{block.head_k} * block.group + row % block.group;
        if (threadIdx.x < kRows && row < block.rows)
          p.part_lse[(block.part * p.nheads + head) * p.seqlen_q + row / block.group] = -kInfinity;
        return;
      }
    }
    // The part's keys; then, what the block's rows see of them.
    int64_t first_key = sequence.first_key(p);
    int64_t low = first_key + walk.begin() * S::kBlockKeys;
    int64_t high = first_key + least(walk.end(sequence_tiles) * S::kBlockKeys, keys);
    int64_t last_row = least(block.first_row + kRows, block.rows) - 1;
    bool writes = block.first_row == 0 && p.seqlen_new > 0;
    int begin = static_cast<int>(largest(mask.begin(block.first_row / block.group), low));
    int end = static_cast<int>(least(mask.end(last_row / block.group), high));
    int cached_end = static_cast<int>(least(end, sequence.cached));
    int new_begin = static_cast<int>(largest(writes ? low : begin, sequence.cached));
    int new_end = writes ? static_cast<int>(high) : p.seqlen_new > 0 ? end : 0;
    int cached_tiles = static_cast<int>(divide_up(largest(cached_end - begin, 0), S::kKeys));
    int all_tiles = cached_tiles + static_cast<int>(divide_up(largest(new_end - new_begin, 0), S::kKeys));
    // The warp's are those of number warp, warp + kWarps, ...
    auto first_of = [&](int tile) {
      return tile < cached_tiles ? begin + tile * S::kKeys : new_begin + (tile - cached_tiles) * S::kKeys;
    };

    int dim = static_cast<int>(p.headdim), dim_v = static_cast<int>(p.headdim_v);
    // Of tile `next`, that is copied next, this lane's key: found a tile ahead, as a block table takes time
    // to read.
    int next = warp;
    Place place{};
    auto find = [&] {
      if (next >= cached_tiles) return;
      int key = first_of(next) + lane % S::kKeys;
      place = sequence.place_of(key < cached_end ? key : cached_end - 1);
    };
    auto copy = [&](unsigned char* tile, const Tensor& cache, int width) {
      if (next < cached_tiles)
        copy_tile<S>(tile,
                     static_cast<const Cache*>(cache.data) + head_k * cache.head_stride + place.offset(cache),
                     cached_end - first_of(next), width, p.vectors, lane);
      commit_copies();
    };
    // What no copy reaches is 0.
    if (dim < S::kWidth || dim_v < S::kWidth) {
#pragma unroll 1
      for (int i = lane * 16; i < 2 * S::kStages * S::kTileBytes; i += 32 * 16)
        *reinterpret_cast<uint4*>(tiles + i) = uint4{0, 0, 0, 0};
      __syncwarp();
    }
    find();
#pragma unroll 1
    for (int half = 0; half < 2 * S::kStages; half++) {
      bool is_v = half % 2;
      copy(tiles + half * S::kTileBytes, is_v ? p.v_cache : p.k_cache, is_v ? dim_v : dim);
      if (!is_v) continue;
      next += S::kWarps;
      find();
    }

    if (threadIdx.x == 0) note(p, block, walk, sequence_tiles, plan);

    auto q =
        static_cast<const Query*>(p.q.data) + b * p.q.batch_stride + head_k * block.group * p.q.head_stride;
    load_queries<S>(p, sequence, shared_q, q, block);
    Rows state;
    state.scale = p.softmax_scale * descale_of(p, p.k_descale, b, head_k) *
                  (p.softcap != 0.0f ? 1.0f / p.softcap : kLog2E);
    state.softcap = p.softcap * kLog2E;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int row = block.first_row + lane / 4 + 8 * h, query = row / block.group;
      int64_t head = head_k * block.group + row % block.group;
      bool valid = row < block.rows;
      state.begin[h] = static_cast<int>(mask.begin(query));
      state.end[h] = valid ? static_cast<int>(mask.end(query)) : 0;
      state.diagonal[h] = static_cast<int>(query + mask.shift);
      state.slopes[h] =
          valid && p.alibi_slopes ? p.alibi_slopes[b * p.alibi_batch_stride + head] * kLog2E : 0.0f;
      // The sink is in the first part, as a key seen first, of value 0.
      state.m[h] = valid && p.sink && walk.opens() && warp == 0 ? p.sink[head] * kLog2E : -kInfinity;
      state.l[h] = state.m[h] != -kInfinity && in_group == 0 ? 1.0f : 0.0f;
    }
    float acc[S::kWidth / 8][4];
#pragma unroll
    for (int n = 0; n < S::kWidth / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[n][e] = 0.0f;
    __syncthreads();

    int stage = 0;
    for (int tile = warp; tile < all_tiles; tile += S::kWarps) {
      lane = opaque(lane) & 31;
      bool is_new = tile >= cached_tiles;
      int first = first_of(tile), tile_end = is_new ? new_end : cached_end;
      if (is_new) {
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
          const Tensor &from = half ? p.v_new : p.k_new, &to = half ? p.v_cache : p.k_cache;
          append_tile<S>(
              p, sequence, tile_k(stage) + half * S::kTileBytes,
              static_cast<const Query*>(from.data) + plan.b * from.batch_stride + head_k * from.head_stride,
              from, static_cast<Cache*>(to.data) + head_k * to.head_stride, to, first, tile_end,
              half ? dim_v : dim, half ? 0 : static_cast<int>(p.rotary_dim),
              descale_of(p, half ? p.v_descale : p.k_descale, plan.b, head_k), writes, lane);
        }
      }
      // Each tile of k and of v is a group of copies, empty at the end.
      wait_for_copies<2 * S::kStages - 1>();
      __syncwarp();
      float s[S::kKeys / 8][4], alpha[2];
      multiply_keys<S>(shared_q, tile_k(stage), lane, s);
      __syncwarp();
      copy(tile_k(stage), p.k_cache, dim);
      state.softmax(s, p.alibi_slopes != nullptr, first, tile_end, in_group, alpha);
#pragma unroll
      for (int n = 0; n < S::kWidth / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[n][e] *= alpha[e / 2];
      wait_for_copies<2 * S::kStages - 1>();
      __syncwarp();
      multiply_values<S>(s, tile_v(stage), probs, lane, acc);
      __syncwarp();
      copy(tile_v(stage), p.v_cache, dim_v);
      next += S::kWarps;
      find();
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }

    __syncthreads();
    if (p.cuts && threadIdx.x == 0) plan.walk.next(plan.tiles);
    float* states = shared_memory<float>();
    float* shared_m = states + S::kWarps * kRows * S::kWidth;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int row = warp * kRows + lane / 4 + 8 * h;
      float l = warp_sum(state.l[h], 4);
      if (in_group == 0) {
        shared_m[row] = state.m[h];
        shared_m[S::kWarps * kRows + row] = l;
      }
#pragma unroll
      for (int n = 0; n < S::kWidth / 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          states[row * S::kWidth + column_of<S>(n, e, in_group)] = acc[n][2 * h + e];
    }
    __syncthreads();
    store_rows<S>(p, Block(p, opaque(static_cast<int>(blockIdx.x))), plan);
    __syncthreads();
  } while (p.cuts && plan.walk.start + plan.walk.size > 0);
}

constexpr int kMergeWarps = 4, kMostColumns = 256 / 32;

// out and lse of one row of a sequence that is cut, from its parts: attention over them, with lse for scores
// and out for values. A warp has each kMergeWarps-th part; those without keys are not read.
template <class T>
__global__ void __launch_bounds__(32 * kMergeWarps)
    decode_merge_kernel(const __grid_constant__ DeviceDecode p) {
  float* sums = shared_memory<float>();  // (kMergeWarps, headdim_v)
  int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int parts = static_cast<int>(p.parts), dim = static_cast<int>(p.headdim_v);
  int64_t id = blockIdx.x, head = id % p.nheads, query = id / p.nheads % p.seqlen_q;
  int64_t b = id / p.nheads / p.seqlen_q, slot = b * parts, first_slot = slot;
  if (p.cuts) {
    const int32_t* row = p.cuts + 3 * b;
    b = row[0];
    slot = row[1];
    first_slot = p.parts + slot;
    parts = row[2];
    if (parts == 1) return;
  }
  // Of a part: lse is (slot, head, query), out (slot, query, head).
  auto slot_of = [&](int part) { return part == 0 ? first_slot : slot + part; };
  auto lse_of = [&](int part) { return p.part_lse[(slot_of(part) * p.nheads + head) * p.seqlen_q + query]; };
  float most = -kInfinity, sum = 0.0f;
  for (int part = lane; part < parts; part += 32) most = fmaxf(most, lse_of(part));
  for (int distance = 16; distance > 0; distance /= 2)
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, distance));
  float finite = most == -kInfinity ? 0.0f : most;
  for (int part = lane; part < parts; part += 32) sum += exp2f((lse_of(part) - finite) * kLog2E);
  sum = warp_sum(sum, 32);
  float inverse = sum == 0.0f ? 0.0f : 1.0f / sum, acc[kMostColumns] = {};
#pragma unroll 4
  for (int part = warp; part < parts; part += kMergeWarps) {
    float lse = lse_of(part), weight = exp2f((lse - finite) * kLog2E) * inverse;
    const float* out = p.part_out + ((slot_of(part) * p.seqlen_q + query) * p.nheads + head) * dim;
    bool read = lse != -kInfinity;
#pragma unroll
    for (int c = 0; c < kMostColumns; c++)
      if (read && c * 32 + lane < dim) acc[c] += weight * out[c * 32 + lane];
  }
#pragma unroll
  for (int c = 0; c < kMostColumns; c++)
    if (c * 32 + lane < dim) sums[warp * dim + c * 32 + lane] = acc[c];
  __syncthreads();
  for (int column = static_cast<int>(threadIdx.x); column < dim; column += 32 * kMergeWarps) {
    float x = 0.0f;
#pragma unroll
    for (int w = 0; w < kMergeWarps; w++) x += sums[w * dim + column];
    static_cast<T*>(p.out)[((b * p.seqlen_q + query) * p.nheads + head) * dim + column] = from_float<T>(x);
  }
  if (threadIdx.x == 0)
    p.lse[(b * p.nheads + head) * p.seqlen_q + query] = sum == 0.0f ? -kInfinity : finite + log2f(sum) * kLn2;
}

// All that is compiled, and the table by which a call is served: the first width that holds its rows.
struct Instance {
  int width;
  void (*kernel)(DeviceDecode);
  int threads, tile_keys, shared_bytes;
};
template <class Q, class C, int kDim>
constexpr Instance instance() {
  typedef Shape<Q, C, kDim> S;
  return {kDim, decode_kernel<S>, S::kThreads, S::kKeys, S::kSharedBytes};
}
template <class Q, class C>
const Instance& find(const DeviceDecode& p) {
  static constexpr Instance kInstances[] = {instance<Q, C, 64>(), instance<Q, C, 128>(),
                                            instance<Q, C, 256>()};
  const Instance* found = kInstances;
  while (largest(p.headdim, p.headdim_v) > found->width) found++;
  return *found;
}
template <class Q>
const Instance& find(const DeviceDecode& p) {
  return p.cache_type == CacheType::int8   ? find<Q, s8>(p)
         : p.cache_type == CacheType::e4m3 ? find<Q, e4m3>(p)
                                           : find<Q, Q>(p);
}
const Instance& find(const DeviceDecode& p) {
  return p.dtype == DType::f32 ? find<float>(p) : p.dtype == DType::bf16 ? find<bf16>(p) : find<f16>(p);
}

// Blocks of a part: its heads, and blocks of rows.
int64_t blocks_of(const DeviceDecode& p) {
  return p.nheads_k * largest(divide_up(p.seqlen_q * (p.nheads / p.nheads_k), kRows), 1);
}

// Whether all rows of a cache are whole chunks of 16 bytes, and aligned to that.
bool aligned(const Tensor& cache, int64_t dim, int64_t element_bytes) {
  int64_t all = cache.batch_stride | cache.seq_stride | cache.head_stride | dim;
  return reinterpret_cast<uintptr_t>(cache.data) % 16 == 0 && all * element_bytes % 16 == 0;
}

}  // namespace

int64_t decode_parts(const DeviceDecode& p, int64_t num_splits, int64_t multiprocessors) {
  const Instance& instance = find(p);
  int64_t block_keys = instance.tile_keys * (instance.threads / 32), keys = p.capacity;
  if (p.window_left >= 0)  // no more than these belong to parts
    keys = least(keys, largest(p.window_left + p.seqlen_q, p.seqlen_new) + block_keys);
  int64_t most = largest(divide_up(keys, block_keys), 1);
  if (num_splits > 0) return least(num_splits, most);
  // All that are resident at once; of blocks that do not divide them, the fewest waves that are nine tenths
  // full.
  int64_t blocks = largest(blocks_of(p), 1), slots = kResident * multiprocessors;
  while (slots / blocks * blocks * 10 < slots * 9) slots += kResident * multiprocessors;
  return largest(least(slots / blocks, p.batch * largest(most / kLeastTiles, 1)), 1);
}

std::vector<RangePart> decode_ranges(const std::vector<int64_t>& tiles, int64_t parts) {
  int64_t batch = static_cast<int64_t>(tiles.size()), units = batch;
  if (parts < 1) throw std::invalid_argument("parts: got " + std::to_string(parts) + ", expected 1 or more");
  if (batch == 0) return {};
  for (int64_t n : tiles) units += n;
  const Ranges ranges(units, batch, parts);
  std::vector<RangePart> found;
  for (int64_t range = 0; range < ranges.count; range++) {
    int64_t begin = ranges.begin(range);
    Walk walk{0, begin, ranges.begin(range + 1) - begin};
    do {
      int64_t n = tiles[walk.b];
      if (walk.takes_part(n)) found.push_back({range, walk.b, walk.begin(), walk.end(n)});
    } while (walk.next(tiles[walk.b]));
  }
  return found;
}

void decode(DeviceDecode p, const Queue& queue) {
  if (p.batch == 0 || (p.seqlen_q == 0 && p.seqlen_new == 0)) return;
  const Instance& instance = find(p);
  int64_t element_bytes = p.cache_type != CacheType::same ? 1 : p.dtype == DType::f32 ? 4 : 2;
  p.vectors = aligned(p.k_cache, p.headdim, element_bytes) && aligned(p.v_cache, p.headdim_v, element_bytes);
  auto grid = [](int64_t blocks) { return dim3(grid_size(blocks)); };
  launch(instance.kernel,
         {"decode", grid(blocks_of(p) * (p.cuts ? p.parts : p.batch * p.parts)),
          dim3(static_cast<unsigned>(instance.threads)), instance.shared_bytes},
         queue, p);
  if (p.parts == 1 || p.seqlen_q == 0) return;
  auto merge = p.dtype == DType::f32    ? decode_merge_kernel<float>
               : p.dtype == DType::bf16 ? decode_merge_kernel<bf16>
                                        : decode_merge_kernel<f16>;
  int64_t sequences = p.cuts ? least(p.batch, p.parts) : p.batch;  // that are cut, at most
  launch(merge,
         {"decode_merge", grid(sequences * p.seqlen_q * p.nheads), dim3(32 * kMergeWarps),
          kMergeWarps * static_cast<int>(p.headdim_v) * 4},
         queue, p);
}

}  // namespace fastgpt
