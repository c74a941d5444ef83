/* The zip archive of torch.save: its pickle, and an entry for each storage. */
#include <string.h>

#include "quote.h"
#include "torch_loader.h"

#define MAX_KEY 255 /* bytes of a storage's key */

static pc_status zip_storage(void *context, const pc_pickle *pickle, const pc_pickle_storage *request, uint32_t *index,
                             uint64_t *nbytes, pc_error *err)
{
    pc_bin_loader *load = context;
    pc_torch_bin *bin = load->bin;
    char quoted[PC_QUOTED], name[5 + MAX_KEY] = "data/";
    if (request->has_view_field)
        return pc_pickle_bad(pickle, err, "a view of a storage has no place in a zip archive");
    size_t entry = SIZE_MAX;
    if (request->key_len <= MAX_KEY) {
        memcpy(name + 5, request->key, request->key_len);
        entry = pc_zip_find(&bin->zip, name, 5 + request->key_len);
    }
    if (entry == SIZE_MAX)
        return pc_pickle_bad(pickle, err, "the archive has no entry for storage %s",
                             pc_quote(request->key, request->key_len, quoted));
    *nbytes = request->nbytes;
    if (load->storage_of_entry[entry] != UINT32_MAX) {
        *index = load->storage_of_entry[entry];
        return pc_bin_check_again(bin, pickle, *index, request, err);
    }
    pc_status status = pc_zip_locate(&bin->zip, entry, err);
    if (status != PC_OK)
        return status;
    const pc_zip_entry *e = &bin->zip.entries[entry];
    if (request->nbytes > e->size)
        return pc_pickle_bad(pickle, err, "storage %s should have %llu bytes; its entry has %llu",
                             pc_quote(request->key, request->key_len, quoted), (unsigned long long)request->nbytes,
                             (unsigned long long)e->size);
    const pc_bin_storage storage = {.offset = e->data,
                                    .nbytes = request->nbytes,
                                    .entry = entry,
                                    .parent = SIZE_MAX,
                                    .dtype = request->dtype,
                                    .placed = true,
                                    .verified = !bin->zip.checked};
    status = pc_bin_add_storage(bin, &storage, index, err);
    if (status == PC_OK)
        load->storage_of_entry[entry] = *index;
    return status;
}

/* Read a small entry whole; it must exist. */
static pc_status read_entry(pc_torch_bin *bin, const char *name, size_t limit, uint8_t **out, size_t *len,
                            pc_error *err)
{
    size_t entry = pc_zip_find(&bin->zip, name, strlen(name));
    if (entry == SIZE_MAX)
        return pc_fail(err, PC_ERR_UNPICKLE, "%s is a zip archive without an entry '%s': it was not made by torch.save",
                       bin->label, name);
    pc_status status = pc_zip_locate(&bin->zip, entry, err);
    if (status != PC_OK)
        return status;
    if (bin->zip.entries[entry].size > limit)
        return pc_fail(err, PC_ERR_UNPICKLE, "%s: entry '%s' is larger than %zu bytes", bin->label, name, limit);
    *len = (size_t)bin->zip.entries[entry].size;
    *out = pc_malloc(*len);
    if (*out == NULL)
        return pc_fail_nomem(err, "an entry of a zip archive");
    status = pc_zip_read(&bin->zip, entry, *out, err);
    if (status != PC_OK) {
        pc_free(*out);
        *out = NULL;
    }
    return status;
}

static pc_status check_byte_order(pc_torch_bin *bin, pc_error *err)
{
    if (pc_zip_find(&bin->zip, "byteorder", 9) == SIZE_MAX)
        return PC_OK; /* before torch 2.1: little */
    uint8_t *text;
    size_t len;
    pc_status status = read_entry(bin, "byteorder", 64, &text, &len, err);
    if (status != PC_OK)
        return status;
    bin->big_endian = len == 3 && memcmp(text, "big", 3) == 0;
    if (!bin->big_endian && !(len == 6 && memcmp(text, "little", 6) == 0)) {
        char quoted[PC_QUOTED];
        status = pc_fail(err, PC_ERR_UNPICKLE, "%s: byte order %s is neither 'little' nor 'big'", bin->label,
                         pc_quote((const char *)text, len, quoted));
    }
    pc_free(text);
    return status;
}

static pc_status check_version(pc_torch_bin *bin, pc_error *err)
{
    const char *name = pc_zip_find(&bin->zip, ".data/version", 13) != SIZE_MAX ? ".data/version" : "version";
    uint8_t *text;
    size_t len;
    pc_status status = read_entry(bin, name, 64, &text, &len, err);
    if (status != PC_OK)
        return status;
    unsigned version = 0;
    size_t digits = 0;
    while (digits < len && digits < 3 && text[digits] >= '0' && text[digits] <= '9')
        version = version * 10 + (unsigned)(text[digits++] - '0');
    if (digits == 0 || version < 1 || version > 10 || (digits < len && text[digits] != '\n'))
        status = pc_fail(err, PC_ERR_UNPICKLE, "%s: its archive version is not between 1 and 10", bin->label);
    pc_free(text);
    return status;
}

pc_status pc_bin_open_zip(pc_bin_loader *load, pc_error *err)
{
    pc_torch_bin *bin = load->bin;
    pc_status status = pc_zip_open(&bin->source, &bin->zip, err);
    if (status != PC_OK)
        return status;
    if (pc_zip_find(&bin->zip, "constants.pkl", 13) != SIZE_MAX)
        return pc_bin_wrong(bin, err,
                            "is a TorchScript archive (torch.jit.save), which contains code; save the state dict with "
                            "torch.save");
    status = check_version(bin, err);
    if (status == PC_OK)
        status = check_byte_order(bin, err);
    if (status == PC_OK)
        status = read_entry(bin, "data.pkl", PC_PICKLE_MAX_BYTES, &load->input.owned, &load->input.have, err);
    if (status != PC_OK)
        return status;
    load->input.bytes = load->input.owned;
    load->storage_of_entry = pc_malloc((bin->zip.count + 1) * sizeof *load->storage_of_entry);
    if (load->storage_of_entry == NULL)
        return pc_fail_nomem(err, "the storages of a file");
    memset(load->storage_of_entry, 0xFF, (bin->zip.count + 1) * sizeof *load->storage_of_entry);

    pc_pickle_ref top;
    status = pc_pickle_init(&load->pickle, bin->label, &load->input, 0, zip_storage, load, err);
    if (status == PC_OK)
        status = pc_pickle_run(&load->pickle, &top, err);
    if (status == PC_OK && load->pickle.at != load->input.have)
        status = pc_bin_wrong(bin, err, "has bytes behind the end of its pickle");
    return status == PC_OK ? pc_bin_name_tensors(load, top, err) : status;
}
