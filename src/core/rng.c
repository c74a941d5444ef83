#include "rng.h"

#include <math.h>
#include <string.h>

void pc_rng_block(pc_rng rng, uint64_t block, uint32_t out[4])
{
    uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32);
    uint32_t c2 = (uint32_t)rng.stream, c3 = (uint32_t)(rng.stream >> 32);
    uint32_t k0 = (uint32_t)rng.seed, k1 = (uint32_t)(rng.seed >> 32);
    for (int round = 0; round < PC_PHILOX_ROUNDS; round++) {
        uint64_t p0 = (uint64_t)PC_PHILOX_M0 * c0;
        uint64_t p1 = (uint64_t)PC_PHILOX_M1 * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += PC_PHILOX_W0;
        k1 += PC_PHILOX_W1;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

float pc_rng_unit(pc_rng rng, uint64_t index)
{
    uint32_t bits[4];
    pc_rng_block(rng, index / 4, bits);
    return (float)(bits[index % 4] >> 8) * 0x1p-24f;
}

typedef struct fill {
    pc_rng rng;
    pc_dtype dtype;
    void *dst;
    int64_t n;
    double a, b;
} fill;

/* The loops below are compiled once per instruction set, and the loader takes the best that the CPU has; sanitizers
 * do not get along with that. The values are the same: no operation is fused or reordered. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define PER_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), optimize("fp-contract=off")))
#else
#define PER_CPU
#endif

/* Blocks are drawn this many at a time, one array per word, so that the compiler can work on several at once. */
#define BATCH 64

/* bits[w][i] ← word w of block first + i. */
static inline __attribute__((always_inline)) void draw_batch(pc_rng rng, uint64_t first, uint32_t bits[4][BATCH])
{
    uint32_t k0 = (uint32_t)rng.seed, k1 = (uint32_t)(rng.seed >> 32);
    for (int i = 0; i < BATCH; i++) {
        bits[0][i] = (uint32_t)(first + (uint64_t)i);
        bits[1][i] = (uint32_t)((first + (uint64_t)i) >> 32);
        bits[2][i] = (uint32_t)rng.stream;
        bits[3][i] = (uint32_t)(rng.stream >> 32);
    }
    for (int round = 0; round < PC_PHILOX_ROUNDS; round++) {
        for (int i = 0; i < BATCH; i++) {
            const uint64_t p0 = (uint64_t)PC_PHILOX_M0 * bits[0][i], p1 = (uint64_t)PC_PHILOX_M1 * bits[2][i];
            bits[0][i] = (uint32_t)(p1 >> 32) ^ bits[1][i] ^ k0;
            bits[1][i] = (uint32_t)p1;
            bits[2][i] = (uint32_t)(p0 >> 32) ^ bits[3][i] ^ k1;
            bits[3][i] = (uint32_t)p0;
        }
        k0 += PC_PHILOX_W0;
        k1 += PC_PHILOX_W1;
    }
}

/* Words in the order of their blocks. */
static inline __attribute__((always_inline)) void interleave(uint32_t bits[4][BATCH], uint32_t in_order[4 * BATCH])
{
    for (int i = 0; i < BATCH; i++) {
        in_order[4 * i] = bits[0][i];
        in_order[4 * i + 1] = bits[1][i];
        in_order[4 * i + 2] = bits[2][i];
        in_order[4 * i + 3] = bits[3][i];
    }
}

/* Elements 4 · block … of the destination ← a + b · draws, as many of the `count` as there are. */
static inline __attribute__((always_inline)) void put_doubles(const fill *f, int64_t block, const double *draws, int count)
{
    const int64_t first = block * 4, left = f->n - first;
    if (left < count)
        count = (int)left;
    if (f->dtype == PC_F32) {
        float *dst = (float *)f->dst + first;
        for (int j = 0; j < count; j++)
            dst[j] = (float)(f->a + f->b * draws[j]);
        return;
    }
    for (int j = 0; j < count; j++)
        pc_put_double(f->dtype, f->dst, first + j, f->a + f->b * draws[j]);
}

PER_CPU static void fill_uniform(void *ctx, int64_t begin, int64_t end)
{
    const fill *f = ctx;
    for (int64_t block = begin; block < end; block += BATCH) {
        uint32_t bits[4][BATCH], in_order[4 * BATCH];
        double draws[4 * BATCH];
        const int blocks = end - block < BATCH ? (int)(end - block) : BATCH;
        draw_batch(f->rng, (uint64_t)block, bits);
        interleave(bits, in_order);
        for (int j = 0; j < 4 * BATCH; j++)
            draws[j] = (double)(int32_t)(in_order[j] >> 8) * 0x1p-24;
        put_doubles(f, block, draws, 4 * blocks);
    }
}

/* ln u for u in (0, 1], as 2·artanh: with u = m · 2^e and m in [0.71, 1.42], |s| ≤ 0.172 and the series' rest is
 * below half a unit in the last place of a float. */
static inline float log_unit(float u)
{
    uint32_t word;
    memcpy(&word, &u, sizeof word);
    const int32_t e = (int32_t)(word - 0x3F3504F3u) >> 23;
    const uint32_t mantissa = word - ((uint32_t)e << 23);
    float m;
    memcpy(&m, &mantissa, sizeof m);
    const float s = (m - 1.0f) / (m + 1.0f), q = s * s;
    const float series = 1.0f + q * (1.0f / 3.0f + q * (1.0f / 5.0f + q * (1.0f / 7.0f + q * (1.0f / 9.0f))));
    return (float)e * 0.69314718056f + 2.0f * s * series;
}

/* sin and cos of 2π v for v in [0, 1), by the Taylor series on an eighth of a turn around the nearest quarter. */
static inline void sincos_turn(float v, float *sine, float *cosine)
{
    const float quarters = v * 4.0f;
    const int32_t quarter = (int32_t)(quarters + 0.5f);
    const float x = (quarters - (float)quarter) * 1.57079632679f, q = x * x;
    const float s = x * (1.0f - q * (1.0f / 6.0f - q * (1.0f / 120.0f - q * (1.0f / 5040.0f - q / 362880.0f))));
    const float c =
        1.0f - q * (0.5f - q * (1.0f / 24.0f - q * (1.0f / 720.0f - q * (1.0f / 40320.0f - q / 3628800.0f))));
    /* By bits, not by conditions, which would keep the compiler from working on many at once: an odd quarter swaps the
     * two, and the signs turn every two quarters. */
    uint32_t s_bits, c_bits;
    memcpy(&s_bits, &s, sizeof s_bits);
    memcpy(&c_bits, &c, sizeof c_bits);
    const uint32_t odd = 0u - ((uint32_t)quarter & 1u), differ = (s_bits ^ c_bits) & odd;
    s_bits ^= differ ^ (((uint32_t)quarter & 2u) << 30);
    c_bits ^= differ ^ ((((uint32_t)quarter + 1u) & 2u) << 30);
    memcpy(sine, &s_bits, sizeof s_bits);
    memcpy(cosine, &c_bits, sizeof c_bits);
}

/* Two words each → two independent standard normal draws each: Box and Muller's transform. */
static inline __attribute__((always_inline)) void to_normal(const uint32_t *restrict one, const uint32_t *restrict other, float *restrict first,
                      float *restrict second)
{
    for (int i = 0; i < BATCH; i++) {
        /* (0, 1]: its log is finite.  Small values are exact, and they make the tails. */
        const float u = ((float)(int32_t)(one[i] >> 1) + 1.0f) * 0x1p-31f;
        const float radius = sqrtf(-2.0f * log_unit(u));
        float sine, cosine;
        sincos_turn((float)(int32_t)(other[i] >> 8) * 0x1p-24f, &sine, &cosine);
        first[i] = radius * cosine;
        second[i] = radius * sine;
    }
}

PER_CPU static void fill_normal(void *ctx, int64_t begin, int64_t end)
{
    const fill *f = ctx;
    for (int64_t block = begin; block < end; block += BATCH) {
        uint32_t bits[4][BATCH];
        float draws[4][BATCH];
        double values[4 * BATCH];
        const int blocks = end - block < BATCH ? (int)(end - block) : BATCH;
        draw_batch(f->rng, (uint64_t)block, bits);
        to_normal(bits[0], bits[1], draws[0], draws[1]);
        to_normal(bits[2], bits[3], draws[2], draws[3]);
        for (int i = 0; i < BATCH; i++) {
            values[4 * i] = (double)draws[0][i];
            values[4 * i + 1] = (double)draws[1][i];
            values[4 * i + 2] = (double)draws[2][i];
            values[4 * i + 3] = (double)draws[3][i];
        }
        put_doubles(f, block, values, 4 * blocks);
    }
}

void pc_rng_keep(pc_rng rng, uint64_t first, int64_t n, double p, float *keep)
{
    const uint32_t least = pc_rng_least(p);
    for (int64_t at = 0; at < n; at += 4) {
        uint32_t bits[4];
        pc_rng_block(rng, first / 4 + (uint64_t)(at / 4), bits);
        for (int64_t i = 0; i < 4 && at + i < n; i++)
            keep[at + i] = (bits[i] >> 8) >= least ? 1.0f : 0.0f;
    }
}

void pc_fill_uniform(pc_runtime *rt, pc_rng rng, pc_dtype dtype, void *dst, int64_t n, double low, double high)
{
    fill f = {rng, dtype, dst, n, low, high - low};
    pc_parallel_for(rt, (n + 3) / 4, 4096, fill_uniform, &f);
}

void pc_fill_normal(pc_runtime *rt, pc_rng rng, pc_dtype dtype, void *dst, int64_t n, double mean, double std)
{
    fill f = {rng, dtype, dst, n, mean, std};
    pc_parallel_for(rt, (n + 3) / 4, 1024, fill_normal, &f);
}
