/* Threads, and random numbers that do not depend on them. */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../src/core/dtype.h"
#include "../../src/core/parallel.h"
#include "../../src/core/rng.h"

/* ---------------------------------------------------------- random numbers */

/* Known answers for philox4x32-10 from the authors' Random123 distribution. */
TEST(philox_gives_its_known_answers)
{
    const struct {
        uint32_t counter[4], key[2], want[4];
    } known[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        const uint32_t *c = known[i].counter, *k = known[i].key;
        pc_rng rng = {.seed = (uint64_t)k[1] << 32 | k[0], .stream = (uint64_t)c[3] << 32 | c[2]};
        uint32_t out[4];
        pc_rng_block(rng, (uint64_t)c[1] << 32 | c[0], out);
        CHECK(memcmp(out, known[i].want, sizeof out) == 0);
    }
}

TEST(draws_do_not_depend_on_the_number_of_threads)
{
    enum { N = 70003 }; /* not a multiple of 4, and larger than the grains */
    static double alone[N], together[N + 1];
    const pc_dtype dtypes[] = {PC_F64, PC_F32, PC_F16, PC_BF16};
    const pc_rng rng = {.seed = 42, .stream = 7};
    pc_runtime *rt = NULL;
    REQUIRE_STATUS(pc_runtime_new(&rt, NULL), PC_OK);
    for (int d = 0; d < 4; d++) {
        size_t bytes = N * pc_dtype_size(dtypes[d]);
        for (int normal = 0; normal < 2; normal++) {
            void (*fill)(pc_runtime *, pc_rng, pc_dtype, void *, int64_t, double, double) =
                normal ? pc_fill_normal : pc_fill_uniform;
            fill(NULL, rng, dtypes[d], alone, N, -1, 3);
            for (int threads = 1; threads <= 5; threads++) {
                REQUIRE_STATUS(pc_runtime_set_threads(rt, threads, NULL), PC_OK);
                memset(together, 0x5A, sizeof together);
                fill(rt, rng, dtypes[d], together, N, -1, 3);
                CHECK(memcmp(alone, together, bytes) == 0);
                CHECK(((unsigned char *)together)[bytes] == 0x5A); /* not one element too many */
            }
            /* a shorter fill is the beginning of a longer one */
            for (int64_t n = 0; n < 9; n++) {
                fill(NULL, rng, dtypes[d], together, n, -1, 3);
                CHECK(memcmp(alone, together, (size_t)n * pc_dtype_size(dtypes[d])) == 0);
            }
        }
    }
    pc_runtime_free(rt);
}

TEST(draws_have_the_right_distribution)
{
    enum { N = 400000 };
    static double x[N];
    const pc_rng rng = {.seed = 1, .stream = 2};
    pc_fill_uniform(NULL, rng, PC_F64, x, N, -2, 6);
    double sum = 0, squares = 0, smallest = 100, largest = -100;
    for (int i = 0; i < N; i++) {
        sum += x[i];
        squares += x[i] * x[i];
        smallest = fmin(smallest, x[i]);
        largest = fmax(largest, x[i]);
        if (i < 1000)
            CHECK_CLOSE(x[i], -2 + 8 * (double)pc_rng_unit(rng, (uint64_t)i), 0);
    }
    CHECK_CLOSE(sum / N, 2, 0.02);
    CHECK_CLOSE(squares / N - 4, 64.0 / 12, 0.05);
    CHECK(smallest >= -2 && largest < 6);
    CHECK(smallest < -1.99 && largest > 5.99);

    pc_fill_normal(NULL, rng, PC_F64, x, N, 3, 0.5);
    double m1 = 0, m2 = 0, m3 = 0, m4 = 0, pairs = 0;
    for (int i = 0; i < N; i++)
        m1 += x[i] / N;
    for (int i = 0; i < N; i++) {
        double z = (x[i] - m1) / 0.5;
        m2 += z * z / N;
        m3 += z * z * z / N;
        m4 += z * z * z * z / N;
        if (i + 1 < N)
            pairs += z * (x[i + 1] - m1) / 0.5 / N;
        CHECK(isfinite(x[i]));
    }
    CHECK_CLOSE(m1, 3, 0.005);
    CHECK_CLOSE(m2, 1, 0.02);
    CHECK_CLOSE(m3, 0, 0.03);
    CHECK_CLOSE(m4, 3, 0.1);
    CHECK_CLOSE(pairs, 0, 0.01); /* the two of a Box-Muller pair are independent */

    uint32_t a[4], b[4];
    pc_rng_block((pc_rng){.seed = 1, .stream = 2}, 0, a);
    pc_rng_block((pc_rng){.seed = 1, .stream = 3}, 0, b);
    CHECK(memcmp(a, b, sizeof a) != 0);
    pc_rng_block((pc_rng){.seed = 2, .stream = 2}, 0, b);
    CHECK(memcmp(a, b, sizeof a) != 0);
}

/* ----------------------------------------------------------------- threads */

typedef struct counting {
    atomic_uchar *visits; /* per item */
    int64_t n, grain;
    atomic_int calls, short_calls, bad_ranges;
    pc_runtime *nested;
} counting;

static void count_visits(void *ctx, int64_t begin, int64_t end)
{
    counting *c = ctx;
    atomic_fetch_add(&c->calls, 1);
    if (begin < 0 || end > c->n || begin >= end)
        atomic_fetch_add(&c->bad_ranges, 1);
    if (end - begin < c->grain && end != c->n)
        atomic_fetch_add(&c->short_calls, 1);
    for (int64_t i = begin; i < end; i++)
        atomic_fetch_add(&c->visits[i], 1);
    if (c->nested != NULL) { /* a loop inside a loop */
        counting inner = {.visits = c->visits + begin, .n = end - begin, .grain = 1};
        pc_parallel_for(c->nested, end - begin, 1, count_visits, &inner);
    }
}

/* Runs a loop over n items and tells whether every item was visited exactly `times` times. */
static bool loop_is_right(pc_runtime *rt, int64_t n, int64_t grain, pc_runtime *nested, unsigned char times)
{
    counting c = {.n = n, .grain = grain, .nested = nested};
    c.visits = calloc((size_t)n + 1, 1);
    if (c.visits == NULL)
        return false;
    pc_parallel_for(rt, n, grain, count_visits, &c);
    bool good = c.short_calls == 0 && c.bad_ranges == 0 && c.visits[n] == 0;
    for (int64_t i = 0; i < n; i++)
        good = good && c.visits[i] == times;
    free(c.visits);
    return good;
}

TEST(parallel_for_visits_each_item_once)
{
    pc_runtime *rt = NULL;
    REQUIRE_STATUS(pc_runtime_new(&rt, NULL), PC_OK);
    CHECK(pc_runtime_threads(rt) >= 1 && pc_runtime_threads(rt) <= PC_MAX_THREADS);
    const int threads[] = {1, 2, 3, 7, 16, 2};
    const int64_t sizes[] = {0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 100, 1000, 4097, 20011};
    const int64_t grains[] = {-5, 0, 1, 2, 10, 64, 1000, 1 << 30};
    for (size_t t = 0; t < 6; t++) {
        REQUIRE_STATUS(pc_runtime_set_threads(rt, threads[t], NULL), PC_OK);
        CHECK_INT(pc_runtime_threads(rt), threads[t]);
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            CHECK(loop_is_right(NULL, sizes[s], 1, NULL, 1));
            for (size_t g = 0; g < sizeof grains / sizeof *grains; g++)
                CHECK(loop_is_right(rt, sizes[s], grains[g], NULL, 1));
        }
    }
    pc_parallel_for(rt, -1, 1, count_visits, NULL); /* never called */
    pc_runtime_free(rt);
    pc_runtime_free(NULL);
}

TEST(parallel_for_nests)
{
    pc_runtime *rt = NULL, *other = NULL;
    REQUIRE_STATUS(pc_runtime_new(&rt, NULL), PC_OK);
    REQUIRE_STATUS(pc_runtime_new(&other, NULL), PC_OK);
    REQUIRE_STATUS(pc_runtime_set_threads(rt, 3, NULL), PC_OK);
    REQUIRE_STATUS(pc_runtime_set_threads(other, 2, NULL), PC_OK);
    for (int i = 0; i < 200; i++) {
        CHECK(loop_is_right(rt, 1000, 10, rt, 2));
        CHECK(loop_is_right(rt, 1000, 10, other, 2));
    }
    pc_runtime_free(rt);
    pc_runtime_free(other);
}

TEST(thread_counts_are_checked)
{
    pc_runtime *rt = NULL;
    pc_error err;
    REQUIRE_STATUS(pc_runtime_new(&rt, &err), PC_OK);
    int before = pc_runtime_threads(rt);
    const int bad[] = {0, -1, PC_MAX_THREADS + 1, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < 5; i++) {
        CHECK_STATUS(pc_runtime_set_threads(rt, bad[i], &err), PC_ERR_VALUE);
        CHECK_CONTAINS(err.text, "between 1 and 256");
        CHECK_INT(pc_runtime_threads(rt), before);
    }
    CHECK_STATUS(pc_runtime_set_threads(rt, PC_MAX_THREADS, &err), PC_OK);
    CHECK(loop_is_right(rt, 100000, 1, NULL, 1));
    pc_runtime_free(rt);
}

static atomic_bool stop_callers;

static void *call_until_stopped(void *rt)
{
    for (int64_t n = 1; !atomic_load(&stop_callers); n = n % 977 + 1)
        CHECK(loop_is_right(rt, n, 3, NULL, 1));
    return NULL;
}

TEST(any_number_of_callers_share_a_runtime)
{
    pc_runtime *rt = NULL;
    REQUIRE_STATUS(pc_runtime_new(&rt, NULL), PC_OK);
    pthread_t callers[4];
    atomic_store(&stop_callers, false);
    for (int i = 0; i < 4; i++)
        REQUIRE(pthread_create(&callers[i], NULL, call_until_stopped, rt) == 0);
    for (int i = 0; i < 60; i++) { /* the number of threads changes under them */
        CHECK_STATUS(pc_runtime_set_threads(rt, 1 + i % 5, NULL), PC_OK);
        usleep(5000);
    }
    atomic_store(&stop_callers, true);
    for (int i = 0; i < 4; i++)
        pthread_join(callers[i], NULL);
    pc_runtime_free(rt);
}

/* Exit status of a child that runs `loops` loops over n items; the alarm turns a hang into a failure. */
static int child_status(pc_runtime *rt, int loops)
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(20);
        bool good = true;
        for (int i = 0; i < loops; i++)
            good = good && loop_is_right(rt, 5000, 10, NULL, 1);
        _exit(good ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    return status;
}

TEST(loops_run_in_a_forked_child)
{
    pc_runtime *rt = NULL;
    REQUIRE_STATUS(pc_runtime_new(&rt, NULL), PC_OK);
    REQUIRE_STATUS(pc_runtime_set_threads(rt, 3, NULL), PC_OK);
    CHECK_INT(child_status(rt, 20), 0); /* before any worker has started */
    for (int i = 0; i < 10; i++) {
        CHECK(loop_is_right(rt, 5000, 10, NULL, 1));
        CHECK_INT(child_status(rt, 20), 0);
    }
    /* and while another thread is in the middle of a loop */
    pthread_t caller;
    atomic_store(&stop_callers, false);
    REQUIRE(pthread_create(&caller, NULL, call_until_stopped, rt) == 0);
    for (int i = 0; i < 20; i++)
        CHECK_INT(child_status(rt, 20), 0);
    atomic_store(&stop_callers, true);
    pthread_join(caller, NULL);
    CHECK(loop_is_right(rt, 5000, 10, NULL, 1)); /* the parent is none the worse */
    pc_runtime_free(rt);
}

typedef struct who_runs {
    pthread_t seen[64];
    atomic_int count;
} who_runs;

static void remember_thread(void *ctx, int64_t begin, int64_t end)
{
    who_runs *who = ctx;
    (void)begin;
    (void)end;
    usleep(2000); /* long enough for every worker to come in */
    who->seen[atomic_fetch_add(&who->count, 1) % 64] = pthread_self();
}

static int distinct_threads(pc_runtime *rt)
{
    who_runs who = {.count = 0};
    pc_parallel_for(rt, 32, 1, remember_thread, &who);
    int distinct = 0;
    for (int i = 0; i < who.count; i++) {
        int j = 0;
        while (j < i && !pthread_equal(who.seen[i], who.seen[j]))
            j++;
        distinct += j == i;
    }
    return distinct;
}

/* A child must get workers of its own, also when the fork hit the parent in the middle of a loop. */
static void fork_inside_loop(void *ctx, int64_t begin, int64_t end)
{
    (void)end;
    if (begin != 0)
        return;
    pc_runtime *rt = ctx;
    pid_t child = fork();
    if (child == 0) {
        alarm(20);
        _exit(distinct_threads(rt) == 4 ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK_INT(status, 0);
}

TEST(work_is_shared_and_children_get_workers_too)
{
    pc_runtime *rt = NULL;
    REQUIRE_STATUS(pc_runtime_new(&rt, NULL), PC_OK);
    REQUIRE_STATUS(pc_runtime_set_threads(rt, 4, NULL), PC_OK);
    CHECK_INT(distinct_threads(rt), 4);
    REQUIRE_STATUS(pc_runtime_set_threads(rt, 2, NULL), PC_OK);
    CHECK_INT(distinct_threads(rt), 2);
    REQUIRE_STATUS(pc_runtime_set_threads(rt, 4, NULL), PC_OK);
    fflush(stdout);
    pc_parallel_for(rt, 100, 1, fork_inside_loop, rt);
    CHECK_INT(distinct_threads(rt), 4);
    pc_runtime_free(rt);
}

/* What OpenMP's library does, with threads that are made anew; it may give fewer than it is asked for. */
static _Thread_local int own_number;
static unsigned most_given;
static atomic_int teams;

typedef struct member {
    pthread_t thread;
    void (*body)(void *);
    void *ctx;
    int number;
} member;

static void *be_member(void *arg)
{
    member *m = arg;
    own_number = m->number;
    m->body(m->ctx);
    return NULL;
}

static int number_in_team(void) { return own_number; }

static void run_team(void (*body)(void *), void *ctx, unsigned threads, unsigned flags)
{
    member all[8];
    unsigned given = threads < most_given ? threads : most_given;
    CHECK_INT(flags, 0);
    atomic_fetch_add(&teams, 1);
    for (unsigned i = 1; i < given; i++) {
        all[i] = (member){.body = body, .ctx = ctx, .number = (int)i};
        REQUIRE(pthread_create(&all[i].thread, NULL, be_member, &all[i]) == 0);
    }
    body(ctx);
    for (unsigned i = 1; i < given; i++)
        pthread_join(all[i].thread, NULL);
}

static void remember_number(void *ctx, int64_t begin, int64_t end)
{
    for (int64_t i = begin; i < end; i++)
        ((int *)ctx)[i] = own_number;
}

TEST(threads_are_borrowed)
{
    pc_runtime *rt = NULL;
    REQUIRE_STATUS(pc_runtime_borrow(&rt, run_team, number_in_team, NULL), PC_OK);
    REQUIRE_STATUS(pc_runtime_set_threads(rt, 4, NULL), PC_OK);
    for (most_given = 1; most_given <= 4; most_given++) {
        for (int64_t n = 0; n < 40; n++)
            CHECK(loop_is_right(rt, n, 1 + n % 7, NULL, 1));
        int before = teams;
        CHECK(loop_is_right(rt, 5000, 10, NULL, 1) && teams == before + 1);
        CHECK(loop_is_right(rt, 10, 10, NULL, 1) && teams == before + 1); /* one piece: a plain call */
    }
    CHECK(loop_is_right(rt, 100, 1, rt, 2));
    CHECK(most_given == 5);
    int numbers[8];
    REQUIRE_STATUS(pc_runtime_set_threads(rt, 2, NULL), PC_OK);
    pc_parallel_for(rt, 8, 1, remember_number, numbers);
    for (int i = 0; i < 8; i++) /* shares in the order of the threads, unless one came late */
        CHECK(numbers[i] == numbers[i / 4 * 4] && numbers[i] >= 0 && numbers[i] < 2);
    int before = teams;
    CHECK_INT(child_status(rt, 5), 0);
    CHECK_INT(teams, before);
    pc_runtime_free(rt);
}

TEST(no_memory_for_workers_means_one_thread)
{
    long live = pc_test_live_allocations();
    FOR_EACH_ALLOCATION (n) {
        pc_runtime *rt = NULL;
        pc_error err;
        pc_status status = pc_runtime_new(&rt, &err);
        CHECK_STATUS(status, n == 1 ? PC_ERR_NOMEM : PC_OK);
        if (status == PC_OK) {
            CHECK_STATUS(pc_runtime_set_threads(rt, 2, &err), PC_OK);
            CHECK(loop_is_right(rt, 5000, 10, NULL, 1));
            CHECK(loop_is_right(rt, 5000, 10, NULL, 1));
        }
        pc_runtime_free(rt);
    }
    CHECK_INT(pc_test_live_allocations(), live);
}

static atomic_int signals_seen;
static pthread_t signal_thread;

static void on_signal(int number)
{
    (void)number;
    signal_thread = pthread_self();
    atomic_fetch_add(&signals_seen, 1);
}

TEST(workers_leave_signals_alone)
{
    pc_runtime *rt = NULL;
    REQUIRE_STATUS(pc_runtime_new(&rt, NULL), PC_OK);
    REQUIRE_STATUS(pc_runtime_set_threads(rt, 4, NULL), PC_OK);
    CHECK(loop_is_right(rt, 5000, 10, NULL, 1));
    struct sigaction action = {.sa_handler = on_signal}, before;
    sigaction(SIGUSR1, &action, &before);
    sigset_t usr1, mask;
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &usr1, &mask);
    kill(getpid(), SIGUSR1); /* a worker that did not block it would take it now */
    usleep(50000);
    CHECK_INT(signals_seen, 0);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    CHECK_INT(signals_seen, 1);
    CHECK(pthread_equal(signal_thread, pthread_self()));
    sigaction(SIGUSR1, &before, NULL);
    pc_runtime_free(rt);
}

int main(void)
{
    RUN(philox_gives_its_known_answers);
    RUN(draws_do_not_depend_on_the_number_of_threads);
    RUN(draws_have_the_right_distribution);
    RUN(parallel_for_visits_each_item_once);
    RUN(parallel_for_nests);
    RUN(thread_counts_are_checked);
    RUN(any_number_of_callers_share_a_runtime);
    RUN(loops_run_in_a_forked_child);
    RUN(work_is_shared_and_children_get_workers_too);
    RUN(threads_are_borrowed);
    RUN(no_memory_for_workers_means_one_thread);
    RUN(workers_leave_signals_alone);
    return check_done();
}
