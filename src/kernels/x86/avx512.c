/* The kernels for AVX-512 (F, BW, DQ, VL): 16 lanes, 32 registers. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "../simd_common.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))),              \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define REAL float
#define VW 16
typedef __m512 V;

static inline __mmask16 first_lanes(int64_t n) { return (__mmask16)((1u << n) - 1u); }
static inline V v_set1(float x) { return _mm512_set1_ps(x); }
static inline V v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, V v) { _mm512_storeu_ps(p, v); }
/* n in 1 … VW; the other lanes are zero */
static inline V v_loadn(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
static inline void v_storen(float *p, V v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
static inline V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
/* The second operand when either is NaN. */
static inline V v_min(V a, V b) { return _mm512_min_ps(a, b); }
static inline V v_max(V a, V b) { return _mm512_max_ps(a, b); }
static inline V v_abs(V a) { return _mm512_abs_ps(a); }
static inline V v_copysign(V a, V sign)
{
    __m512i mask = _mm512_set1_epi32((int)0x80000000u);
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(mask, _mm512_castps_si512(sign), _mm512_castps_si512(a), 0xCA));
}
static inline V v_select_less(V a, V b, V yes, V no)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
static inline V v_round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V v_scale2(V a, V n) { return _mm512_scalef_ps(a, n); } /* a · 2^n */
static inline float v_sum(V a) { return _mm512_reduce_add_ps(a); }
static inline float v_highest(V a) { return _mm512_reduce_max_ps(a); }

/* Four sums at once. */
static inline void v_sum4(const V *a, float *out)
{
    V t0 = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    V t1 = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    V t = _mm512_add_ps(_mm512_shuffle_ps(t0, t1, 0x44), _mm512_shuffle_ps(t0, t1, 0xEE));
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(t), _mm512_extractf32x8_ps(t, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}

static inline void v_transpose(V r[16])
{
    V t[16];
    UNROLL for (int i = 0; i < 16; i += 4) /* 4 × 4 within each 128 bits */
    {
        V a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
        V c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
        t[i] = _mm512_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm512_shuffle_ps(a, c, 0xEE);
        t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm512_shuffle_ps(b, d, 0xEE);
    }
    UNROLL for (int i = 0; i < 4; i++) /* then 4 × 4 of those */
    {
        V a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xDD);
        V c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xDD);
        r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
        r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
        r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
    }
}

static inline V v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
static inline V v_load_bf16(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
/* n in 1 … VW; the other lanes are zero */
#define LOADN_16_BITS
static inline V loadn_f16(const uint16_t *p, int64_t n)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
static inline V loadn_bf16(const uint16_t *p, int64_t n)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline void v_store_f16(uint16_t *p, V v)
{
    _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void v_store_bf16(uint16_t *p, V v)
{
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
    __m512i chosen = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, quiet);
    _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}

/* Philox (core/rng.c) for eight blocks at once, a word in the low half of each 64-bit lane: the high halves hold what is
 * left of products and are never looked at. */
static void isa_keep(pc_rng rng, uint64_t first, int64_t n, double p, float *keep)
{
    const __m512i m0 = _mm512_set1_epi64(PC_PHILOX_M0), m1 = _mm512_set1_epi64(PC_PHILOX_M1);
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    const __m512i half = _mm512_set1_epi64(0xFFFFFFFF), least = _mm512_set1_epi32((int)pc_rng_least(p));
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int64_t at = 0; at < n; at += 32) {
        __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64((int64_t)(first / 4) + at / 4),
                                      _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
        __m512i c1 = _mm512_srli_epi64(c0, 32), c2 = _mm512_set1_epi64((int64_t)rng.stream), c3 = _mm512_srli_epi64(c2, 32);
        uint32_t k0 = (uint32_t)rng.seed, k1 = (uint32_t)(rng.seed >> 32);
        for (int round = 0; round < PC_PHILOX_ROUNDS; round++) {
            const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
            c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96);
            c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
            c1 = p1;
            c3 = p0;
            k0 += PC_PHILOX_W0;
            k1 += PC_PHILOX_W1;
        }
        const __m512i a = _mm512_or_si512(_mm512_and_si512(c0, half), _mm512_slli_epi64(c1, 32));
        const __m512i b = _mm512_or_si512(_mm512_and_si512(c2, half), _mm512_slli_epi64(c3, 32));
        const __m512i words[2] = {_mm512_permutex2var_epi64(a, low, b), _mm512_permutex2var_epi64(a, high, b)};
        for (int i = 0; i < 2 && at + 16 * i < n; i++) {
            const int64_t left = n - at - 16 * i;
            const __mmask16 kept = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(words[i], 8), least);
            const __mmask16 there = (__mmask16)(left >= 16 ? 0xFFFFu : (1u << left) - 1u);
            _mm512_mask_storeu_ps(keep + at + 16 * i, there, _mm512_maskz_mov_ps(kept, one));
        }
    }
}

#define TILE_ROWS 8
#define MAX_VECTORS 3
#define DEFINE_TILES                                                                                                   \
    DEFINE_TILE(8, 1)                                                                                                  \
    DEFINE_TILE(8, 2)                                                                                                  \
    DEFINE_TILE(8, 3)                                                                                                  \
    DEFINE_TILE(1, 1)                                                                                                  \
    DEFINE_TILE(1, 2)                                                                                                  \
    DEFINE_TILE(1, 3)                                                                                                  \
    static const tile_fn tiles[MAX_VECTORS] = {tile_8_1, tile_8_2, tile_8_3};                                          \
    static const tile_fn single[MAX_VECTORS] = {tile_1_1, tile_1_2, tile_1_3};
#define ROW_OPS_NAME row_ops
#define TABLE_NAME pc_table_avx512
#define TABLE_TEXT "avx512"

#include "../simd_math.h"
#include "../simd_rows.h"
#include "../simd_widen.h"
#include "../simd_products.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
