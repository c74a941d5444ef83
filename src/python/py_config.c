/* adapter_config.json and the pattern engine, for Python. */
#include "binding.h"

#include "../core/memory.h"
#include "../core/pattern.h"

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

static PyMethodDef functions[] = {
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
