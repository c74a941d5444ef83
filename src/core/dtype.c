#include "dtype.h"

static const pc_dtype_info table[PC_DTYPE_COUNT] = {
    [PC_DTYPE_NONE] = {"?", 0, false},
    [PC_BOOL] = {"BOOL", 8, false},
    [PC_U8] = {"U8", 8, false},
    [PC_I8] = {"I8", 8, false},
    [PC_U16] = {"U16", 16, false},
    [PC_I16] = {"I16", 16, false},
    [PC_U32] = {"U32", 32, false},
    [PC_I32] = {"I32", 32, false},
    [PC_U64] = {"U64", 64, false},
    [PC_I64] = {"I64", 64, false},
    [PC_F16] = {"F16", 16, true},
    [PC_BF16] = {"BF16", 16, true},
    [PC_F32] = {"F32", 32, true},
    [PC_F64] = {"F64", 64, true},
    [PC_C64] = {"C64", 64, false},
    [PC_F8_E5M2] = {"F8_E5M2", 8, false},
    [PC_F8_E4M3] = {"F8_E4M3", 8, false},
    [PC_F8_E8M0] = {"F8_E8M0", 8, false},
    [PC_F6_E2M3] = {"F6_E2M3", 6, false},
    [PC_F6_E3M2] = {"F6_E3M2", 6, false},
    [PC_F4] = {"F4", 4, false},
    [PC_F8_E4M3FNUZ] = {"F8_E4M3FNUZ", 8, false},
    [PC_F8_E5M2FNUZ] = {"F8_E5M2FNUZ", 8, false},
};

const pc_dtype_info *pc_dtype_get(pc_dtype dtype)
{
    unsigned index = (unsigned)dtype;
    return &table[index < PC_DTYPE_COUNT ? index : PC_DTYPE_NONE];
}

pc_dtype pc_dtype_from_name(const char *name, size_t len)
{
    for (unsigned i = PC_DTYPE_NONE + 1; i < PC_DTYPE_COUNT; i++)
        if (strlen(table[i].name) == len && memcmp(table[i].name, name, len) == 0)
            return (pc_dtype)i;
    return PC_DTYPE_NONE;
}

float pc_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = (h >> 10) & 0x1Fu;
    uint32_t fraction = h & 0x3FFu;
    uint32_t bits;
    if (exponent == 0x1Fu) {
        bits = sign | 0x7F800000u | (fraction << 13);
    } else if (exponent != 0) {
        bits = sign | ((exponent + 112u) << 23) | (fraction << 13);
    } else if (fraction == 0) {
        bits = sign;
    } else { /* subnormal half: normalise */
        uint32_t shift = 0;
        while ((fraction & 0x400u) == 0) {
            fraction <<= 1;
            shift++;
        }
        bits = sign | ((113u - shift) << 23) | ((fraction & 0x3FFu) << 13);
    }
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

uint16_t pc_f32_to_f16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u)
        return (uint16_t)(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
    if (magnitude >= 0x47800000u) /* 65536 and above, infinity included */
        return (uint16_t)(sign | 0x7C00u);
    if (magnitude < 0x38800000u) { /* below 2^-14: subnormal half or zero */
        if (magnitude < 0x33000000u)
            return (uint16_t)sign;
        uint32_t exponent = magnitude >> 23;
        uint32_t fraction = (magnitude & 0x7FFFFFu) | 0x800000u;
        uint32_t shift = 126u - exponent; /* 14 … 24 */
        uint32_t half = fraction >> shift;
        uint32_t rest = fraction & ((1u << shift) - 1u);
        uint32_t middle = 1u << (shift - 1);
        if (rest > middle || (rest == middle && (half & 1u)))
            half++;
        return (uint16_t)(sign | half);
    }
    uint32_t half = (magnitude - 0x38000000u) >> 13;
    uint32_t rest = magnitude & 0x1FFFu;
    if (rest > 0x1000u || (rest == 0x1000u && (half & 1u)))
        half++; /* may carry into the exponent, up to infinity: that is the rounding wanted */
    return (uint16_t)(sign | half);
}

double pc_get_double(pc_dtype dtype, const void *buffer, int64_t index)
{
    switch (dtype) {
    case PC_F64:
        return ((const double *)buffer)[index];
    case PC_F32:
        return (double)((const float *)buffer)[index];
    case PC_F16:
        return (double)pc_f16_to_f32(((const uint16_t *)buffer)[index]);
    case PC_BF16:
        return (double)pc_bf16_to_f32(((const uint16_t *)buffer)[index]);
    default:
        return 0.0;
    }
}

void pc_put_double(pc_dtype dtype, void *buffer, int64_t index, double value)
{
    switch (dtype) {
    case PC_F64:
        ((double *)buffer)[index] = value;
        break;
    case PC_F32:
        ((float *)buffer)[index] = (float)value;
        break;
    case PC_F16:
        ((uint16_t *)buffer)[index] = pc_f32_to_f16((float)value);
        break;
    case PC_BF16:
        ((uint16_t *)buffer)[index] = pc_f32_to_bf16((float)value);
        break;
    default:
        break;
    }
}
