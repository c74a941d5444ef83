/* adapter_model.bin: the two layouts of torch.save, and from the object in the
 * pickle to a list of named tensors. */
#include "torch_bin.h"

#include <string.h>

#include "../core/strmap.h"
#include "pickle_reader.h"
#include "quote.h"
#include "torch_storage.h"

/* Expanded tensors (stride 0) and many views of one storage are larger than the file.
 * All together may take this much: eight times the file, and 64 MiB for small files. */
#define EXPANSION ((uint64_t)8)
#define ALWAYS_ALLOWED ((uint64_t)64 * 1024 * 1024)

#define MAX_NESTING 64                            /* of dicts that hold tensors */
#define MAX_VISITS ((size_t)4 * 1024 * 1024)      /* entries of dicts, each counted as often as it is reached */
#define MAX_NAME_BYTES ((size_t)64 * 1024 * 1024) /* of all names together */
#define MAX_DIMS_TOTAL ((size_t)8 * 1024 * 1024)  /* of all tensors together */
#define MAX_KEY 255                               /* bytes of a storage's key */

typedef struct named {
    const char *name;
    size_t name_len;
    uint32_t tensor; /* of the pickle */
} named;

/* What exists only while a file is being opened. */
typedef struct loader {
    pc_torch_bin *bin;
    uint32_t *storage_of_entry; /* zip entry → storage, or UINT32_MAX */
    pc_strmap storage_of_key;   /* legacy; the keys are in the bin's pool */
    pc_pickle_input input;
    pc_pickle pickle;

    named *list;
    size_t count, room;
    char *name; /* of the entry being looked at */
    size_t name_len, name_room;
    size_t name_bytes, visits;
    uint8_t *seen;           /* object → looked through already and found to hold no tensor */
    pc_pickle_ref *pending;  /* objects still to look through */
    size_t pending_count, pending_room;
} loader;

static pc_status wrong(const pc_torch_bin *bin, pc_error *err, const char *why)
{
    return pc_fail(err, PC_ERR_UNPICKLE, "%s %s", bin->label, why);
}

/* -------------------------------------------------------------------- storages */

static pc_status add_storage(pc_torch_bin *bin, const pc_bin_storage *storage, uint32_t *index, pc_error *err)
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

/* A storage that is named again must be described as before. */
static pc_status check_again(const pc_torch_bin *bin, const pc_pickle *pickle, uint32_t index,
                             const pc_pickle_storage *request, pc_error *err)
{
    const pc_bin_storage *known = &bin->storages[index];
    char quoted[PC_QUOTED];
    if (known->dtype != request->dtype || known->nbytes != request->nbytes)
        return pc_pickle_bad(pickle, err, "storage %s is described in two different ways",
                             pc_quote(request->key, request->key_len, quoted));
    return PC_OK;
}

static pc_status zip_storage(void *context, const pc_pickle *pickle, const pc_pickle_storage *request, uint32_t *index,
                             uint64_t *nbytes, pc_error *err)
{
    loader *load = context;
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
        return check_again(bin, pickle, *index, request, err);
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
    status = add_storage(bin, &storage, index, err);
    if (status == PC_OK)
        load->storage_of_entry[entry] = *index;
    return status;
}

static pc_status legacy_storage(void *context, const pc_pickle *pickle, const pc_pickle_storage *request,
                                uint32_t *index, uint64_t *nbytes, pc_error *err)
{
    loader *load = context;
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
        status = check_again(bin, pickle, *index, request, err);
    } else {
        const char *key = pc_pool_strndup(&bin->pool, request->key, request->key_len);
        if (key == NULL || !pc_strmap_put(&load->storage_of_key, key, request->key_len, bin->storage_count))
            return pc_fail_nomem(err, "the storages of a file");
        status = add_storage(bin, &storage, index, err);
    }
    if (status != PC_OK || !request->is_view)
        return status;
    size_t width = pc_dtype_size(request->dtype);
    storage.parent = *index;
    storage.offset = request->view_start * width; /* for now within the parent */
    storage.nbytes = *nbytes = request->view_count * width;
    return add_storage(bin, &storage, index, err);
}

/* -------------------------------------------------- from the object to the names */

static pc_status about_entry(const loader *load, pc_error *err, const char *why)
{
    char quoted[PC_QUOTED];
    return pc_fail(err, PC_ERR_UNPICKLE, "%s: entry %s %s", load->bin->label,
                   pc_quote(load->name, load->name_len, quoted), why);
}

/* Set what follows the first `prefix` bytes of the name, after a dot if inside another dict. */
static pc_status set_name(loader *load, size_t prefix, bool inside, const char *text, size_t len, pc_error *err)
{
    size_t want = prefix + 1 + len; /* both are limited far below SIZE_MAX */
    if (want > load->name_room) {
        char *moved = pc_realloc(load->name, want * 2);
        if (moved == NULL)
            return pc_fail_nomem(err, "a tensor's name");
        load->name = moved;
        load->name_room = want * 2;
    }
    if (inside)
        load->name[prefix++] = '.';
    memcpy(load->name + prefix, text, len);
    load->name_len = prefix + len;
    return PC_OK;
}

static pc_status add_pending(loader *load, pc_pickle_ref ref, pc_error *err)
{
    if (load->seen[ref] != 0)
        return PC_OK;
    load->seen[ref] = 1;
    if (load->pending_count == load->pending_room) {
        size_t room = load->pending_room != 0 ? load->pending_room * 2 : 64;
        pc_pickle_ref *moved = pc_realloc(load->pending, room * sizeof *moved); /* each object at most once */
        if (moved == NULL)
            return pc_fail_nomem(err, "the objects of a pickle");
        load->pending = moved;
        load->pending_room = room;
    }
    load->pending[load->pending_count++] = ref;
    return PC_OK;
}

/* A value that is not a tensor nor a dict is left out of the result, which is right only if no tensor is lost
 * with it.  Every object is looked through once, however often it is reached. */
static pc_status check_without_tensors(loader *load, pc_pickle_ref value, const char *complaint, pc_error *err)
{
    pc_status status = add_pending(load, value, err);
    while (status == PC_OK && load->pending_count != 0) {
        const pc_pickle_object *o = &load->pickle.objects[load->pending[--load->pending_count]];
        if (o->kind == PC_PICKLE_TENSOR || o->kind == PC_PICKLE_STORAGE)
            return about_entry(load, err, complaint);
        if (o->kind == PC_PICKLE_TUPLE || o->kind == PC_PICKLE_LIST || o->kind == PC_PICKLE_SET ||
            o->kind == PC_PICKLE_DICT) {
            const pc_pickle_ref *items = pc_pickle_items(o);
            for (uint32_t i = 0; i < o->count && status == PC_OK; i++)
                status = add_pending(load, items[i], err);
        }
    }
    return status;
}

static pc_status add_named(loader *load, uint32_t tensor, pc_error *err)
{
    if (load->name_len > MAX_NAME_BYTES - load->name_bytes)
        return wrong(load->bin, err, "has more than 64 MiB of tensor names");
    load->name_bytes += load->name_len;
    if (load->count == load->room) {
        size_t room = load->room != 0 ? load->room * 2 : 256;
        named *moved = pc_realloc(load->list, room * sizeof *moved); /* at most MAX_VISITS */
        if (moved == NULL)
            return pc_fail_nomem(err, "the names of tensors");
        load->list = moved;
        load->room = room;
    }
    const char *name = pc_pool_strndup(&load->bin->pool, load->name, load->name_len);
    if (name == NULL)
        return pc_fail_nomem(err, "the names of tensors");
    load->list[load->count++] = (named){name, load->name_len, tensor};
    return PC_OK;
}

static pc_status flatten(loader *load, pc_pickle_ref dict, size_t prefix, int depth, pc_error *err)
{
    if (depth > MAX_NESTING)
        return about_entry(load, err, "is nested more than 64 dicts deep");
    const pc_pickle *pickle = &load->pickle;
    const pc_pickle_object *object = &pickle->objects[dict];
    const pc_pickle_ref *items = pc_pickle_items(object);
    if (object->count / 2 > MAX_VISITS - load->visits)
        return wrong(load->bin, err, "has more than 4194304 entries in its dicts");
    load->visits += object->count / 2;
    pc_status status = PC_OK;
    for (uint32_t i = 0; i < object->count && status == PC_OK; i += 2) {
        const pc_pickle_object *key = &pickle->objects[items[i]], *value = &pickle->objects[items[i + 1]];
        if (key->kind != PC_PICKLE_TEXT) {
            const char *kind = pc_pickle_kind_name(key);
            status = set_name(load, prefix, depth > 1, kind, strlen(kind), err);
            if (status == PC_OK)
                status = check_without_tensors(load, items[i + 1], "is a key that is not a string, and holds tensors",
                                               err);
            continue;
        }
        status = set_name(load, prefix, depth > 1, pc_pickle_bytes(pickle, key), key->count, err);
        if (status != PC_OK)
            break;
        if (value->kind == PC_PICKLE_TENSOR)
            status = add_named(load, (uint32_t)value->as.number, err);
        else if (value->kind == PC_PICKLE_DICT)
            status = flatten(load, items[i + 1], load->name_len, depth + 1, err);
        else
            status = check_without_tensors(load, items[i + 1],
                                           "holds tensors in something other than a dict; save them as a flat dict",
                                           err);
    }
    return status;
}

/* Strides as the tensor's own shape would give them (dimensions of size 1 may have any). */
static bool is_contiguous(const uint64_t *shape, const uint64_t *stride, int ndim)
{
    uint64_t expected = 1;
    for (int d = ndim; d-- > 0;) {
        if (shape[d] != 1 && stride[d] != expected)
            return false;
        expected *= shape[d]; /* a tensor that has elements and fits in its storage: no overflow */
    }
    return true;
}

static pc_status describe(loader *load, const named *item, pc_tensor_info *info, pc_bin_layout *layout, pc_error *err)
{
    pc_torch_bin *bin = load->bin;
    const pc_pickle *pickle = &load->pickle;
    const pc_pickle_tensor *tensor = &pickle->tensors[item->tensor];
    const pc_pickle_object *shape_object = &pickle->objects[tensor->shape];
    const pc_pickle_ref *sizes = pc_pickle_items(shape_object);
    const pc_pickle_ref *steps = pc_pickle_items(&pickle->objects[tensor->stride]);
    int ndim = (int)shape_object->count;
    uint64_t *shape = pc_pool_array(&bin->pool, (size_t)ndim * 2, sizeof *shape);
    if (shape == NULL)
        return pc_fail_nomem(err, "the shapes of tensors");
    for (int d = 0; d < ndim; d++) {
        shape[d] = (uint64_t)pickle->objects[sizes[d]].as.number;
        shape[ndim + d] = (uint64_t)pickle->objects[steps[d]].as.number;
    }
    *info = (pc_tensor_info){.name = item->name,
                             .name_len = item->name_len,
                             .dtype = tensor->dtype,
                             .ndim = ndim,
                             .shape = shape,
                             .nbytes = tensor->nbytes};
    layout->storage = tensor->storage;
    layout->stride = shape + ndim;
    layout->contiguous = tensor->nbytes == 0 || is_contiguous(shape, shape + ndim, ndim);
    if (tensor->nbytes != 0)
        layout->start = tensor->offset * pc_dtype_size(tensor->dtype); /* inside the storage */
    if (!layout->contiguous)
        bin->storages[tensor->storage].gathers++;
    return PC_OK;
}

/* The list of names → the tensors of the pc_weights. */
static pc_status make_tensors(loader *load, pc_error *err)
{
    pc_torch_bin *bin = load->bin;
    pc_tensor_info *infos = pc_pool_array(&bin->pool, load->count, sizeof *infos);
    bin->layouts = pc_pool_array(&bin->pool, load->count, sizeof *bin->layouts);
    if (infos == NULL || bin->layouts == NULL)
        return pc_fail_nomem(err, "the tensors of a file");
    uint64_t limit = bin->source.size > UINT64_MAX / EXPANSION ? UINT64_MAX : bin->source.size * EXPANSION;
    limit = limit > ALWAYS_ALLOWED ? limit : ALWAYS_ALLOWED;
    uint64_t total = 0;
    size_t dims = 0;
    pc_strmap names;
    pc_strmap_init(&names);
    pc_status status = PC_OK;
    for (size_t i = 0; i < load->count && status == PC_OK; i++) {
        const named *item = &load->list[i];
        const pc_pickle_tensor *tensor = &load->pickle.tensors[item->tensor];
        char quoted[PC_QUOTED];
        size_t other;
        dims += load->pickle.objects[tensor->shape].count;
        if (pc_strmap_get(&names, item->name, item->name_len, &other))
            status = pc_fail(err, PC_ERR_UNPICKLE, "%s: tensor %s occurs twice", bin->label,
                             pc_quote(item->name, item->name_len, quoted));
        else if (tensor->nbytes > limit - total)
            status = pc_fail(err, PC_ERR_UNPICKLE,
                             "%s: with tensor %s its tensors take more than %llu bytes, from a file of %llu: "
                             "expanded tensors and views must be saved as .contiguous() or .clone()",
                             bin->label, pc_quote(item->name, item->name_len, quoted), (unsigned long long)limit,
                             (unsigned long long)bin->source.size);
        else if (dims > MAX_DIMS_TOTAL)
            status = wrong(bin, err, "has tensors of too many dimensions");
        else if (!pc_strmap_put(&names, item->name, item->name_len, i))
            status = pc_fail_nomem(err, "the names of tensors");
        else
            status = describe(load, item, &infos[i], &bin->layouts[i], err);
        total += tensor->nbytes;
    }
    pc_strmap_free(&names);
    bin->base.tensors = infos;
    bin->base.count = load->count;
    return status;
}

static pc_status take_object(loader *load, pc_pickle_ref top, pc_error *err)
{
    const pc_pickle_object *object = &load->pickle.objects[top];
    if (object->kind != PC_PICKLE_DICT)
        return pc_fail(err, PC_ERR_UNPICKLE, "%s holds %s and not a dict of tensors", load->bin->label,
                       pc_pickle_kind_name(object));
    load->seen = pc_calloc(load->pickle.object_count, 1);
    if (load->seen == NULL)
        return pc_fail_nomem(err, "the objects of a pickle");
    return flatten(load, top, 0, 1, err);
}

/* ------------------------------------------------------------------- zip layout */

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

static pc_status open_zip(loader *load, pc_error *err)
{
    pc_torch_bin *bin = load->bin;
    pc_status status = pc_zip_open(&bin->source, &bin->zip, err);
    if (status != PC_OK)
        return status;
    if (pc_zip_find(&bin->zip, "constants.pkl", 13) != SIZE_MAX)
        return wrong(bin, err, "is a TorchScript archive (torch.jit.save), which contains code; save the state dict with "
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
        status = wrong(bin, err, "has bytes behind the end of its pickle");
    if (status == PC_OK)
        status = take_object(load, top, err);
    return status == PC_OK ? make_tensors(load, err) : status;
}

/* ---------------------------------------------------------------- legacy layout */

/* Five pickles (magic number, protocol version, facts about the writer, the object, the keys of its storages),
 * then per key the number of elements as int64 and the bytes. */

static const uint8_t magic[10] = {0x6C, 0xFC, 0x9C, 0x46, 0xF9, 0x20, 0x6A, 0xA8, 0x50, 0x19};
#define LEGACY_PROTOCOL 1001

static pc_status next_pickle(loader *load, size_t *at, pc_pickle *pickle, pc_pickle_ref *top,
                             pc_pickle_storage_fn storage, pc_error *err)
{
    pc_status status = pc_pickle_init(pickle, load->bin->label, &load->input, *at, storage, load, err);
    if (status == PC_OK)
        status = pc_pickle_run(pickle, top, err);
    *at = pickle->at;
    return status;
}

/* Run a pickle that must give an integer: `expected`, or the magic number if expected is 0. */
static pc_status expect_number(loader *load, size_t *at, int64_t expected, pc_error *err)
{
    pc_pickle pickle;
    pc_pickle_ref top;
    pc_status status = next_pickle(load, at, &pickle, &top, NULL, err);
    if (status == PC_OK) {
        const pc_pickle_object *o = &pickle.objects[top];
        if (expected == 0) {
            if (o->kind != PC_PICKLE_BIG_INT || o->count != sizeof magic ||
                memcmp(pc_pickle_bytes(&pickle, o), magic, sizeof magic) != 0)
                status = wrong(load->bin, err, "is not a file of torch.save: it begins with another pickle");
        } else if (o->kind != PC_PICKLE_INT || o->as.number != expected) {
            status = wrong(load->bin, err, "has an unknown protocol version of torch.save's legacy layout");
        }
    }
    pc_pickle_free(&pickle);
    return status;
}

static pc_status place_storage(loader *load, uint64_t *at, const char *key, size_t key_len, pc_error *err)
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
static pc_status place_storages(loader *load, size_t *at, pc_error *err)
{
    pc_torch_bin *bin = load->bin;
    pc_pickle pickle;
    pc_pickle_ref top;
    pc_status status = next_pickle(load, at, &pickle, &top, NULL, err);
    uint64_t position = *at;
    if (status == PC_OK && pickle.objects[top].kind != PC_PICKLE_LIST)
        status = wrong(bin, err, "has no list of storages");
    if (status == PC_OK) {
        const pc_pickle_object *list = &pickle.objects[top];
        for (uint32_t i = 0; i < list->count && status == PC_OK; i++) {
            const pc_pickle_object *key = &pickle.objects[pc_pickle_items(list)[i]];
            if (key->kind != PC_PICKLE_TEXT && key->kind != PC_PICKLE_BYTES)
                status = wrong(bin, err, "lists a storage whose key is not a string");
            else
                status = place_storage(load, &position, pc_pickle_bytes(&pickle, key), key->count, err);
        }
    }
    pc_pickle_free(&pickle);
    if (status != PC_OK)
        return status;
    if (position != bin->source.size)
        return wrong(bin, err, "has bytes behind its last storage");
    for (size_t i = 0; i < bin->storage_count; i++) {
        pc_bin_storage *s = &bin->storages[i];
        const pc_bin_storage *owner = s->parent != SIZE_MAX ? &bin->storages[s->parent] : s;
        if (!owner->placed)
            return wrong(bin, err, "has tensors in a storage that it does not list");
        if (s->parent != SIZE_MAX)
            s->offset += owner->offset;
    }
    return PC_OK;
}

static pc_status open_legacy(loader *load, pc_error *err)
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
    if (status == PC_OK)
        status = take_object(load, top, err);
    return status == PC_OK ? make_tensors(load, err) : status;
}

/* ----------------------------------------------------------------------- opening */

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
static pc_status open_by_content(loader *load, pc_error *err)
{
    pc_torch_bin *bin = load->bin;
    uint8_t head[512];
    size_t len = bin->source.size < sizeof head ? (size_t)bin->source.size : sizeof head;
    pc_status status = pc_source_read(&bin->source, 0, head, len, err);
    if (status != PC_OK)
        return status;
    if (len == 0)
        return wrong(bin, err, "is empty");
    if (len >= 4 && memcmp(head, "PK\3\4", 4) == 0)
        return open_zip(load, err);
    if (head[0] == 0x80)
        return open_legacy(load, err);
    if (is_tar(head, len))
        return wrong(bin, err, "is in the tar layout of torch before 0.2, which is not supported; load and save it again "
                               "with torch");
    if (len > 8 && memcmp(head, "version https://git-lfs", 23 < len ? 23 : len) == 0)
        return wrong(bin, err, "is a Git LFS pointer and not the file itself; run 'git lfs pull'");
    if (len > 8 && head[8] == '{')
        return wrong(bin, err, "looks like a safetensors file; name it adapter_model.safetensors");
    return wrong(bin, err, "is not a file of torch.save");
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
    loader *load = pc_calloc(1, sizeof *load);
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
    pc_free(load->list);
    pc_free(load->name);
    pc_free(load->seen);
    pc_free(load->pending);
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
