/* The kernels for any CPU: vectors of four floats in the compiler's own notation, which it maps to SSE2, NEON or
 * plain scalars. */
#include "simd_common.h"

#define REAL float
#define VW 4
typedef float V __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));

static inline V v_set1(float x) { return (V){x, x, x, x}; }
static inline V v_load(const float *p)
{
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void v_store(float *p, V v) { memcpy(p, &v, sizeof v); }
/* n in 1 … VW; the other lanes are zero */
static inline V v_loadn(const float *p, int64_t n)
{
    V v = {0, 0, 0, 0};
    for (int64_t i = 0; i < n; i++)
        v[i] = p[i];
    return v;
}
static inline void v_storen(float *p, V v, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        p[i] = v[i];
}
static inline V v_fma(V a, V b, V c) { return a * b + c; }
static inline V v_select(VI mask, V yes, V no) { return (V)((mask & (VI)yes) | (~mask & (VI)no)); }
/* The second operand when either is NaN. */
static inline V v_min(V a, V b) { return v_select((VI)(a < b), a, b); }
static inline V v_max(V a, V b) { return v_select((VI)(a > b), a, b); }
static inline V v_abs(V a) { return (V)((VI)a & 0x7FFFFFFF); }
static inline V v_copysign(V a, V sign) { return (V)(((VI)a & 0x7FFFFFFF) | ((VI)sign & ~0x7FFFFFFF)); }
static inline V v_select_less(V a, V b, V yes, V no) { return v_select((VI)(a < b), yes, no); }
/* For |a| < 2^22; NaN stays NaN. */
static inline V v_round(V a)
{
    const V magic = v_set1(0x1.8p+23f);
    return (a + magic) - magic;
}
/* a · 2^n for |n| < 250, in two steps so that subnormal results and overflow come out right */
static inline V v_scale2(V a, V n)
{
    V x = a, y = a;
    for (int i = 0; i < VW; i++) {
        int32_t e = n[i] == n[i] ? (int32_t)n[i] : 0, half = e / 2;
        uint32_t low = (uint32_t)(half + 127) << 23, high = (uint32_t)(e - half + 127) << 23;
        float f;
        memcpy(&f, &low, sizeof f);
        x[i] = f;
        memcpy(&f, &high, sizeof f);
        y[i] = f;
    }
    return a * x * y;
}
static inline float v_sum(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }
static inline float v_highest(V a)
{
    float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
}

/* Four sums at once. */
static inline void v_sum4(const V *a, float *out)
{
    for (int i = 0; i < 4; i++)
        out[i] = v_sum(a[i]);
}

static inline void v_transpose(V r[4])
{
    V a = r[0], b = r[1], c = r[2], d = r[3];
    r[0] = (V){a[0], b[0], c[0], d[0]};
    r[1] = (V){a[1], b[1], c[1], d[1]};
    r[2] = (V){a[2], b[2], c[2], d[2]};
    r[3] = (V){a[3], b[3], c[3], d[3]};
}

static inline V v_load_f16(const uint16_t *p)
{
    return (V){pc_f16_to_f32(p[0]), pc_f16_to_f32(p[1]), pc_f16_to_f32(p[2]), pc_f16_to_f32(p[3])};
}
static inline V v_load_bf16(const uint16_t *p)
{
    return (V){pc_bf16_to_f32(p[0]), pc_bf16_to_f32(p[1]), pc_bf16_to_f32(p[2]), pc_bf16_to_f32(p[3])};
}
static inline void v_store_f16(uint16_t *p, V v)
{
    for (int i = 0; i < VW; i++)
        p[i] = pc_f32_to_f16(v[i]);
}
static inline void v_store_bf16(uint16_t *p, V v)
{
    for (int i = 0; i < VW; i++)
        p[i] = pc_f32_to_bf16(v[i]);
}

#define isa_keep pc_rng_keep

#define TILE_ROWS 4
#define MAX_VECTORS 2
#define DEFINE_TILES                                                                                                   \
    DEFINE_TILE(4, 1)                                                                                                  \
    DEFINE_TILE(4, 2)                                                                                                  \
    DEFINE_TILE(1, 1)                                                                                                  \
    DEFINE_TILE(1, 2)                                                                                                  \
    static const tile_fn tiles[MAX_VECTORS] = {tile_4_1, tile_4_2};                                                    \
    static const tile_fn single[MAX_VECTORS] = {tile_1_1, tile_1_2};
#define ROW_OPS_NAME row_ops
#define TABLE_NAME pc_table_generic
#define TABLE_TEXT "generic"

#include "simd_math.h"
#include "simd_rows.h"
#include "simd_widen.h"
#include "simd_products.h"
