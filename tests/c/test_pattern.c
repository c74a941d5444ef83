/* The pattern engine as a C library: results, refusals, bounds, and every allocation made to fail. */
#include "check.h"

#include "../../src/core/pattern.h"

static pc_error err;

/* 1 match, 0 no match, -1 an error. */
static int full(const char *pattern, const char *subject)
{
    pc_pattern *p;
    bool matched = false;
    if (pc_pattern_compile(pattern, strlen(pattern), &p, &err) != PC_OK)
        return -1;
    pc_status status = pc_pattern_fullmatch(p, subject, strlen(subject), &matched, &err);
    pc_pattern_free(p);
    return status == PC_OK ? matched : -1;
}

static int suffix(const char *pattern, const char *subject)
{
    pc_pattern *p;
    bool matched = false;
    if (pc_pattern_compile(pattern, strlen(pattern), &p, &err) != PC_OK)
        return -1;
    pc_status status = pc_pattern_match_suffix(p, subject, strlen(subject), &matched, &err);
    pc_pattern_free(p);
    return status == PC_OK ? matched : -1;
}

TEST(full_matches)
{
    CHECK(full(".*\\.(q|v)_proj", "model.layers.0.q_proj") == 1);
    CHECK(full(".*\\.(q|v)_proj", "model.layers.0.k_proj") == 0);
    CHECK(full("layer\\.5", "layer.5") == 1);
    CHECK(full("layer\\.5", "layerx5") == 0);
    CHECK(full("layer.5", "layerx5") == 1);
    CHECK(full("(?i)LAYER", "layer") == 1);
    CHECK(full("(a)(?(1)b|c)", "ab") == 1);
    CHECK(full("\xC3\xA9+", "\xC3\xA9\xC3\xA9") == 1);
    CHECK(full("", "") == 1);
}

TEST(suffixes)
{
    CHECK(suffix("layer\\.5", "bert.layer.5") == 1);
    CHECK(suffix("layer\\.5", "bertlayer.5") == 0);
    CHECK(suffix("q|v", "a.v") == 1);
    CHECK(suffix("layer\\.5", "bert.layer.5\n") == 1);
    CHECK(suffix("(?i)q", "q") == -1); /* flags in the middle of the whole */
}

TEST(groups)
{
    pc_pattern *p;
    bool matched;
    const char *group;
    size_t len;
    const char pattern[] = "layers\\.(\\d+)\\.", subject[] = "\xC3\xA9.layers.17.q";
    REQUIRE(pc_pattern_compile(pattern, sizeof pattern - 1, &p, &err) == PC_OK);
    CHECK_STATUS(pc_pattern_search(p, subject, sizeof subject - 1, &matched, &group, &len, &err), PC_OK);
    CHECK(matched && len == 2 && group != NULL && memcmp(group, "17", 2) == 0);
    CHECK_STATUS(pc_pattern_search(p, "x", 1, &matched, &group, &len, &err), PC_OK);
    CHECK(!matched && group == NULL);
    pc_pattern_free(p);
}

TEST(refusals)
{
    static const char *const bad[] = {"(", ")", "[", "*", "a**", "\\", "(?P<1>a)", "\\1", "(?<=a+)b", "a{3,2}", "\xFF"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK(full(bad[i], "a") == -1);
        CHECK(err.code == PC_ERR_VALUE);
    }
    CHECK(full("a|b", "\xFF") == -1); /* a subject that is not UTF-8 */
}

TEST(bounded)
{
    char name[3000];
    memset(name, 'a', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    name[sizeof name - 2] = '!';
    CHECK(full("(a+)+$", name) == -1);
    CHECK(strstr(err.text, "(a+)+$") != NULL);
    CHECK(full("(a|aa)*b", name) == -1);
    char deep[2001];
    memset(deep, '(', 1000);
    memset(deep + 1000, ')', 1000);
    deep[2000] = '\0';
    CHECK(full(deep, "") == -1);
}

TEST(every_allocation_may_fail)
{
    static const char *const patterns[] = {"(?i)[a-z\xC3\xA0-\xC3\xBF]+(?P<n>x|y)*?(?:ab){2,3}+(?<=b)(?(n)c|d)?\\w*.*", "a\\.b",
                                           "(a)(b)(c)(d)(e)(f)(g)(h)(i)(j)(k)(l)(m)(n)(o)(p)(q)(r)", "(?:a|b|(c))*x"};
    char subject[600];
    memset(subject, 'a', sizeof subject);
    for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++) {
        long live = pc_test_live_allocations();
        bool done = false;
        for (long n = 1; !done && n < 1000; n++) {
            pc_pattern *p = NULL;
            bool matched;
            pc_test_fail_allocation(n);
            pc_status status = pc_pattern_compile(patterns[i], strlen(patterns[i]), &p, &err);
            if (status == PC_OK)
                status = pc_pattern_fullmatch(p, subject, sizeof subject, &matched, &err);
            if (status == PC_OK)
                status = pc_pattern_match_suffix(p, subject, sizeof subject, &matched, &err);
            done = !pc_test_allocation_failed();
            pc_test_fail_allocation(0);
            CHECK(done ? status != PC_ERR_NOMEM : status == PC_ERR_NOMEM);
            pc_pattern_free(p);
            CHECK(pc_test_live_allocations() == live);
        }
        CHECK(done);
    }
}

int main(void)
{
    RUN(full_matches);
    RUN(suffixes);
    RUN(groups);
    RUN(refusals);
    RUN(bounded);
    RUN(every_allocation_may_fail);
    return check_done();
}
