/* One registry and one runtime used by several threads at once.  The results are checked elsewhere; here the
 * sanitizers look on (make ctest T=threads SAN=thread). */
#include <pthread.h>

#include "model.h"

#include "../../src/core/parallel.h"

#define ROUNDS 200

typedef struct shared {
    model m;
    pc_runtime *rt;
    atomic_bool stop;
    atomic_long failures, forwards;
} shared;

static void expect(shared *s, bool fine)
{
    if (!fine)
        atomic_fetch_add(&s->failures, 1);
}

static pc_config *config_of_round(int i)
{
    pc_config *config = config_new("LORA", i % 2 != 0 ? "q" : "q,k");
    set_int(config, "r", 1 + i % 3);
    config->bias = i % 3 == 0 ? PC_BIAS_ALL : PC_BIAS_NONE;
    if (i % 5 == 0)
        config->modules_to_save = strings_of(&config->pool, "head");
    return config;
}

static void *keep_running(void *arg)
{
    shared *s = arg;
    pc_error err;
    pc_call call = call_of(&s->m, "model.layers.0.q", 3);
    call.rt = s->rt;
    void *x = input_for(&call), *y = malloc((size_t)call_outputs(&call) * sizeof(float));
    while (!atomic_load(&s->stop)) {
        pc_activation *now = pc_registry_acquire(s->m.registry);
        pc_module effective = *call.module;
        expect(s, pc_effective_weights(now, call.module_index, &effective, &err) == PC_OK);
        expect(s, pc_forward(&call, now, x, y, &err) == PC_OK);
        pc_activation_release(now);
        atomic_fetch_add(&s->forwards, 1);
    }
    free(x);
    free(y);
    return NULL;
}

/* What a person's threads may ask at any time; names that are gone by then are errors, not crashes. */
static void *keep_switching(void *arg)
{
    shared *s = arg;
    static const char *const wanted[] = {"always", "comes", "always,comes", ""};
    pc_error err;
    for (int i = 0; !atomic_load(&s->stop); i++) {
        pc_status status = activate(&s->m, wanted[i % 4], &err);
        expect(s, status == PC_OK || status == PC_ERR_VALUE);
        expect(s, pc_registry_set_enabled(s->m.registry, i % 3 != 0, &err) == PC_OK);
        expect(s, pc_registry_count(s->m.registry) >= 1);
        expect(s, pc_registry_find(s->m.registry, "always", 6) != NULL);
        expect(s, pc_runtime_set_threads(s->rt, 1 + i % 4, &err) == PC_OK);
        if (i % 11 == 0)
            expect(s, pc_registry_set_merged(s->m.registry, NULL, &err) == PC_OK);
    }
    return NULL;
}

/* Adding, merging and deleting: one thread at a time does that (the binding's lock). */
static void add_merge_remove(shared *s, int i)
{
    pc_error err;
    pc_adapter *adapter = NULL;
    pc_config *config = config_of_round(i);
    CHECK_STATUS(config->schema->validate(config, &err), PC_OK);
    CHECK_STATUS(pc_adapter_build(s->m.registry, "comes", 5, config, NULL, &adapter, &err), PC_OK);
    CHECK_STATUS(pc_adapter_init(s->rt, s->m.registry, adapter, 3, &err), PC_OK);
    CHECK_STATUS(pc_registry_insert(s->m.registry, adapter, &err), PC_OK);
    pc_merged *merged = NULL;
    if (i % 2 == 0) {
        CHECK_STATUS(pc_merge(s->rt, s->m.registry, &adapter, 1, i % 4 == 0, &merged, &err), PC_OK);
        CHECK_STATUS(pc_registry_set_merged(s->m.registry, merged, &err), PC_OK);
    }
    CHECK_STATUS(pc_registry_remove(s->m.registry, "comes", 5, &err), PC_OK);
}

TEST(everything_at_once)
{
    shared s = {0};
    pc_error err;
    model_init(&s.m, PC_F32);
    CHECK_STATUS(pc_runtime_new(&s.rt, &err), PC_OK);
    CHECK_STATUS(pc_runtime_set_threads(s.rt, 3, &err), PC_OK);
    add_adapter(&s.m, "always", config_of_round(0), true);
    pthread_t threads[3];
    CHECK(pthread_create(&threads[0], NULL, keep_running, &s) == 0);
    CHECK(pthread_create(&threads[1], NULL, keep_running, &s) == 0);
    CHECK(pthread_create(&threads[2], NULL, keep_switching, &s) == 0);
    for (int i = 0; i < ROUNDS || (atomic_load(&s.forwards) < 100 && i < 100000); i++)
        add_merge_remove(&s, i);
    atomic_store(&s.stop, true);
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    CHECK_INT(atomic_load(&s.failures), 0);
    model_free(&s.m);
    pc_runtime_free(s.rt);
}

int main(void)
{
    pc_kernels_init();
    RUN(everything_at_once);
    return check_done();
}
