/* The Mersenne Twister, written so that the compiler makes vectors of it.  Included by simd_products.h. */

#define TWIST_MIDDLE 397

static inline uint32_t twisted(uint32_t high, uint32_t low, uint32_t far)
{
    uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);
    return far ^ (y >> 1) ^ ((uint32_t)-(int32_t)(y & 1u) & 0x9908b0dfu);
}

/* The next 624 words. Each loop writes only what it has read before, 227 words or more behind. */
static void isa_twist(uint32_t *restrict w)
{
    uint32_t next[624];
    for (int i = 0; i < 624 - TWIST_MIDDLE; i++)
        next[i] = twisted(w[i], w[i + 1], w[i + TWIST_MIDDLE]);
    for (int i = 624 - TWIST_MIDDLE; i < 2 * (624 - TWIST_MIDDLE); i++)
        next[i] = twisted(w[i], w[i + 1], next[i + TWIST_MIDDLE - 624]);
    for (int i = 2 * (624 - TWIST_MIDDLE); i < 623; i++)
        next[i] = twisted(w[i], w[i + 1], next[i + TWIST_MIDDLE - 624]);
    next[623] = twisted(w[623], next[0], next[TWIST_MIDDLE - 1]);
    memcpy(w, next, sizeof next);
}

static void isa_temper(const uint32_t *restrict words, int64_t n, uint32_t *restrict out)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t y = words[i];
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c5680u;
        y ^= (y << 15) & 0xefc60000u;
        out[i] = y ^ (y >> 18);
    }
}

#define DEFINE_CHOOSE(NAME, TYPE)                                                                                      \
    static void choose_##NAME(const uint32_t *restrict words, int64_t n, uint64_t below, TYPE bits, TYPE *restrict out) \
    {                                                                                                                  \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            uint64_t k = (uint64_t)(words[2 * i] & 0x1fffffu) << 32 | words[2 * i + 1];                                \
            out[i] = (TYPE)(k < below ? bits : 0);                                                                     \
        }                                                                                                              \
    }
DEFINE_CHOOSE(16, uint16_t)
DEFINE_CHOOSE(32, uint32_t)
DEFINE_CHOOSE(64, uint64_t)

static void isa_choose(const uint32_t *words, int64_t n, uint64_t below, uint64_t bits, int bytes, void *out)
{
    if (bytes == 2)
        choose_16(words, n, below, (uint16_t)bits, out);
    else if (bytes == 4)
        choose_32(words, n, below, (uint32_t)bits, out);
    else
        choose_64(words, n, below, bits, out);
}
