// What only Hopper (sm_90a) has, as functions: barriers that count bytes (mbarrier), the engine that copies
// tiles between global and shared memory (TMA), products of a whole warpgroup (wgmma), registers that move
// from one warpgroup to another. PTX under nvcc, and what it means beside it for the emulator, where copies
// and products happen as late as they may: a copy when its barrier or, of a store, its group is waited for, a
// product when its group is. What they are to write is NaN until then. By a schedule that is drawn, some
// copies happen at once.
#pragma once

#include "device.h"

#ifdef FASTGPT_EMULATE
#include <algorithm>
#include <functional>
#include <map>
#include <vector>
#else
#include <cuda.h>
#endif

namespace fastgpt {

// A tensor of 16-bit numbers of which tiles of 64 columns are copied, in shared memory as wgmma wants them:
// rows of 128 bytes, whose 16-byte chunk c is at c ^ (row % 8). Rows beyond the tensor's are read as 0 and
// not written.
#ifdef FASTGPT_EMULATE
struct alignas(64) TensorMap {
  unsigned char* data;
  int64_t sizes[4], strides[4];  // columns, rows, heads, sequences; strides in bytes
  int rows;                      // of a tile
};
#else
using TensorMap = CUtensorMap;
#endif
constexpr int kTileColumns = 64, kTileRowBytes = 128;

// Throws std::runtime_error where the engine cannot: addresses and strides are multiples of 16 bytes. The
// tensor's device is the current one.
TensorMap make_tensor_map(const Tensor& tensor, DType dtype, int64_t columns, int64_t rows, int64_t heads,
                          int64_t sequences, int tile_rows);

// Where the 16 bytes of row `row` and chunk `chunk` of a tile are, in bytes; tiles begin at multiples of
// 1024.
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  return row * kTileRowBytes + ((chunk ^ (row & 7)) << 4);
}

// A barrier in shared memory: its phase ends when as many threads as it was made for have arrived and all
// bytes that they have announced are there.
struct Mbarrier {
  uint64_t bits;
};

#ifdef FASTGPT_EMULATE
namespace emulated {

struct BarrierState {
  uint16_t threads, missing;
  int32_t bytes_and_phase;  // 2 · bytes that are still missing + phase
};
inline BarrierState& state_of(Mbarrier* barrier, Where where) {
  auto* state = reinterpret_cast<BarrierState*>(barrier);
  if (state->threads == 0xffff) fail(where, "the barrier was not initialized");
  return *state;
}

struct Load {
  int bytes;
  std::function<void()> land;
};
// What a barrier's 8 bytes have no room for.
struct BarrierHistory {
  std::vector<Load> loads;  // on their way
  int ended = 0;            // phases
  int seen[kMaxThreads];  // by each thread, the last phase of which it knows that it has ended; -1 is before
                          // all
  BarrierHistory() { std::fill(std::begin(seen), std::end(seen), -2); }
};
inline std::map<Mbarrier*, BarrierHistory> histories;

struct Store {
  std::function<void()> read;  // empty: it has
  bool committed;
};
inline std::vector<Store> stores[kMaxThreads];  // of which a thread does not know that they have been read

inline void settle(Mbarrier* barrier, BarrierState& state) {
  if (state.missing == 0 && state.bytes_and_phase >> 1 == 0) {
    state.missing = state.threads;
    state.bytes_and_phase ^= 1;
    histories[barrier].ended++;
  }
}
inline void land(Mbarrier* barrier, const Load& load, BarrierState& state) {
  load.land();
  state.bytes_and_phase -= 2 * load.bytes;
  settle(barrier, state);
}
// Begins a copy to shared memory.
inline void begin(Mbarrier* barrier, void* to, const Load& load, Where where) {
  BarrierState& state = state_of(barrier, where);
  auto at = static_cast<unsigned char*>(to) - block.shared;
  if (at < 0 || at + load.bytes > block.shared_bytes) fail(where, "writes beside the block's shared memory");
  std::memset(to, 0xff, load.bytes);
  if (at_once())
    land(barrier, load, state);
  else
    histories[barrier].loads.push_back(load);
}

inline int64_t swizzled(int64_t address) { return address ^ ((address >> 7 & 7) << 4); }

struct Tile {
  const TensorMap* map;
  unsigned char* shared;
  int at[4];  // its first column, row, head and sequence

  int bytes() const { return map->rows * kTileRowBytes; }
  void move(bool store) const {
    for (int r = 0; r < map->rows; r++)
      for (int c = 0; c < kTileColumns; c++) {
        int64_t place[4] = {at[0] + c, at[1] + r, at[2], at[3]}, offset = 0;
        bool inside = true;
        for (int axis = 0; axis < 4; axis++) {
          inside = inside && place[axis] >= 0 && place[axis] < map->sizes[axis];
          offset += place[axis] * map->strides[axis];
        }
        unsigned char* here = block.shared + swizzled(shared - block.shared + r * kTileRowBytes + 2 * c);
        if (store && inside)
          std::memcpy(map->data + offset, here, 2);
        else if (!store && inside)
          std::memcpy(here, map->data + offset, 2);
        else if (!store)
          std::memset(here, 0, 2);
      }
  }
};
inline Tile tile(const TensorMap* map, const void* shared, int column, int row, int head, int sequence,
                 Where where) {
  if (reinterpret_cast<uintptr_t>(shared) % 128) fail(where, "the tile is not aligned to 128 bytes");
  return {map, static_cast<unsigned char*>(const_cast<void*>(shared)), {column, row, head, sequence}};
}

inline const bool has_copies = add_engine(
    [] {
      histories.clear();
      for (auto& own : stores) own.clear();
    },
    []() -> std::string {
      for (const auto& [barrier, history] : histories)
        if (!history.loads.empty()) return "copies to shared memory under way";
      for (const auto& own : stores)
        if (!own.empty()) return "copies from shared memory that were not waited for";
      return "";
    });

}  // namespace emulated

inline void mbarrier_init(Mbarrier* barrier, int threads) {
  emulated::histories[barrier] = {};
  uint16_t n = static_cast<uint16_t>(threads);
  *reinterpret_cast<emulated::BarrierState*>(barrier) = {n, n, 0};
}
inline void mbarrier_arrive(Mbarrier* barrier, FASTGPT_WHERE("mbarrier_arrive")) {
  auto& state = emulated::state_of(barrier, where);
  if (state.missing == 0) emulated::fail(where, "all threads of the barrier have arrived before");
  state.missing--;
  emulated::settle(barrier, state);
}
inline void mbarrier_arrive_expect(Mbarrier* barrier, int bytes, FASTGPT_WHERE("mbarrier_arrive_expect")) {
  emulated::state_of(barrier, where).bytes_and_phase += 2 * bytes;
  mbarrier_arrive(barrier, where);
}
inline void mbarrier_wait(Mbarrier* barrier, int parity, FASTGPT_WHERE("mbarrier_wait")) {
  auto& state = emulated::state_of(barrier, where);
  auto& history = emulated::histories[barrier];
  int& seen = history.seen[emulated::thread->number];
  int phase = seen + ((seen & 1) == parity ? 2 : 1);  // the next one of this parity
  emulated::wait_until(where, [&state, &history, barrier, parity, phase] {
    std::vector<emulated::Load> landing;
    landing.swap(history.loads);
    for (const emulated::Load& load : landing) emulated::land(barrier, load, state);
    return (state.bytes_and_phase & 1) != parity || history.ended > phase + 1;
  });
  if (history.ended > phase + 1)
    emulated::fail(where, "phase " + std::to_string(phase) + " of the barrier has ended, and " +
                              std::to_string(history.ended - 1 - phase) +
                              " after it, before this thread has seen it");
  seen = history.ended - 1;
}
inline void fence_mbarrier_init() {}
inline void fence_proxy_async() { emulated::fence_proxy(); }
inline void store_chunk(void* to, uint4 x, FASTGPT_WHERE("store_chunk")) {
  for (int word = 0; word < 4; word++)
    emulated::wrote(static_cast<unsigned char*>(to) + 4 * word, emulated::thread->number, where);
  std::memcpy(to, &x, sizeof x);
}

inline void tma_load(void* to, const TensorMap* map, Mbarrier* barrier, int column, int row, int head,
                     int sequence, FASTGPT_WHERE("tma_load")) {
  emulated::Tile tile = emulated::tile(map, to, column, row, head, sequence, where);
  emulated::begin(barrier, to, {tile.bytes(), [tile] { tile.move(false); }}, where);
}
inline void bulk_load(void* to, const void* from, int bytes, Mbarrier* barrier, FASTGPT_WHERE("bulk_load")) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | static_cast<uintptr_t>(bytes)) %
      16)
    emulated::fail(where, "an address or the size is no multiple of 16 bytes");
  emulated::begin(barrier, to, {bytes, [=] { std::memcpy(to, from, bytes); }}, where);
}
inline void red_add(float* to, float4 x, FASTGPT_WHERE("red_add")) {
  if (reinterpret_cast<uintptr_t>(to) % 16) emulated::fail(where, "the address is no multiple of 16 bytes");
  to[0] += x.x, to[1] += x.y, to[2] += x.z, to[3] += x.w;
}
inline void tma_store(const TensorMap* map, const void* from, int column, int row, int head, int sequence,
                      FASTGPT_WHERE("tma_store")) {
  emulated::Tile tile = emulated::tile(map, from, column, row, head, sequence, where);
  emulated::expect_fenced(from, tile.bytes(), where);
  emulated::Store store{[tile] { tile.move(true); }, false};
  if (emulated::at_once()) {
    store.read();
    store.read = nullptr;
  }
  emulated::stores[emulated::thread->number].push_back(store);
}
inline void tma_commit() {
  for (auto& store : emulated::stores[emulated::thread->number]) store.committed = true;
}
inline void tma_wait_read() {
  auto& own = emulated::stores[emulated::thread->number];
  for (const auto& store : own)
    if (store.committed && store.read) store.read();
  own.erase(std::remove_if(own.begin(), own.end(), [](const auto& store) { return store.committed; }),
            own.end());
}
inline void prefetch(const TensorMap*) {}

template <int kRegisters>
inline void setmaxnreg_inc() {}
template <int kRegisters>
inline void setmaxnreg_dec() {}

#else

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int threads) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(threads)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Until the phase of this parity, 0 first, has ended; of one that has not begun, returns at once for
// parity 1.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Makes mbarrier_init visible to copies.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// What this thread has written to shared memory is what copies and products that follow a barrier read.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// 16 bytes of shared memory that copies or products are to read.
__device__ __forceinline__ void store_chunk(void* to, uint4 x) { *static_cast<uint4*>(to) = x; }

// A tile that begins at this column and row; the barrier counts its bytes, those beyond the tensor, too.
__device__ __forceinline__ void tma_load(void* to, const TensorMap* map, Mbarrier* barrier, int column,
                                         int row, int head, int sequence) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(sequence)
      : "memory");
}
// So many bytes, in order; they and the addresses are multiples of 16.
__device__ __forceinline__ void bulk_load(void* to, const void* from, int bytes, Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// Adds to four numbers in global memory, at a multiple of 16 bytes, each at once; nothing waits for it.
__device__ __forceinline__ void red_add(float* to, float4 x) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y),
               "f"(x.z), "f"(x.w)
               : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap* map, const void* from, int column, int row,
                                          int head, int sequence) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(shared_address(from)), "r"(column), "r"(row), "r"(head), "r"(sequence)
      : "memory");
}
__device__ __forceinline__ void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until this thread's stores have read shared memory; they may not be seen in global memory yet.
__device__ __forceinline__ void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
#endif

// wgmma's descriptor of an operand in shared memory, in tiles of 64 columns (TensorMap). K-major: rows of the
// operand are rows of the tile. M- or N-major (transposed): its columns are rows of the tile, and the tiles
// of its next 64 rows lie `leading_bytes` on. Groups of 8 rows of a tile, the stride, are 1024 bytes.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading_bytes = 16) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{leading_bytes >> 4} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

// The same operand's, so many bytes on: addresses in shared memory do not carry out of their field.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, int bytes) {
  return descriptor + (bytes >> 4);
}

// Products of a warpgroup, asynchronous: after wgmma_fence, which is needed wherever the program has written
// accumulators or factors in registers, those up to wgmma_commit are a group, and wgmma_wait<n> waits for all
// groups but the last n. Between, the operands and accumulators belong to them. By their operands:
// wgmma_shared has both in shared memory, K-major, wgmma_transposed M- and N-major, wgmma_registers a in
// registers and b N-major.
//
// d (64, N) += a (64, 16) · b (16, N), or d = a · b without `accumulate`. Of d each thread has N / 2
// elements: of rows r = 16 · warp + lane / 4 and r + 8, d[4 i + e] is of row r + 8 (e / 2) and column 8 i + 2
// (lane % 4) + e % 2. a in registers is the same of its 16 columns, two to a register: rows r and r + 8 of
// columns below 8, then of the others.
#ifdef FASTGPT_EMULATE
namespace emulated {

struct Product {
  float* d[kWarpgroup];
  const uint32_t* a[kWarpgroup];  // null: a_matrix
  uint64_t a_matrix, b_matrix;
  int n;
  bool a_transposed, b_transposed, accumulate, is_bf16;
};
struct Products {
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  std::map<float*, std::vector<float>>
      values;  // of accumulators that are NaN meanwhile, by the first thread's
};
inline Products products[kMaxThreads / kWarpgroup];

inline float number(const unsigned char* address, bool is_bf16) {
  uint16_t bits;
  std::memcpy(&bits, address, 2);
  return is_bf16 ? to_float(bf16{bits}) : to_float(f16{bits});
}
// Where element (row, k) of a matrix is.
inline const unsigned char* element(uint64_t matrix, int row, int k, bool transposed) {
  int64_t start = (matrix & 0x3fff) << 4, apart = (matrix >> 16 & 0x3fff) << 4,
          groups = (matrix >> 32 & 0x3fff) << 4;
  int64_t address = transposed ? row / 64 * apart + row % 64 * 2 + k / 8 * groups + k % 8 * 128
                               : row / 8 * groups + row % 8 * 128 + k * 2;
  return block.shared + swizzled(start + address);
}
inline void expect_fenced(uint64_t matrix, int rows, bool transposed, Where where) {
  for (int row = 0; row < rows; row += transposed ? 8 : 1)
    for (int k = 0; k < 16; k += transposed ? 1 : 8)
      expect_fenced(element(matrix, row, k, transposed), 16, where);
}

inline const bool has_products =
    add_engine([] { std::fill(std::begin(products), std::end(products), Products{}); },
               []() -> std::string {
                 for (const Products& own : products)
                   if (!own.open.empty() || !own.groups.empty()) return "products that were not waited for";
                 return "";
               });

inline void compute(Products& own, const Product& p) {
  std::vector<float> b(16 * p.n);
  for (int k = 0; k < 16; k++)
    for (int c = 0; c < p.n; c++)
      b[k * p.n + c] = number(element(p.b_matrix, c, k, p.b_transposed), p.is_bf16);
  std::vector<float>& values = own.values.at(p.d[0]);
  for (int row = 0; row < 64; row++) {
    int warp = row / 16, group = row % 8, half = row % 16 / 8;
    float a[16];
    for (int k = 0; k < 16; k++) {
      if (p.a[0]) {
        uint32_t bits = p.a[32 * warp + 4 * group + k % 8 / 2][half + k / 8 * 2] >> 16 * (k % 2);
        uint16_t low = static_cast<uint16_t>(bits);
        a[k] = p.is_bf16 ? to_float(bf16{low}) : to_float(f16{low});
      } else {
        a[k] = number(element(p.a_matrix, row, k, p.a_transposed), p.is_bf16);
      }
    }
    for (int c = 0; c < p.n; c++) {
      int thread = 32 * warp + 4 * group + c % 8 / 2, at = c / 8 * 4 + half * 2 + c % 2;
      float& d = values[thread * (p.n / 2) + at];
      float sum = p.accumulate ? d : 0.0f;
      for (int k = 0; k < 16; k++) sum += a[k] * b[k * p.n + c];
      d = sum;
    }
  }
}

}  // namespace emulated

template <class T, int N>
void wgmma_issue(float (&d)[N / 2], const uint32_t* a, uint64_t a_matrix, uint64_t b_matrix,
                 bool a_transposed, bool b_transposed, bool accumulate, emulated::Where where) {
  struct Own {
    float* d;
    const uint32_t* a;
  } own{d, a};
  emulated::warpgroup_wide(own, where, [&](Own* const(&threads)[128]) {
    emulated::Products& mine = emulated::products[emulated::thread->number / 128];
    if (!a) emulated::expect_fenced(a_matrix, 64, a_transposed, where);
    emulated::expect_fenced(b_matrix, N, b_transposed, where);
    emulated::Product p{
        {}, {}, a_matrix, b_matrix, N, a_transposed, b_transposed, accumulate, dtype_of<T> == DType::bf16};
    for (int i = 0; i < 128; i++) p.d[i] = threads[i]->d, p.a[i] = threads[i]->a;
    if (!mine.values.count(p.d[0])) {
      std::vector<float>& values = mine.values[p.d[0]];
      values.resize(128 * (N / 2));
      for (int i = 0; i < 128; i++) {
        std::memcpy(&values[i * (N / 2)], p.d[i], sizeof d);
        std::memset(p.d[i], 0xff, sizeof d);
      }
    }
    mine.open.push_back(p);
  });
}
template <class T, int N>
void wgmma_shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, FASTGPT_WHERE("wgmma_shared")) {
  wgmma_issue<T, N>(d, nullptr, a, b, false, false, accumulate, where);
}
template <class T, int N>
void wgmma_transposed(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate,
                      FASTGPT_WHERE("wgmma_transposed")) {
  wgmma_issue<T, N>(d, nullptr, a, b, true, true, accumulate, where);
}
template <class T, int N>
void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                     FASTGPT_WHERE("wgmma_registers")) {
  wgmma_issue<T, N>(d, a, 0, b, false, true, accumulate, where);
}
inline void wgmma_fence() {}
inline void wgmma_commit(FASTGPT_WHERE("wgmma_commit")) {
  int none = 0;
  emulated::warpgroup_wide(none, where, [](int* const(&)[128]) {
    emulated::Products& mine = emulated::products[emulated::thread->number / 128];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
  });
}
template <int kLeft>
void wgmma_wait(FASTGPT_WHERE("wgmma_wait")) {
  int none = 0;
  emulated::warpgroup_wide(none, where, [](int* const(&)[128]) {
    emulated::Products& mine = emulated::products[emulated::thread->number / 128];
    while (mine.groups.size() > kLeft) {
      for (const emulated::Product& p : mine.groups.front()) emulated::compute(mine, p);
      std::vector<emulated::Product> done = std::move(mine.groups.front());
      mine.groups.erase(mine.groups.begin());
      for (const emulated::Product& p : done) {
        bool busy = false;
        for (const auto& group : mine.groups)
          for (const emulated::Product& other : group) busy |= other.d[0] == p.d[0];
        auto values = mine.values.find(p.d[0]);
        if (busy || values == mine.values.end()) continue;
        for (int i = 0; i < 128; i++)
          std::memcpy(p.d[i], &values->second[i * (p.n / 2)], p.n / 2 * sizeof(float));
        mine.values.erase(values);
      }
    }
  });
}
template <int N>
void wgmma_done(float (&)[N]) {}

inline uint32_t operand_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulated::block.shared);
}
#else
__device__ __forceinline__ uint32_t operand_address(const void* pointer) { return shared_address(pointer); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// After a wait: the compiler must not have read the accumulators before it.
template <int N>
__device__ __forceinline__ void wgmma_done(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define FASTGPT_8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTGPT_32(i) FASTGPT_8(i), FASTGPT_8(i + 8), FASTGPT_8(i + 16), FASTGPT_8(i + 24)
#define FASTGPT_NAMES_32                                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTGPT_NAMES_64                                                                                   \
  FASTGPT_NAMES_32                                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTGPT_NAMES_128                                                                                  \
  FASTGPT_NAMES_64                                                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, "                                                                                                  \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, "    \
  "%104, "                                                                                                 \
  "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, " \
  "%122, %123, %124, %125, %126, %127"

// n and the types of a and b; the names of d; those of the operands after it; and their values.
#define FASTGPT_WGMMA(n, type, d_names, operands, scale, trailing, ...)                          \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " scale                       \
               ", 0;\n"                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type " {" d_names "}, " operands \
               ", accumulate, 1, 1" trailing ";\n}"                                              \
               : __VA_ARGS__)

// a and b K-major, in shared memory.
template <class T, int N>
__device__ __forceinline__ void wgmma_shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  int scale = accumulate;
  constexpr bool is_bf16 = dtype_of<T> == DType::bf16;
  static_assert(N == 64 || N == 128);
#define FASTGPT_SHARED(type)                                                                                 \
  if constexpr (N == 64)                                                                                     \
    FASTGPT_WGMMA("64", type, FASTGPT_NAMES_32, "%32, %33", "%34", ", 0, 0", FASTGPT_32(0) : "l"(a), "l"(b), \
                  "r"(scale));                                                                               \
  else                                                                                                       \
    FASTGPT_WGMMA("128", type, FASTGPT_NAMES_64, "%64, %65", "%66", ", 0, 0", FASTGPT_32(0),                 \
                  FASTGPT_32(32) : "l"(a), "l"(b), "r"(scale))
  if constexpr (is_bf16) {
    FASTGPT_SHARED("bf16.bf16");
  } else {
    FASTGPT_SHARED("f16.f16");
  }
#undef FASTGPT_SHARED
}

// a M-major and b N-major, in shared memory.
template <class T, int N>
__device__ __forceinline__ void wgmma_transposed(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  int scale = accumulate;
  static_assert(N == 64);
#define FASTGPT_ACROSS(type)                                                                               \
  FASTGPT_WGMMA("64", type, FASTGPT_NAMES_32, "%32, %33", "%34", ", 1, 1", FASTGPT_32(0) : "l"(a), "l"(b), \
                "r"(scale))
  if constexpr (dtype_of<T> == DType::bf16) {
    FASTGPT_ACROSS("bf16.bf16");
  } else {
    FASTGPT_ACROSS("f16.f16");
  }
#undef FASTGPT_ACROSS
}

// a in registers, b N-major in shared memory.
template <class T, int N>
__device__ __forceinline__ void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                                bool accumulate) {
  int scale = accumulate;
  constexpr bool is_bf16 = dtype_of<T> == DType::bf16;
  static_assert(N == 64 || N == 128 || N == 256);
#define FASTGPT_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define FASTGPT_REGISTERS(type)                                                                            \
  if constexpr (N == 64)                                                                                   \
    FASTGPT_WGMMA("64", type, FASTGPT_NAMES_32, "{%32, %33, %34, %35}, %36", "%37", ", 1",                 \
                  FASTGPT_32(0) : FASTGPT_A, "l"(b), "r"(scale));                                          \
  else if constexpr (N == 128)                                                                             \
    FASTGPT_WGMMA("128", type, FASTGPT_NAMES_64, "{%64, %65, %66, %67}, %68", "%69", ", 1", FASTGPT_32(0), \
                  FASTGPT_32(32) : FASTGPT_A, "l"(b), "r"(scale));                                         \
  else                                                                                                     \
    FASTGPT_WGMMA("256", type, FASTGPT_NAMES_128, "{%128, %129, %130, %131}, %132", "%133", ", 1",         \
                  FASTGPT_32(0), FASTGPT_32(32), FASTGPT_32(64), FASTGPT_32(96) : FASTGPT_A, "l"(b),       \
                  "r"(scale))
  if constexpr (is_bf16) {
    FASTGPT_REGISTERS("bf16.bf16");
  } else {
    FASTGPT_REGISTERS("f16.f16");
  }
#undef FASTGPT_REGISTERS
#undef FASTGPT_A
}
#undef FASTGPT_WGMMA
#undef FASTGPT_NAMES_128
#undef FASTGPT_NAMES_64
#undef FASTGPT_NAMES_32
#undef FASTGPT_32
#undef FASTGPT_8
#endif

}  // namespace fastgpt
