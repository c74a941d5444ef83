/* The registry: the adapter list, what is active, and that changing it costs
 * the same for any model. */
#include <pthread.h>

#include "model.h"

#include "../../src/core/parallel.h"

static pc_config *small(void)
{
    pc_config *config = config_new("LORA", "q");
    set_int(config, "r", 2);
    return config;
}

static pc_config *with_head(void)
{
    pc_config *config = small();
    config->modules_to_save = strings_of(&config->pool, "head");
    return config;
}

/* "a b" for the active adapters. */
static const char *active(model *m)
{
    static char text[256];
    text[0] = '\0';
    pc_activation *now = pc_registry_acquire(m->registry);
    for (size_t i = 0; i < now->count; i++) {
        size_t used = strlen(text);
        snprintf(text + used, sizeof text - used, "%s%s", i != 0 ? " " : "", now->adapters[i]->name);
    }
    pc_activation_release(now);
    return text;
}

TEST(modules_are_found_by_name)
{
    model m;
    pc_error err;
    model_init(&m, PC_F32);
    const pc_module_table *table = pc_registry_modules(m.registry);
    for (size_t i = 0; i < table->count; i++)
        CHECK(pc_module_table_find(table, table->items[i].name, table->items[i].name_len) == &table->items[i]);
    CHECK(pc_module_table_find(table, "nothing", 7) == NULL);
    pc_module again = table->items[1];
    CHECK_STATUS(pc_module_table_add(pc_registry_modules(m.registry), &again, NULL, &err), PC_ERR_VALUE);
    int64_t shape[PC_TENSOR_DIMS];
    CHECK_INT(pc_module_weight_shape(module_of(&m, "grouped"), shape), 4);
    CHECK(shape[0] == 6 && shape[1] == 2 && shape[2] == 3 && shape[3] == 2);
    CHECK_INT(pc_module_weight_shape(module_of(&m, "head"), shape), 0);
    CHECK(strcmp(pc_kind_name(PC_CONV1D), "Conv1D") == 0);
    model_free(&m);
}

TEST(room_for_modules_is_made_once)
{
    pc_registry *registry;
    pc_error err;
    REQUIRE(pc_registry_new(&registry, &err) == PC_OK);
    pc_module_table *table = pc_registry_modules(registry);
    CHECK_STATUS(pc_module_table_reserve(table, 0, &err), PC_OK);
    CHECK_STATUS(pc_module_table_reserve(table, 300, &err), PC_OK);
    const pc_module *items = table->items;
    char name[32];
    for (int i = 0; i < 300; i++) {
        const int len = snprintf(name, sizeof name, "layers.%d", i);
        pc_module module = {.name = name, .name_len = (size_t)len, .class_name = i % 3 == 0 ? "Block" : "Linear"};
        CHECK_STATUS(pc_module_table_add(table, &module, NULL, &err), PC_OK);
    }
    CHECK(table->items == items);
    CHECK(strcmp(table->items[299].name, "layers.299") == 0 && strcmp(table->items[299].class_name, "Linear") == 0);
    CHECK(strcmp(table->items[297].class_name, "Block") == 0);
    CHECK_STATUS(pc_module_table_reserve(table, SIZE_MAX, &err), PC_ERR_NOMEM);
    CHECK_STATUS(pc_module_table_reserve(table, (size_t)INT32_MAX, &err), PC_ERR_VALUE);
    CHECK_CONTAINS(err.text, "modules is not supported");
    CHECK(table->items == items);
    pc_registry_free(registry);
}

TEST(activation_keeps_order_and_drops_duplicates)
{
    model m;
    pc_error err;
    model_init(&m, PC_F32);
    add_adapter(&m, "a", small(), false);
    add_adapter(&m, "b", small(), false);
    add_adapter(&m, "c", small(), false);
    CHECK_STATUS(activate(&m, "c,a,c", &err), PC_OK);
    CHECK(strcmp(active(&m), "c a") == 0);
    CHECK_STATUS(activate(&m, "b,x", &err), PC_ERR_VALUE);
    CHECK_CONTAINS(err.text, "Adapter with name x not found. Please pass the correct adapter name among ['a', 'b', 'c']");
    CHECK(strcmp(active(&m), "c a") == 0);
    CHECK_STATUS(activate(&m, "", &err), PC_OK);
    CHECK(strcmp(active(&m), "") == 0);
    model_free(&m);
}

TEST(two_saved_copies_of_one_module_are_refused)
{
    model m;
    pc_error err;
    model_init(&m, PC_F32);
    add_adapter(&m, "a", with_head(), false);
    add_adapter(&m, "b", with_head(), false);
    add_adapter(&m, "c", small(), false);
    CHECK_STATUS(activate(&m, "a,c", &err), PC_OK);
    CHECK_STATUS(activate(&m, "c,a,b", &err), PC_ERR_VALUE);
    CHECK_CONTAINS(err.text, "Attempted to set multiple (['a', 'b']) adapters at once for modules_to_save.");
    CHECK(strcmp(active(&m), "a c") == 0);
    CHECK_STATUS(activate(&m, "b", &err), PC_OK);
    model_free(&m);
}

TEST(removing_keeps_the_others_in_order)
{
    model m;
    pc_error err;
    model_init(&m, PC_F32);
    static const char *const names[] = {"a", "b", "c", "d"};
    for (size_t i = 0; i < 4; i++)
        add_adapter(&m, names[i], small(), false);
    CHECK_STATUS(activate(&m, "d,b,a", &err), PC_OK);
    CHECK_STATUS(pc_registry_remove(m.registry, "x", 1, &err), PC_ERR_VALUE);
    CHECK_STATUS(pc_registry_remove(m.registry, "b", 1, &err), PC_OK);
    CHECK(strcmp(active(&m), "d a") == 0);
    CHECK_INT(pc_registry_count(m.registry), 3);
    CHECK(pc_registry_find(m.registry, "b", 1) == NULL);
    for (size_t i = 0; i < 3; i++) {
        const pc_adapter *adapter = pc_registry_at(m.registry, i);
        CHECK(pc_registry_find(m.registry, adapter->name, adapter->name_len) == adapter);
    }
    CHECK(pc_registry_at(m.registry, 3) == NULL);
    /* The name is free again. */
    CHECK(add_adapter(&m, "b", small(), false) != NULL);
    CHECK_STATUS(activate(&m, "b", &err), PC_OK);
    model_free(&m);
}

TEST(an_adapter_takes_the_place_of_another)
{
    model m;
    pc_error err;
    model_init(&m, PC_F32);
    const char *names[] = {"a", "b", "c"};
    for (size_t i = 0; i < 3; i++)
        add_adapter(&m, names[i], small(), false);
    pc_adapter *incoming = add_adapter(&m, "incoming", small(), false);
    CHECK_STATUS(activate(&m, "c,b", &err), PC_OK);
    CHECK_STATUS(pc_registry_replace(m.registry, "x", 1, "incoming", 8, &err), PC_ERR_VALUE);
    CHECK_STATUS(pc_registry_replace(m.registry, "b", 1, "x", 1, &err), PC_ERR_VALUE);
    CHECK_STATUS(pc_registry_replace(m.registry, "b", 1, "c", 1, &err), PC_ERR_VALUE);
    CHECK_STATUS(pc_registry_replace(m.registry, "b", 1, "b", 1, &err), PC_ERR_VALUE);
    CHECK_INT(pc_registry_count(m.registry), 4);
    CHECK_STATUS(pc_registry_replace(m.registry, "b", 1, "incoming", 8, &err), PC_OK);
    CHECK(strcmp(active(&m), "c b") == 0);
    CHECK_INT(pc_registry_count(m.registry), 3);
    CHECK(pc_registry_find(m.registry, "incoming", 8) == NULL);
    CHECK(pc_registry_find(m.registry, "b", 1) == incoming && pc_registry_at(m.registry, 1) == incoming);
    /* One that is not active stays so, and may come first in the list. */
    pc_adapter *again = add_adapter(&m, "more", small(), false);
    CHECK_STATUS(pc_registry_replace(m.registry, "a", 1, "more", 4, &err), PC_OK);
    CHECK(pc_registry_at(m.registry, 0) == again && strcmp(active(&m), "c b") == 0);
    for (size_t i = 0; i < 3; i++)
        CHECK_STATUS(pc_registry_remove(m.registry, names[i], 1, &err), PC_OK);
    model_free(&m);
}

TEST(an_activation_in_use_outlives_the_adapter)
{
    model m;
    pc_error err;
    model_init(&m, PC_F32);
    add_adapter(&m, "a", small(), true);
    CHECK_STATUS(activate(&m, "a", &err), PC_OK);
    pc_activation *held = pc_registry_acquire(m.registry);
    pc_arena *arena = pc_arena_retain(held->adapters[0]->arena);
    CHECK_STATUS(pc_registry_remove(m.registry, "a", 1, &err), PC_OK);
    CHECK(strcmp(held->adapters[0]->name, "a") == 0);
    pc_call call = call_of(&m, "model.layers.0.q", 2);
    void *x = input_for(&call);
    float y[2 * OUT];
    CHECK_STATUS(pc_forward(&call, held, x, y, &err), PC_OK);
    pc_activation_release(held);
    /* A view of the tensors outlives even that. */
    ((char *)pc_arena_data(arena))[0] = 1;
    pc_arena_release(arena);
    free(x);
    model_free(&m);
}

TEST(enabling_is_a_state_of_its_own)
{
    model m;
    pc_error err;
    model_init(&m, PC_F32);
    add_adapter(&m, "a", small(), false);
    CHECK_STATUS(pc_registry_set_enabled(m.registry, false, &err), PC_OK);
    CHECK_STATUS(activate(&m, "a", &err), PC_OK);
    pc_activation *now = pc_registry_acquire(m.registry);
    CHECK(!now->enabled && now->count == 1);
    const uint64_t version = now->version;
    pc_activation_release(now);
    CHECK_STATUS(pc_registry_set_enabled(m.registry, true, &err), PC_OK);
    now = pc_registry_acquire(m.registry);
    CHECK(now->enabled && now->version > version);
    pc_activation_release(now);
    model_free(&m);
}

TEST(deleting_everything_frees_everything)
{
    model m;
    pc_error err;
    model_init(&m, PC_F32);
    add_adapter(&m, "first", small(), false); /* tables have grown once */
    CHECK_STATUS(pc_registry_remove(m.registry, "first", 5, &err), PC_OK);
    const long before = pc_test_live_allocations();
    char names[100][8];
    for (size_t i = 0; i < 100; i++) {
        snprintf(names[i], sizeof names[i], "n%zu", i);
        add_adapter(&m, names[i], small(), false);
    }
    for (size_t i = 0; i < 100; i++)
        CHECK_STATUS(pc_registry_remove(m.registry, names[(i * 37) % 100], strlen(names[(i * 37) % 100]), &err), PC_OK);
    CHECK_INT(pc_registry_count(m.registry), 0);
    CHECK_INT(pc_test_live_allocations(), before);
    model_free(&m);
}

/* --------------------------------------------------------------------- threads */

typedef struct racing {
    model *m;
    atomic_bool stop;
    atomic_long forwards, torn;
    float *with[3];
    pc_call call;
    const void *x;
} racing;

static void *keep_running(void *arg)
{
    racing *r = arg;
    float y[2 * OUT];
    pc_error err;
    while (!atomic_load(&r->stop)) {
        pc_activation *now = pc_registry_acquire(r->m->registry);
        pc_status status = pc_forward(&r->call, now, r->x, y, &err);
        pc_activation_release(now);
        bool known = false;
        for (int i = 0; i < 3; i++)
            known = known || memcmp(y, r->with[i], sizeof y) == 0;
        if (status != PC_OK || !known)
            atomic_fetch_add(&r->torn, 1);
        atomic_fetch_add(&r->forwards, 1);
    }
    return NULL;
}

TEST(a_forward_is_entirely_old_or_entirely_new)
{
    model m;
    pc_error err;
    model_init(&m, PC_F32);
    add_adapter(&m, "a", small(), true);
    add_adapter(&m, "bb", small(), true);
    racing r = {.m = &m, .call = call_of(&m, "model.layers.0.q", 2)};
    void *x = input_for(&r.call);
    r.x = x;
    static const char *const states[] = {"", "a", "bb,a"};
    for (int i = 0; i < 3; i++) {
        CHECK_STATUS(activate(&m, states[i], &err), PC_OK);
        r.with[i] = run(&m, &r.call, x);
    }
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&threads[i], NULL, keep_running, &r) == 0);
    for (int i = 0; i < 3000 || (atomic_load(&r.forwards) < 500 && i < 3000000); i++) {
        CHECK_STATUS(activate(&m, states[i % 3], &err), PC_OK);
        if (i % 7 == 0) {
            CHECK_STATUS(pc_registry_set_enabled(m.registry, false, &err), PC_OK);
            CHECK_STATUS(pc_registry_set_enabled(m.registry, true, &err), PC_OK);
        }
    }
    atomic_store(&r.stop, true);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    CHECK_INT(atomic_load(&r.torn), 0);
    CHECK(atomic_load(&r.forwards) > 0);
    for (int i = 0; i < 3; i++)
        free(r.with[i]);
    free(x);
    model_free(&m);
}

#ifdef PC_TEST_HOOKS
TEST(every_failed_allocation_leaves_the_state_as_it_was)
{
    model m;
    pc_error err;
    model_init(&m, PC_F32);
    add_adapter(&m, "a", small(), false);
    add_adapter(&m, "b", small(), false);
    CHECK_STATUS(activate(&m, "a", &err), PC_OK);
    FOR_EACH_ALLOCATION (n) {
        pc_status status = activate(&m, "b,a", &err);
        CHECK(strcmp(active(&m), status == PC_OK ? "b a" : "a") == 0);
        CHECK_STATUS(status, pc_test_allocation_failed() ? PC_ERR_NOMEM : PC_OK);
    }
    FOR_EACH_ALLOCATION (n) {
        pc_status status = pc_registry_set_enabled(m.registry, false, &err);
        CHECK_STATUS(status, pc_test_allocation_failed() ? PC_ERR_NOMEM : PC_OK);
    }
    FOR_EACH_ALLOCATION (n) {
        pc_status status = pc_registry_remove(m.registry, "a", 1, &err);
        CHECK(strcmp(active(&m), status == PC_OK ? "b" : "b a") == 0);
        CHECK((pc_registry_find(m.registry, "a", 1) == NULL) == (status == PC_OK));
    }
    FOR_EACH_ALLOCATION (n) {
        pc_registry *registry = NULL;
        pc_status status = pc_registry_new(&registry, &err);
        pc_module module = {.name = "x", .name_len = 1, .kind = PC_LINEAR};
        if (status == PC_OK && n % 2 == 0)
            status = pc_module_table_reserve(pc_registry_modules(registry), 100, &err);
        if (status == PC_OK)
            status = pc_module_table_add(pc_registry_modules(registry), &module, NULL, &err);
        CHECK_STATUS(status, pc_test_allocation_failed() ? PC_ERR_NOMEM : PC_OK);
        pc_registry_free(registry);
    }
    model_free(&m);
}
#endif

int main(void)
{
    pc_kernels_init();
    RUN(modules_are_found_by_name);
    RUN(room_for_modules_is_made_once);
    RUN(activation_keeps_order_and_drops_duplicates);
    RUN(two_saved_copies_of_one_module_are_refused);
    RUN(removing_keeps_the_others_in_order);
    RUN(an_adapter_takes_the_place_of_another);
    RUN(an_activation_in_use_outlives_the_adapter);
    RUN(enabling_is_a_state_of_its_own);
    RUN(deleting_everything_frees_everything);
    RUN(a_forward_is_entirely_old_or_entirely_new);
#ifdef PC_TEST_HOOKS
    RUN(every_failed_allocation_leaves_the_state_as_it_was);
#endif
    return check_done();
}
