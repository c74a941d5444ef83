/* A loop that another thread begins. */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../src/core/background.h"
#include "../../src/core/memory.h"

#define ITEMS 1000

typedef struct visits {
    atomic_int count[ITEMS];
    atomic_int calls;
    useconds_t pause; /* per range */
    atomic_bool elsewhere; /* another thread than the first has called */
    pthread_t first;
} visits;

static void visit(void *ctx, int64_t begin, int64_t end)
{
    visits *v = ctx;
    atomic_fetch_add(&v->calls, 1);
    if (!pthread_equal(pthread_self(), v->first))
        atomic_store(&v->elsewhere, true);
    if (v->pause != 0)
        usleep(v->pause);
    for (int64_t i = begin; i < end; i++)
        atomic_fetch_add(&v->count[i], 1);
}

static void begin_visits(visits *v, useconds_t pause)
{
    memset(v, 0, sizeof *v);
    v->first = pthread_self();
    v->pause = pause;
}

static bool each_once(visits *v, int64_t n)
{
    bool good = true;
    for (int64_t i = 0; i < ITEMS; i++)
        good = good && atomic_load(&v->count[i]) == (i < n ? 1 : 0);
    return good;
}

TEST(every_item_is_visited_once)
{
    static visits v;
    for (int64_t n = 0; n <= ITEMS; n = n * 3 + 1) {
        for (int64_t grain = -1; grain < 50; grain += 7) {
            begin_visits(&v, 0);
            pc_background *job = pc_background_start(n, grain, visit, &v);
            REQUIRE(job != NULL);
            pc_background_finish(job, true);
            CHECK(each_once(&v, n));
        }
    }
    pc_background_finish(NULL, true);
}

TEST(another_thread_works_and_the_caller_helps)
{
    static visits v;
    begin_visits(&v, 2000);
    pc_background *job = pc_background_start(50, 1, visit, &v);
    REQUIRE(job != NULL);
    for (int i = 0; i < 5000 && !atomic_load(&v.elsewhere); i++)
        usleep(1000);
    CHECK(atomic_load(&v.elsewhere));
    pc_background_finish(job, true);
    CHECK(each_once(&v, 50));
}

TEST(what_is_given_up_is_begun_no_more)
{
    static visits v;
    begin_visits(&v, 1000);
    pc_background *job = pc_background_start(ITEMS, 1, visit, &v);
    REQUIRE(job != NULL);
    pc_background_finish(job, false);
    int calls = atomic_load(&v.calls);
    CHECK(calls < ITEMS);
    usleep(20000);
    CHECK_INT(atomic_load(&v.calls), calls);
}

/* The child has no other thread, and the range that it was at is nobody's. */
TEST(a_forked_child_does_all_of_it)
{
    static visits v;
    begin_visits(&v, 3000);
    pc_background *job = pc_background_start(20, 1, visit, &v);
    REQUIRE(job != NULL);
    usleep(5000);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(20);
        begin_visits(&v, 0);
        pc_background_finish(job, true);
        _exit(each_once(&v, 20) ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK_INT(status, 0);
    pc_background_finish(job, true);
    CHECK(each_once(&v, 20));
}

TEST(no_memory_means_no_job)
{
    static visits v;
    begin_visits(&v, 0);
    pc_test_fail_allocation(1);
    CHECK(pc_background_start(10, 1, visit, &v) == NULL);
    CHECK(pc_test_allocation_failed());
    pc_test_fail_allocation(0);
    CHECK_INT(atomic_load(&v.calls), 0);
}

TEST(no_thread_means_no_job)
{
    static visits v;
    begin_visits(&v, 0);
    const long before = pc_test_no_threads(true), live = pc_test_live_allocations();
    CHECK(pc_background_start(10, 1, visit, &v) == NULL);
    CHECK_INT(pc_test_no_threads(false), before + 1);
    CHECK_INT(pc_test_live_allocations(), live);
    CHECK_INT(atomic_load(&v.calls), 0);
}

static void allocate(void *ctx, int64_t begin, int64_t end)
{
    visits *v = ctx;
    visit(ctx, begin, end);
    void *piece = pc_malloc(1);
    if (piece == NULL)
        atomic_store(&v->elsewhere, false);
    pc_free(piece);
}

TEST(allocations_of_the_other_thread_fail_by_themselves)
{
    static visits v;
    begin_visits(&v, 0);
    pc_test_fail_allocation_elsewhere(3);
    pc_free(pc_malloc(1));
    pc_free(pc_malloc(1));
    pc_free(pc_malloc(1));
    CHECK(!pc_test_allocation_failed());
    pc_background *job = pc_background_start(5, 1, allocate, &v);
    for (int i = 0; i < 2000 && atomic_load(&v.calls) < 5; i++)
        usleep(1000);
    pc_background_finish(job, true);
    CHECK(pc_test_allocation_failed());
    pc_test_fail_allocation_elsewhere(0);
    CHECK(each_once(&v, 5));
}

int main(void)
{
    RUN(every_item_is_visited_once);
    RUN(another_thread_works_and_the_caller_helps);
    RUN(what_is_given_up_is_begun_no_more);
    RUN(a_forked_child_does_all_of_it);
    RUN(no_memory_means_no_job);
    RUN(no_thread_means_no_job);
    RUN(allocations_of_the_other_thread_fail_by_themselves);
    return check_done();
}
