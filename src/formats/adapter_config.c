/* adapter_config.json → pc_config: which method, its fields, and what cannot
 * work.  json_tree.c reads the text, config_values.c single values. */
#define _DEFAULT_SOURCE
#include "adapter_config.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../core/memory.h"
#include "config_values.h"
#include "json_tree.h"

/* ---------------------------------------------------------------- the fields */

/* Fields of every method, into pc_config itself. */
static const pc_field common_fields[] = {
    {"task_type", PC_FIELD_TEXT, offsetof(pc_config, task_type)},
    {"inference_mode", PC_FIELD_BOOL, offsetof(pc_config, inference_mode)},
    {"fan_in_fan_out", PC_FIELD_BOOL, offsetof(pc_config, fan_in_fan_out)},
    {"target_modules", PC_FIELD_SELECTOR, offsetof(pc_config, target_modules)},
    {"exclude_modules", PC_FIELD_SELECTOR, offsetof(pc_config, exclude_modules)},
    {"modules_to_save", PC_FIELD_STRINGS, offsetof(pc_config, modules_to_save)},
    {"layers_to_transform", PC_FIELD_INTS, offsetof(pc_config, layers_to_transform)},
    {"layers_pattern", PC_FIELD_STRINGS, offsetof(pc_config, layers_pattern)},
    {"bias", PC_FIELD_TEXT, offsetof(pc_config, bias_text)},
    {"peft_type", PC_FIELD_IGNORED, 0},
    {"auto_mapping", PC_FIELD_IGNORED, 0},
    {"base_model_name_or_path", PC_FIELD_IGNORED, 0},
    {"revision", PC_FIELD_IGNORED, 0},
    {"runtime_config", PC_FIELD_IGNORED, 0},
};
#define COMMON_FIELDS (sizeof common_fields / sizeof common_fields[0])

static const pc_field *find_field(const pc_field *fields, size_t count, const char *name)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(fields[i].name, name) == 0)
            return &fields[i];
    return NULL;
}

static bool lacks(const pc_schema *schema, const char *name)
{
    if (schema->lacks != NULL)
        for (const char *const *field = schema->lacks; *field != NULL; field++)
            if (strcmp(*field, name) == 0)
                return true;
    return false;
}

/* Truth as Python sees it: false, null, 0, "", [] and {} are not. */
static bool is_true(const pc_json_value *value)
{
    double number;
    switch (pc_json_kind_of(value)) {
    case PC_JSON_BOOL:
        return pc_json_bool(value);
    case PC_JSON_NUMBER:
        return pc_json_double(value, &number, NULL) != PC_OK || number != 0;
    case PC_JSON_STRING:
        return pc_json_text(value) == NULL || pc_json_text(value)[0] != '\0';
    case PC_JSON_ARRAY:
    case PC_JSON_OBJECT:
        return pc_json_first(value) != NULL;
    case PC_JSON_NULL:
        break;
    }
    return false;
}

/* Fields of PEFT's configs that change what an adapter computes and that peftc has no code for. */
static const struct {
    const char *name;
    const char *what;
    bool unless_null; /* refused unless null; else refused when true in Python's sense */
} refused_fields[] = {
    {"layer_replication", "repeating layers of the base model", false},
    {"megatron_config", "Megatron's parallel layers", false},
    {"use_qalora", "QALoRA on quantized layers", false},
    {"trainable_token_indices", "training single rows of an embedding", true},
    {"target_parameters", "adapting parameters that belong to no layer", false},
};
#define REFUSED_FIELDS (sizeof refused_fields / sizeof refused_fields[0])

/* Likewise of PEFT versions after 0.17.1: the schemas do not know these fields, and unset they change nothing. */
static const struct {
    const char *name;
    const char *what;
} later_fields[] = {
    {"use_bdlora", "block-diagonal LoRA"},
    {"alora_invocation_tokens", "applying an adapter from certain tokens on"},
    {"arrow_config", "routing among adapters"},
    {"kasa_config", "KaSA's singular values"},
    {"velora_config", "VeLoRA's compressed activations"},
    {"monteclora_config", "sampling an adapter's weights"},
    {"ensure_weight_tying", "tying adapters of tied weights"},
};

static pc_status check_later(pc_config_reader *reader, const char *name, const pc_json_value *value)
{
    char shown[96];
    for (size_t i = 0; i < sizeof later_fields / sizeof later_fields[0]; i++) {
        if (strcmp(name, later_fields[i].name) != 0 || !is_true(value))
            continue;
        pc_json_describe(value, shown, sizeof shown);
        return pc_fail(reader->err, PC_ERR_UNSUPPORTED,
                       "%s: %s is %s, and %s is not something peftc can do; use PEFT for this adapter, or set the field "
                       "to its default",
                       reader->config->label, name, shown, later_fields[i].what);
    }
    return PC_OK;
}

static pc_status check_refused(pc_config_reader *reader, const char *name, const pc_json_value *value)
{
    char shown[96];
    for (size_t i = 0; i < REFUSED_FIELDS; i++) {
        if (strcmp(name, refused_fields[i].name) != 0)
            continue;
        if (refused_fields[i].unless_null ? pc_json_kind_of(value) == PC_JSON_NULL : !is_true(value))
            return PC_OK;
        pc_json_describe(value, shown, sizeof shown);
        return pc_fail(reader->err, PC_ERR_UNSUPPORTED,
                       "%s: %s is %s, and %s is not something peftc can do; use PEFT for this adapter, or set the field "
                       "to %s",
                       reader->config->label, name, shown, refused_fields[i].what,
                       refused_fields[i].unless_null ? "null" : "its default");
    }
    if (strcmp(name, "init_lora_weights") == 0 && pc_json_kind_of(value) == PC_JSON_STRING &&
        pc_json_text(value) != NULL) {
        /* eva leaves the base weights alone, so such an adapter can be loaded; these two cannot even be */
        const char *text = pc_json_text(value);
        if (strcmp(text, "loftq") == 0 || strcmp(text, "corda") == 0 || strcmp(text, "lora_ga") == 0)
            return pc_fail(reader->err, PC_ERR_UNSUPPORTED,
                           "%s: init_lora_weights is \"%s\", which replaces the base weights in a way that peftc cannot "
                           "redo; convert the adapter with PEFT (save_pretrained with "
                           "path_initial_model_for_weight_conversion)",
                           reader->config->label, text);
        if (strcmp(text, "mica") == 0)
            return pc_fail(reader->err, PC_ERR_UNSUPPORTED,
                           "%s: init_lora_weights is \"mica\", which peftc has no code for; use PEFT for this adapter",
                           reader->config->label);
    }
    return PC_OK;
}

/* ---------------------------------------------------------------- the method */

static const char *const prompt_methods[] = {"PROMPT_TUNING",  "MULTITASK_PROMPT_TUNING", "P_TUNING",
                                             "PREFIX_TUNING", "ADAPTION_PROMPT",         "CPT"};
static const char *const other_methods[] = {"BOFT",    "LOHA",     "LOKR", "OFT",     "POLY",             "LN_TUNING",
                                            "VERA",    "FOURIERFT", "XLORA", "HRA",     "VBLORA",           "BONE",
                                            "MISS",    "RANDLORA", "TRAINABLE_TOKENS", "SHIRA", "C3A"};
static const char *const base_fields[] = {"task_type", "peft_type", "auto_mapping", "base_model_name_or_path",
                                          "revision",  "inference_mode"};
#define COUNT(array) (sizeof(array) / sizeof(array)[0])

static bool is_among(const char *text, const char *const *words, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(text, words[i]) == 0)
            return true;
    return false;
}

static void list_methods(const pc_schema *const *schemas, size_t count, char *out, size_t size)
{
    size_t used = 0;
    out[0] = '\0';
    for (size_t i = 0; i < count && used < size; i++)
        used += (size_t)snprintf(out + used, size - used, "%s%s", i > 0 ? ", " : "", schemas[i]->peft_type);
}

static pc_status missing_type(const pc_json_value *root, const char *label, const char *known, pc_error *err)
{
    bool has_more = false; /* fields that belong to some method: then PEFT raises TypeError */
    for (const pc_json_value *member = pc_json_first(root); member != NULL; member = pc_json_next(member))
        has_more = has_more || pc_json_name(member) == NULL ||
                   !is_among(pc_json_name(member), base_fields, COUNT(base_fields));
    return pc_fail(err, has_more ? PC_ERR_TYPE : PC_ERR_VALUE,
                   "%s has no peft_type, so it does not say which method the adapter uses; add \"peft_type\" (known are "
                   "%s)",
                   label, known);
}

static pc_status choose_schema(const pc_json_value *root, const char *label, const pc_schema *const *schemas, size_t count,
                               const pc_schema **out, pc_error *err)
{
    char known[256], shown[96];
    list_methods(schemas, count, known, sizeof known);
    const pc_json_value *type = pc_json_member(root, "peft_type");
    if (type == NULL)
        return missing_type(root, label, known, err);
    const char *text = pc_json_kind_of(type) == PC_JSON_STRING ? pc_json_text(type) : NULL;
    for (size_t i = 0; i < count && text != NULL; i++)
        if (strcmp(schemas[i]->peft_type, text) == 0) {
            *out = schemas[i];
            return PC_OK;
        }
    if (text != NULL && is_among(text, prompt_methods, COUNT(prompt_methods)))
        return pc_fail(err, PC_ERR_VALUE,
                       "%s: %s is a prompt or prefix method: it adds tokens or layers around a model and cannot be "
                       "injected into its modules. Methods that can are %s",
                       label, text, known);
    if (text != NULL && is_among(text, other_methods, COUNT(other_methods)))
        return pc_fail(err, PC_ERR_UNSUPPORTED, "%s: peftc has no code for the method %s of PEFT; it knows %s", label,
                       text, known);
    pc_json_describe(type, shown, sizeof shown);
    return pc_fail(err, PC_ERR_KEY, "%s: peft_type is %s, which is not a method; known are %s", label, shown, known);
}

/* ------------------------------------------------------------- common checks */

static pc_status check_task_type(pc_config_reader *reader)
{
    static const char *const types[] = {"SEQ_CLS",   "SEQ_2_SEQ_LM", "CAUSAL_LM",
                                        "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"};
    const pc_config *config = reader->config;
    if (config->task_type.text == NULL || is_among(config->task_type.text, types, COUNT(types)))
        return PC_OK;
    return pc_fail(reader->err, PC_ERR_VALUE,
                   "%s: Invalid task type: '%.100s'. Must be one of the following task types: SEQ_CLS, SEQ_2_SEQ_LM, "
                   "CAUSAL_LM, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION.",
                   config->label, config->task_type.text);
}

static pc_status check_bias(pc_config_reader *reader)
{
    pc_config *config = reader->config;
    const char *text = config->bias_text.text;
    if (text != NULL && strcmp(text, "none") == 0)
        config->bias = PC_BIAS_NONE;
    else if (text != NULL && strcmp(text, "all") == 0)
        config->bias = PC_BIAS_ALL;
    else if (text != NULL && strcmp(text, "lora_only") == 0)
        config->bias = PC_BIAS_ADAPTED;
    else
        return pc_fail(reader->err, PC_ERR_UNSUPPORTED,
                       "%s: Requested bias: %.100s, is not implemented. bias must be \"none\", \"all\" or \"lora_only\"",
                       config->label, text != NULL ? text : "null");
    return PC_OK;
}

static pc_status check_layers(pc_config_reader *reader, bool has_pattern)
{
    const pc_config *config = reader->config;
    bool text_targets =
        config->target_modules.kind == PC_SELECT_REGEX || config->target_modules.kind == PC_SELECT_ALL_LINEAR;
    if (text_targets && config->has_layers_to_transform)
        return pc_fail(reader->err, PC_ERR_VALUE,
                       "%s: `layers_to_transform` cannot be used when `target_modules` is a str. Name the layers in the "
                       "pattern, or list the target modules",
                       config->label);
    if (text_targets && has_pattern)
        return pc_fail(reader->err, PC_ERR_VALUE,
                       "%s: `layers_pattern` cannot be used when `target_modules` is a str. Name the layers in the "
                       "pattern, or list the target modules",
                       config->label);
    bool pattern = config->layers_pattern.count > 1 ||
                   (config->layers_pattern.count == 1 && config->layers_pattern.items[0].len > 0);
    if (pattern && config->layers_to_transform.count == 0)
        return pc_fail(reader->err, PC_ERR_VALUE,
                       "%s: When `layers_pattern` is specified, `layers_to_transform` must also be specified. ",
                       config->label);
    return PC_OK;
}

/* ------------------------------------------------------------------- reading */

static pc_status note_unknown(pc_config_reader *reader, const pc_json_value *member, pc_string *names, size_t *count)
{
    const char *text;
    size_t len;
    pc_pool *pool = &reader->config->pool;
    if (!pc_json_decode(member, true, pool, &text, &len))
        return pc_fail_nomem(reader->err, "an adapter config");
    /* it is for a message: cut at NUL, and a lone surrogate has no UTF-8 */
    if (pc_json_name(member) == NULL) {
        text = "(a name with NUL or a lone surrogate)";
        len = strlen(text);
    }
    names[*count].text = pc_pool_strndup(pool, text, len);
    names[*count].len = len;
    if (names[*count].text == NULL)
        return pc_fail_nomem(reader->err, "an adapter config");
    (*count)++;
    return PC_OK;
}

static pc_status read_member(pc_config_reader *reader, const pc_json_value *member, const char *name, bool *known)
{
    pc_config *config = reader->config;
    const pc_schema *schema = config->schema;
    *known = true;
    const pc_field *field = find_field(schema->fields, schema->field_count, name);
    void *base = config->params;
    if (field == NULL && !lacks(schema, name)) {
        field = find_field(common_fields, COMMON_FIELDS, name);
        base = config;
    }
    if (field == NULL) {
        *known = false;
        return check_later(reader, name, member);
    }
    pc_status status = check_refused(reader, name, member);
    if (status != PC_OK || field->type == PC_FIELD_IGNORED)
        return status;
    return pc_config_read_value(reader, name, field->type, member, (char *)base + field->offset);
}

static pc_status read_fields(pc_config_reader *reader, const pc_json_value *root)
{
    pc_config *config = reader->config;
    size_t members = 0, unknown = 0;
    for (const pc_json_value *member = pc_json_first(root); member != NULL; member = pc_json_next(member))
        members++;
    pc_string *names = pc_pool_array(&config->pool, members, sizeof *names);
    if (names == NULL)
        return pc_fail_nomem(reader->err, "an adapter config");
    config->unknown.items = names;
    for (const pc_json_value *member = pc_json_first(root); member != NULL; member = pc_json_next(member)) {
        const char *name = pc_json_name(member);
        bool known = false;
        pc_status status = name != NULL ? read_member(reader, member, name, &known) : PC_OK;
        if (status == PC_OK && !known)
            status = note_unknown(reader, member, names, &unknown);
        if (status != PC_OK)
            return status;
    }
    config->unknown.count = unknown;
    return PC_OK;
}

static pc_status check_fields(pc_config_reader *reader, const pc_json_value *root)
{
    pc_config *config = reader->config;
    const pc_schema *schema = config->schema;
    pc_status status = check_task_type(reader);
    if (status == PC_OK && !lacks(schema, "bias"))
        status = check_bias(reader);
    if (status == PC_OK && !lacks(schema, "layers_to_transform")) {
        const pc_json_value *layers = pc_json_member(root, "layers_to_transform");
        const pc_json_value *pattern = pc_json_member(root, "layers_pattern");
        config->has_layers_to_transform = layers != NULL && pc_json_kind_of(layers) != PC_JSON_NULL;
        status = check_layers(reader, pattern != NULL && pc_json_kind_of(pattern) != PC_JSON_NULL);
    }
    if (status == PC_OK && schema->validate != NULL) {
        pc_error why;
        status = schema->validate(config, &why);
        if (status != PC_OK) /* the method names field and value; it may have named the label, too */
            pc_fail(reader->err, status, "%s%s%s", strstr(why.text, config->label) ? "" : config->label,
                    strstr(why.text, config->label) ? "" : ": ", why.text);
    }
    return status;
}

static pc_status new_config(const pc_schema *schema, const char *label, pc_config **out, pc_error *err)
{
    pc_config *config = pc_calloc(1, sizeof *config);
    if (config == NULL)
        return pc_fail_nomem(err, "an adapter config");
    pc_pool_init(&config->pool);
    config->label = pc_pool_strndup(&config->pool, label, strlen(label));
    config->params = pc_pool_alloc(&config->pool, schema->params_size);
    if (config->label == NULL || config->params == NULL) {
        pc_pool_free(&config->pool);
        pc_free(config);
        return pc_fail_nomem(err, "an adapter config");
    }
    config->schema = schema;
    config->bias_text = (pc_string){"none", 4};
    if (schema->set_defaults != NULL)
        schema->set_defaults(config->params);
    *out = config;
    return PC_OK;
}

static pc_status read_config(const pc_json_value *root, const char *label, const pc_schema *const *schemas, size_t count,
                             pc_config **out, pc_error *err)
{
    if (pc_json_kind_of(root) != PC_JSON_OBJECT) {
        char shown[96];
        pc_json_describe(root, shown, sizeof shown);
        return pc_fail(err, PC_ERR_VALUE, "%s must hold a JSON object with the fields of a config, got %s", label, shown);
    }
    const pc_schema *schema = NULL;
    pc_config *config = NULL;
    pc_status status = choose_schema(root, label, schemas, count, &schema, err);
    if (status == PC_OK)
        status = new_config(schema, label, &config, err);
    if (status != PC_OK)
        return status;
    pc_config_reader reader = {.config = config, .err = err};
    status = read_fields(&reader, root);
    if (status == PC_OK)
        status = check_fields(&reader, root);
    if (status != PC_OK) {
        pc_config_free(config);
        return status;
    }
    *out = config;
    return PC_OK;
}

pc_status pc_config_parse(const char *text, size_t len, const char *label, const pc_schema *const *schemas,
                          size_t schema_count, pc_config **out, pc_error *err)
{
    *out = NULL;
    pc_json_value *root;
    pc_status status = pc_json_parse(text, len, label, &root, err);
    if (status != PC_OK)
        return status;
    status = read_config(root, label, schemas, schema_count, out, err);
    pc_json_free(root);
    return status;
}

static void release_fields(const pc_field *fields, size_t count, void *base)
{
    for (size_t i = 0; i < count; i++)
        if (fields[i].type != PC_FIELD_IGNORED)
            pc_config_release_value(fields[i].type, (char *)base + fields[i].offset);
}

void pc_config_free(pc_config *config)
{
    if (config == NULL)
        return;
    release_fields(common_fields, COMMON_FIELDS, config);
    release_fields(config->schema->fields, config->schema->field_count, config->params);
    pc_pool_free(&config->pool);
    pc_free(config);
}

/* --------------------------------------------------------------------- files */

static pc_status read_all(int fd, const char *path, size_t limit, char **out, size_t *out_len, pc_error *err)
{
    size_t capacity = 0, len = 0;
    char *text = NULL;
    for (;;) {
        if (len + 1 >= capacity) { /* the size that the system tells may be wrong: read until there is no more */
            capacity = capacity * 2 + 16 * 1024;
            char *grown = pc_realloc(text, capacity);
            if (grown == NULL) {
                pc_free(text);
                return pc_fail_nomem(err, path);
            }
            text = grown;
        }
        ssize_t got = read(fd, text + len, capacity - len - 1);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            int why = errno;
            pc_free(text);
            return pc_fail_errno(err, why, "cannot read %s", path);
        }
        if (got == 0)
            break;
        len += (size_t)got;
        if (len > limit) {
            pc_free(text);
            return pc_fail(err, PC_ERR_VALUE, "%s is larger than %zu bytes, which no file of its kind is", path, limit);
        }
    }
    text[len] = '\0';
    *out = text;
    *out_len = len;
    return PC_OK;
}

pc_status pc_read_text_file(const char *path, size_t limit, char **out, size_t *out_len, pc_error *err)
{
    *out = NULL;
    *out_len = 0;
    int fd;
    do
        fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO under that name must not make us wait */
    while (fd < 0 && errno == EINTR);
    if (fd < 0)
        return pc_fail_errno(err, errno, "cannot open %s", path);
    struct stat info;
    pc_status status;
    if (fstat(fd, &info) != 0)
        status = pc_fail_errno(err, errno, "cannot read %s", path);
    else if (S_ISDIR(info.st_mode))
        status = pc_fail_errno(err, EISDIR, "cannot read %s", path);
    else if (!S_ISREG(info.st_mode))
        status = pc_fail(err, PC_ERR_VALUE, "%s is not a regular file", path);
    else
        status = read_all(fd, path, limit, out, out_len, err);
    close(fd);
    return status;
}
