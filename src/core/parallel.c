#define _GNU_SOURCE
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <unistd.h>

#include "memory.h"

/* Pieces per thread: more than one, so that a thread that the system
 * interrupts does not hold up the others; few, because each piece costs an
 * atomic operation and a fresh start of the caches. */
#define PIECES_PER_THREAD 4

/* How long a worker looks for the next loop before it sleeps.  Waking a
 * sleeper costs 5 to 50 microseconds, more than a small layer's product; the
 * loops of one forward pass follow each other within a few microseconds. */
#define SPIN_ROUNDS 2000

typedef struct team {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t threads[PC_MAX_THREADS];
    int workers;
    pid_t owner; /* the process that started the threads */
    bool stop;
    atomic_uint ticket; /* counts loops; workers wait for it to change */

    /* the loop that runs now */
    pc_range_fn fn;
    void *ctx;
    int64_t n, piece;
    atomic_llong next;
    atomic_int unfinished; /* workers that have not left the loop */
} team;

struct pc_runtime {
    atomic_int threads;
    atomic_flag busy;
    team *team; /* NULL until needed; guarded by busy */
};

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void run_pieces(team *t)
{
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&t->next, t->piece, memory_order_relaxed);
        if (begin >= t->n)
            return;
        int64_t end = t->n - begin < t->piece ? t->n : begin + t->piece;
        t->fn(t->ctx, begin, end);
    }
}

static void *worker_main(void *arg)
{
    team *t = arg;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPIN_ROUNDS && atomic_load_explicit(&t->ticket, memory_order_acquire) == seen; i++)
            relax();
        if (atomic_load_explicit(&t->ticket, memory_order_acquire) == seen) {
            pthread_mutex_lock(&t->lock);
            while (atomic_load_explicit(&t->ticket, memory_order_acquire) == seen)
                pthread_cond_wait(&t->wake, &t->lock);
            pthread_mutex_unlock(&t->lock);
        }
        seen++;
        if (t->stop)
            return NULL;
        run_pieces(t);
        atomic_fetch_sub_explicit(&t->unfinished, 1, memory_order_release);
    }
}

static void announce(team *t)
{
    pthread_mutex_lock(&t->lock);
    atomic_fetch_add_explicit(&t->ticket, 1, memory_order_release);
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->lock);
}

static void team_free(team *t)
{
    if (t == NULL)
        return;
    if (t->owner == getpid()) {
        t->stop = true;
        announce(t);
        for (int i = 0; i < t->workers; i++)
            pthread_join(t->threads[i], NULL);
        pthread_cond_destroy(&t->wake);
        pthread_mutex_destroy(&t->lock);
    } /* else: after a fork the threads are not ours and the lock may be held by nobody */
    pc_free(t);
}

/* A team with `workers` threads, or fewer if the system gives no more; NULL if none. */
static team *team_start(int workers)
{
    team *t = pc_calloc(1, sizeof *t);
    if (t == NULL)
        return NULL;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->wake, NULL);
    t->owner = getpid();
    while (t->workers < workers && pthread_create(&t->threads[t->workers], NULL, worker_main, t) == 0)
        t->workers++;
    if (t->workers == 0) {
        team_free(t);
        return NULL;
    }
    return t;
}

pc_status pc_runtime_new(pc_runtime **out, pc_error *err)
{
    pc_runtime *rt = pc_calloc(1, sizeof *rt);
    if (rt == NULL)
        return pc_fail_nomem(err, "the runtime");
    int n = 1;
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        n = CPU_COUNT(&set);
#else
    n = (int)sysconf(_SC_NPROCESSORS_ONLN);
#endif
    if (n < 1)
        n = 1;
    if (n > PC_MAX_THREADS)
        n = PC_MAX_THREADS;
    atomic_init(&rt->threads, n);
    atomic_flag_clear(&rt->busy);
    *out = rt;
    return PC_OK;
}

void pc_runtime_free(pc_runtime *rt)
{
    if (rt == NULL)
        return;
    team_free(rt->team);
    pc_free(rt);
}

int pc_runtime_threads(const pc_runtime *rt) { return atomic_load(&((pc_runtime *)(uintptr_t)rt)->threads); }

pc_status pc_runtime_set_threads(pc_runtime *rt, int n, pc_error *err)
{
    if (n < 1 || n > PC_MAX_THREADS)
        return pc_fail(err, PC_ERR_VALUE, "number of threads must be between 1 and %d, got %d", PC_MAX_THREADS, n);
    atomic_store(&rt->threads, n);
    return PC_OK;
}

/* Whether the workers are ours to use: starts or replaces them if need be.  Called with busy held. */
static bool have_team(pc_runtime *rt, int threads)
{
    team *t = rt->team;
    if (t != NULL && t->owner == getpid() && t->workers == threads - 1)
        return true;
    team_free(t);
    rt->team = team_start(threads - 1);
    return rt->team != NULL;
}

void pc_parallel_for(pc_runtime *rt, int64_t n, int64_t grain, pc_range_fn fn, void *ctx)
{
    if (n <= 0)
        return;
    if (grain < 1)
        grain = 1;
    int threads = rt != NULL ? pc_runtime_threads(rt) : 1;
    if (threads < 2 || n <= grain || atomic_flag_test_and_set_explicit(&rt->busy, memory_order_acquire)) {
        fn(ctx, 0, n);
        return;
    }
    if (!have_team(rt, threads)) {
        atomic_flag_clear_explicit(&rt->busy, memory_order_release);
        fn(ctx, 0, n);
        return;
    }
    team *t = rt->team;
    int64_t pieces = (int64_t)(t->workers + 1) * PIECES_PER_THREAD;
    int64_t piece = n / pieces + (n % pieces != 0);
    t->fn = fn;
    t->ctx = ctx;
    t->n = n;
    t->piece = piece > grain ? piece : grain;
    atomic_store_explicit(&t->next, 0, memory_order_relaxed);
    atomic_store_explicit(&t->unfinished, t->workers, memory_order_relaxed);
    announce(t);
    run_pieces(t);
    while (atomic_load_explicit(&t->unfinished, memory_order_acquire) != 0)
        relax();
    atomic_flag_clear_explicit(&rt->busy, memory_order_release);
}
