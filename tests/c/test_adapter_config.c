/* Configs as a C library: a schema of the test's own, values, refusals, and every allocation made to fail. */
#include "check.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stddef.h>

#include "../../src/formats/adapter_config.h"

typedef struct test_params {
    bool flag;
    int64_t r, optional;
    double alpha;
    pc_bool_or_text init;
    pc_number_patterns ranks;
    pc_masks masks;
    pc_selector feed;
    pc_strings words;
} test_params;

static const pc_field fields[] = {
    {"flag", PC_FIELD_BOOL, offsetof(test_params, flag)},
    {"r", PC_FIELD_INT, offsetof(test_params, r)},
    {"optional", PC_FIELD_OPTIONAL_INT, offsetof(test_params, optional)},
    {"alpha", PC_FIELD_DOUBLE, offsetof(test_params, alpha)},
    {"init", PC_FIELD_BOOL_OR_TEXT, offsetof(test_params, init)},
    {"rank_pattern", PC_FIELD_NUMBERS, offsetof(test_params, ranks)},
    {"masks", PC_FIELD_MASKS, offsetof(test_params, masks)},
    {"feed", PC_FIELD_SELECTOR, offsetof(test_params, feed)},
    {"words", PC_FIELD_STRINGS, offsetof(test_params, words)},
    {"loftq_config", PC_FIELD_IGNORED, 0},
};

static void defaults(void *params) { ((test_params *)params)->r = 8; }

static pc_status validate(const pc_config *config, pc_error *e)
{
    const test_params *p = config->params;
    return p->r == 13 ? pc_fail(e, PC_ERR_VALUE, "r is 13") : PC_OK;
}

static const char *const without[] = {"bias", NULL};
static const pc_schema first = {.peft_type = "TEST",
                                .fields = fields,
                                .field_count = sizeof fields / sizeof fields[0],
                                .params_size = sizeof(test_params),
                                .set_defaults = defaults,
                                .validate = validate};
static const pc_schema second = {.peft_type = "BARE", .params_size = 1, .lacks = without};
static const pc_schema *const schemas[] = {&first, &second};
static pc_error err;

static pc_status parse(const char *text, pc_config **out)
{
    return pc_config_parse(text, strlen(text), "file.json", schemas, 2, out, &err);
}

static const char whole[] =
    "{\"peft_type\":\"TEST\",\"flag\":1,\"r\":4.0,\"optional\":null,\"alpha\":3,\"init\":\"gaussian\",\"rank_pattern\":"
    "{\"b(c|d)\":2,\"a\":3,\"b(c|d)\":5},\"masks\":{\"x\":[true,false],\"y\":7},\"feed\":\"all-linear\",\"words\":\"one\","
    "\"target_modules\":[\"q\",\"v\",\"q\"],\"exclude_modules\":\"x.*(y|z)\",\"modules_to_save\":null,"
    "\"layers_to_transform\":2,\"bias\":\"lora_only\",\"task_type\":\"SEQ_CLS\",\"new\\u0000er\":[1,[NaN,-Infinity]],"
    "\"newer\":{}}";

TEST(values)
{
    pc_config *config;
    REQUIRE(parse(whole, &config) == PC_OK);
    const test_params *p = config->params;
    CHECK(p->flag && p->r == 4 && p->optional == INT64_MIN && p->alpha == 3.0);
    CHECK(p->init.is_text && strcmp(p->init.text.text, "gaussian") == 0);
    CHECK(p->ranks.count == 2 && strcmp(p->ranks.items[0].text.text, "b(c|d)") == 0 && p->ranks.items[0].value == 5);
    CHECK(p->masks.count == 2 && p->masks.items[0].count == 2 && p->masks.items[0].keep[0] && !p->masks.items[0].keep[1]);
    CHECK(p->masks.items[1].keep == NULL && p->masks.items[1].count == 7);
    CHECK(p->feed.kind == PC_SELECT_REGEX);
    CHECK(p->words.count == 1);
    CHECK(config->target_modules.kind == PC_SELECT_LIST && config->target_modules.names.count == 2);
    CHECK(config->exclude_modules.kind == PC_SELECT_REGEX);
    CHECK(config->has_layers_to_transform && config->layers_to_transform.count == 1);
    CHECK(config->bias == PC_BIAS_ADAPTED);
    CHECK(config->unknown.count == 2 && strcmp(config->unknown.items[1].text, "newer") == 0);
    pc_config_free(config);
    REQUIRE(parse("{\"peft_type\":\"BARE\",\"bias\":\"all\",\"r\":3}", &config) == PC_OK);
    CHECK(config->unknown.count == 2 && config->bias == PC_BIAS_NONE);
    pc_config_free(config);
}

TEST(refusals)
{
    static const struct {
        const char *text;
        pc_status status;
        const char *words;
    } cases[] = {
        {"{}", PC_ERR_VALUE, "TEST, BARE"},
        {"{\"r\":1}", PC_ERR_TYPE, "no peft_type"},
        {"{\"peft_type\":\"test\"}", PC_ERR_KEY, "test"},
        {"{\"peft_type\":\"CPT\"}", PC_ERR_VALUE, "injected"},
        {"{\"peft_type\":\"VERA\"}", PC_ERR_UNSUPPORTED, "VERA"},
        {"{\"peft_type\":\"TEST\",\"r\":13}", PC_ERR_VALUE, "file.json: r is 13"},
        {"{\"peft_type\":\"TEST\",\"r\":\"4\"}", PC_ERR_VALUE, "r must be an integer, got \"4\""},
        {"{\"peft_type\":\"TEST\",\"alpha\":Infinity}", PC_ERR_VALUE, "finite"},
        {"{\"peft_type\":\"TEST\",\"rank_pattern\":{\"a\":1,\"(\":2}}", PC_ERR_VALUE, "regular expression"},
        {"{\"peft_type\":\"TEST\",\"masks\":{\"a\":[1]}}", PC_ERR_VALUE, "masks"},
        {"{\"peft_type\":\"TEST\",\"bias\":\"x\"}", PC_ERR_UNSUPPORTED, "bias"},
        {"{\"peft_type\":\"TEST\"", PC_ERR_VALUE, "line 1 column 20"},
        {"\xEF\xBB\xBF{}", PC_ERR_VALUE, "byte order mark"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        pc_config *config;
        CHECK_STATUS(parse(cases[i].text, &config), cases[i].status);
        CHECK(config == NULL && strstr(err.text, cases[i].words) != NULL && strstr(err.text, "file.json") != NULL);
    }
}

TEST(canonical)
{
    static const char text[] = "{\"b\":[1.50,1e22,-0,{}],\"a\":\"\xC3\xA9\\u0000\",\"b\":[]}";
    char *out;
    size_t len;
    CHECK_STATUS(pc_json_canonical(text, sizeof text - 1, "t", &out, &len, &err), PC_OK);
    REQUIRE(out != NULL);
    CHECK(strcmp(out, "{\n  \"a\": \"\\u00e9\\u0000\",\n  \"b\": []\n}") == 0 && len == strlen(out));
    pc_free(out);
}

TEST(every_allocation_may_fail)
{
    /* cJSON's allocations, too: only here, because its hooks belong to the whole process */
    cJSON_Hooks hooks = {pc_malloc, pc_free};
    cJSON_InitHooks(&hooks);
    long live = pc_test_live_allocations();
    bool done = false;
    for (long n = 1; !done && n < 5000; n++) {
        pc_config *config;
        pc_test_fail_allocation(n);
        pc_status status = parse(whole, &config);
        done = !pc_test_allocation_failed();
        pc_test_fail_allocation(0);
        CHECK_STATUS(status, done ? PC_OK : PC_ERR_NOMEM);
        CHECK((config != NULL) == done);
        pc_config_free(config);
        CHECK(pc_test_live_allocations() == live);
    }
    CHECK(done);
    done = false;
    for (long n = 1; !done && n < 5000; n++) {
        char *out;
        size_t len;
        pc_test_fail_allocation(n);
        pc_status status = pc_json_canonical(whole, sizeof whole - 1, "t", &out, &len, &err);
        done = !pc_test_allocation_failed();
        pc_test_fail_allocation(0);
        CHECK_STATUS(status, done ? PC_OK : PC_ERR_NOMEM);
        pc_free(out);
        CHECK(pc_test_live_allocations() == live);
    }
    CHECK(done);
    cJSON_InitHooks(NULL);
}

int main(void)
{
    RUN(values);
    RUN(refusals);
    RUN(canonical);
    RUN(every_allocation_may_fail);
    return check_done();
}
