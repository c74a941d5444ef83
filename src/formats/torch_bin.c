/* adapter_model.bin: which layout it is, its storages, and the object that the caller gets. */
#include "torch_bin.h"

#include <string.h>

#include "torch_loader.h"

pc_status pc_bin_wrong(const pc_torch_bin *bin, pc_error *err, const char *why)
{
    return pc_fail(err, PC_ERR_UNPICKLE, "%s %s", bin->label, why);
}

pc_status pc_bin_add_storage(pc_torch_bin *bin, const pc_bin_storage *storage, uint32_t *index, pc_error *err)
{
    if (bin->storage_count == bin->storage_room) {
        size_t room = bin->storage_room != 0 ? bin->storage_room * 2 : 64;
        pc_bin_storage *moved = pc_realloc(bin->storages, room * sizeof *moved); /* as many as objects at most */
        if (moved == NULL)
            return pc_fail_nomem(err, "the storages of a file");
        bin->storages = moved;
        bin->storage_room = room;
    }
    *index = (uint32_t)bin->storage_count;
    bin->storages[bin->storage_count++] = *storage;
    return PC_OK;
}

pc_status pc_bin_check_again(const pc_torch_bin *bin, const pc_pickle *pickle, uint32_t index,
                             const pc_pickle_storage *request, pc_error *err)
{
    const pc_bin_storage *known = &bin->storages[index];
    char quoted[PC_QUOTED];
    if (known->dtype != request->dtype || known->nbytes != request->nbytes)
        return pc_pickle_bad(pickle, err, "storage %s is described in two different ways",
                             pc_quote(request->key, request->key_len, quoted));
    return PC_OK;
}

static bool is_tar(const uint8_t *head, size_t len)
{
    static const char *const members[] = {"sys_info", "pickle", "tensors", "storages", "./sys_info", "./pickle"};
    if (len < 512)
        return false;
    for (size_t i = 0; i < sizeof members / sizeof members[0]; i++)
        if (memcmp(head, members[i], strlen(members[i]) + 1) == 0)
            return true;
    return memcmp(head + 257, "ustar", 5) == 0;
}

/* Name what the file is, if it is something that people do give us. */
static pc_status open_by_content(pc_bin_loader *load, pc_error *err)
{
    pc_torch_bin *bin = load->bin;
    uint8_t head[512];
    size_t len = bin->source.size < sizeof head ? (size_t)bin->source.size : sizeof head;
    pc_status status = pc_source_read(&bin->source, 0, head, len, err);
    if (status != PC_OK)
        return status;
    if (len == 0)
        return pc_bin_wrong(bin, err, "is empty");
    if (len >= 4 && memcmp(head, "PK\3\4", 4) == 0)
        return pc_bin_open_zip(load, err);
    if (head[0] == 0x80)
        return pc_bin_open_legacy(load, err);
    if (is_tar(head, len))
        return pc_bin_wrong(bin, err,
                            "is in the tar layout of torch before 0.2, which is not supported; load and save it again "
                            "with torch");
    if (len > 8 && memcmp(head, "version https://git-lfs", 23 < len ? 23 : len) == 0)
        return pc_bin_wrong(bin, err, "is a Git LFS pointer and not the file itself; run 'git lfs pull'");
    if (len > 8 && head[8] == '{')
        return pc_bin_wrong(bin, err, "looks like a safetensors file; name it adapter_model.safetensors");
    return pc_bin_wrong(bin, err, "is not a file of torch.save");
}

static void close_bin(pc_weights *self)
{
    pc_torch_bin *bin = (pc_torch_bin *)self;
    for (size_t i = 0; i < bin->storage_count; i++)
        if (bin->storages[i].cache != NULL)
            pc_block_free(bin->storages[i].cache, (size_t)bin->storages[i].nbytes);
    pc_free(bin->storages);
    pc_zip_close(&bin->zip);
    pc_source_close(&bin->source);
    pc_pool_free(&bin->pool);
    pc_free(bin->label);
    pc_free(bin);
}

/* The reason must fit in the error text: of a very long path, its end will do. */
#define LONGEST_LABEL 1000

static char *make_label(const char *text)
{
    size_t len = strlen(text);
    if (len <= LONGEST_LABEL)
        return pc_strndup(text, len);
    const char *tail = text + (len - LONGEST_LABEL);
    while (((unsigned char)*tail & 0xC0u) == 0x80u)
        tail++;
    return pc_strndup(tail, strlen(tail));
}

/* Path or bytes; exactly one is given. */
static pc_status open_any(const char *path, const void *bytes, size_t len, const char *label, pc_weights **out,
                          pc_error *err)
{
    *out = NULL;
    pc_torch_bin *bin = pc_calloc(1, sizeof *bin);
    pc_bin_loader *load = pc_calloc(1, sizeof *load);
    if (bin == NULL || load == NULL || (bin->label = make_label(label)) == NULL) {
        pc_free(bin);
        pc_free(load);
        return pc_fail_nomem(err, "a file reader");
    }
    bin->source.fd = -1;
    bin->base.label = bin->label;
    bin->base.read = pc_bin_read;
    bin->base.close = close_bin;
    pc_pool_init(&bin->pool);
    load->bin = bin;
    pc_strmap_init(&load->storage_of_key);
    pc_status status = PC_OK;
    if (path != NULL)
        status = pc_source_open(path, bin->label, &bin->source, err);
    else
        pc_source_memory(bytes, len, bin->label, &bin->source);
    if (status == PC_OK)
        status = open_by_content(load, err);
    pc_pickle_free(&load->pickle);
    pc_pickle_input_free(&load->input);
    pc_strmap_free(&load->storage_of_key);
    pc_free(load->storage_of_entry);
    pc_free(load);
    if (status == PC_OK)
        *out = &bin->base;
    else
        close_bin(&bin->base);
    return status;
}

pc_status pc_torch_bin_open(const char *path, pc_weights **out, pc_error *err)
{
    return open_any(path, NULL, 0, path, out, err);
}

pc_status pc_torch_bin_parse(const void *bytes, size_t len, const char *label, pc_weights **out, pc_error *err)
{
    return open_any(NULL, bytes, len, label, out, err);
}
