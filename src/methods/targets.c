/* Which modules an adapter changes: target_modules, exclude_modules,
 * layers_to_transform and modules_to_save, by PEFT's rules.
 *
 * A name in a list matches a module that has exactly that dotted name or ends
 * in "." + name; a string is a regular expression for the whole name. */
#include "methods.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Is `key` equal to `name`, or does it end in "." + name? */
static bool has_suffix(const char *key, size_t len, const pc_string *name)
{
    if (name->len > len || memcmp(key + (len - name->len), name->text, name->len) != 0)
        return false;
    return name->len == len || key[len - name->len - 1] == '.';
}

pc_status pc_selector_matches(const pc_selector *selector, const char *key, size_t len, bool *matched, pc_error *err)
{
    *matched = false;
    switch (selector->kind) {
    case PC_SELECT_LIST:
        for (size_t i = 0; i < selector->names.count && !*matched; i++)
            *matched = has_suffix(key, len, &selector->names.items[i]);
        return PC_OK;
    case PC_SELECT_REGEX:
        return pc_pattern_fullmatch(selector->regex, key, len, matched, err);
    case PC_SELECT_NONE:
    case PC_SELECT_ALL_LINEAR:
        break;
    }
    return PC_OK;
}

pc_status pc_pattern_value(const pc_number_patterns *patterns, const char *key, size_t len, double fallback,
                           double *value, pc_error *err)
{
    *value = fallback;
    for (size_t i = 0; i < patterns->count; i++) {
        bool matched;
        pc_status status = pc_pattern_match_suffix(patterns->items[i].regex, key, len, &matched, err);
        if (status != PC_OK)
            return status;
        if (matched) {
            *value = patterns->items[i].value;
            return PC_OK;
        }
    }
    return PC_OK;
}

size_t pc_saved_root(const pc_config *config, const char *name, size_t len)
{
    /* The shortest prefix that ends at a dot (or the whole name) and that the list names. */
    for (size_t end = 1; end <= len; end++) {
        if (end != len && name[end] != '.')
            continue;
        for (size_t i = 0; i < config->modules_to_save.count; i++)
            if (has_suffix(name, end, &config->modules_to_save.items[i]))
                return end;
    }
    return 0;
}

/* ------------------------------------------------------------------- matcher */

typedef struct matcher {
    const pc_config *config;
    const pc_module_table *modules;
    pc_pool pool;
    pc_strmap exact;        /* a long list of targets, for a look-up per suffix instead of a scan */
    bool use_map;
    pc_pattern **layer_patterns; /* one per layers_pattern */
    size_t layer_pattern_count;
    const char *classifier; /* all-linear with task_type SEQ_CLS: the head that is left out */
} matcher;

#define LONG_LIST 16

static void matcher_free(matcher *m)
{
    for (size_t i = 0; i < m->layer_pattern_count; i++)
        pc_pattern_free(m->layer_patterns[i]);
    pc_strmap_free(&m->exact);
    pc_pool_free(&m->pool);
}

static bool uses_layers(const pc_config *config)
{
    return config->has_layers_to_transform && config->layers_to_transform.count != 0;
}

/* layers_pattern "h" looks for ".h.<number>." after at least one dot, as PEFT does. */
static pc_status compile_layer_patterns(matcher *m, pc_error *err)
{
    const pc_strings *names = &m->config->layers_pattern;
    if (!uses_layers(m->config) || names->count == 0)
        return PC_OK;
    m->layer_patterns = pc_pool_array(&m->pool, names->count, sizeof *m->layer_patterns);
    if (m->layer_patterns == NULL)
        return pc_fail_nomem(err, "layers_pattern");
    static const char head[] = ".*\\.", tail[] = "\\.([0-9]+)\\.";
    for (size_t i = 0; i < names->count; i++) {
        const pc_string *name = &names->items[i];
        size_t size = sizeof head + sizeof tail;
        char *text = pc_add_size(size, name->len, &size) ? pc_pool_alloc(&m->pool, size) : NULL;
        if (text == NULL)
            return pc_fail_nomem(err, "layers_pattern");
        memcpy(text, head, sizeof head - 1);
        memcpy(text + sizeof head - 1, name->text, name->len);
        memcpy(text + sizeof head - 1 + name->len, tail, sizeof tail);
        pc_status status = pc_pattern_compile(text, strlen(text), &m->layer_patterns[i], err);
        if (status != PC_OK)
            return status;
        m->layer_pattern_count++;
    }
    return PC_OK;
}

static pc_status matcher_init(matcher *m, const pc_config *config, const pc_module_table *modules, pc_error *err)
{
    memset(m, 0, sizeof *m);
    m->config = config;
    m->modules = modules;
    pc_pool_init(&m->pool);
    pc_strmap_init(&m->exact);
    const pc_selector *targets = &config->target_modules;
    m->use_map = targets->kind == PC_SELECT_LIST && targets->names.count > LONG_LIST;
    for (size_t i = 0; m->use_map && i < targets->names.count; i++)
        if (!pc_strmap_put(&m->exact, targets->names.items[i].text, targets->names.items[i].len, i))
            return pc_fail_nomem(err, "target_modules");
    if (targets->kind == PC_SELECT_ALL_LINEAR && config->task_type.text != NULL &&
        strcmp(config->task_type.text, "SEQ_CLS") == 0) {
        bool has_output_embedding = false;
        for (size_t i = 0; i < modules->count; i++)
            has_output_embedding = has_output_embedding || modules->items[i].output_embedding;
        if (!has_output_embedding)
            m->classifier = pc_module_table_find(modules, "score", 5) != NULL ? "score" : "classifier";
    }
    return compile_layer_patterns(m, err);
}

/* The number of the layer that `key` lies in when any pattern will do: the last ".<any>.<digits>.". */
static bool any_layer(const char *key, size_t len, const char **digits, size_t *digit_count)
{
    bool found = false;
    size_t component = 0, start = 0;
    for (size_t i = 0; i < len; i++) {
        if (key[i] != '.')
            continue;
        bool number = i > start;
        for (size_t j = start; j < i; j++)
            number = number && key[j] >= '0' && key[j] <= '9';
        if (number && component >= 2) {
            *digits = key + start;
            *digit_count = i - start;
            found = true;
        }
        component++;
        start = i + 1;
    }
    return found;
}

static pc_status in_wanted_layer(const matcher *m, const char *key, size_t len, bool *wanted, pc_error *err)
{
    const char *digits = NULL;
    size_t count = 0;
    bool found = false;
    if (m->config->layers_pattern.count == 0)
        found = any_layer(key, len, &digits, &count);
    for (size_t i = 0; i < m->layer_pattern_count && !found; i++) {
        pc_status status = pc_pattern_search(m->layer_patterns[i], key, len, &found, &digits, &count, err);
        if (status != PC_OK)
            return status;
    }
    *wanted = false;
    if (!found || digits == NULL)
        return PC_OK;
    int64_t layer = 0;
    for (size_t i = 0; i < count; i++) {
        if (digits[i] < '0' || digits[i] > '9' || layer > (INT64_MAX - 9) / 10)
            return PC_OK; /* no index is that large */
        layer = layer * 10 + (digits[i] - '0');
    }
    const pc_ints *layers = &m->config->layers_to_transform;
    for (size_t i = 0; i < layers->count && !*wanted; i++)
        *wanted = layers->items[i] == layer;
    return PC_OK;
}

static pc_status list_targets(const matcher *m, const char *key, size_t len, bool *matched, pc_error *err)
{
    const pc_strings *names = &m->config->target_modules.names;
    bool exact = false, suffix = false;
    size_t unused;
    if (m->use_map) {
        exact = pc_strmap_get(&m->exact, key, len, &unused);
        for (size_t i = 0; i < len && !exact && !suffix; i++)
            suffix = key[i] == '.' && pc_strmap_get(&m->exact, key + i + 1, len - i - 1, &unused);
    } else {
        for (size_t i = 0; i < names->count && !exact; i++) {
            if (has_suffix(key, len, &names->items[i])) {
                exact = names->items[i].len == len;
                suffix = true;
            }
        }
    }
    *matched = exact || suffix;
    /* A module that is named in full is wanted whatever its layer. */
    return !exact && suffix && uses_layers(m->config) ? in_wanted_layer(m, key, len, matched, err) : PC_OK;
}

static pc_status is_target(const matcher *m, const pc_module *module, bool *matched, pc_error *err)
{
    const pc_selector *targets = &m->config->target_modules;
    *matched = false;
    switch (targets->kind) {
    case PC_SELECT_NONE:
        break;
    case PC_SELECT_LIST:
        return list_targets(m, module->name, module->name_len, matched, err);
    case PC_SELECT_REGEX:
        return pc_pattern_fullmatch(targets->regex, module->name, module->name_len, matched, err);
    case PC_SELECT_ALL_LINEAR:
        *matched = (module->kind == PC_LINEAR || module->kind == PC_CONV1D) && !module->output_embedding &&
                   (m->classifier == NULL || strcmp(module->name, m->classifier) != 0);
        break;
    }
    return PC_OK;
}

/* -------------------------------------------------------------------- errors */

typedef struct text_buffer {
    char text[PC_ERROR_TEXT / 2];
    size_t used;
} text_buffer;

static void put(text_buffer *out, const char *text, size_t len)
{
    size_t room = sizeof out->text - 1 - out->used;
    if (len > room)
        len = room;
    memcpy(out->text + out->used, text, len);
    out->used += len;
    out->text[out->used] = '\0';
}

static void put_text(text_buffer *out, const char *text) { put(out, text, strlen(text)); }

/* Python's notation for a collection of strings. */
static void put_strings(text_buffer *out, const pc_strings *strings, const char *open, const char *close)
{
    put_text(out, open);
    for (size_t i = 0; i < strings->count; i++) {
        put_text(out, i != 0 ? ", '" : "'");
        put(out, strings->items[i].text, strings->items[i].len);
        put_text(out, "'");
    }
    put_text(out, close);
}

/* What PEFT adds to a message when layers were given. */
static void put_layer_notes(text_buffer *out, const pc_config *config)
{
    if (config->has_layers_to_transform) {
        put_text(out, " Note: You specified 'layers_to_transform': [");
        for (size_t i = 0; i < config->layers_to_transform.count; i++) {
            char number[32];
            snprintf(number, sizeof number, "%s%" PRId64, i != 0 ? ", " : "", config->layers_to_transform.items[i]);
            put_text(out, number);
        }
        put_text(out, "].");
    }
    if (config->layers_pattern.count != 0) {
        put_text(out, " You also specified 'layers_pattern': ");
        put_strings(out, &config->layers_pattern, "[", "]");
        put_text(out, ".");
    }
}

static pc_status nothing_matched(const pc_config *config, bool some_excluded, bool some_unmatched, pc_error *err)
{
    text_buffer notes = {.used = 0}, targets = {.used = 0};
    const pc_selector *selector = &config->target_modules;
    if (some_excluded && !some_unmatched)
        return pc_fail(err, PC_ERR_VALUE,
                       "All modules were excluded. This is likely unintended. Check your `target_modules`, "
                       "`exclude_modules` and `modules_to_save` configuration.");
    if (!some_excluded && selector->kind == PC_SELECT_LIST && selector->names.count == 0)
        return pc_fail(err, PC_ERR_VALUE,
                       "No `target_modules` passed but also no `target_parameters` found. Please check the values for "
                       "these arguments.");
    put_layer_notes(&notes, config);
    if (some_excluded)
        return pc_fail(err, PC_ERR_VALUE,
                       "No modules were targeted for adaptation. This might be caused by a combination of mismatched "
                       "target modules and excluded modules. Please check your `target_modules` and `exclude_modules` "
                       "configuration. You may also have only targeted modules that are marked to be saved "
                       "(`modules_to_save`).%s",
                       notes.text);
    if (selector->kind == PC_SELECT_LIST)
        put_strings(&targets, &selector->names, "{", "}");
    else if (selector->kind == PC_SELECT_REGEX)
        put(&targets, selector->text.text, selector->text.len);
    else
        put_text(&targets, "set()"); /* all-linear in a model without linear layers */
    return pc_fail(err, PC_ERR_VALUE,
                   "Target modules %s not found in the base model. Please check the target modules and try again.%s",
                   targets.text, notes.text);
}

/* --------------------------------------------------------------------- entry */

static pc_status match_all(const matcher *m, uint8_t *match, pc_error *err)
{
    bool some_target = false, some_excluded = false, some_unmatched = false;
    for (size_t i = 0; i < m->modules->count; i++) {
        const pc_module *module = &m->modules->items[i];
        match[i] = 0;
        if (module->name_len == 0 || module->alias_of >= 0)
            continue;
        bool saved = pc_saved_root(m->config, module->name, module->name_len) != 0, excluded, target;
        if (saved && module->has_weight)
            match[i] = 2;
        pc_status status =
            pc_selector_matches(&m->config->exclude_modules, module->name, module->name_len, &excluded, err);
        if (status != PC_OK)
            return status;
        if (saved || excluded) {
            some_excluded = true;
            continue;
        }
        status = is_target(m, module, &target, err);
        if (status != PC_OK)
            return status;
        if (target)
            match[i] = 1;
        some_target = some_target || target;
        some_unmatched = some_unmatched || !target;
    }
    return some_target ? PC_OK : nothing_matched(m->config, some_excluded, some_unmatched, err);
}

pc_status pc_match_modules(const pc_config *config, const pc_module_table *modules, uint8_t *match, pc_error *err)
{
    if (config->target_modules.kind == PC_SELECT_NONE)
        return pc_fail(err, PC_ERR_VALUE, "Please specify `target_modules` in `peft_config`");
    matcher m;
    pc_status status = matcher_init(&m, config, modules, err);
    if (status == PC_OK)
        status = match_all(&m, match, err);
    matcher_free(&m);
    return status;
}
