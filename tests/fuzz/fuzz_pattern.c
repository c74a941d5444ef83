/* libFuzzer target: pattern and subject, split at the first NUL. No crash, no leak, bounded work. */
#include <stdint.h>
#include <string.h>

#include "../../src/core/pattern.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *text = (const char *)data;
    const char *split = size > 0 ? memchr(text, 0, size) : NULL;
    size_t len = split != NULL ? (size_t)(split - text) : size;
    const char *subject = split != NULL ? split + 1 : text;
    size_t subject_len = split != NULL ? size - len - 1 : size;
    pc_error err;
    pc_pattern *pattern;
    if (pc_pattern_compile(text, len, &pattern, &err) != PC_OK)
        return 0;
    bool matched;
    const char *group;
    size_t group_len;
    pc_pattern_fullmatch(pattern, subject, subject_len, &matched, &err);
    pc_pattern_match_suffix(pattern, subject, subject_len, &matched, &err);
    if (pc_pattern_search(pattern, subject, subject_len, &matched, &group, &group_len, &err) == PC_OK && group != NULL &&
        (group < subject || group + group_len > subject + subject_len))
        __builtin_trap();
    pc_pattern_free(pattern);
    return 0;
}
