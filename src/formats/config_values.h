/* One JSON value → one field of a config, with the checks of its type. */
#ifndef PEFTC_FORMATS_CONFIG_VALUES_H
#define PEFTC_FORMATS_CONFIG_VALUES_H

#include "../core/config.h"
#include "json_tree.h"

/* All regular expressions of a config together: bounds the memory of their programs to some 32 MB. */
#define PC_CONFIG_PATTERN_BYTES ((size_t)1024 * 1024)

typedef struct pc_config_reader {
    pc_config *config; /* what is read lives in its pool */
    size_t pattern_bytes;
    pc_error *err;
} pc_config_reader;

/* Fill `target`, which has the C type that config.h names for `type`. Errors name label, field and value. */
pc_status pc_config_read_value(pc_config_reader *reader, const char *name, pc_field_type type, const pc_json_value *value,
                               void *target);

/* PC_ERR_VALUE "<label>: <name> must be <what>, got <value>". */
pc_status pc_config_refuse(pc_config_reader *reader, const char *name, const char *what, const pc_json_value *value);

/* Free what a field holds outside the pool: its patterns. */
void pc_config_release_value(pc_field_type type, void *target);

#endif
