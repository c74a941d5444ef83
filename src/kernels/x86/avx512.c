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
