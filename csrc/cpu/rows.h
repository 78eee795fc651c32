// What the kernels that go row by row share: units of rows, and the vectors of one row.

constexpr int64_t kUnitElements = 1 << 14;  // of a unit: a few microseconds, what waking a thread costs
constexpr int kSums = 4;                    // partial sums of a row, so that additions overlap

// Calls body(unit, worker) for every unit; on the calling thread alone where one is enough.
template <class Body>
void parallel_units(int64_t units, int64_t workers, const Body& body) {
  if (workers <= 1) {
    for (int64_t u = 0; u < units; u++) body(u, 0);
    return;
  }
  int64_t unit_counter = 0, worker_counter = 0;
#pragma omp parallel num_threads(workers)
  {
    int64_t worker = next_unit(&worker_counter);
    for (int64_t u; (u = next_unit(&unit_counter)) < units;) body(u, worker);
  }
}

// Calls body(i, n, s) for every vector of a row: its n elements from i on go into partial sum s.
template <class Body>
FASTGPT_INLINE void for_each_vector(int64_t hidden, const Body& body) {
  int64_t i = 0;
  for (; i + kSums * kLanes <= hidden; i += kSums * kLanes)
#pragma GCC unroll 4
    for (int s = 0; s < kSums; s++) body(i + s * kLanes, kLanes, s);
  for (; i + kLanes <= hidden; i += kLanes) body(i, kLanes, 0);
  if (i < hidden) body(i, hidden - i, 0);
}

FASTGPT_INLINE float total(const vf (&sums)[kSums]) {
  return horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Scratch memory for `rows` rows of `width` floats.
inline Rows<float> scratch_rows(int64_t rows, int64_t width) {
  Parts row{nullptr};
  row.take(width);
  Parts parts{scratch(rows * row.size)};
  for (int64_t i = 0; i < rows; i++) parts.take(width);
  return {parts.memory, row.size};
}
