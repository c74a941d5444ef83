#include "crc32.h"

#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_FOLDING 1
#include <immintrin.h>
#else
#define HAVE_FOLDING 0
#endif

#define POLYNOMIAL 0xEDB88320u

void pc_crc32_init(pc_crc32 *crc)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++)
            value = (value >> 1) ^ ((value & 1u) != 0 ? POLYNOMIAL : 0u);
        crc->table[0][byte] = value;
    }
    /* table[k][b]: the effect of byte b followed by k zero bytes */
    for (size_t k = 1; k < 8; k++)
        for (size_t byte = 0; byte < 256; byte++) {
            uint32_t shorter = crc->table[k - 1][byte];
            crc->table[k][byte] = (shorter >> 8) ^ crc->table[0][shorter & 0xFFu];
        }
    crc->carryless = false;
#if HAVE_FOLDING
    crc->carryless = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
#endif
}

/* `state` is the checksum before its final inversion. */
static uint32_t by_table(const pc_crc32 *crc, uint32_t state, const uint8_t *bytes, size_t len)
{
    for (; len >= 8; bytes += 8, len -= 8) {
        uint32_t low = state ^ ((uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 |
                                (uint32_t)bytes[3] << 24);
        state = crc->table[7][low & 0xFFu] ^ crc->table[6][(low >> 8) & 0xFFu] ^ crc->table[5][(low >> 16) & 0xFFu] ^
                crc->table[4][low >> 24] ^ crc->table[3][bytes[4]] ^ crc->table[2][bytes[5]] ^
                crc->table[1][bytes[6]] ^ crc->table[0][bytes[7]];
    }
    for (; len != 0; bytes++, len--)
        state = (state >> 8) ^ crc->table[0][(state ^ *bytes) & 0xFFu];
    return state;
}

#if HAVE_FOLDING
/* The message as one long polynomial: a 128-bit piece stands for the same
 * remainder as its two halves multiplied by x^n mod P and added n bits further
 * on.  Four pieces are folded side by side over 64 bytes a step, then into one,
 * whose 16 bytes go through the tables like a short message. */
__attribute__((target("pclmul,sse4.1"))) static __m128i fold(__m128i piece, __m128i next, __m128i by)
{
    __m128i low = _mm_clmulepi64_si128(piece, by, 0x00);
    __m128i high = _mm_clmulepi64_si128(piece, by, 0x11);
    return _mm_xor_si128(next, _mm_xor_si128(low, high));
}

__attribute__((target("pclmul,sse4.1"))) static uint32_t by_folding(const pc_crc32 *crc, uint32_t state,
                                                                   const uint8_t *bytes, size_t len)
{
    /* x^(4·128+32), x^(4·128-32) and x^(128+32), x^(128-32) modulo P, bit-reflected and shifted by one */
    const __m128i by_four = _mm_set_epi64x(0x1C6E41596LL, 0x154442BD4LL);
    const __m128i by_one = _mm_set_epi64x(0x0CCAA009ELL, 0x1751997D0LL);
    __m128i piece[4];
    for (int i = 0; i < 4; i++)
        piece[i] = _mm_loadu_si128((const __m128i *)(const void *)(bytes + 16 * i));
    piece[0] = _mm_xor_si128(piece[0], _mm_cvtsi32_si128((int)state));
    for (bytes += 64, len -= 64; len >= 64; bytes += 64, len -= 64)
        for (int i = 0; i < 4; i++)
            piece[i] = fold(piece[i], _mm_loadu_si128((const __m128i *)(const void *)(bytes + 16 * i)), by_four);
    __m128i one = piece[0];
    for (int i = 1; i < 4; i++)
        one = fold(one, piece[i], by_one);
    uint8_t rest[16];
    memcpy(rest, &one, sizeof rest);
    return by_table(crc, by_table(crc, 0, rest, sizeof rest), bytes, len);
}
#endif

uint32_t pc_crc32_update(const pc_crc32 *crc, uint32_t before, const void *bytes, size_t len)
{
    uint32_t state = ~before;
#if HAVE_FOLDING
    if (crc->carryless && len >= 128)
        return ~by_folding(crc, state, bytes, len);
#endif
    return ~by_table(crc, state, bytes, len);
}
