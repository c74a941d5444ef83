#define _GNU_SOURCE
#include "background.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "memory.h"

/* What a thread is given to do. */
typedef struct task {
    void (*run)(struct task *self);
} task;

/* Ranges are taken under the lock: they are milliseconds of work in all, and a few hundred at most. */
struct pc_background {
    task task; /* first */
    pthread_mutex_t lock;
    pthread_cond_t idle;
    pc_range_fn fn;
    void *ctx;
    int64_t next, n, grain;
    bool busy;      /* the other thread works on a range */
    int references; /* of the two threads: neither waits for the other to look at this for the last time */
    pid_t owner;    /* the process that has the other thread */
};

/* With the lock held: work on the next range; false when there is none. */
static bool work(struct pc_background *job, bool *busy)
{
    if (job->next >= job->n)
        return false;
    const int64_t begin = job->next;
    const int64_t end = job->n - begin < job->grain ? job->n : begin + job->grain;
    job->next = end;
    *busy = true;
    pthread_mutex_unlock(&job->lock);
    job->fn(job->ctx, begin, end);
    pthread_mutex_lock(&job->lock);
    *busy = false;
    return true;
}

/* With the lock held: give up one thread's reference and the lock. */
static void leave(struct pc_background *job)
{
    const bool last = --job->references == 0;
    pthread_mutex_unlock(&job->lock);
    if (!last)
        return;
    pthread_cond_destroy(&job->idle);
    pthread_mutex_destroy(&job->lock);
    pc_free(job);
}

/* Until no range is left. */
static void run_job(task *self)
{
    struct pc_background *job = (struct pc_background *)self;
    pthread_mutex_lock(&job->lock);
    while (work(job, &job->busy))
        continue;
    pthread_cond_signal(&job->idle);
    leave(job);
}

/* ------------------------------------------------------------- between jobs */

/* A thread whose job is done waits so long for another: adapters come one after the other, and making a thread costs as much
 * as the first percents of a job. */
#ifdef PC_TEST_HOOKS
#define REST_SECONDS 1
#else
#define REST_SECONDS 10
#endif

#ifdef __APPLE__
#define REST_CLOCK CLOCK_REALTIME /* a condition waits by no other there */
#else
#define REST_CLOCK CLOCK_MONOTONIC
#endif

static atomic_bool unmapping;      /* memory is being given back elsewhere */
static atomic_bool threads_wanted; /* there has been a job */

/* Where one thread waits. A child of a fork has none, and a lock that may be held by nobody: it begins anew. */
static struct lounge {
    pthread_mutex_t lock;
    pthread_cond_t call;
    task *next;
    bool taken; /* somebody waits */
} lounge;

static void begin_anew(void)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
#ifndef __APPLE__
    pthread_condattr_setclock(&attributes, REST_CLOCK);
#endif
    pthread_mutex_init(&lounge.lock, NULL);
    pthread_cond_init(&lounge.call, &attributes);
    pthread_condattr_destroy(&attributes);
    lounge.next = NULL;
    lounge.taken = false;
}

static void after_fork(void)
{
    begin_anew();
    atomic_store(&unmapping, false);
}

static bool watches_forks;

static void open_lounge(void)
{
    begin_anew();
    watches_forks = pthread_atfork(NULL, NULL, after_fork) == 0;
}

/* False if a child would not be told that it is one: nobody waits then. */
static bool lounge_is_open(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_lounge);
    return watches_forks;
}

/* Give the task to the thread that waits, if one does. */
static bool call_thread(task *what)
{
    if (!lounge_is_open())
        return false;
    pthread_mutex_lock(&lounge.lock);
    const bool there = lounge.taken && lounge.next == NULL;
    if (there) {
        lounge.next = what;
        pthread_cond_signal(&lounge.call);
    }
    pthread_mutex_unlock(&lounge.lock);
    return there;
}

/* The next task, or NULL when it is time to go. */
static task *wait_for_task(void)
{
    if (!lounge_is_open())
        return NULL;
    struct timespec until;
    clock_gettime(REST_CLOCK, &until);
    until.tv_sec += REST_SECONDS;
    task *next = NULL;
    pthread_mutex_lock(&lounge.lock);
    if (!lounge.taken) {
        lounge.taken = true;
        while (lounge.next == NULL && pthread_cond_timedwait(&lounge.call, &lounge.lock, &until) == 0)
            continue;
        next = lounge.next;
        lounge.next = NULL;
        lounge.taken = false;
    }
    pthread_mutex_unlock(&lounge.lock);
    return next;
}

static void *run(void *arg)
{
    for (task *next = arg; next != NULL; next = wait_for_task())
        next->run(next);
    return NULL;
}

/* Enough for what is called from it, and not the megabytes that an application's limit may ask for. */
#define STACK_BYTES ((size_t)2 << 20)

#ifdef PC_TEST_HOOKS
static atomic_bool no_threads;
static atomic_long not_found;

long pc_test_no_threads(bool none)
{
    atomic_store(&no_threads, none);
    return atomic_load(&not_found);
}

static bool refuse_thread(void) { return atomic_load(&no_threads) && (atomic_fetch_add(&not_found, 1), true); }
#else
static inline bool refuse_thread(void) { return false; }
#endif

static bool start_thread(task *what)
{
    pthread_attr_t attributes;
    pthread_t thread;
    if (pthread_attr_init(&attributes) != 0)
        return false;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    /* Signals belong to the application's threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const bool started = pthread_create(&thread, &attributes, run, what) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return started;
}

/* On the thread that waits, or, if it is worth one, on a new one. */
static bool run_elsewhere(task *what, bool worth_a_thread)
{
    return !refuse_thread() && (call_thread(what) || (worth_a_thread && start_thread(what)));
}

/* --------------------------------------------------------------------- jobs */

pc_background *pc_background_start(int64_t n, int64_t grain, pc_range_fn fn, void *ctx)
{
    struct pc_background *job = pc_calloc(1, sizeof *job);
    if (job == NULL)
        return NULL;
    pthread_mutex_init(&job->lock, NULL);
    pthread_cond_init(&job->idle, NULL);
    job->task.run = run_job;
    job->fn = fn;
    job->ctx = ctx;
    job->n = n;
    job->grain = grain > 0 ? grain : 1;
    job->references = 2;
    job->owner = getpid();
    atomic_store_explicit(&threads_wanted, true, memory_order_relaxed);
    if (run_elsewhere(&job->task, true))
        return job;
    pthread_mutex_lock(&job->lock);
    job->references = 1;
    leave(job);
    return NULL;
}

void pc_background_finish(pc_background *job, bool rest)
{
    if (job == NULL)
        return;
    if (job->owner != getpid()) { /* the other thread may have been anywhere, the lock may be held by nobody */
        if (rest && job->n > 0)
            job->fn(job->ctx, 0, job->n);
        pc_free(job);
        return;
    }
    bool mine;
    pthread_mutex_lock(&job->lock);
    if (!rest)
        job->next = job->n;
    while (work(job, &mine))
        continue;
    while (job->busy)
        pthread_cond_wait(&job->idle, &job->lock);
    leave(job);
}

/* ------------------------------------------------------------------- memory */

/* In the first bytes of the mapping that is to go. */
typedef struct release {
    task task; /* first */
    size_t bytes;
} release;

static void unmap(task *self)
{
    munmap(self, ((release *)self)->bytes);
    atomic_store(&unmapping, false);
}

/* From here on it takes longer to give memory back than to make a thread. */
#define WORTH_A_THREAD ((size_t)4 << 20)

bool pc_background_unmap(void *map, size_t bytes)
{
    if (atomic_exchange(&unmapping, true))
        return false;
    release *r = map;
    *r = (release){{unmap}, bytes};
    /* A process that has never had a job may have been told to do without threads. */
    const bool worth = bytes >= WORTH_A_THREAD && atomic_load_explicit(&threads_wanted, memory_order_relaxed);
    const bool given = run_elsewhere(&r->task, worth);
    if (!given)
        atomic_store(&unmapping, false);
    return given;
}
