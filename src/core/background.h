/* What another thread does while the caller does something else.
 *
 * A loop whose results are wanted later: filling an adapter's memory while its owner makes Python objects, for example. And
 * giving memory back, which nobody waits for.
 */
#ifndef PEFTC_CORE_BACKGROUND_H
#define PEFTC_CORE_BACKGROUND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "parallel.h"

typedef struct pc_background pc_background;

/* Begin to call fn(ctx, begin, end) on disjoint ranges of about `grain` items that cover [0, n), in order, on a thread of
 * its own, which stays for some seconds after that, in case there is more to do.  NULL when there is no thread or no memory
 * to be had: nothing was called then.  fn is as for pc_parallel_for; ctx must live until pc_background_finish. */
pc_background *pc_background_start(int64_t n, int64_t grain, pc_range_fn fn, void *ctx);

/* End it: with `rest`, all ranges have been worked on when this returns, what is left on this thread; without, no new one
 * is begun.  After a fork the child, which lacks the other thread, does all of them again.  NULL is allowed. */
void pc_background_finish(pc_background *job, bool rest);

/* Give a private writable mapping back to the system on another thread, which takes 0.4 µs for each page that was written.
 * False if there is no thread to be had, it is not worth making one, or another mapping is on its way, so that little memory
 * is in between: the mapping is the caller's then, perhaps with other bytes at its beginning. A child of a fork at just this
 * moment keeps its copy. */
bool pc_background_unmap(void *map, size_t bytes);

#ifdef PC_TEST_HOOKS
/* Whether pc_background_start finds no thread to be had from now on; returns how many it has not found so far. */
long pc_test_no_threads(bool none);
#endif

#endif
