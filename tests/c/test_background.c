/* A loop that another thread begins. */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/syscall.h>
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

static void note_thread(void *ctx, int64_t begin, int64_t end)
{
    (void)begin, (void)end;
    usleep(1000);
    atomic_long *thread = ctx;
    const long this = syscall(SYS_gettid);
    if (this != getpid())
        atomic_store(thread, this);
}

/* The number of the thread that works on a job, which does all of it. */
static long thread_of_a_job(void)
{
    static atomic_long thread;
    atomic_store(&thread, 0);
    pc_background *job = pc_background_start(1, 1, note_thread, &thread);
    for (int i = 0; i < 5000 && atomic_load(&thread) == 0; i++)
        usleep(1000);
    pc_background_finish(job, true);
    usleep(50000); /* it has looked for the next one by then, unless the machine is very busy */
    return atomic_load(&thread);
}

TEST(a_thread_stays_for_the_next_job)
{
    usleep(1500000); /* those of other tests are gone */
    const long first = thread_of_a_job();
    CHECK(first != 0);
    int again = 0;
    for (int i = 0; i < 5; i++)
        again += thread_of_a_job() == first;
    CHECK(again > 0);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) { /* where it is not */
        alarm(20);
        const long other = thread_of_a_job();
        _exit(other != 0 && other != first ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK_INT(status, 0);
    usleep(1500000);
    CHECK(thread_of_a_job() != first);
}

TEST(jobs_at_the_same_time_have_a_thread_each)
{
    static visits all[4];
    for (int round = 0; round < 20; round++) {
        pc_background *jobs[4];
        for (int i = 0; i < 4; i++) {
            begin_visits(&all[i], round % 2 == 0 ? 100 : 0);
            jobs[i] = pc_background_start(20, 1, visit, &all[i]);
            REQUIRE(jobs[i] != NULL);
        }
        for (int i = 3; i >= 0; i--)
            pc_background_finish(jobs[i], true);
        for (int i = 0; i < 4; i++)
            CHECK(each_once(&all[i], 20));
    }
}

static long resident_mb(void)
{
    long pages = -1;
    FILE *file = fopen("/proc/self/statm", "r");
    if (file == NULL || fscanf(file, "%*d %ld", &pages) != 1)
        pages = -1;
    if (file != NULL)
        fclose(file);
    return pages * (sysconf(_SC_PAGESIZE) >> 10) >> 10;
}

/* A block that has been written. */
static void *full_block(size_t mb)
{
    void *block = pc_block_alloc(mb << 20);
    if (block != NULL)
        memset(block, 1, mb << 20);
    return block;
}

TEST(large_blocks_go_elsewhere)
{
    for (size_t mb = 1; mb <= 64; mb *= 2) {
        void *block = full_block(mb);
        REQUIRE(block != NULL);
        const long before = resident_mb(), live = pc_test_live_allocations();
        pc_block_free(block, mb << 20);
        CHECK(pc_test_live_allocations() < live); /* it counts as gone at once */
        for (int i = 0; i < 5000 && mb >= 32 && resident_mb() > before - (long)mb / 2; i++)
            usleep(1000);
        CHECK(mb < 32 || resident_mb() <= before - (long)mb / 2);
    }
}

TEST(without_a_thread_blocks_go_at_once)
{
    usleep(200000); /* none is on its way */
    void *block = full_block(32);
    REQUIRE(block != NULL);
    const long refused = pc_test_no_threads(true), before = resident_mb();
    pc_block_free(block, (size_t)32 << 20);
    CHECK_INT(pc_test_no_threads(false), refused + 1);
    CHECK(resident_mb() <= before - 16);
}

/* One is on its way at a time. A child that was forked while one was does not wait for it. */
TEST(many_blocks_go)
{
    enum { MANY = 12, MB = 8 };
    void *blocks[MANY];
    const long before = resident_mb();
    for (int i = 0; i < MANY; i++)
        REQUIRE((blocks[i] = full_block(MB)) != NULL);
    pc_block_free(blocks[0], (size_t)MB << 20);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0)
        alarm(20);
    for (int i = 1; i < MANY; i++)
        pc_block_free(blocks[i], (size_t)MB << 20);
    if (child == 0)
        _exit(0);
    for (int i = 0; i < 5000 && resident_mb() > before + 2 * MB; i++)
        usleep(1000);
    CHECK(resident_mb() <= before + 2 * MB);
    int status = -1;
    waitpid(child, &status, 0);
    CHECK_INT(status, 0);
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
    RUN(a_thread_stays_for_the_next_job);
    RUN(jobs_at_the_same_time_have_a_thread_each);
    RUN(large_blocks_go_elsewhere);
    RUN(without_a_thread_blocks_go_at_once);
    RUN(many_blocks_go);
    RUN(no_memory_means_no_job);
    RUN(no_thread_means_no_job);
    RUN(allocations_of_the_other_thread_fail_by_themselves);
    return check_done();
}
