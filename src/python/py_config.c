/* adapter_config.json and the pattern engine, for Python. */
#include "binding.h"

#include "../core/memory.h"
#include "../core/pattern.h"
#include "../formats/adapter_config.h"
#include "../formats/atomic_file.h"
#include "../formats/json_tree.h"
#include "../methods/methods.h"

#define MAX_METHODS 64

/* ----------------------------------------------------------------- patterns */

typedef pc_status (*match_call)(const pc_pattern *, const char *, size_t, bool *, pc_error *);

/* Parse (pattern: str, subject: str); compile. */
static pc_pattern *compile_argument(PyObject *module, PyObject *const *args, Py_ssize_t nargs, const char *name,
                                    const char **subject, Py_ssize_t *len)
{
    if (nargs != 2 || !PyUnicode_Check(args[0]) || !PyUnicode_Check(args[1])) {
        PyErr_Format(PyExc_TypeError, "%s takes two strings: a pattern and a subject", name);
        return NULL;
    }
    Py_ssize_t pattern_len;
    const char *text = PyUnicode_AsUTF8AndSize(args[0], &pattern_len);
    *subject = PyUnicode_AsUTF8AndSize(args[1], len);
    if (text == NULL || *subject == NULL)
        return NULL;
    pc_error err;
    pc_pattern *pattern;
    if (pc_pattern_compile(text, (size_t)pattern_len, &pattern, &err) != PC_OK) {
        peftc_raise(peftc_get_state(module), &err);
        return NULL;
    }
    return pattern;
}

static PyObject *match_with(PyObject *module, PyObject *const *args, Py_ssize_t nargs, const char *name,
                            match_call call)
{
    const char *subject;
    Py_ssize_t len;
    pc_pattern *pattern = compile_argument(module, args, nargs, name, &subject, &len);
    if (pattern == NULL)
        return NULL;
    pc_error err;
    bool matched = false;
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    status = call(pattern, subject, (size_t)len, &matched, &err);
    pc_pattern_free(pattern);
    Py_END_ALLOW_THREADS
    if (status != PC_OK)
        return peftc_raise(peftc_get_state(module), &err);
    return PyBool_FromLong(matched);
}

PyDoc_STRVAR(pattern_fullmatch_doc,
             "pattern_fullmatch(pattern, subject, /)\n--\n\n"
             "Whether re.fullmatch(pattern, subject) matches, by peftc's own engine with bounded work.\n\n"
             "Raises ValueError when pattern is not a regular expression, or the work exceeds its bound.");

static PyObject *pattern_fullmatch(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return match_with(module, args, nargs, "pattern_fullmatch", pc_pattern_fullmatch);
}

PyDoc_STRVAR(pattern_match_suffix_doc,
             "pattern_match_suffix(pattern, subject, /)\n--\n\n"
             "Whether re.match(rf'(.*\\.)?({pattern})$', subject) matches: the rule of rank_pattern.");

static PyObject *pattern_match_suffix(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return match_with(module, args, nargs, "pattern_match_suffix", pc_pattern_match_suffix);
}

PyDoc_STRVAR(pattern_search_doc,
             "pattern_search(pattern, subject, /)\n--\n\n"
             "re.search: None without a match, else a tuple of group 1 (a str, or None when it took no part).");

static PyObject *pattern_search(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const char *subject, *group;
    Py_ssize_t len;
    size_t group_len;
    pc_pattern *pattern = compile_argument(module, args, nargs, "pattern_search", &subject, &len);
    if (pattern == NULL)
        return NULL;
    pc_error err;
    bool matched = false;
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    status = pc_pattern_search(pattern, subject, (size_t)len, &matched, &group, &group_len, &err);
    pc_pattern_free(pattern);
    Py_END_ALLOW_THREADS
    if (status != PC_OK)
        return peftc_raise(peftc_get_state(module), &err);
    if (!matched)
        Py_RETURN_NONE;
    return group == NULL ? Py_BuildValue("(O)", Py_None) : Py_BuildValue("(s#)", group, (Py_ssize_t)group_len);
}

/* ------------------------------------------------------------------ configs */

static PyObject *to_object(const pc_json_value *value);

static PyObject *decode_text(const pc_json_value *value, int name)
{
    pc_pool pool;
    pc_pool_init(&pool);
    const char *text;
    size_t len;
    PyObject *str = NULL;
    if (pc_json_decode(value, name, &pool, &text, &len))
        str = PyUnicode_DecodeUTF8(text, (Py_ssize_t)len, "surrogatepass");
    else
        PyErr_NoMemory();
    pc_pool_free(&pool);
    return str;
}

static PyObject *to_number(const pc_json_value *value)
{
    if (pc_json_is_integer(value))
        return PyLong_FromString(pc_json_number(value), NULL, 10);
    pc_error err;
    double number;
    if (pc_json_double(value, &number, &err) != PC_OK)
        return PyErr_NoMemory();
    return PyFloat_FromDouble(number);
}

static PyObject *to_list(const pc_json_value *array)
{
    PyObject *list = PyList_New(0);
    for (const pc_json_value *item = pc_json_first(array); item != NULL && list != NULL; item = pc_json_next(item)) {
        PyObject *object = to_object(item);
        if (object == NULL || PyList_Append(list, object) < 0)
            Py_CLEAR(list);
        Py_XDECREF(object);
    }
    return list;
}

static PyObject *to_dict(const pc_json_value *parent)
{
    PyObject *dict = PyDict_New();
    for (const pc_json_value *item = pc_json_first(parent); item != NULL && dict != NULL; item = pc_json_next(item)) {
        PyObject *key = decode_text(item, 1);
        PyObject *object = key != NULL ? to_object(item) : NULL;
        if (object == NULL || PyDict_SetItem(dict, key, object) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(key);
        Py_XDECREF(object);
    }
    return dict;
}

/* What json.loads gives. Recursion is as deep as the text, which PC_JSON_DEPTH bounds. */
static PyObject *to_object(const pc_json_value *value)
{
    switch (pc_json_kind_of(value)) {
    case PC_JSON_BOOL:
        return PyBool_FromLong(pc_json_bool(value));
    case PC_JSON_NUMBER:
        return to_number(value);
    case PC_JSON_STRING:
        return decode_text(value, 0);
    case PC_JSON_ARRAY:
        return to_list(value);
    case PC_JSON_OBJECT:
        return to_dict(value);
    case PC_JSON_NULL:
        break;
    }
    Py_RETURN_NONE;
}

/* (text, label="config") of a function. */
static int text_and_label(PyObject *args, PyObject *kwargs, const char *format, const char **text, Py_ssize_t *len,
                          const char **label)
{
    static char *names[] = {"text", "label", NULL};
    *label = "config";
    return PyArg_ParseTupleAndKeywords(args, kwargs, format, names, text, len, label);
}

PyDoc_STRVAR(json_loads_doc,
             "json_loads(text, label='config')\n--\n\n"
             "What json.loads gives for the same text (str or bytes), under peftc's limits: 16 MiB, a million values, "
             "500 levels.\n\n"
             "Raises ValueError that names label, line and column.");

static PyObject *json_loads(PyObject *module, PyObject *args, PyObject *kwargs)
{
    const char *text, *label;
    Py_ssize_t len;
    if (!text_and_label(args, kwargs, "s#|s:json_loads", &text, &len, &label))
        return NULL;
    pc_error err;
    pc_json_value *root;
    if (pc_json_parse(text, (size_t)len, label, &root, &err) != PC_OK)
        return peftc_raise(peftc_get_state(module), &err);
    PyObject *object = to_object(root);
    pc_json_free(root);
    return object;
}

PyDoc_STRVAR(json_canonical_doc,
             "json_canonical(text, label='config')\n--\n\n"
             "json.dumps(json.loads(text), indent=2, sort_keys=True): how PEFT writes adapter_config.json.");

static PyObject *json_canonical(PyObject *module, PyObject *args, PyObject *kwargs)
{
    const char *text, *label;
    Py_ssize_t len;
    if (!text_and_label(args, kwargs, "s#|s:json_canonical", &text, &len, &label))
        return NULL;
    pc_error err;
    char *out;
    size_t out_len;
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    status = pc_json_canonical(text, (size_t)len, label, &out, &out_len, &err);
    Py_END_ALLOW_THREADS
    if (status != PC_OK)
        return peftc_raise(peftc_get_state(module), &err);
    PyObject *str = PyUnicode_DecodeASCII(out, (Py_ssize_t)out_len, NULL);
    pc_free(out);
    return str;
}

pc_status peftc_parse_config(const char *text, Py_ssize_t len, const char *label, pc_config **out, pc_error *err)
{
    const pc_schema *schemas[MAX_METHODS];
    size_t count = pc_method_count < MAX_METHODS ? pc_method_count : MAX_METHODS;
    for (size_t i = 0; i < count; i++)
        schemas[i] = &pc_methods[i]->schema;
    return pc_config_parse(text, (size_t)len, label, schemas, count, out, err);
}

PyDoc_STRVAR(config_check_doc,
             "config_check(text, label='config')\n--\n\n"
             "Check an adapter config in JSON as strictly as the core does before it makes an adapter of it.\n\n"
             "Returns the names of its fields that neither PEFT 0.17.1 nor peftc knows, in the text's order.\n"
             "Raises ValueError, TypeError, KeyError or NotImplementedError that names label, field and value.");

static PyObject *config_check(PyObject *module, PyObject *args, PyObject *kwargs)
{
    const char *text, *label;
    Py_ssize_t len;
    if (!text_and_label(args, kwargs, "s#|s:config_check", &text, &len, &label))
        return NULL;
    pc_error err;
    pc_config *config;
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    status = peftc_parse_config(text, len, label, &config, &err);
    Py_END_ALLOW_THREADS
    if (status != PC_OK)
        return peftc_raise(peftc_get_state(module), &err);
    PyObject *unknown = PyList_New(0);
    for (size_t i = 0; i < config->unknown.count && unknown != NULL; i++) {
        PyObject *name = PyUnicode_FromString(config->unknown.items[i].text);
        if (name == NULL || PyList_Append(unknown, name) < 0)
            Py_CLEAR(unknown);
        Py_XDECREF(name);
    }
    pc_config_free(config);
    return unknown;
}

PyDoc_STRVAR(config_read_doc, "config_read(path, /)\n--\n\n"
                              "The bytes of a small text file (at most 16 MiB) such as adapter_config.json.\n\n"
                              "Raises OSError when it cannot be read, ValueError when it is larger or no file.");

static PyObject *config_read(PyObject *module, PyObject *path)
{
    PyObject *encoded;
    if (!PyUnicode_FSConverter(path, &encoded))
        return NULL;
    pc_error err;
    char *text;
    size_t len;
    pc_status status;
    const char *name = PyBytes_AS_STRING(encoded);
    Py_BEGIN_ALLOW_THREADS
    status = pc_read_text_file(name, PC_JSON_BYTES, &text, &len, &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(encoded);
    if (status != PC_OK)
        return peftc_raise(peftc_get_state(module), &err);
    PyObject *bytes = PyBytes_FromStringAndSize(text, (Py_ssize_t)len);
    pc_free(text);
    return bytes;
}

PyDoc_STRVAR(config_write_doc, "config_write(path, text, /)\n--\n\n"
                               "Write a text file atomically: a failure or a kill leaves an older file as it was.");

static PyObject *config_write(PyObject *module, PyObject *args)
{
    PyObject *encoded;
    const char *text;
    Py_ssize_t len;
    if (!PyArg_ParseTuple(args, "O&s#:config_write", PyUnicode_FSConverter, &encoded, &text, &len))
        return NULL;
    pc_error err;
    pc_status status;
    pc_atomic_file file;
    const char *name = PyBytes_AS_STRING(encoded);
    Py_BEGIN_ALLOW_THREADS
    status = pc_atomic_open(name, &file, &err);
    if (status == PC_OK) {
        status = pc_atomic_write(&file, text, (size_t)len, &err);
        if (status == PC_OK)
            status = pc_atomic_commit(&file, &err);
        else
            pc_atomic_abort(&file);
    }
    Py_END_ALLOW_THREADS
    Py_DECREF(encoded);
    if (status != PC_OK)
        return peftc_raise(peftc_get_state(module), &err);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"json_loads", (PyCFunction)(void (*)(void))json_loads, METH_VARARGS | METH_KEYWORDS, json_loads_doc},
    {"json_canonical", (PyCFunction)(void (*)(void))json_canonical, METH_VARARGS | METH_KEYWORDS, json_canonical_doc},
    {"config_check", (PyCFunction)(void (*)(void))config_check, METH_VARARGS | METH_KEYWORDS, config_check_doc},
    {"config_read", config_read, METH_O, config_read_doc},
    {"config_write", config_write, METH_VARARGS, config_write_doc},
    {"pattern_fullmatch", (PyCFunction)(void (*)(void))pattern_fullmatch, METH_FASTCALL, pattern_fullmatch_doc},
    {"pattern_match_suffix", (PyCFunction)(void (*)(void))pattern_match_suffix, METH_FASTCALL,
     pattern_match_suffix_doc},
    {"pattern_search", (PyCFunction)(void (*)(void))pattern_search, METH_FASTCALL, pattern_search_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_config(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
