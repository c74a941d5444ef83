/* A test harness in one header.
 *
 *     TEST(strmap_forgets) { ...; CHECK(count == 0); }
 *     int main(void) { RUN(strmap_forgets); return check_done(); }
 *
 * A failed CHECK is reported and the test goes on; a failed REQUIRE returns
 * from the test, for what the lines after it depend on.  Each macro evaluates
 * its arguments once.  Everything is static: one test program, one state.
 */
#ifndef PEFTC_TESTS_CHECK_H
#define PEFTC_TESTS_CHECK_H

#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../src/core/memory.h"
#include "../../src/core/status.h"

#define CHECK_UNUSED __attribute__((unused))

/* Atomic: a CHECK may run on a test's own threads. */
static atomic_int check_failures; /* failed checks of the test that runs */
static int check_passed_tests, check_failed_tests;
static const char *check_test_name = "";

CHECK_UNUSED static bool check_that(bool good, const char *file, int line, const char *what)
{
    if (!good) {
        fprintf(stderr, "%s:%d: %s: CHECK(%s) failed\n", file, line, check_test_name, what);
        atomic_fetch_add(&check_failures, 1);
    }
    return good;
}

CHECK_UNUSED static bool check_status(pc_status got, pc_status want, const char *file, int line, const char *what)
{
    if (got != want) {
        fprintf(stderr, "%s:%d: %s: %s gave status %d, not %d\n", file, line, check_test_name, what, (int)got,
                (int)want);
        atomic_fetch_add(&check_failures, 1);
    }
    return got == want;
}

CHECK_UNUSED static bool check_int(long long got, long long want, const char *file, int line, const char *what)
{
    if (got != want) {
        fprintf(stderr, "%s:%d: %s: %s is %lld, not %lld\n", file, line, check_test_name, what, got, want);
        atomic_fetch_add(&check_failures, 1);
    }
    return got == want;
}

CHECK_UNUSED static bool check_close(double got, double want, double tolerance, const char *file, int line,
                                     const char *what)
{
    bool good = fabs(got - want) <= tolerance; /* false for NaN */
    if (!good) {
        fprintf(stderr, "%s:%d: %s: %s is %.17g, not %.17g within %g\n", file, line, check_test_name, what, got, want,
                tolerance);
        atomic_fetch_add(&check_failures, 1);
    }
    return good;
}

CHECK_UNUSED static bool check_contains(const char *text, const char *part, const char *file, int line)
{
    bool good = text != NULL && strstr(text, part) != NULL;
    if (!good) {
        fprintf(stderr, "%s:%d: %s: \"%s\" does not contain \"%s\"\n", file, line, check_test_name,
                text != NULL ? text : "(null)", part);
        atomic_fetch_add(&check_failures, 1);
    }
    return good;
}

#define CHECK(cond) ((void)check_that((cond), __FILE__, __LINE__, #cond))
#define CHECK_STATUS(expr, want) ((void)check_status((expr), (want), __FILE__, __LINE__, #expr))
#define CHECK_INT(got, want) ((void)check_int((long long)(got), (long long)(want), __FILE__, __LINE__, #got))
#define CHECK_CLOSE(got, want, tolerance) \
    ((void)check_close((double)(got), (double)(want), (double)(tolerance), __FILE__, __LINE__, #got))
/* An error text names what it should. */
#define CHECK_CONTAINS(text, part) ((void)check_contains((text), (part), __FILE__, __LINE__))

#define REQUIRE(cond)                                       \
    do {                                                    \
        if (!check_that((cond), __FILE__, __LINE__, #cond)) \
            return;                                         \
    } while (0)
#define REQUIRE_STATUS(expr, want)                                    \
    do {                                                              \
        if (!check_status((expr), (want), __FILE__, __LINE__, #expr)) \
            return;                                                   \
    } while (0)

#define TEST(name) static void name(void)

#define RUN(name) check_run(name, #name)

CHECK_UNUSED static void check_run(void (*test)(void), const char *name)
{
    check_test_name = name;
    atomic_store(&check_failures, 0);
    test();
    if (atomic_load(&check_failures) == 0) {
        check_passed_tests++;
    } else {
        check_failed_tests++;
        fprintf(stderr, "FAILED %s\n", name);
    }
}

/* Print the totals; what main returns. */
CHECK_UNUSED static int check_done(void)
{
    printf("%d passed, %d failed\n", check_passed_tests, check_failed_tests);
    return check_failed_tests != 0 || check_passed_tests == 0;
}

#ifdef PC_TEST_HOOKS
/* Run the body once for every allocation that it makes on this thread, with
 * that one failing, and a last time with none failing:
 *
 *     FOR_EACH_ALLOCATION (n) {
 *         status = thing_new(&thing, &err);
 *         ... n tells which one failed; pc_test_allocation_failed() whether it was reached
 *     }
 *
 * The body must not leave by break or return without pc_test_fail_allocation(0). */
CHECK_UNUSED static bool check_next_allocation(long *nth)
{
    bool more = *nth == 0 || pc_test_allocation_failed();
    if (more && *nth == 1000000) {
        check_that(false, __FILE__, __LINE__, "fewer than 1000000 allocations");
        more = false;
    }
    pc_test_fail_allocation(more ? ++*nth : 0);
    return more;
}

#define FOR_EACH_ALLOCATION(nth) for (long nth = 0; check_next_allocation(&nth);)
#endif

#endif
