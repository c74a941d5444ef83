/* Regular expressions with bounded work, in the dialect of Python's re.
 *
 * target_modules, exclude_modules, rank_pattern and alpha_pattern hold Python
 * regular expressions, and a config file is untrusted: "(a+)+$" must not hang.
 * A match that takes more than PC_PATTERN_STEPS steps is an error that names
 * the pattern, not a wait.  See pattern.c for what of Python's syntax is known;
 * the rest is refused with the construct's name.
 */
#ifndef PEFTC_CORE_PATTERN_H
#define PEFTC_CORE_PATTERN_H

#include <stdbool.h>
#include <stddef.h>

#include "status.h"

#define PC_PATTERN_STEPS 1000000

typedef struct pc_pattern pc_pattern;

/* Compile; PC_ERR_VALUE with the position and reason when it is not a pattern. */
pc_status pc_pattern_compile(const char *text, size_t len, pc_pattern **out, pc_error *err);
void pc_pattern_free(pc_pattern *pattern); /* NULL is allowed */

/* Like re.fullmatch: does the whole of `subject` (UTF-8) match? */
pc_status pc_pattern_fullmatch(const pc_pattern *pattern, const char *subject, size_t len, bool *matched, pc_error *err);

/* Like re.match(rf"(.*\.)?({pattern})$", subject): rank_pattern's and alpha_pattern's rule. */
pc_status pc_pattern_match_suffix(const pc_pattern *pattern, const char *subject, size_t len, bool *matched,
                                  pc_error *err);

/* Like re.search at any position; *group_text/_len receive group 1 if it took part (NULL otherwise). */
pc_status pc_pattern_search(const pc_pattern *pattern, const char *subject, size_t len, bool *matched,
                            const char **group_text, size_t *group_len, pc_error *err);

#endif
