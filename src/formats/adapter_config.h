/* adapter_config.json ↔ pc_config, through cJSON behind strict checks. */
#ifndef PEFTC_FORMATS_ADAPTER_CONFIG_H
#define PEFTC_FORMATS_ADAPTER_CONFIG_H

#include <stddef.h>

#include "../core/config.h"
#include "../core/status.h"

/* Parse and check a config.  `label` (copied) names it in messages: a path or "config".
 * The schema is the one of `schemas` whose peft_type the text names.
 * Errors name field, value and label. */
pc_status pc_config_parse(const char *text, size_t len, const char *label, const pc_schema *const *schemas,
                          size_t schema_count, pc_config **out, pc_error *err);

/* Check that text is JSON that Python's json.loads would take (UTF-8 without BOM, NaN/Infinity
 * tokens allowed, nesting and number limits), and re-write it as
 * json.dumps(value, indent=2, sort_keys=True) would.  *out is pc_malloc'ed, NUL-terminated. */
pc_status pc_json_canonical(const char *text, size_t len, const char *label, char **out, size_t *out_len,
                            pc_error *err);

/* Read a whole small file (at most `limit` bytes) into pc_malloc'ed, NUL-terminated memory. */
pc_status pc_read_text_file(const char *path, size_t limit, char **out, size_t *out_len, pc_error *err);

#endif
