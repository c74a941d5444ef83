#define _GNU_SOURCE
#include "background.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

#include "memory.h"

/* Ranges are taken under the lock: they are milliseconds of work in all, and a few hundred at most. */
struct pc_background {
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

static void *run(void *arg)
{
    struct pc_background *job = arg;
    pthread_mutex_lock(&job->lock);
    while (work(job, &job->busy))
        continue;
    pthread_cond_signal(&job->idle);
    leave(job);
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

static bool start_thread(struct pc_background *job)
{
    pthread_attr_t attributes;
    pthread_t thread;
    if (refuse_thread() || pthread_attr_init(&attributes) != 0)
        return false;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    /* Signals belong to the application's threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const bool started = pthread_create(&thread, &attributes, run, job) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return started;
}

pc_background *pc_background_start(int64_t n, int64_t grain, pc_range_fn fn, void *ctx)
{
    struct pc_background *job = pc_calloc(1, sizeof *job);
    if (job == NULL)
        return NULL;
    pthread_mutex_init(&job->lock, NULL);
    pthread_cond_init(&job->idle, NULL);
    job->fn = fn;
    job->ctx = ctx;
    job->n = n;
    job->grain = grain > 0 ? grain : 1;
    job->references = 2;
    job->owner = getpid();
    if (start_thread(job))
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
