/* The engine: what each method computes, alone, nested, merged and disabled. */
#include "model.h"

/* The effective weight of one adapter on a module by plain loops: base + scale · product, in doubles. */
TEST(lora_linear_is_base_plus_scaled_product)
{
    model m;
    model_init(&m, PC_F32);
    pc_config *config = config_new("LORA", "q");
    set_int(config, "r", 3);
    pc_adapter *adapter = add_adapter(&m, "a", config, true);
    REQUIRE(adapter != NULL);
    pc_error err;
    CHECK_STATUS(activate(&m, "a", &err), PC_OK);
    pc_call call = call_of(&m, "model.layers.1.q", 4);
    float *x = input_for(&call), *y = run(&m, &call, x);
    const pc_tensor *a = tensor_named(&m, adapter, "model.layers.1.q.lora_A.weight");
    const pc_tensor *b = tensor_named(&m, adapter, "model.layers.1.q.lora_B.weight");
    REQUIRE(a != NULL && b != NULL);
    const float *w = call.module->weight, *bias = call.module->bias;
    for (int64_t row = 0; row < 4; row++)
        for (int64_t o = 0; o < OUT; o++) {
            double sum = bias[o];
            for (int64_t i = 0; i < IN; i++) {
                double weight = w[o * IN + i];
                for (int64_t k = 0; k < 3; k++)
                    weight += 8.0 / 3.0 * value_at(adapter, b, o * 3 + k) * value_at(adapter, a, k * IN + i);
                sum += weight * x[row * IN + i];
            }
            CHECK_CLOSE(y[row * OUT + o], sum, 2e-5);
        }
    free(x);
    free(y);
    model_free(&m);
}

int main(void)
{
    RUN(lora_linear_is_base_plus_scaled_product);
    return check_done();
}
