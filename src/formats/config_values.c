#include "config_values.h"

#include <math.h>
#include <string.h>

#include "../core/strmap.h"

pc_status pc_config_refuse(pc_config_reader *reader, const char *name, const char *what, const pc_json_value *value)
{
    char shown[96];
    pc_json_describe(value, shown, sizeof shown);
    return pc_fail(reader->err, PC_ERR_VALUE, "%s: %s must be %s, got %s", reader->config->label, name, what, shown);
}

static pc_status no_memory(pc_config_reader *reader) { return pc_fail_nomem(reader->err, "an adapter config"); }

static size_t count_items(const pc_json_value *parent)
{
    size_t count = 0;
    for (const pc_json_value *item = pc_json_first(parent); item != NULL; item = pc_json_next(item))
        count++;
    return count;
}

static pc_status read_bool(pc_config_reader *reader, const char *name, const pc_json_value *value, bool *out)
{
    int64_t number;
    switch (pc_json_kind_of(value)) {
    case PC_JSON_BOOL:
        *out = pc_json_bool(value);
        return PC_OK;
    case PC_JSON_NULL: /* false to PEFT, which asks for truth only */
        *out = false;
        return PC_OK;
    case PC_JSON_NUMBER:
        if (pc_json_int64(value, &number) && (number == 0 || number == 1)) {
            *out = number == 1;
            return PC_OK;
        }
        break;
    default:
        break;
    }
    return pc_config_refuse(reader, name, "true or false", value);
}

static pc_status read_int(pc_config_reader *reader, const char *name, const pc_json_value *value, int64_t *out)
{
    if (pc_json_kind_of(value) != PC_JSON_NUMBER || !pc_json_int64(value, out) || *out == INT64_MIN)
        return pc_config_refuse(reader, name, "an integer", value);
    return PC_OK;
}

static pc_status read_double(pc_config_reader *reader, const char *name, const pc_json_value *value, double *out)
{
    if (pc_json_kind_of(value) != PC_JSON_NUMBER)
        return pc_config_refuse(reader, name, "a number", value);
    pc_status status = pc_json_double(value, out, reader->err);
    if (status == PC_OK && !isfinite(*out))
        return pc_config_refuse(reader, name, "a finite number", value);
    return status;
}

/* `value` is a string. */
static pc_status read_string(pc_config_reader *reader, const char *name, const pc_json_value *value, pc_string *out)
{
    const char *text = pc_json_text(value);
    if (text == NULL)
        return pc_config_refuse(reader, name, "text without NUL and lone surrogates", value);
    out->len = strlen(text);
    out->text = pc_pool_strndup(&reader->config->pool, text, out->len);
    return out->text != NULL ? PC_OK : no_memory(reader);
}

static pc_status read_text(pc_config_reader *reader, const char *name, const pc_json_value *value, pc_string *out)
{
    if (pc_json_kind_of(value) == PC_JSON_NULL) {
        *out = (pc_string){0};
        return PC_OK;
    }
    if (pc_json_kind_of(value) != PC_JSON_STRING)
        return pc_config_refuse(reader, name, "a string or null", value);
    return read_string(reader, name, value, out);
}

static pc_status read_bool_or_text(pc_config_reader *reader, const char *name, const pc_json_value *value,
                                   pc_bool_or_text *out)
{
    out->is_text = pc_json_kind_of(value) == PC_JSON_STRING;
    if (out->is_text)
        return read_string(reader, name, value, &out->text);
    if (pc_json_kind_of(value) != PC_JSON_BOOL)
        return pc_config_refuse(reader, name, "true, false or a string", value);
    out->flag = pc_json_bool(value);
    return PC_OK;
}

/* An array of strings; a repeated one counts once, as in a Python set. */
static pc_status read_names(pc_config_reader *reader, const char *name, const pc_json_value *array, pc_strings *out)
{
    pc_string *items = pc_pool_array(&reader->config->pool, count_items(array), sizeof *items);
    if (items == NULL)
        return no_memory(reader);
    pc_strmap seen;
    pc_strmap_init(&seen);
    size_t count = 0;
    pc_status status = PC_OK;
    for (const pc_json_value *item = pc_json_first(array); item != NULL && status == PC_OK; item = pc_json_next(item)) {
        size_t earlier;
        if (pc_json_kind_of(item) != PC_JSON_STRING)
            status = pc_config_refuse(reader, name, "a list of strings", item);
        else
            status = read_string(reader, name, item, &items[count]);
        if (status != PC_OK || pc_strmap_get(&seen, items[count].text, items[count].len, &earlier))
            continue;
        if (!pc_strmap_put(&seen, items[count].text, items[count].len, count))
            status = no_memory(reader);
        count++;
    }
    pc_strmap_free(&seen);
    *out = (pc_strings){items, count};
    return status;
}

static pc_status read_strings(pc_config_reader *reader, const char *name, const pc_json_value *value, pc_strings *out)
{
    *out = (pc_strings){0};
    pc_string *one;
    switch (pc_json_kind_of(value)) {
    case PC_JSON_NULL:
        return PC_OK;
    case PC_JSON_STRING:
        one = pc_pool_array(&reader->config->pool, 1, sizeof *one);
        if (one == NULL)
            return no_memory(reader);
        *out = (pc_strings){one, 1};
        return read_string(reader, name, value, one);
    case PC_JSON_ARRAY:
        return read_names(reader, name, value, out);
    default:
        return pc_config_refuse(reader, name, "a list of strings, a string or null", value);
    }
}

static pc_status read_ints(pc_config_reader *reader, const char *name, const pc_json_value *value, pc_ints *out)
{
    *out = (pc_ints){0};
    if (pc_json_kind_of(value) == PC_JSON_NULL)
        return PC_OK;
    bool list = pc_json_kind_of(value) == PC_JSON_ARRAY;
    if (!list && pc_json_kind_of(value) != PC_JSON_NUMBER)
        return pc_config_refuse(reader, name, "a list of integers, an integer or null", value);
    size_t count = list ? count_items(value) : 1;
    int64_t *items = pc_pool_array(&reader->config->pool, count, sizeof *items);
    if (items == NULL)
        return no_memory(reader);
    *out = (pc_ints){items, count};
    if (!list)
        return read_int(reader, name, value, items);
    for (const pc_json_value *item = pc_json_first(value); item != NULL; item = pc_json_next(item)) {
        pc_status status = read_int(reader, name, item, items++);
        if (status != PC_OK)
            return status;
    }
    return PC_OK;
}

/* Compile a regular expression of the config; the text must outlive nothing: it is copied. */
static pc_status read_pattern(pc_config_reader *reader, const char *name, const char *text, size_t len,
                              pc_pattern **out)
{
    const char *label = reader->config->label;
    reader->pattern_bytes += len;
    if (reader->pattern_bytes > PC_CONFIG_PATTERN_BYTES)
        return pc_fail(reader->err, PC_ERR_VALUE, "%s: %s brings the regular expressions of this config to more than 1 MiB",
                       label, name);
    pc_error why;
    pc_status status = pc_pattern_compile(text, len, out, &why);
    return status == PC_OK ? PC_OK : pc_fail(reader->err, status, "%s: %s: %s", label, name, why.text);
}

static bool is_all_linear(const char *text)
{
    static const char word[] = "all-linear";
    size_t i = 0;
    for (; text[i] != '\0' && word[i] != '\0'; i++)
        if ((text[i] >= 'A' && text[i] <= 'Z' ? text[i] + 32 : text[i]) != word[i])
            return false;
    return text[i] == word[i];
}

static pc_status read_selector(pc_config_reader *reader, const char *name, const pc_json_value *value, pc_selector *out)
{
    pc_status status;
    *out = (pc_selector){0};
    switch (pc_json_kind_of(value)) {
    case PC_JSON_NULL:
        return PC_OK;
    case PC_JSON_ARRAY:
        out->kind = PC_SELECT_LIST;
        return read_names(reader, name, value, &out->names);
    case PC_JSON_STRING:
        if ((status = read_string(reader, name, value, &out->text)) != PC_OK)
            return status;
        /* the wildcard means something for the targets alone; elsewhere it is a pattern like any other */
        if (strcmp(name, "target_modules") == 0 && is_all_linear(out->text.text)) {
            out->kind = PC_SELECT_ALL_LINEAR;
            return PC_OK;
        }
        status = read_pattern(reader, name, out->text.text, out->text.len, &out->regex);
        if (status == PC_OK)
            out->kind = PC_SELECT_REGEX;
        return status;
    default:
        return pc_config_refuse(reader, name, "a list of module names, a regular expression or null", value);
    }
}

/* The name of an object's member, which C strings can hold. */
static pc_status read_member_name(pc_config_reader *reader, const char *field, const pc_json_value *member,
                                  pc_string *out)
{
    const char *key = pc_json_name(member);
    if (key == NULL)
        return pc_fail(reader->err, PC_ERR_VALUE, "%s: %s has a name with NUL or a lone surrogate",
                       reader->config->label, field);
    out->len = strlen(key);
    out->text = pc_pool_strndup(&reader->config->pool, key, out->len);
    return out->text != NULL ? PC_OK : no_memory(reader);
}

static pc_status read_numbers(pc_config_reader *reader, const char *name, const pc_json_value *value,
                              pc_number_patterns *out)
{
    *out = (pc_number_patterns){0};
    if (pc_json_kind_of(value) == PC_JSON_NULL)
        return PC_OK;
    if (pc_json_kind_of(value) != PC_JSON_OBJECT)
        return pc_config_refuse(reader, name, "an object that maps module names to numbers, or null", value);
    pc_number_pattern *items = pc_pool_array(&reader->config->pool, count_items(value), sizeof *items);
    if (items == NULL)
        return no_memory(reader);
    out->items = items;
    for (const pc_json_value *member = pc_json_first(value); member != NULL; member = pc_json_next(member)) {
        pc_number_pattern *item = &items[out->count];
        pc_status status = read_member_name(reader, name, member, &item->text);
        if (status == PC_OK)
            status = read_pattern(reader, name, item->text.text, item->text.len, &item->regex);
        if (status != PC_OK)
            return status;
        out->count++; /* from here on the item is released with the config */
        bool matched;
        pc_error why;
        status = pc_pattern_match_suffix(item->regex, "", 0, &matched, &why); /* how it will be used: does it compile? */
        if (status != PC_OK)
            return pc_fail(reader->err, status, "%s: %s: %s", reader->config->label, name, why.text);
        pc_error field; /* its text is cut at a whole character */
        pc_fail(&field, PC_ERR_VALUE, "%s[\"%s\"]", name, item->text.text);
        if ((status = read_double(reader, field.text, member, &item->value)) != PC_OK)
            return status;
        if (strcmp(name, "rank_pattern") == 0 && (item->value < 1 || item->value != floor(item->value)))
            return pc_config_refuse(reader, field.text, "a rank, an integer of at least 1", member);
    }
    return PC_OK;
}

static pc_status read_mask(pc_config_reader *reader, const char *name, const pc_json_value *value, pc_mask *out)
{
    int64_t rank;
    if (pc_json_kind_of(value) == PC_JSON_NUMBER && pc_json_int64(value, &rank) && rank >= 0) {
        out->count = (size_t)rank;
        return PC_OK;
    }
    if (pc_json_kind_of(value) != PC_JSON_ARRAY)
        return pc_config_refuse(reader, name, "an object that maps names to lists of true and false", value);
    out->count = count_items(value);
    bool *keep = pc_pool_array(&reader->config->pool, out->count, sizeof *keep);
    if (keep == NULL)
        return no_memory(reader);
    out->keep = keep;
    for (const pc_json_value *item = pc_json_first(value); item != NULL; item = pc_json_next(item)) {
        if (pc_json_kind_of(item) != PC_JSON_BOOL)
            return pc_config_refuse(reader, name, "an object that maps names to lists of true and false", item);
        *keep++ = pc_json_bool(item);
    }
    return PC_OK;
}

static pc_status read_masks(pc_config_reader *reader, const char *name, const pc_json_value *value, pc_masks *out)
{
    *out = (pc_masks){0};
    if (pc_json_kind_of(value) == PC_JSON_NULL)
        return PC_OK;
    if (pc_json_kind_of(value) != PC_JSON_OBJECT)
        return pc_config_refuse(reader, name, "an object that maps names to lists of true and false, or null", value);
    pc_mask *items = pc_pool_array(&reader->config->pool, count_items(value), sizeof *items);
    if (items == NULL)
        return no_memory(reader);
    out->items = items;
    for (const pc_json_value *member = pc_json_first(value); member != NULL; member = pc_json_next(member)) {
        pc_mask *item = &items[out->count++];
        pc_status status = read_member_name(reader, name, member, &item->name);
        if (status == PC_OK)
            status = read_mask(reader, name, member, item);
        if (status != PC_OK)
            return status;
    }
    return PC_OK;
}

pc_status pc_config_read_value(pc_config_reader *reader, const char *name, pc_field_type type, const pc_json_value *value,
                               void *target)
{
    switch (type) {
    case PC_FIELD_BOOL:
        return read_bool(reader, name, value, target);
    case PC_FIELD_INT:
        return read_int(reader, name, value, target);
    case PC_FIELD_OPTIONAL_INT:
        if (pc_json_kind_of(value) == PC_JSON_NULL) {
            *(int64_t *)target = INT64_MIN;
            return PC_OK;
        }
        return read_int(reader, name, value, target);
    case PC_FIELD_DOUBLE:
        return read_double(reader, name, value, target);
    case PC_FIELD_TEXT:
        return read_text(reader, name, value, target);
    case PC_FIELD_BOOL_OR_TEXT:
        return read_bool_or_text(reader, name, value, target);
    case PC_FIELD_STRINGS:
        return read_strings(reader, name, value, target);
    case PC_FIELD_INTS:
        return read_ints(reader, name, value, target);
    case PC_FIELD_SELECTOR:
        return read_selector(reader, name, value, target);
    case PC_FIELD_NUMBERS:
        return read_numbers(reader, name, value, target);
    case PC_FIELD_MASKS:
        return read_masks(reader, name, value, target);
    case PC_FIELD_IGNORED:
        break;
    }
    return PC_OK;
}

void pc_config_release_value(pc_field_type type, void *target)
{
    if (type == PC_FIELD_SELECTOR) {
        pc_selector *selector = target;
        pc_pattern_free(selector->regex);
        selector->regex = NULL;
    } else if (type == PC_FIELD_NUMBERS) {
        pc_number_patterns *patterns = target;
        for (size_t i = 0; i < patterns->count; i++)
            pc_pattern_free(patterns->items[i].regex);
        patterns->count = 0;
    }
}
