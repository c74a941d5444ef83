#include "zip_reader.h"

#include <stdlib.h>
#include <string.h>

#include "../core/memory.h"
#include "quote.h"

#define END_BYTES 22
#define END64_BYTES 56
#define LOCATOR_BYTES 20
#define LONGEST_COMMENT 65535
#define DIRECTORY_ITEM_BYTES 46
#define LOCAL_HEADER_BYTES 30
#define LONGEST_NAME 512 /* bytes, top folder included; torch writes some twenty */

#define FLAG_ENCRYPTED 0x2041u /* bits 0, 6 and 13: encrypted, strongly encrypted, masked headers */
#define FLAG_DESCRIPTOR 0x0008u
#define FLAG_PATCHED 0x0020u

static unsigned get16(const uint8_t *p) { return (unsigned)p[0] | (unsigned)p[1] << 8; }
static uint32_t get32(const uint8_t *p) { return (uint32_t)get16(p) | (uint32_t)get16(p + 2) << 16; }
static uint64_t get64(const uint8_t *p) { return (uint64_t)get32(p) | (uint64_t)get32(p + 4) << 32; }

/* What the end of the archive says about its directory. */
typedef struct directory_place {
    uint64_t offset, size, count;
} directory_place;

static pc_status damaged(const pc_zip *zip, pc_error *err, const char *why)
{
    return pc_fail(err, PC_ERR_UNPICKLE, "%s is a damaged zip archive: %s", zip->source->label, why);
}

static pc_status damaged_entry(const pc_zip *zip, const char *name, size_t len, pc_error *err, const char *why)
{
    char quoted[PC_QUOTED];
    return pc_fail(err, PC_ERR_UNPICKLE, "%s: entry %s of the zip archive %s", zip->source->label,
                   pc_quote(name, len, quoted), why);
}

/* Zip64: the classic record's fields are either the same or say "look there". */
static pc_status read_end64(const pc_zip *zip, uint64_t locator_at, const uint8_t *classic, directory_place *place,
                            uint64_t *directory_end, pc_error *err)
{
    uint8_t locator[LOCATOR_BYTES], end[END64_BYTES];
    pc_status status = pc_source_read(zip->source, locator_at, locator, sizeof locator, err);
    if (status != PC_OK)
        return status;
    uint64_t at = get64(locator + 8);
    if (get32(locator + 4) != 0 || get32(locator + 16) > 1)
        return damaged(zip, err, "it is split over several files");
    if (at > locator_at || locator_at - at < END64_BYTES)
        return damaged(zip, err, "its zip64 end record is not where it says");
    status = pc_source_read(zip->source, at, end, sizeof end, err);
    if (status != PC_OK)
        return status;
    if (memcmp(end, "PK\6\6", 4) != 0 || get64(end + 4) != locator_at - at - 12)
        return damaged(zip, err, "its zip64 end record is not where it says");
    if (get32(end + 16) != 0 || get32(end + 20) != 0 || get64(end + 24) != get64(end + 32))
        return damaged(zip, err, "it is split over several files");
    place->count = get64(end + 32);
    place->size = get64(end + 40);
    place->offset = get64(end + 48);
    if ((get16(classic + 10) != 0xFFFFu && get16(classic + 10) != place->count) ||
        (get32(classic + 12) != 0xFFFFFFFFu && get32(classic + 12) != place->size) ||
        (get32(classic + 16) != 0xFFFFFFFFu && get32(classic + 16) != place->offset))
        return damaged(zip, err, "its two end records contradict each other");
    *directory_end = at;
    return PC_OK;
}

/* The end record is the last thing in the file except for a comment, whose length it gives. */
static pc_status find_directory(const pc_zip *zip, directory_place *place, pc_error *err)
{
    uint64_t size = zip->source->size;
    if (size < END_BYTES)
        return damaged(zip, err, "it is too short");
    size_t tail_len = size < END_BYTES + LONGEST_COMMENT ? (size_t)size : END_BYTES + LONGEST_COMMENT;
    uint64_t tail_at = size - tail_len;
    uint8_t *tail = pc_malloc(tail_len);
    if (tail == NULL)
        return pc_fail_nomem(err, "the end of a zip archive");
    uint8_t classic[END_BYTES];
    uint64_t end_at = UINT64_MAX;
    pc_status status = pc_source_read(zip->source, tail_at, tail, tail_len, err);
    for (size_t at = tail_len - END_BYTES + 1; status == PC_OK && at-- > 0;)
        if (memcmp(tail + at, "PK\5\6", 4) == 0 && get16(tail + at + 20) == tail_len - END_BYTES - at) {
            memcpy(classic, tail + at, END_BYTES);
            end_at = tail_at + at;
            break;
        }
    pc_free(tail);
    if (status != PC_OK)
        return status;
    if (end_at == UINT64_MAX)
        return damaged(zip, err, "its end record is missing (the file is cut short?)");
    if (get16(classic + 4) != 0 || get16(classic + 6) != 0 || get16(classic + 8) != get16(classic + 10))
        return damaged(zip, err, "it is split over several files");

    uint64_t directory_end = end_at;
    place->count = get16(classic + 10);
    place->size = get32(classic + 12);
    place->offset = get32(classic + 16);
    bool has_locator = false;
    if (end_at >= LOCATOR_BYTES) {
        uint8_t signature[4];
        status = pc_source_read(zip->source, end_at - LOCATOR_BYTES, signature, 4, err);
        if (status != PC_OK)
            return status;
        has_locator = memcmp(signature, "PK\6\7", 4) == 0;
    }
    if (has_locator) {
        status = read_end64(zip, end_at - LOCATOR_BYTES, classic, place, &directory_end, err);
        if (status != PC_OK)
            return status;
    }
    if (place->offset > directory_end || place->size != directory_end - place->offset)
        return damaged(zip, err, "its directory is not where its end record says");
    if (place->size > PC_ZIP_MAX_DIRECTORY)
        return damaged(zip, err, "its directory is larger than 64 MiB");
    if (place->count > place->size / DIRECTORY_ITEM_BYTES)
        return damaged(zip, err, "its directory is too small for its entries");
    return PC_OK;
}

/* Replace the fields that say 0xFFFFFFFF by those of the zip64 extra field. */
static bool apply_zip64(const uint8_t *extra, size_t len, uint64_t *size, uint64_t *packed, uint64_t *header)
{
    uint64_t *wanted[3];
    size_t wanting = 0;
    if (*size == 0xFFFFFFFFu)
        wanted[wanting++] = size;
    if (*packed == 0xFFFFFFFFu)
        wanted[wanting++] = packed;
    if (*header == 0xFFFFFFFFu)
        wanted[wanting++] = header;
    if (wanting == 0)
        return true;
    while (len >= 4) {
        unsigned id = get16(extra);
        size_t piece = get16(extra + 2);
        if (piece > len - 4)
            return false;
        if (id == 1) {
            if (piece < 8 * wanting)
                return false;
            for (size_t i = 0; i < wanting; i++)
                *wanted[i] = get64(extra + 4 + 8 * i);
            return true;
        }
        extra += 4 + piece;
        len -= 4 + piece;
    }
    return false;
}

/* One item of the directory → *entry; *used is its length. */
static pc_status read_item(const pc_zip *zip, const uint8_t *item, size_t left, uint64_t directory_at,
                           pc_zip_entry *entry, size_t *used, pc_error *err)
{
    if (left < DIRECTORY_ITEM_BYTES || memcmp(item, "PK\1\2", 4) != 0)
        return damaged(zip, err, "an entry of its directory is malformed");
    unsigned flags = get16(item + 8), method = get16(item + 10);
    size_t name_len = get16(item + 28), extra_len = get16(item + 30), comment_len = get16(item + 32);
    if (name_len + extra_len + comment_len > left - DIRECTORY_ITEM_BYTES)
        return damaged(zip, err, "an entry of its directory is malformed");
    *used = DIRECTORY_ITEM_BYTES + name_len + extra_len + comment_len;
    const char *name = (const char *)item + DIRECTORY_ITEM_BYTES;
    if (name_len > LONGEST_NAME)
        return damaged_entry(zip, name, name_len, err, "has a name longer than 512 bytes");
    if ((flags & FLAG_ENCRYPTED) != 0)
        return damaged_entry(zip, name, name_len, err, "is encrypted; save the file again without encryption");
    if ((flags & FLAG_PATCHED) != 0)
        return damaged_entry(zip, name, name_len, err, "is a patch and not data");
    if (method != 0)
        return damaged_entry(zip, name, name_len, err,
                             method == 8 ? "is compressed (deflate); torch.save stores entries uncompressed: save the "
                                           "file again with torch.save"
                                         : "is compressed; torch.save stores entries uncompressed: save the file "
                                           "again with torch.save");
    uint64_t packed = get32(item + 20), size = get32(item + 24), header = get32(item + 42);
    if (!apply_zip64(item + DIRECTORY_ITEM_BYTES + name_len, extra_len, &size, &packed, &header))
        return damaged_entry(zip, name, name_len, err, "has a malformed zip64 field");
    if (get16(item + 34) != 0)
        return damaged_entry(zip, name, name_len, err, "is in another file of a split archive");
    if (packed != size)
        return damaged_entry(zip, name, name_len, err, "is stored, but its two sizes differ");
    if (header > directory_at || directory_at - header < LOCAL_HEADER_BYTES ||
        size > directory_at - header - LOCAL_HEADER_BYTES)
        return damaged_entry(zip, name, name_len, err, "reaches outside the archive");

    const char *slash = memchr(name, '/', name_len);
    if (slash == NULL)
        return damaged_entry(zip, name, name_len, err, "is not inside the archive's top folder");
    size_t folder_len = (size_t)(slash - name) + 1;
    if (zip->folder != NULL && (zip->folder_len != folder_len || memcmp(zip->folder, name, folder_len) != 0))
        return damaged_entry(zip, name, name_len, err, "is in a second top folder; an archive of torch.save has one");
    *entry = (pc_zip_entry){.name = name + folder_len,
                            .name_len = (uint32_t)(name_len - folder_len),
                            .crc = get32(item + 16),
                            .header = header,
                            .size = size,
                            .flags = (uint16_t)flags};
    return PC_OK;
}

static int compare_offsets(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Each entry must end before the next one's header begins. */
static pc_status set_limits(pc_zip *zip, uint64_t directory_at, pc_error *err)
{
    uint64_t *starts;
    size_t bytes;
    if (!pc_mul_size(zip->count + 1, sizeof *starts, &bytes) || (starts = pc_malloc(bytes)) == NULL)
        return pc_fail_nomem(err, "the entries of a zip archive");
    bool sorted = true;
    for (size_t i = 0; i < zip->count; i++) {
        starts[i] = zip->entries[i].header;
        sorted = sorted && (i == 0 || starts[i - 1] <= starts[i]);
    }
    starts[zip->count] = directory_at;
    if (!sorted)
        qsort(starts, zip->count, sizeof *starts, compare_offsets);
    pc_status status = PC_OK;
    for (size_t i = 0; i < zip->count && status == PC_OK; i++) {
        pc_zip_entry *e = &zip->entries[i];
        const uint64_t *own = bsearch(&e->header, starts, zip->count, sizeof *starts, compare_offsets);
        size_t at = (size_t)(own - starts);
        if ((at > 0 && starts[at - 1] == e->header) || starts[at + 1] - e->header < LOCAL_HEADER_BYTES ||
            e->size > starts[at + 1] - e->header - LOCAL_HEADER_BYTES)
            status = damaged_entry(zip, e->name, e->name_len, err, "overlaps another entry");
        e->limit = starts[at + 1];
    }
    pc_free(starts);
    return status;
}

static pc_status read_directory(pc_zip *zip, const directory_place *place, pc_error *err)
{
    zip->directory = pc_malloc((size_t)place->size);
    zip->entries = pc_calloc((size_t)place->count, sizeof *zip->entries);
    if (zip->directory == NULL || zip->entries == NULL)
        return pc_fail_nomem(err, "the directory of a zip archive");
    pc_status status = pc_source_read(zip->source, place->offset, zip->directory, (size_t)place->size, err);
    if (status != PC_OK)
        return status;
    size_t at = 0, left = (size_t)place->size;
    for (uint64_t i = 0; i < place->count; i++) {
        pc_zip_entry *entry = &zip->entries[zip->count];
        size_t used = 0;
        status = read_item(zip, zip->directory + at, left, place->offset, entry, &used, err);
        if (status != PC_OK)
            return status;
        if (zip->folder == NULL) {
            zip->folder = (const char *)zip->directory + at + DIRECTORY_ITEM_BYTES;
            zip->folder_len = (size_t)(entry->name - zip->folder);
        }
        at += used;
        left -= used;
        size_t other;
        if (pc_strmap_get(&zip->by_name, entry->name, entry->name_len, &other))
            return damaged_entry(zip, entry->name, entry->name_len, err, "occurs twice");
        if (!pc_strmap_put(&zip->by_name, entry->name, entry->name_len, zip->count))
            return pc_fail_nomem(err, "the names of a zip archive");
        zip->checked = zip->checked || entry->crc != 0;
        zip->count++;
    }
    if (left != 0)
        return damaged(zip, err, "its directory has more bytes than entries");
    return set_limits(zip, place->offset, err);
}

pc_status pc_zip_open(const pc_byte_source *source, pc_zip *out, pc_error *err)
{
    memset(out, 0, sizeof *out);
    out->source = source;
    pc_strmap_init(&out->by_name);
    pc_crc32_init(&out->crc);
    directory_place place = {0};
    pc_status status = find_directory(out, &place, err);
    if (status == PC_OK)
        status = read_directory(out, &place, err);
    if (status != PC_OK)
        pc_zip_close(out);
    return status;
}

void pc_zip_close(pc_zip *zip)
{
    if (zip->source == NULL)
        return;
    pc_strmap_free(&zip->by_name);
    pc_free(zip->entries);
    pc_free(zip->directory);
    memset(zip, 0, sizeof *zip);
}

size_t pc_zip_find(const pc_zip *zip, const char *name, size_t len)
{
    size_t i;
    return pc_strmap_get(&zip->by_name, name, len, &i) ? i : SIZE_MAX;
}

pc_status pc_zip_locate(pc_zip *zip, size_t i, pc_error *err)
{
    pc_zip_entry *e = &zip->entries[i];
    if (e->data != 0)
        return PC_OK;
    uint8_t header[LOCAL_HEADER_BYTES + LONGEST_NAME];
    size_t full_name = zip->folder_len + e->name_len;
    size_t want = LOCAL_HEADER_BYTES + full_name;
    if (e->limit - e->header < want)
        return damaged_entry(zip, e->name, e->name_len, err, "overlaps another entry");
    pc_status status = pc_source_read(zip->source, e->header, header, want, err);
    if (status != PC_OK)
        return status;
    if (memcmp(header, "PK\3\4", 4) != 0)
        return damaged_entry(zip, e->name, e->name_len, err, "has no local header");
    if (get16(header + 26) != full_name || memcmp(header + LOCAL_HEADER_BYTES, zip->folder, zip->folder_len) != 0 ||
        memcmp(header + LOCAL_HEADER_BYTES + zip->folder_len, e->name, e->name_len) != 0)
        return damaged_entry(zip, e->name, e->name_len, err, "has another name in its local header");
    if (get16(header + 6) != e->flags || get16(header + 8) != 0)
        return damaged_entry(zip, e->name, e->name_len, err, "is described differently in its local header");
    /* With a data descriptor the local sizes are not known when the header is written; else they must agree. */
    uint32_t crc = get32(header + 14), packed = get32(header + 18), size = get32(header + 22);
    bool later = (e->flags & FLAG_DESCRIPTOR) != 0;
    bool sizes_agree = (size == e->size && packed == e->size) || (size == 0xFFFFFFFFu && packed == 0xFFFFFFFFu) ||
                       (later && size == 0 && packed == 0);
    if (!sizes_agree || (crc != e->crc && !(later && crc == 0)))
        return damaged_entry(zip, e->name, e->name_len, err, "is described differently in its local header");
    uint64_t skip = want + get16(header + 28);
    if (skip > e->limit - e->header || e->size > e->limit - e->header - skip)
        return damaged_entry(zip, e->name, e->name_len, err, "overlaps another entry");
    e->data = e->header + skip;
    return PC_OK;
}

/* One piece at a time, so that the checksum finds the bytes still in the cache. */
#define PIECE_BYTES ((size_t)128 * 1024)

pc_status pc_zip_read(const pc_zip *zip, size_t i, void *dst, pc_error *err)
{
    const pc_zip_entry *e = &zip->entries[i];
    uint32_t crc = 0;
    if (zip->source->bytes != NULL) {
        const uint8_t *bytes = zip->source->bytes + e->data; /* inside: the directory's checks made sure */
        if (zip->checked)
            crc = pc_crc32_update(&zip->crc, 0, bytes, (size_t)e->size);
        if (dst != NULL && e->size != 0)
            memcpy(dst, bytes, (size_t)e->size);
    } else {
        uint8_t *piece = NULL;
        if (dst == NULL && (piece = pc_malloc(PIECE_BYTES)) == NULL)
            return pc_fail_nomem(err, "a read buffer");
        pc_status status = PC_OK;
        for (uint64_t done = 0; done < e->size && status == PC_OK;) {
            size_t len = e->size - done < PIECE_BYTES ? (size_t)(e->size - done) : PIECE_BYTES;
            uint8_t *to = dst != NULL ? (uint8_t *)dst + done : piece;
            status = pc_source_read(zip->source, e->data + done, to, len, err);
            if (status == PC_OK && zip->checked)
                crc = pc_crc32_update(&zip->crc, crc, to, len);
            done += len;
        }
        pc_free(piece);
        if (status != PC_OK)
            return status;
    }
    if (zip->checked && crc != e->crc)
        return damaged_entry(zip, e->name, e->name_len, err, "does not have the checksum (CRC-32) that it should: its "
                                                             "bytes are damaged");
    return PC_OK;
}
