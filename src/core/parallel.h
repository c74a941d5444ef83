/* Threads: a pool and a parallel for.
 *
 * A runtime owns the worker threads.  They start at the first loop that needs
 * them, and again in a child after fork() (threads do not survive a fork).
 * Any number of callers may use one runtime at once: whoever finds the workers
 * busy runs its loop alone.
 *
 * A runtime may also borrow the threads of a library that the process has
 * running: two pools of as many threads as there are cores, each of which
 * looks out for work for a while before it sleeps, take turns on the cores.
 */
#ifndef PEFTC_CORE_PARALLEL_H
#define PEFTC_CORE_PARALLEL_H

#include <stdint.h>

#include "status.h"

typedef struct pc_runtime pc_runtime;

#define PC_MAX_THREADS 256

/* A runtime that uses as many threads as the process may run on. */
pc_status pc_runtime_new(pc_runtime **out, pc_error *err);
/* run(body, ctx, threads, 0) calls body(ctx) once on each of at most `threads`
 * threads, the caller's among them, any number of callers at once, and returns
 * when all have returned; number() says which of them it is on, from 0:
 * GOMP_parallel and omp_get_thread_num of OpenMP's libraries.  In a child after
 * fork(), where such libraries hang, the runtime has threads of its own. */
typedef void (*pc_team_fn)(void (*body)(void *), void *ctx, unsigned threads, unsigned flags);
typedef int (*pc_number_fn)(void);
pc_status pc_runtime_borrow(pc_runtime **out, pc_team_fn run, pc_number_fn number, pc_error *err);
void pc_runtime_free(pc_runtime *rt); /* joins the workers; no loop may be running */

int pc_runtime_threads(const pc_runtime *rt);
/* n in 1 … PC_MAX_THREADS, the caller included; else PC_ERR_VALUE. */
pc_status pc_runtime_set_threads(pc_runtime *rt, int n, pc_error *err);

/* Call fn(ctx, begin, end) on disjoint ranges that cover [0, n), each of at
 * least `grain` items except the last, possibly on several threads at once,
 * and return when all are done.  fn must not fail and must not call into
 * Python.  With rt == NULL, one thread or few items it is a plain call. */
typedef void (*pc_range_fn)(void *ctx, int64_t begin, int64_t end);
void pc_parallel_for(pc_runtime *rt, int64_t n, int64_t grain, pc_range_fn fn, void *ctx);

#endif
