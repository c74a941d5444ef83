/* Element types.  The names are those of the safetensors format. */
#ifndef PEFTC_CORE_DTYPE_H
#define PEFTC_CORE_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum pc_dtype {
    PC_DTYPE_NONE = 0,
    PC_BOOL,
    PC_U8,
    PC_I8,
    PC_U16,
    PC_I16,
    PC_U32,
    PC_I32,
    PC_U64,
    PC_I64,
    PC_F16,
    PC_BF16,
    PC_F32,
    PC_F64,
    PC_C64,
    PC_F8_E5M2,
    PC_F8_E4M3,
    PC_F8_E8M0,
    PC_F6_E2M3,
    PC_F6_E3M2,
    PC_F4,
    PC_F8_E4M3FNUZ,
    PC_F8_E5M2FNUZ,
    PC_DTYPE_COUNT
} pc_dtype;

typedef struct pc_dtype_info {
    const char *name;  /* "F32" */
    unsigned bits;     /* per element */
    bool is_float;     /* f16, bf16, f32, f64: what a weight may be */
} pc_dtype_info;

/* Valid for every dtype; PC_DTYPE_NONE gives name "?" and 0 bits. */
const pc_dtype_info *pc_dtype_get(pc_dtype dtype);

/* The dtype with exactly this safetensors name, or PC_DTYPE_NONE. */
pc_dtype pc_dtype_from_name(const char *name, size_t len);

/* Bytes of one element; 0 for the sub-byte types. */
static inline size_t pc_dtype_size(pc_dtype dtype) { return pc_dtype_get(dtype)->bits / 8; }

/* What arithmetic on a weight of this dtype runs in: f64 for f64, else f32. */
static inline pc_dtype pc_compute_dtype(pc_dtype dtype) { return dtype == PC_F64 ? PC_F64 : PC_F32; }

/* Scalar conversions; round to nearest even, NaN stays NaN. */
static inline float pc_bf16_to_f32(uint16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint16_t pc_f32_to_bf16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u)
        return (uint16_t)((bits >> 16) | 0x0040u);
    bits += 0x7FFFu + ((bits >> 16) & 1u);
    return (uint16_t)(bits >> 16);
}

float pc_f16_to_f32(uint16_t h);
uint16_t pc_f32_to_f16(float f);

/* Read or write element `index` of a float buffer (any of the four float types) as double. */
double pc_get_double(pc_dtype dtype, const void *buffer, int64_t index);
void pc_put_double(pc_dtype dtype, void *buffer, int64_t index, double value);

#endif
