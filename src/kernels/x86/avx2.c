/* The kernels for AVX2 with FMA and F16C: 8 lanes, 16 registers. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "../simd_common.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define REAL float
#define VW 8
typedef __m256 V;

static const int32_t lane_masks[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
static inline __m256i first_lanes(int64_t n) { return _mm256_loadu_si256((const void *)(lane_masks + 8 - n)); }
static inline V v_set1(float x) { return _mm256_set1_ps(x); }
static inline V v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, V v) { _mm256_storeu_ps(p, v); }
/* n in 1 … VW; the other lanes are zero */
static inline V v_loadn(const float *p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
static inline void v_storen(float *p, V v, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), v); }
static inline V v_fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
/* The second operand when either is NaN. */
static inline V v_min(V a, V b) { return _mm256_min_ps(a, b); }
static inline V v_max(V a, V b) { return _mm256_max_ps(a, b); }
static inline V v_abs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline V v_copysign(V a, V sign)
{
    V mask = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(mask, a), _mm256_and_ps(mask, sign));
}
static inline V v_select_less(V a, V b, V yes, V no)
{
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
static inline V v_round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* a · 2^n for |n| < 250, in two steps so that subnormal results and overflow come out right */
static inline V v_scale2(V a, V n)
{
    __m256i e = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(e, 1), rest = _mm256_sub_epi32(e, half);
    __m256i one = _mm256_set1_epi32(127);
    V x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23));
    V y = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23));
    return _mm256_mul_ps(_mm256_mul_ps(a, x), y);
}
static inline float v_sum(V a)
{
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
static inline float v_highest(V a)
{
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}

/* Four sums at once. */
static inline void v_sum4(const V *a, float *out)
{
    V t = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}

static inline void v_transpose(V r[8])
{
    V t[8];
    UNROLL for (int i = 0; i < 8; i += 4) /* 4 × 4 within each 128 bits */
    {
        V a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
        V c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
        t[i] = _mm256_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
    }
    UNROLL for (int i = 0; i < 4; i++)
    {
        r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
}

static inline V v_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
static inline V v_load_bf16(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline void v_store_f16(uint16_t *p, V v)
{
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void v_store_bf16(uint16_t *p, V v)
{
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    V nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    V chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
    __m256i high = _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128((void *)p, _mm256_castsi256_si128(packed));
}

/* Philox (core/rng.c) for four blocks at once, a word in the low half of each 64-bit lane: the high halves hold what is
 * left of products and are never looked at. */
static void isa_keep(pc_rng rng, uint64_t first, int64_t n, double p, float *keep)
{
    const __m256i m0 = _mm256_set1_epi64x(PC_PHILOX_M0), m1 = _mm256_set1_epi64x(PC_PHILOX_M1);
    const __m256i half = _mm256_set1_epi64x(0xFFFFFFFF), below = _mm256_set1_epi32((int)pc_rng_least(p) - 1);
    const __m256 one = _mm256_set1_ps(1.0f);
    for (int64_t at = 0; at < n; at += 16) {
        __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x((int64_t)(first / 4) + at / 4), _mm256_setr_epi64x(0, 1, 2, 3));
        __m256i c1 = _mm256_srli_epi64(c0, 32), c2 = _mm256_set1_epi64x((int64_t)rng.stream);
        __m256i c3 = _mm256_srli_epi64(c2, 32);
        uint32_t k0 = (uint32_t)rng.seed, k1 = (uint32_t)(rng.seed >> 32);
        for (int round = 0; round < PC_PHILOX_ROUNDS; round++) {
            const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
            c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
            c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
            c1 = p1;
            c3 = p0;
            k0 += PC_PHILOX_W0;
            k1 += PC_PHILOX_W1;
        }
        const __m256i a = _mm256_or_si256(_mm256_and_si256(c0, half), _mm256_slli_epi64(c1, 32));
        const __m256i b = _mm256_or_si256(_mm256_and_si256(c2, half), _mm256_slli_epi64(c3, 32));
        const __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b); /* blocks 0, 2 and 1, 3 */
        const __m256i words[2] = {_mm256_permute2x128_si256(even, odd, 0x20), _mm256_permute2x128_si256(even, odd, 0x31)};
        for (int i = 0; i < 2 && at + 8 * i < n; i++) {
            const __m256i kept = _mm256_cmpgt_epi32(_mm256_srli_epi32(words[i], 8), below);
            const V values = _mm256_and_ps(_mm256_castsi256_ps(kept), one);
            const int64_t left = n - at - 8 * i;
            if (left >= 8)
                v_store(keep + at + 8 * i, values);
            else
                v_storen(keep + at + 8 * i, values, left);
        }
    }
}

#define TILE_ROWS 4
#define MAX_VECTORS 3
#define DEFINE_TILES                                                                                                   \
    DEFINE_TILE(4, 1)                                                                                                  \
    DEFINE_TILE(4, 2)                                                                                                  \
    DEFINE_TILE(4, 3)                                                                                                  \
    DEFINE_TILE(1, 1)                                                                                                  \
    DEFINE_TILE(1, 2)                                                                                                  \
    DEFINE_TILE(1, 3)                                                                                                  \
    static const tile_fn tiles[MAX_VECTORS] = {tile_4_1, tile_4_2, tile_4_3};                                          \
    static const tile_fn single[MAX_VECTORS] = {tile_1_1, tile_1_2, tile_1_3};
#define ROW_OPS_NAME row_ops
#define TABLE_NAME pc_table_avx2
#define TABLE_TEXT "avx2"

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
