// The random bits of dropout, kLanes counters of philox.h at a time.

struct MultiplyLanes {
  static FASTGPT_INLINE void wide(vu a, uint32_t m, vu& high, vu& low) {
    low = a * m;
#if defined(__AVX512F__)
    __m512i factor = _mm512_set1_epi32(static_cast<int>(m));
    __m512i even = _mm512_mul_epu32((__m512i)a, factor);
    __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
    high = (vu)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
    __m256i factor = _mm256_set1_epi32(static_cast<int>(m));
    __m256i even = _mm256_mul_epu32((__m256i)a, factor);
    __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
    high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
    for (int i = 0; i < kLanes; i++) high[i] = static_cast<uint32_t>((static_cast<uint64_t>(a[i]) * m) >> 32);
#endif
  }
};

// 1 where dropout keeps elements [first, first + 4 kLanes) of a row, else 0. The row is words c1 and c2 of
// the counter; first is a multiple of 4.
FASTGPT_INLINE void keep_elements(const Dropout& p, int64_t first, uint32_t c1, uint32_t c2, vf (&keep)[4]) {
  typename MakeLanes<kLanes>::type lanes;
  vu words[4] = {(vu)(lane_index() + static_cast<int32_t>(first / 4)), vu{} + c1, vu{} + c2,
                 vu{} + p.dropout_offset};
  philox<MultiplyLanes>(words, static_cast<uint32_t>(p.dropout_seed),
                        static_cast<uint32_t>(p.dropout_seed >> 32));
  // Word w of lane l belongs to element 4 l + w.
  vf w0 = (vf)words[0], w1 = (vf)words[1], w2 = (vf)words[2], w3 = (vf)words[3];
  vf even_low = interleave_low(w0, w2, lanes), even_high = interleave_high(w0, w2, lanes);
  vf odd_low = interleave_low(w1, w3, lanes), odd_high = interleave_high(w1, w3, lanes);
  vf elements[4] = {interleave_low(even_low, odd_low, lanes), interleave_high(even_low, odd_low, lanes),
                    interleave_low(even_high, odd_high, lanes), interleave_high(even_high, odd_high, lanes)};
  for (int v = 0; v < 4; v++) keep[v] = (vu)elements[v] >= p.dropout_threshold ? splat(1.0f) : vf{};
}
