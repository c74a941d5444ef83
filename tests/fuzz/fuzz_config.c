/* libFuzzer target: adapter_config.json. What parses is written again, and what is written stays as it is. */
#include <stdint.h>
#include <string.h>

#include "../../src/core/memory.h"
#include "../../src/formats/adapter_config.h"
#include "../../src/methods/methods.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *text = (const char *)data;
    pc_error err;
    const pc_schema *schemas[16];
    size_t count = pc_method_count < 16 ? pc_method_count : 16;
    for (size_t i = 0; i < count; i++)
        schemas[i] = &pc_methods[i]->schema;
    pc_config *config;
    pc_status status = pc_config_parse(text, size, "fuzz", schemas, count, &config, &err);
    if ((config != NULL) != (status == PC_OK))
        __builtin_trap();
    pc_config_free(config);
    char *once, *twice;
    size_t once_len, twice_len;
    if (pc_json_canonical(text, size, "fuzz", &once, &once_len, &err) != PC_OK) {
        if (status == PC_OK)
            __builtin_trap(); /* a config that is not JSON */
        return 0;
    }
    if (pc_json_canonical(once, once_len, "fuzz", &twice, &twice_len, &err) != PC_OK || once_len != twice_len ||
        memcmp(once, twice, once_len) != 0)
        __builtin_trap();
    pc_free(once);
    pc_free(twice);
    return 0;
}
