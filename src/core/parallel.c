#define _GNU_SOURCE
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
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

/* team.state: number of the loop (32 bits), whether workers may still join it
 * (1 bit), how many are inside (31 bits).  One word, so that the caller, when
 * no piece is left, can shut out workers that have not woken up yet instead of
 * waiting for them: on a busy machine that may take milliseconds. */
#define LOOP_NUMBER(state) ((uint32_t)((state) >> 32))
#define LOOP_OPEN ((uint64_t)1 << 31)
#define LOOP_INSIDE(state) ((state) & (LOOP_OPEN - 1))

typedef struct loop {
    pc_range_fn fn;
    void *ctx;
    int64_t n, piece;
    _Atomic int64_t next;
} loop;

typedef struct team {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t threads[PC_MAX_THREADS];
    int wanted;  /* workers asked for */
    int workers; /* and got: the system may give fewer */
    pid_t owner; /* the process that started the threads */
    atomic_bool stop;
    _Atomic uint64_t state;

    loop now; /* written only while nobody is inside */
} team;

struct pc_runtime {
    pc_team_fn run; /* whose threads are borrowed, or NULL */
    pc_number_fn number;
    pid_t borrower; /* the process that may do so */
    atomic_int threads;
    atomic_int holder; /* the process that has the team in use, 0 when it is free */
    team *team;        /* NULL until needed; guarded by holder */
};

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void loop_begin(loop *l, int64_t n, int64_t grain, int threads, pc_range_fn fn, void *ctx)
{
    int64_t pieces = (int64_t)threads * PIECES_PER_THREAD, piece = n / pieces + (n % pieces != 0);
    l->fn = fn;
    l->ctx = ctx;
    l->n = n;
    l->piece = piece > grain ? piece : grain;
    atomic_store_explicit(&l->next, 0, memory_order_relaxed);
}

static void run_pieces(void *arg)
{
    loop *l = arg;
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&l->next, l->piece, memory_order_relaxed);
        if (begin >= l->n)
            return;
        int64_t end = l->n - begin < l->piece ? l->n : begin + l->piece;
        l->fn(l->ctx, begin, end);
    }
}

static void *worker_main(void *arg)
{
    team *t = arg;
    uint32_t seen = 0;
    for (;;) {
        uint64_t state = atomic_load_explicit(&t->state, memory_order_acquire);
        for (int i = 0; i < SPIN_ROUNDS && LOOP_NUMBER(state) == seen; i++) {
            relax();
            state = atomic_load_explicit(&t->state, memory_order_acquire);
        }
        if (LOOP_NUMBER(state) == seen) {
            pthread_mutex_lock(&t->lock);
            while (LOOP_NUMBER(state = atomic_load_explicit(&t->state, memory_order_acquire)) == seen)
                pthread_cond_wait(&t->wake, &t->lock);
            pthread_mutex_unlock(&t->lock);
        }
        if (atomic_load_explicit(&t->stop, memory_order_relaxed))
            return NULL;
        bool joined = false;
        while (!joined && (state & LOOP_OPEN) != 0)
            joined = atomic_compare_exchange_weak_explicit(&t->state, &state, state + 1, memory_order_acquire,
                                                           memory_order_acquire);
        seen = LOOP_NUMBER(state);
        if (joined) {
            run_pieces(&t->now);
            atomic_fetch_sub_explicit(&t->state, 1, memory_order_release);
        }
    }
}

/* Start the next loop; `open` lets workers join it. Nobody is inside. */
static void announce(team *t, uint64_t open)
{
    pthread_mutex_lock(&t->lock); /* or a worker that is about to sleep would miss it */
    uint64_t number = LOOP_NUMBER(atomic_load_explicit(&t->state, memory_order_relaxed)) + (uint64_t)1;
    atomic_store_explicit(&t->state, number << 32 | open, memory_order_release);
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->lock);
}

/* Let no more workers in and wait for those inside. */
static void finish(team *t)
{
    uint64_t state = atomic_fetch_and_explicit(&t->state, ~LOOP_OPEN, memory_order_acq_rel);
    for (int i = 0; LOOP_INSIDE(state) != 0; i++) {
        if (i < SPIN_ROUNDS)
            relax();
        else
            sched_yield(); /* a worker was interrupted: it may need this very CPU */
        state = atomic_load_explicit(&t->state, memory_order_acquire);
    }
}

static void team_free(team *t)
{
    if (t == NULL)
        return;
    if (t->owner == getpid()) {
        atomic_store_explicit(&t->stop, true, memory_order_relaxed);
        announce(t, 0);
        for (int i = 0; i < t->workers; i++)
            pthread_join(t->threads[i], NULL);
        pthread_cond_destroy(&t->wake);
        pthread_mutex_destroy(&t->lock);
    } /* else: after a fork the threads are not ours and the lock may be held by nobody */
    pc_free(t);
}

/* A team with `wanted` threads, or fewer if the system gives no more; NULL if none. */
static team *team_start(int wanted)
{
    team *t = pc_calloc(1, sizeof *t);
    if (t == NULL)
        return NULL;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->wake, NULL);
    t->owner = getpid();
    t->wanted = wanted;
    /* Signals belong to the application's threads: a worker that took one would leave the main thread asleep. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (t->workers < wanted && pthread_create(&t->threads[t->workers], NULL, worker_main, t) == 0)
        t->workers++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
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
    atomic_init(&rt->holder, 0);
    *out = rt;
    return PC_OK;
}

pc_status pc_runtime_borrow(pc_runtime **out, pc_team_fn run, pc_number_fn number, pc_error *err)
{
    pc_status status = pc_runtime_new(out, err);
    if (status == PC_OK) {
        (*out)->run = run;
        (*out)->number = number;
        (*out)->borrower = getpid();
    }
    return status;
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

/* Take the team for this process. A holder that is another process is the parent: it forked while a
 * loop ran there, that loop does not exist here. */
static bool take(pc_runtime *rt, pid_t self)
{
    int holder = 0;
    while (!atomic_compare_exchange_weak_explicit(&rt->holder, &holder, self, memory_order_acquire,
                                                  memory_order_relaxed))
        if (holder == self)
            return false;
    return true;
}

static void give_back(pc_runtime *rt) { atomic_store_explicit(&rt->holder, 0, memory_order_release); }

/* The workers, started or replaced if need be; NULL if there are none to be had. Called by the holder. */
static team *get_team(pc_runtime *rt, int wanted, pid_t self)
{
    team *old = rt->team;
    if (old != NULL && old->owner == self && old->wanted == wanted)
        return old;
    rt->team = NULL; /* first: a fork at this moment must not leave the child a freed team */
    team_free(old);
    rt->team = team_start(wanted);
    return rt->team;
}

/* The items shared out among borrowed threads. */
typedef struct share {
    pc_number_fn number;
    pc_range_fn fn;
    void *ctx;
    int64_t n, each;
    atomic_flag *taken; /* of every share */
} share;

/* Every thread takes its own share first: the owners of the threads share out theirs in the same order, so that the rows
 * are in the caches of its core. Then it looks for one that nobody has begun, since there may be fewer threads than
 * were asked for. */
static void run_share(void *arg)
{
    share *s = arg;
    int64_t shares = (s->n + s->each - 1) / s->each, own = s->number();
    for (int64_t i = 0; i < shares; i++) {
        int64_t mine = (own + i) % shares, begin = mine * s->each;
        if (!atomic_flag_test_and_set_explicit(&s->taken[mine], memory_order_relaxed))
            s->fn(s->ctx, begin, s->n - begin < s->each ? s->n : begin + s->each);
    }
}

static void run_borrowed(pc_runtime *rt, int64_t n, int64_t grain, int threads, pc_range_fn fn, void *ctx)
{
    atomic_flag taken[PC_MAX_THREADS];
    int64_t each = n / threads + (n % threads != 0);
    share s = {.number = rt->number, .fn = fn, .ctx = ctx, .n = n, .taken = taken};
    s.each = each > grain ? each : grain;
    for (int i = 0; i < threads; i++)
        atomic_flag_clear_explicit(&taken[i], memory_order_relaxed);
    rt->run(run_share, &s, (unsigned)threads, 0);
}

void pc_parallel_for(pc_runtime *rt, int64_t n, int64_t grain, pc_range_fn fn, void *ctx)
{
    if (n <= 0)
        return;
    if (grain < 1)
        grain = 1;
    int threads = rt != NULL ? pc_runtime_threads(rt) : 1;
    if (threads < 2 || n <= grain) {
        fn(ctx, 0, n);
        return;
    }
    pid_t self = getpid();
    if (rt->run != NULL && rt->borrower == self) {
        run_borrowed(rt, n, grain, threads, fn, ctx);
        return;
    }
    team *t = NULL;
    if (take(rt, self)) {
        t = get_team(rt, threads - 1, self);
        if (t == NULL)
            give_back(rt);
    }
    if (t == NULL) {
        fn(ctx, 0, n);
        return;
    }
    loop_begin(&t->now, n, grain, t->workers + 1, fn, ctx);
    announce(t, LOOP_OPEN);
    run_pieces(&t->now);
    finish(t);
    give_back(rt);
}
