/* The table of methods.  A new method is one file and one row here. */
#include "methods.h"

#include <string.h>

extern const pc_method pc_method_lora, pc_method_ia3, pc_method_adalora;

const pc_method *const pc_methods[] = {&pc_method_lora, &pc_method_ia3, &pc_method_adalora};
const size_t pc_method_count = sizeof pc_methods / sizeof *pc_methods;

const pc_method *pc_method_find(const char *peft_type, size_t len)
{
    for (size_t i = 0; i < pc_method_count; i++) {
        const char *name = pc_methods[i]->schema.peft_type;
        if (strlen(name) == len && memcmp(name, peft_type, len) == 0)
            return pc_methods[i];
    }
    return NULL;
}

const char *pc_method_names(void) { return "LORA, IA3, ADALORA"; }
