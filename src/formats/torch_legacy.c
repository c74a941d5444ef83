/* The layout of torch.save before zip archives. */
#include <string.h>

#include "quote.h"
#include "torch_loader.h"

/* Five pickles (magic number, protocol version, facts about the writer, the object, the keys of its storages),
 * then per key the number of elements as int64 and the bytes. */

static const uint8_t magic[10] = {0x6C, 0xFC, 0x9C, 0x46, 0xF9, 0x20, 0x6A, 0xA8, 0x50, 0x19};
#define LEGACY_PROTOCOL 1001

static pc_status legacy_storage(void *context, const pc_pickle *pickle, const pc_pickle_storage *request,
                                uint32_t *index, uint64_t *nbytes, pc_error *err)
{
    pc_bin_loader *load = context;
    pc_torch_bin *bin = load->bin;
    size_t known;
    pc_bin_storage storage = {
        .nbytes = request->nbytes, .entry = SIZE_MAX, .parent = SIZE_MAX, .dtype = request->dtype, .verified = true};
    *nbytes = request->nbytes;
    if (!request->has_view_field)
        return pc_pickle_bad(pickle, err, "a persistent id is not that of a storage in the legacy layout");
    if (request->nbytes > bin->source.size)
        return pc_pickle_bad(pickle, err, "a storage of %llu bytes is larger than the file",
                             (unsigned long long)request->nbytes);
    pc_status status = PC_OK;
    if (pc_strmap_get(&load->storage_of_key, request->key, request->key_len, &known)) {
        *index = (uint32_t)known;
        status = pc_bin_check_again(bin, pickle, *index, request, err);
    } else {
        const char *key = pc_pool_strndup(&bin->pool, request->key, request->key_len);
        if (key == NULL || !pc_strmap_put(&load->storage_of_key, key, request->key_len, bin->storage_count))
            return pc_fail_nomem(err, "the storages of a file");
        status = pc_bin_add_storage(bin, &storage, index, err);
    }
    if (status != PC_OK || !request->is_view)
        return status;
    size_t width = pc_dtype_size(request->dtype);
    storage.parent = *index;
    storage.offset = request->view_start * width; /* for now within the parent */
    storage.nbytes = *nbytes = request->view_count * width;
    return pc_bin_add_storage(bin, &storage, index, err);
}

static pc_status next_pickle(pc_bin_loader *load, size_t *at, pc_pickle *pickle, pc_pickle_ref *top,
                             pc_pickle_storage_fn storage, pc_error *err)
{
    pc_status status = pc_pickle_init(pickle, load->bin->label, &load->input, *at, storage, load, err);
    if (status == PC_OK)
        status = pc_pickle_run(pickle, top, err);
    *at = pickle->at;
    return status;
}

/* Run a pickle that must give an integer: `expected`, or the magic number if expected is 0. */
static pc_status expect_number(pc_bin_loader *load, size_t *at, int64_t expected, pc_error *err)
{
    pc_pickle pickle;
    pc_pickle_ref top;
    pc_status status = next_pickle(load, at, &pickle, &top, NULL, err);
    if (status == PC_OK) {
        const pc_pickle_object *o = &pickle.objects[top];
        if (expected == 0) {
            if (o->kind != PC_PICKLE_BIG_INT || o->count != sizeof magic ||
                memcmp(pc_pickle_bytes(&pickle, o), magic, sizeof magic) != 0)
                status = pc_bin_wrong(load->bin, err, "is not a file of torch.save: it begins with another pickle");
        } else if (o->kind != PC_PICKLE_INT || o->as.number != expected) {
            status = pc_bin_wrong(load->bin, err, "has an unknown protocol version of torch.save's legacy layout");
        }
    }
    pc_pickle_free(&pickle);
    return status;
}

static pc_status place_storage(pc_bin_loader *load, uint64_t *at, const char *key, size_t key_len, pc_error *err)
{
    pc_torch_bin *bin = load->bin;
    char quoted[PC_QUOTED];
    size_t index;
    if (!pc_strmap_get(&load->storage_of_key, key, key_len, &index))
        return pc_fail(err, PC_ERR_UNPICKLE, "%s: storage %s is listed, but no tensor lies in it", bin->label,
                       pc_quote(key, key_len, quoted));
    pc_bin_storage *s = &bin->storages[index];
    if (s->placed)
        return pc_fail(err, PC_ERR_UNPICKLE, "%s: storage %s is listed twice", bin->label,
                       pc_quote(key, key_len, quoted));
    uint8_t bytes[8];
    pc_status status = pc_source_read(&bin->source, *at, bytes, sizeof bytes, err);
    if (status != PC_OK)
        return status;
    uint64_t count = 0;
    for (size_t i = sizeof bytes; i-- > 0;)
        count = count << 8 | bytes[i];
    *at += sizeof bytes;
    if (count != s->nbytes / pc_dtype_size(s->dtype))
        return pc_fail(err, PC_ERR_UNPICKLE, "%s: storage %s has another size than its tensors expect", bin->label,
                       pc_quote(key, key_len, quoted));
    if (s->nbytes > bin->source.size - *at)
        return pc_fail(err, PC_ERR_UNPICKLE, "%s is cut short: storage %s is not all there", bin->label,
                       pc_quote(key, key_len, quoted));
    s->offset = *at;
    s->placed = true;
    *at += s->nbytes;
    return PC_OK;
}

/* torch.load gives uninitialised memory for a storage that is not listed; here each must be, exactly once. */
static pc_status place_storages(pc_bin_loader *load, size_t *at, pc_error *err)
{
    pc_torch_bin *bin = load->bin;
    pc_pickle pickle;
    pc_pickle_ref top;
    pc_status status = next_pickle(load, at, &pickle, &top, NULL, err);
    uint64_t position = *at;
    if (status == PC_OK && pickle.objects[top].kind != PC_PICKLE_LIST)
        status = pc_bin_wrong(bin, err, "has no list of storages");
    if (status == PC_OK) {
        const pc_pickle_object *list = &pickle.objects[top];
        for (uint32_t i = 0; i < list->count && status == PC_OK; i++) {
            const pc_pickle_object *key = &pickle.objects[pc_pickle_items(list)[i]];
            if (key->kind != PC_PICKLE_TEXT && key->kind != PC_PICKLE_BYTES)
                status = pc_bin_wrong(bin, err, "lists a storage whose key is not a string");
            else
                status = place_storage(load, &position, pc_pickle_bytes(&pickle, key), key->count, err);
        }
    }
    pc_pickle_free(&pickle);
    if (status != PC_OK)
        return status;
    if (position != bin->source.size)
        return pc_bin_wrong(bin, err, "has bytes behind its last storage");
    for (size_t i = 0; i < bin->storage_count; i++) {
        pc_bin_storage *s = &bin->storages[i];
        const pc_bin_storage *owner = s->parent != SIZE_MAX ? &bin->storages[s->parent] : s;
        if (!owner->placed)
            return pc_bin_wrong(bin, err, "has tensors in a storage that it does not list");
        if (s->parent != SIZE_MAX)
            s->offset += owner->offset;
    }
    return PC_OK;
}

pc_status pc_bin_open_legacy(pc_bin_loader *load, pc_error *err)
{
    pc_torch_bin *bin = load->bin;
    load->input.source = &bin->source;
    if (bin->source.bytes != NULL) {
        load->input.bytes = bin->source.bytes;
        load->input.have = bin->source.size < PC_PICKLE_MAX_BYTES ? (size_t)bin->source.size : PC_PICKLE_MAX_BYTES;
    }
    size_t at = 0;
    pc_status status = expect_number(load, &at, 0, err);
    if (status == PC_OK)
        status = expect_number(load, &at, LEGACY_PROTOCOL, err);
    pc_pickle_ref top;
    if (status == PC_OK) { /* facts about the writer: storages are little-endian whatever it says */
        pc_pickle facts;
        status = next_pickle(load, &at, &facts, &top, NULL, err);
        pc_pickle_free(&facts);
    }
    if (status == PC_OK)
        status = next_pickle(load, &at, &load->pickle, &top, legacy_storage, err);
    if (status == PC_OK)
        status = place_storages(load, &at, err);
    return status == PC_OK ? pc_bin_name_tensors(load, top, err) : status;
}
