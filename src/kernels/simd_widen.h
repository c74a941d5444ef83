/* dst (n) ← src (n) of f16 or bf16. */
static void isa_widen(pc_dtype dt, const void *src_, int64_t n, float *dst)
{
    const uint16_t *src = src_;
    int64_t i = 0;
    if (dt == PC_F16) {
        for (; i + VW <= n; i += VW)
            v_store(dst + i, v_load_f16(src + i));
        for (; i < n; i++)
            dst[i] = pc_f16_to_f32(src[i]);
    } else {
        for (; i + VW <= n; i += VW)
            v_store(dst + i, v_load_bf16(src + i));
        for (; i < n; i++)
            dst[i] = pc_bf16_to_f32(src[i]);
    }
}
