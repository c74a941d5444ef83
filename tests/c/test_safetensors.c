/* The safetensors reader and writer, the JSON scanner and atomic files, from C:
 * what Python cannot reach, and every allocation made to fail. */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../../src/core/utf8.h"
#include "../../src/formats/atomic_file.h"
#include "../../src/formats/json_scan.h"
#include "../../src/formats/safetensors.h"

/* The system calls that matter, in the C library's place: they can be made to give little, to be interrupted and to
 * fail. */
static struct {
    size_t at_most;    /* bytes per call; 0: no limit */
    bool interrupted;  /* every other call ends in EINTR */
    int calls;
    int fail_read, fail_write, fail_fsync, fail_rename, fail_link; /* an errno, or 0 */
} io;

static bool interrupt(void)
{
    if (!io.interrupted || io.calls++ % 2 != 0)
        return false;
    errno = EINTR;
    return true;
}

ssize_t pread(int fd, void *to, size_t len, off_t offset)
{
    if (interrupt())
        return -1;
    if (io.fail_read != 0)
        return errno = io.fail_read, -1;
    return syscall(SYS_pread64, fd, to, io.at_most != 0 && len > io.at_most ? io.at_most : len, offset);
}

ssize_t write(int fd, const void *from, size_t len)
{
    if (interrupt())
        return -1;
    if (io.fail_write != 0)
        return errno = io.fail_write, -1;
    return syscall(SYS_write, fd, from, io.at_most != 0 && len > io.at_most ? io.at_most : len);
}

int fsync(int fd)
{
    if (interrupt())
        return -1;
    return io.fail_fsync != 0 ? errno = io.fail_fsync, -1 : (int)syscall(SYS_fsync, fd);
}

int rename(const char *old, const char *new)
{
    return io.fail_rename != 0 ? errno = io.fail_rename, -1
                               : (int)syscall(SYS_renameat2, AT_FDCWD, old, AT_FDCWD, new, 0);
}

int linkat(int old_dir, const char *old, int new_dir, const char *new, int flags)
{
    return io.fail_link != 0 ? errno = io.fail_link, -1 : (int)syscall(SYS_linkat, old_dir, old, new_dir, new, flags);
}

static char folder[64];

static const char *in_folder(const char *name)
{
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static long entries_in_folder(void)
{
    char command[128];
    snprintf(command, sizeof command, "ls -A %s | wc -l", folder);
    FILE *pipe = popen(command, "r");
    long count = -1;
    if (pipe == NULL || fscanf(pipe, "%ld", &count) != 1)
        count = -1;
    if (pipe != NULL)
        pclose(pipe);
    return count;
}

static size_t make_file(unsigned char *out, const char *header, size_t payload)
{
    size_t len = strlen(header);
    for (int i = 0; i < 8; i++)
        out[i] = (unsigned char)(len >> (8 * i) & 0xFF);
    memcpy(out + 8, header, len);
    for (size_t i = 0; i < payload; i++)
        out[8 + len + i] = (unsigned char)i;
    return 8 + len + payload;
}

static const char header[] =
    "{\"b\":{\"dtype\":\"I16\",\"shape\":[2,3],\"data_offsets\":[8,20]},\"__metadata__\":{\"k\":\"v\",\"\\u0000\":\"\"},"
    "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"x\":[{\"y\":1e9},null]},"
    "\"\\u00e9\":{\"dtype\":\"F64\",\"shape\":[0,4],\"data_offsets\":[20,20]}}";

TEST(reads_what_the_header_says)
{
    unsigned char file[512];
    size_t len = make_file(file, header, 20);
    pc_safetensors *st;
    pc_error err;
    REQUIRE_STATUS(pc_safetensors_parse(file, len, &st, &err), PC_OK);
    pc_weights *weights = pc_safetensors_weights(st);
    REQUIRE(weights->count == 3);
    CHECK(weights->tensors[0].name_len == 1 && weights->tensors[0].name[0] == 'a');
    CHECK(pc_safetensors_find(st, "\xC3\xA9", 2) == 2);
    CHECK(pc_safetensors_find(st, "a\0", 2) == SIZE_MAX);
    CHECK_INT(pc_safetensors_offset(st, 1), 8 + strlen(header) + 8);
    int16_t b[6];
    CHECK_STATUS(weights->read(weights, 1, b, &err), PC_OK);
    CHECK(memcmp(b, file + pc_safetensors_offset(st, 1), sizeof b) == 0);
    pc_axis axes[2] = {{1, -1, 2}, {0, 2, 2}};
    int16_t part[4];
    CHECK_STATUS(pc_safetensors_read_slice(st, 1, axes, part, &err), PC_OK);
    CHECK(part[0] == b[3] && part[1] == b[5] && part[2] == b[0] && part[3] == b[2]);
    const pc_metadata_item *items;
    size_t count;
    REQUIRE(pc_safetensors_metadata(st, &items, &count) && count == 2);
    CHECK(items[1].key_len == 1 && items[1].key[0] == '\0' && items[1].value_len == 0);
    weights->close(weights); /* closes the whole */
}

TEST(slices_outside_the_tensor_are_refused)
{
    unsigned char file[512];
    size_t len = make_file(file, header, 20);
    pc_safetensors *st;
    pc_error err;
    REQUIRE_STATUS(pc_safetensors_parse(file, len, &st, &err), PC_OK);
    int16_t part[16];
    const pc_axis rows[] = {{2, 1, 1}, {0, 1, 3}, {1, 1, 2}, {0, -1, 2}, {0, 0, 2}, {0, INT64_MAX, 2}, {1, INT64_MIN, 2},
                            {UINT64_MAX, 1, 2}, {0, 1, UINT64_MAX}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        pc_axis axes[2] = {rows[i], {0, 1, 3}};
        CHECK_STATUS(pc_safetensors_read_slice(st, 1, axes, part, &err), PC_ERR_INDEX);
    }
    pc_axis one[2] = {{1, INT64_MIN, 1}, {2, INT64_MAX, 1}}; /* a single element: the step does not matter */
    CHECK_STATUS(pc_safetensors_read_slice(st, 1, one, part, &err), PC_OK);
    pc_axis none[2] = {{9, 1, 0}, {0, 1, 3}};
    CHECK_STATUS(pc_safetensors_read_slice(st, 1, none, part, &err), PC_OK);
    pc_safetensors_close(st);
}

TEST(a_header_of_random_bytes_never_crashes)
{
    uint64_t state = 1;
    unsigned char file[600];
    for (int round = 0; round < 20000; round++) {
        size_t len = make_file(file, header, 20);
        for (int k = 0; k < 3; k++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            file[8 + (state >> 33) % (len - 8)] = (unsigned char)(state >> 56);
        }
        pc_safetensors *st;
        pc_error err;
        pc_status status = pc_safetensors_parse(file, len, &st, &err);
        if (status == PC_OK)
            pc_safetensors_close(st);
        else
            CHECK(status == PC_ERR_FORMAT && st == NULL && pc_utf8_valid(err.text, strlen(err.text)) == strlen(err.text));
    }
}

TEST(scanner_stops_at_the_end_of_the_text)
{
    /* Each prefix in a block of its own size, so that a read past the end is seen. */
    for (size_t len = 0; len < strlen(header); len++) {
        char *text = malloc(len + 1);
        REQUIRE(text != NULL);
        char *exact = realloc(text, len != 0 ? len : 1);
        REQUIRE(exact != NULL);
        memcpy(exact, header, len);
        pc_json json;
        pc_json_init(&json, exact, len);
        CHECK(!pc_json_skip(&json) && json.why != NULL);
        free(exact);
    }
}

TEST(numbers)
{
    static const struct {
        const char *text;
        bool good;
    } cases[] = {
        {"0", true},       {"-0", true},         {"1.5e+3", true},     {"1E-9", true},    {"1.7976931348623157e308", true},
        {"1e308", true},   {"1e309", false},     {"-1e309", false},    {"10e308", false}, {"0.1e309", true},
        {"0e999", true},   {"0e9999999999", true}, {"1e-9999999999", true}, {"1e9999999999", false}, {"00", false},
        {"-", false},      {"1.", false},        {".1", false},        {"1e", false},     {"1e+", false},
        {"18446744073709551616", true}, {"1.8e308", false}, {"123456789012345678901234567890e280", false},
        {"+1", false},     {"0x1", false},       {"1_0", false},       {"Infinity", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[64];
        strcpy(text, cases[i].text);
        pc_json json;
        pc_json_init(&json, text, strlen(text));
        bool good = pc_json_skip(&json) && pc_json_finish(&json);
        if (good != cases[i].good)
            fprintf(stderr, "number %s\n", cases[i].text);
        CHECK(good == cases[i].good);
    }
}

TEST(utf8)
{
    CHECK(pc_utf8_valid("plain ascii, longer than a word", 31) == 31);
    CHECK(pc_utf8_valid("\xF4\x8F\xBF\xBF\xED\x9F\xBF\xEE\x80\x80\xC2\x80\xE0\xA0\x80\xF0\x90\x80\x80", 19) == 19);
    static const char *const bad[] = {"\x80",         "\xC0\x80",     "\xC1\xBF",     "\xE0\x9F\xBF",     "\xED\xA0\x80",
                                      "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF", "\xE2\x82"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        CHECK(pc_utf8_valid(bad[i], strlen(bad[i])) == 0);
    char text[] = "a\xFF\xC3\xA9\xC3";
    pc_utf8_repair(text, strlen(text));
    CHECK(strcmp(text, "a?\xC3\xA9?") == 0);
    pc_error err;
    char path[PC_ERROR_TEXT + 10];
    for (size_t offset = 0; offset < 3; offset++) { /* cut at every place of a character */
        memset(path, 'x', sizeof path);
        for (size_t i = offset; i + 3 < sizeof path; i += 3)
            memcpy(path + i, "\xE2\x82\xAC", 3);
        path[sizeof path - 1] = '\0';
        path[sizeof path - 2] = 'x';
        pc_fail(&err, PC_ERR_VALUE, "%s", path);
        CHECK(pc_utf8_valid(err.text, strlen(err.text)) == strlen(err.text) && strchr(err.text, '?') == NULL);
        CHECK(strlen(err.text) > PC_ERROR_TEXT - 5);
    }
}

static const uint64_t shape2[] = {2}, shape23[] = {2, 3}, huge[] = {UINT64_MAX, 2};
static const float data[6] = {1, 2, 3, 4, 5, 6};

static pc_tensor_view view(const char *name, pc_dtype dtype, int ndim, const uint64_t *shape, uint64_t nbytes)
{
    return (pc_tensor_view){{name, strlen(name), dtype, ndim, shape, nbytes}, data};
}

TEST(what_cannot_be_written_is_refused)
{
    const struct {
        pc_tensor_view views[2];
        size_t count;
        const char *words;
    } cases[] = {
        {{view("a", PC_F32, 1, shape2, 8), view("a", PC_F32, 1, shape2, 8)}, 2, "two tensors are named \"a\""},
        {{view("a", PC_F32, 1, shape2, 8), view("a", PC_U8, 1, shape2, 2)}, 2, "two tensors are named \"a\""},
        {{view("__metadata__", PC_F32, 1, shape2, 8)}, 1, "__metadata__"},
        {{view("a", PC_F32, 1, shape2, 12)}, 1, "does not fit"},
        {{view("a", PC_F32, 2, huge, 8)}, 1, "does not fit"},
        {{view("a", PC_F4, 2, shape23, 3), view("\xFF", PC_F4, 1, shape2, 1)}, 2, "UTF-8"},
        {{view("a", PC_DTYPE_NONE, 1, shape2, 0)}, 1, "no dtype"},
        {{view("a", PC_F32, PC_MAX_DIMS + 1, shape2, 8)}, 1, "does not fit"},
        {{view("a", PC_F4, 0, NULL, 0)}, 1, "does not fit"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        pc_safetensors_layout layout;
        pc_error err;
        CHECK_STATUS(pc_safetensors_plan(cases[i].views, cases[i].count, NULL, 0, false, &layout, &err), PC_ERR_FORMAT);
        CHECK_CONTAINS(err.text, cases[i].words);
        CHECK(layout.header == NULL && layout.order == NULL);
    }
    pc_metadata_item bad = {"k", 1, "\xC3", 1};
    pc_safetensors_layout layout;
    pc_error err;
    CHECK_STATUS(pc_safetensors_plan(NULL, 0, &bad, 1, true, &layout, &err), PC_ERR_FORMAT);
    CHECK_STATUS(pc_safetensors_plan(NULL, 0, &bad, 1, false, &layout, &err), PC_OK); /* not asked for: not looked at */
    pc_safetensors_layout_free(&layout);
}

/* Save, open, read everything and a part: what every failing allocation is tried on. */
static pc_status round_trip(pc_error *err)
{
    pc_tensor_view views[] = {view("\xC3\xA9\n", PC_I16, 2, shape23, 12), view("a", PC_F32, 1, shape2, 8)};
    pc_metadata_item metadata[] = {{"k", 1, "v", 1}, {"\0", 1, "", 0}};
    pc_status status = pc_safetensors_save(in_folder("x"), views, 2, metadata, 2, true, err);
    if (status != PC_OK)
        return status;
    pc_safetensors *st;
    status = pc_safetensors_open(in_folder("x"), &st, err);
    if (status != PC_OK)
        return status;
    char a[8], b[12];
    void *dst[2] = {a, b};
    pc_axis axes[2] = {{0, 1, 2}, {1, 1, 1}};
    status = pc_safetensors_read_all(st, dst, NULL, err);
    if (status == PC_OK)
        status = pc_safetensors_read_slice(st, 1, axes, b, err);
    pc_safetensors_close(st);
    return status;
}

TEST(every_allocation_may_fail)
{
    pc_error err;
    REQUIRE_STATUS(round_trip(&err), PC_OK);
    long live = pc_test_live_allocations();
    FOR_EACH_ALLOCATION (n) {
        pc_status status = round_trip(&err);
        /* PC_OK as well: a file without a name has a substitute, and a folder need not be synced. */
        CHECK(status == PC_OK ||
              (pc_test_allocation_failed() && (status == PC_ERR_NOMEM || err.sys_errno == ENOMEM)));
        CHECK(pc_test_live_allocations() == live);
        CHECK_INT(entries_in_folder(), 1);
    }
    REQUIRE_STATUS(round_trip(&err), PC_OK);
}

TEST(every_allocation_of_a_larger_header_may_fail)
{
    static char text[64 * 1024];
    size_t used = 0;
    text[used++] = '{';
    used += (size_t)sprintf(text + used, "\"__metadata__\":{");
    for (int i = 0; i < 40; i++)
        used += (size_t)sprintf(text + used, "%s\"k%d\":\"v\"", i ? "," : "", i);
    used += (size_t)sprintf(text + used, "}");
    for (int i = 0; i < 100; i++)
        used += (size_t)sprintf(text + used, ",\"t%d\":{\"dtype\":\"U8\",\"shape\":[1,1],\"data_offsets\":[%d,%d]}", i,
                                99 - i, 100 - i);
    text[used++] = '}';
    text[used] = '\0';
    static unsigned char file[80 * 1024];
    size_t len = make_file(file, text, 100);
    long live = pc_test_live_allocations();
    FOR_EACH_ALLOCATION (n) {
        pc_safetensors *st;
        pc_error err;
        pc_status status = pc_safetensors_parse(file, len, &st, &err);
        CHECK_STATUS(status, pc_test_allocation_failed() ? PC_ERR_NOMEM : PC_OK);
        pc_safetensors_close(st);
        CHECK(pc_test_live_allocations() == live);
    }
}

static void try_atomic_files(void)
{
    pc_atomic_file file;
    pc_error err;
    const char *path = in_folder("atomic");
    long before = entries_in_folder();
    REQUIRE_STATUS(pc_atomic_open(path, &file, &err), PC_OK);
    CHECK_STATUS(pc_atomic_write(&file, "hello", 5, &err), PC_OK);
    CHECK(access(path, F_OK) != 0); /* not there before commit */
    pc_atomic_abort(&file);
    pc_atomic_abort(&file); /* harmless */
    CHECK_INT(entries_in_folder(), before);

    REQUIRE_STATUS(pc_atomic_open(path, &file, &err), PC_OK);
    CHECK_STATUS(pc_atomic_write(&file, "hello", 5, &err), PC_OK);
    CHECK_STATUS(pc_atomic_write(&file, NULL, 0, &err), PC_OK);
    CHECK_STATUS(pc_atomic_commit(&file, &err), PC_OK);
    pc_atomic_abort(&file); /* harmless */
    struct stat info;
    CHECK(stat(path, &info) == 0 && info.st_size == 5);
    CHECK_INT(entries_in_folder(), before + 1);

    /* The target becomes a folder meanwhile: the rename fails, nothing is left behind. */
    REQUIRE_STATUS(pc_atomic_open(path, &file, &err), PC_OK);
    CHECK(unlink(path) == 0 && mkdir(path, 0700) == 0);
    CHECK_STATUS(pc_atomic_commit(&file, &err), PC_ERR_IO);
    CHECK_CONTAINS(err.text, "atomic");
    CHECK_INT(entries_in_folder(), before + 1);
    CHECK(rmdir(path) == 0);
}

TEST(short_and_interrupted_calls)
{
    pc_error err;
    for (size_t at_most = 1; at_most < 10; at_most++) {
        io.at_most = at_most;
        io.interrupted = true;
        pc_status status = round_trip(&err);
        memset(&io, 0, sizeof io);
        CHECK_STATUS(status, PC_OK);
    }
    pc_safetensors *st;
    REQUIRE_STATUS(pc_safetensors_open(in_folder("x"), &st, &err), PC_OK);
    float a[2];
    io.at_most = 3;
    io.interrupted = true;
    pc_weights *weights = pc_safetensors_weights(st);
    pc_status status = weights->read(weights, pc_safetensors_find(st, "a", 1), a, &err);
    memset(&io, 0, sizeof io);
    CHECK_STATUS(status, PC_OK);
    CHECK(a[0] == 1 && a[1] == 2);
    io.fail_read = EIO;
    CHECK_STATUS(weights->read(weights, 0, a, &err), PC_ERR_IO);
    CHECK(err.sys_errno == EIO);
    CHECK_CONTAINS(err.text, in_folder("x"));
    memset(&io, 0, sizeof io);
    pc_safetensors_close(st);
}

static void save_fails(int reason, bool named)
{
    pc_error err;
    pc_tensor_view views[] = {view("other", PC_F32, 1, shape2, 8)};
    pc_test_named_temporaries(named);
    pc_status status = pc_safetensors_save(in_folder("x"), views, 1, NULL, 0, false, &err);
    pc_test_named_temporaries(false);
    memset(&io, 0, sizeof io);
    CHECK_STATUS(status, PC_ERR_IO);
    CHECK_INT(err.sys_errno, reason);
    CHECK_CONTAINS(err.text, in_folder("x"));
    CHECK_INT(entries_in_folder(), 1);
    pc_safetensors *st;
    REQUIRE_STATUS(pc_safetensors_open(in_folder("x"), &st, &err), PC_OK); /* the old file */
    CHECK(pc_safetensors_find(st, "a", 1) != SIZE_MAX);
    pc_safetensors_close(st);
}

TEST(a_failing_system_call_leaves_the_old_file)
{
    pc_error err;
    REQUIRE_STATUS(round_trip(&err), PC_OK);
    for (int named = 0; named < 2; named++) {
        io.fail_write = ENOSPC;
        save_fails(ENOSPC, named);
        io.fail_fsync = EIO;
        save_fails(EIO, named);
        io.fail_rename = EXDEV;
        save_fails(EXDEV, named);
    }
    io.fail_link = EPERM; /* only the file without a name needs it */
    save_fails(EPERM, false);
}

/* With a file that gets its name late, and with one that has a name from the start. */
TEST(atomic_files)
{
    try_atomic_files();
    pc_test_named_temporaries(true);
    try_atomic_files();
    FOR_EACH_ALLOCATION (n) {
        pc_error err;
        pc_status status = round_trip(&err);
        CHECK(status == PC_OK || (pc_test_allocation_failed() && status == PC_ERR_NOMEM));
        CHECK_INT(entries_in_folder(), 1);
    }
    pc_test_named_temporaries(false);
}

int main(void)
{
    strcpy(folder, "/tmp/peftc-test-XXXXXX");
    if (mkdtemp(folder) == NULL)
        return 1;
    RUN(reads_what_the_header_says);
    RUN(slices_outside_the_tensor_are_refused);
    RUN(a_header_of_random_bytes_never_crashes);
    RUN(scanner_stops_at_the_end_of_the_text);
    RUN(numbers);
    RUN(utf8);
    RUN(what_cannot_be_written_is_refused);
    RUN(every_allocation_may_fail);
    RUN(every_allocation_of_a_larger_header_may_fail);
    RUN(short_and_interrupted_calls);
    RUN(a_failing_system_call_leaves_the_old_file);
    RUN(atomic_files);
    unlink(in_folder("x"));
    rmdir(folder);
    return check_done();
}
