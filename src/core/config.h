/* The parsed form of an adapter configuration.
 *
 * A method declares its fields in a table (pc_field); src/formats/
 * adapter_config.c reads JSON by that table, checks it, and fills this struct
 * and the method's own one.  The Python dataclasses hold the same fields for
 * people; this is what the engine works from.
 */
#ifndef PEFTC_CORE_CONFIG_H
#define PEFTC_CORE_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "memory.h"
#include "pattern.h"
#include "status.h"

typedef struct pc_string { /* NUL-terminated, UTF-8, without embedded NUL */
    const char *text;
    size_t len;
} pc_string;

typedef struct pc_strings {
    const pc_string *items;
    size_t count;
} pc_strings;

typedef struct pc_ints {
    const int64_t *items;
    size_t count;
} pc_ints;

/* target_modules, exclude_modules, feedforward_modules */
typedef enum pc_selector_kind {
    PC_SELECT_NONE,       /* null */
    PC_SELECT_LIST,       /* equal to, or ending in "." + one of them */
    PC_SELECT_REGEX,      /* fullmatch */
    PC_SELECT_ALL_LINEAR  /* the string "all-linear", any case */
} pc_selector_kind;

typedef struct pc_selector {
    pc_selector_kind kind;
    pc_strings names;    /* PC_SELECT_LIST, in the order given */
    pc_pattern *regex;   /* PC_SELECT_REGEX */
    pc_string text;      /* PC_SELECT_REGEX: its source */
} pc_selector;

/* rank_pattern, alpha_pattern of LoRA: regex → number, the first that matches wins */
typedef struct pc_number_pattern {
    pc_string text;
    pc_pattern *regex;
    double value;
} pc_number_pattern;

typedef struct pc_number_patterns {
    const pc_number_pattern *items;
    size_t count;
} pc_number_patterns;

/* rank_pattern of AdaLora: tensor name → which singular values are kept */
typedef struct pc_mask {
    pc_string name;
    const bool *keep; /* NULL when the file gives a plain rank */
    size_t count;     /* items of keep, or that rank */
} pc_mask;

typedef struct pc_masks {
    const pc_mask *items;
    size_t count;
} pc_masks;

/* A value that may be a bool or a word: init_lora_weights */
typedef struct pc_bool_or_text {
    bool is_text;
    bool flag;
    pc_string text;
} pc_bool_or_text;

typedef enum pc_field_type {
    PC_FIELD_BOOL,         /* bool */
    PC_FIELD_INT,          /* int64_t; an integral double such as 8.0 counts */
    PC_FIELD_OPTIONAL_INT, /* int64_t; null gives INT64_MIN */
    PC_FIELD_DOUBLE,       /* double; an integer counts */
    PC_FIELD_TEXT,         /* pc_string; null gives text == NULL */
    PC_FIELD_BOOL_OR_TEXT, /* pc_bool_or_text */
    PC_FIELD_STRINGS,      /* pc_strings; a single string is a list of one; null is empty */
    PC_FIELD_INTS,         /* pc_ints; a single integer is a list of one; null is empty */
    PC_FIELD_SELECTOR,     /* pc_selector */
    PC_FIELD_NUMBERS,      /* pc_number_patterns; null is empty */
    PC_FIELD_MASKS,        /* pc_masks; null is empty */
    PC_FIELD_IGNORED       /* known to PEFT, without effect here; adapter_config.c refuses the values of some that
                              would change the result */
} pc_field_type;

typedef struct pc_field {
    const char *name;
    pc_field_type type;
    size_t offset; /* into the struct the table is for; unused for PC_FIELD_IGNORED */
} pc_field;

struct pc_config;

/* What a method tells the config reader about itself. */
typedef struct pc_schema {
    const char *peft_type; /* "LORA" */
    const pc_field *fields;
    size_t field_count;
    size_t params_size; /* of the method's own struct, zeroed before defaults */
    void (*set_defaults)(void *params);
    /* Check the values together; the text names field and value. */
    pc_status (*validate)(const struct pc_config *config, pc_error *err);
    /* Fields of pc_config below that PEFT's config of this method does not have, so that they are unknown in its
     * files; ends with NULL. NULL: it has them all. */
    const char *const *lacks;
} pc_schema;

typedef enum pc_bias {
    PC_BIAS_NONE = 0,
    PC_BIAS_ALL,     /* every bias of the model */
    PC_BIAS_ADAPTED  /* "lora_only": those of adapted modules */
} pc_bias;

typedef struct pc_config {
    const pc_schema *schema;
    const char *label; /* for messages: the file's path or "config" */

    /* fields of every method (adapter_config.c: common_fields) */
    pc_string task_type; /* text == NULL when null */
    bool inference_mode;
    bool fan_in_fan_out;
    pc_selector target_modules;
    pc_selector exclude_modules;
    pc_strings modules_to_save;
    pc_ints layers_to_transform;
    bool has_layers_to_transform; /* distinguishes null from [] and from a field that is absent */
    pc_strings layers_pattern;
    pc_string bias_text;
    pc_bias bias;

    void *params; /* the method's own struct, laid out by schema->fields */
    pc_pool pool; /* holds everything above */
    pc_strings unknown; /* names of fields that neither PEFT 0.17.1 nor peftc knows: for a warning */
} pc_config;

/* Releases the patterns and the pool, then the struct. NULL is allowed. */
void pc_config_free(pc_config *config);

#endif
