// The vector type of one instruction set, on the compiler's vector extension: arithmetic is plain
// operators, and a * b + c becomes a fused multiply-add (-ffp-contract=fast). Included inside
// kernels.cpp's anonymous namespace, so nothing compiled here can be merged with another set's copy.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#define FASTGPT_INLINE inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef float vf_unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));
typedef uint32_t vu_unaligned __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef int8_t vb_unaligned __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef uint8_t vub_unaligned __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {  // torch.float8_e4m3fn: 4 bits of exponent, 3 of fraction, no infinity
  uint8_t bits;
};

constexpr float kInf = __builtin_inff();

FASTGPT_INLINE vf splat(float x) { return x - vf{}; }  // vf{} + x would turn -0 into 0

FASTGPT_INLINE vi lane_index() {
  vi index;
  for (int i = 0; i < kLanes; i++) index[i] = i;
  return index;
}

// --- loads and stores, converting to and from fp32 (round to nearest even) ---

FASTGPT_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
FASTGPT_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }

FASTGPT_INLINE vf load(const bf16* p) {
  // GCC 12 splits the generic conversion into halves.
#if defined(__AVX512F__)
  vu wide = (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  vu wide = (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vu wide = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vu);
#endif
  return (vf)(wide << 16);
}
FASTGPT_INLINE void store(bf16* p, vf x) {
  vu u = (vu)x;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu bits = x == x ? rounded : (u >> 16) | 0x40u;  // NaN stays NaN
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(bits, vh);
}

#if defined(__AVX512F__)
FASTGPT_INLINE vf load(const f16* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTGPT_INLINE void store(f16* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
FASTGPT_INLINE vf load(const f16* p) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FASTGPT_INLINE void store(f16* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__aarch64__)
FASTGPT_INLINE vf load(const f16* p) {
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
FASTGPT_INLINE void store(f16* p, vf x) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
}
#else
// No conversion instruction: the exponent is moved by a multiplication. Not of subnormals: the processor may
// take them for 0.
FASTGPT_INLINE vf load(const f16* p) {
  vu h = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vu);
  vu sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  vf small = __builtin_convertvector((vi)magnitude, vf) * 0x1p-24f;
  vf scaled = (vi)magnitude < 0x400 ? small : (vf)(magnitude << 13) * 0x1p112f;
  vu special = (magnitude << 13) | 0x7f800000u;
  return (vf)(((vi)magnitude >= 0x7c00 ? special : (vu)scaled) | sign);
}
FASTGPT_INLINE void store(f16* p, vf x) {
  vu u = (vu)x, sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  vu rebased = magnitude - (112u << 23);
  vu normal = (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13;
  vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;  // the adder rounds at 2^-24
  vu finite = (vi)magnitude < 0x38800000 ? subnormal : normal;
  finite = (vi)magnitude >= 0x477ff000 ? vu{} + 0x7c00u : finite;  // rounds to infinity
  vu bits = (vi)magnitude > 0x7f800000 ? vu{} + 0x7e00u : finite;
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(bits | sign, vh);
}
#endif

// What quantised caches store; the scale is applied elsewhere.
FASTGPT_INLINE vf load(const int8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const vb_unaligned*>(p), vi), vf);
#endif
}
FASTGPT_INLINE vf load(const e4m3* p) {
#if defined(__AVX512F__)
  vu bits = (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  vu bits = (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  vu bits = __builtin_convertvector(*reinterpret_cast<const vub_unaligned*>(p), vu);
#endif
  vu magnitude = bits & 0x7fu;
  // The exponent is moved by a multiplication. Not of subnormals: the processor may take them for 0.
  vf small = __builtin_convertvector((vi)magnitude, vf) * 0x1p-9f;
  vf x = (vi)magnitude < 8 ? small : (vf)(magnitude << 20) * 0x1p120f;
  vu result = (vu)x | ((bits & 0x80u) << 24);
  return (vf)(magnitude == 0x7fu ? result | 0x7fc00000u : result);
}
// Rounded to nearest even, saturated.
FASTGPT_INLINE void quantise(int8_t* p, float x) {
  float bounded = x > 127.0f ? 127.0f : x < -127.0f ? -127.0f : x;
  *p = static_cast<int8_t>(x == x ? __builtin_nearbyintf(bounded) : 0.0f);
}
FASTGPT_INLINE void quantise(e4m3* p, float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof(u));
  uint32_t sign = u >> 24 & 0x80u;
  float size = __builtin_fabsf(x);
  if (!(size < 448.0f)) {
    p->bits = static_cast<uint8_t>(sign | (x == x ? 0x7eu : 0x7fu));
  } else if (size < 0x1p-6f) {
    p->bits = static_cast<uint8_t>(sign | static_cast<uint32_t>(__builtin_nearbyintf(size * 0x1p9f)));
  } else {
    u &= 0x7fffffffu;
    u += 0x7ffffu + (u >> 20 & 1u);
    p->bits = static_cast<uint8_t>(sign | ((u >> 20) - (120u << 3)));
  }
}

// Vectors of a type that are loaded together, in an order of its own: of bf16 the even elements of two, then
// the odd ones. That is one load and two instructions, where widening takes two loads and four.
template <class T>
constexpr int kTogether = 1;
template <>
constexpr int kTogether<bf16> = 2;

template <class T>
FASTGPT_INLINE void load_together(const T* p, vf (&x)[1]) {
  x[0] = load(p);
}
FASTGPT_INLINE void load_together(const bf16* p, vf (&x)[2]) {
  vu words = *reinterpret_cast<const vu_unaligned*>(p);
  x[0] = (vf)(words << 16);
  x[1] = (vf)(words & 0xffff0000u);
}

// The first n < kLanes elements; the missing lanes are zero and their memory is not touched.
template <class T>
FASTGPT_INLINE vf load_first(const T* p, int64_t n) {
  T padded[kLanes] = {};
  __builtin_memcpy(padded, p, n * sizeof(T));
  return load(padded);
}
template <class T>
FASTGPT_INLINE void store_first(T* p, vf x, int64_t n) {
  T padded[kLanes];
  store(padded, x);
  __builtin_memcpy(p, padded, n * sizeof(T));
}
template <class T>
FASTGPT_INLINE vf load_upto(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, n);
}
template <class T>
FASTGPT_INLINE void store_upto(T* p, vf x, int64_t n) {
  if (n >= kLanes)
    store(p, x);
  else
    store_first(p, x, n);
}

FASTGPT_INLINE void fill_zero(float* p, int64_t n) { __builtin_memset(p, 0, n * sizeof(float)); }

// --- arithmetic ---

// Of NaN and a number: the NaN when it is b, the number when it is a.
FASTGPT_INLINE vf max(vf a, vf b) { return a > b ? a : b; }

// 2^x for x <= 128, relative error below 8e-8 (1.04e-7 without fused multiply-add), exactly 1 at 0 and
// exactly 0 below -150; NaN stays NaN.
FASTGPT_INLINE vf exp2(vf x) {
#if defined(__AVX512F__)
  // x - round(x), 0 at -inf.
  vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = max(splat(-126.0f), x);
  vf n = (x + 0x1.8p23f) - 0x1.8p23f;
  vf r = x - n;
#endif
  // Minimax polynomial of 2^r on [-1/2, 1/2].
  vf p = r * 0x1.41d334p-13f + 0x1.5f456ap-10f;
  p = p * r + 0x1.3b2dbcp-7f;
  p = p * r + 0x1.c6aed4p-5f;
  p = p * r + 0x1.ebfbdap-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  // p 2^round(x).
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)(x - r));
#else
  // Below 2^-126 the result is flushed to zero; the exponent is added in two halves because n may be 128.
  vi half = __builtin_convertvector(n, vi) >> 1, rest = __builtin_convertvector(n, vi) - half;
  vf scaled = p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
  return x == -126.0f ? vf{} : scaled;
#endif
}

// tanh(x), relative error below 4e-7; NaN stays NaN.
FASTGPT_INLINE vf tanh(vf x) {
  vf size = (vf)((vu)x & 0x7fffffffu), square = x * x;
  // Minimax polynomial of (tanh(x) - x) / x^3 in x^2 on [0, 0.625] (Cephes, Moshier 1989).
  vf p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  vf small = x + x * square * p;
  vf bounded = size > 10.0f ? splat(10.0f) : size;  // where tanh is 1
  vf large = 1.0f - 2.0f / (exp2(bounded * 2.88539008177792681472f) + 1.0f);
  return size < 0.625f ? small : (vf)((vu)large | ((vu)x & 0x80000000u));
}

// --- shuffles ---

template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  typedef Lanes<I...> type;
};

template <int... I>
FASTGPT_INLINE vf interleave_low(vf a, vf b, Lanes<I...>) {
  return __builtin_shuffle(a, b, vi{(I % 2 * kLanes + I / 2)...});
}
template <int... I>
FASTGPT_INLINE vf interleave_high(vf a, vf b, Lanes<I...>) {
  return __builtin_shuffle(a, b, vi{(I % 2 * kLanes + kLanes / 2 + I / 2)...});
}

// Vectors of what load_together has loaded, put in the order of memory.
template <class T>
FASTGPT_INLINE void in_order(vf (&x)[kTogether<T>]) {
  if constexpr (kTogether<T> == 2) {
    typename MakeLanes<kLanes>::type lanes;
    vf even = x[0], odd = x[1];
    x[0] = interleave_low(even, odd, lanes);
    x[1] = interleave_high(even, odd, lanes);
  }
}

// Lanes 0, 1 of every quad of a and b in turn, or 2, 3 of them; even quads of a, then of b, or odd ones. In
// this order each is one cheap instruction, where the halves of whole vectors are not.
template <int kFirst, int... I>
FASTGPT_INLINE vf interleave_quads(vf a, vf b, Lanes<I...>) {
  return __builtin_shuffle(a, b, vi{(I % 2 * kLanes + I / 4 * 4 + kFirst + I % 4 / 2)...});
}
template <int kFirst, int... I>
FASTGPT_INLINE vf every_other_quad(vf a, vf b, Lanes<I...>) {
  return __builtin_shuffle(a, b, vi{((2 * (I / 4) + kFirst) * 4 + I % 4)...});
}

// Lane i is the sum of x[i].
FASTGPT_INLINE vf sums(vf (&x)[kLanes]) {
  typename MakeLanes<kLanes>::type lanes;
  auto fold = [&](vf a, vf b) { return interleave_quads<0>(a, b, lanes) + interleave_quads<2>(a, b, lanes); };
  vf quads[kLanes / 4];  // [i]: the sums of x[4 i] to x[4 i + 3] over each quad of lanes
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 4; i++)
    quads[i] = fold(fold(x[4 * i], x[4 * i + 2]), fold(x[4 * i + 1], x[4 * i + 3]));
#pragma GCC unroll 4
  for (int n = kLanes / 8; n > 0; n /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < n; i++)
      quads[i] = every_other_quad<0>(quads[2 * i], quads[2 * i + 1], lanes) +
                 every_other_quad<1>(quads[2 * i], quads[2 * i + 1], lanes);
  return quads[0];
}

template <int kDistance, int... I>
FASTGPT_INLINE vf add_lanes(vf x, Lanes<I...>) {
  return x + __builtin_shuffle(x, vi{(I ^ kDistance)...});
}

FASTGPT_INLINE float horizontal_sum(vf x) {
  typename MakeLanes<kLanes>::type lanes;
  if constexpr (kLanes > 8) x = add_lanes<8>(x, lanes);
  if constexpr (kLanes > 4) x = add_lanes<4>(x, lanes);
  return add_lanes<1>(add_lanes<2>(x, lanes), lanes)[0];
}

template <int kDistance, int... I>
FASTGPT_INLINE vf max_lanes(vf x, Lanes<I...>) {
  return max(x, __builtin_shuffle(x, vi{(I ^ kDistance)...}));
}

// NaN, or the largest of the numbers, where x has both.
FASTGPT_INLINE float horizontal_max(vf x) {
  typename MakeLanes<kLanes>::type lanes;
  if constexpr (kLanes > 8) x = max_lanes<8>(x, lanes);
  if constexpr (kLanes > 4) x = max_lanes<4>(x, lanes);
  return max_lanes<1>(max_lanes<2>(x, lanes), lanes)[0];
}

// Transposes a kLanes x kLanes block in place: log2(kLanes) rounds of perfect shuffles.
FASTGPT_INLINE void transpose(vf (&rows)[kLanes]) {
  typename MakeLanes<kLanes>::type lanes;
  for (int round = 1; round < kLanes; round *= 2) {
    vf shuffled[kLanes];
    for (int i = 0; i < kLanes / 2; i++) {
      shuffled[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2], lanes);
      shuffled[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2], lanes);
    }
    for (int i = 0; i < kLanes; i++) rows[i] = shuffled[i];
  }
}
