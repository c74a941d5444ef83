#include "py_torch_shelf.h"

/* So many items before its turn an item is fetched, and then what it leads to. */
#define AHEAD 16
#define AHEAD_FOUND 8

/* With nothing on it. */
static bool make(shelf *s, size_t rows, size_t columns)
{
    size_t count, bytes;
    *s = (shelf){.items = NULL, .rows = rows, .columns = columns};
    if (!__builtin_mul_overflow(rows, columns, &count) && !__builtin_mul_overflow(count, sizeof *s->items, &bytes))
        s->items = PyMem_Calloc(count != 0 ? count : 1, sizeof *s->items);
    if (s->items == NULL) {
        PyErr_NoMemory();
        return false;
    }
    s->count = count;
    return true;
}

bool shelf_of_list(shelf *s, PyObject *list)
{
    const bool good = make(s, (size_t)PyList_GET_SIZE(list), 1);
    for (size_t i = 0; i < s->count; i++)
        s->items[i] = Py_NewRef(PyList_GET_ITEM(list, (Py_ssize_t)i));
    return good;
}

bool shelf_of_shelf(shelf *s, const shelf *other)
{
    const bool good = make(s, other->rows, other->columns);
    for (size_t i = 0; i < s->count; i++)
        s->items[i] = Py_XNewRef(other->items[i]);
    return good;
}

/* The dict's item, a new reference; NULL for None, and without an exception for nothing. */
static PyObject *item_of(PyObject *dict, PyObject *key, torch_place *place)
{
    PyObject *found = torch_item_at(dict, key, place);
    if (found == NULL && (found = PyDict_GetItemWithError(dict, key)) != NULL && !place->known)
        (void)torch_find_place(dict, key, place);
    return found != NULL && found != Py_None ? Py_NewRef(found) : NULL;
}

/* One that is only looked at counts no reference: that would wait for it. */
static void ahead_item(PyObject *dict, PyObject *key, const torch_place *place)
{
    const PyObject *found = dict != NULL ? torch_item_at(dict, key, place) : NULL;
    if (found != NULL)
        ahead_object(found);
}

bool shelf_of_items(shelf *s, const shelf *dicts, PyObject *names)
{
    bool good = make(s, dicts->rows, (size_t)PyTuple_GET_SIZE(names));
    torch_place *places = good ? PyMem_Calloc(s->columns + 1, sizeof *places) : NULL;
    if (good && places == NULL) {
        PyErr_NoMemory();
        good = false;
    }
    for (size_t row = 0; good && row < s->rows; row++) {
        PyObject *dict = dicts->items[row * dicts->columns];
        if (row + AHEAD < s->rows)
            ahead_table(dicts->items[(row + AHEAD) * dicts->columns], 3);
        for (size_t k = 0; good && k < s->columns; k++) {
            PyObject *name = PyTuple_GET_ITEM(names, (Py_ssize_t)k);
            if (row + AHEAD_FOUND < s->rows)
                ahead_item(dicts->items[(row + AHEAD_FOUND) * dicts->columns], name, &places[k]);
            PyObject *found = dict != NULL ? item_of(dict, name, &places[k]) : NULL;
            good = found != NULL || !PyErr_Occurred();
            s->items[row * s->columns + k] = found;
        }
    }
    PyMem_Free(places);
    return good;
}

void shelf_clear(shelf *s)
{
    for (size_t i = 0; i < s->count; i++)
        Py_XDECREF(s->items[i]);
    PyMem_Free(s->items);
    *s = (shelf){.items = NULL};
}

bool shelf_to_dicts(shelf *s)
{
    for (size_t i = 0; i < s->count; i++) {
        if (i + AHEAD < s->count && s->items[i + AHEAD] != NULL)
            ahead_object(s->items[i + AHEAD]);
        if (s->items[i] == NULL)
            continue;
        PyObject *dict = torch_dict_of(s->items[i]);
        if (dict == NULL)
            return false;
        __builtin_prefetch(dict);
        Py_SETREF(s->items[i], dict);
    }
    return true;
}

bool shelf_to_items(shelf *s, PyObject *key)
{
    torch_place place = {.known = false};
    for (size_t i = 0; i < s->count; i++) {
        if (i + AHEAD < s->count)
            ahead_table(s->items[i + AHEAD], 1); /* of small dicts that is nearly all, of large ones little would help */
        if (i + AHEAD_FOUND < s->count)
            ahead_item(s->items[i + AHEAD_FOUND], key, &place);
        if (s->items[i] == NULL)
            continue;
        PyObject *found = item_of(s->items[i], key, &place);
        if (found == NULL && PyErr_Occurred())
            return false;
        Py_SETREF(s->items[i], found);
    }
    return true;
}

void shelf_close_up(shelf *s)
{
    size_t count = 0;
    for (size_t i = 0; i < s->count; i++)
        if (s->items[i] != NULL)
            s->items[count++] = s->items[i];
    s->rows = s->count = count;
    s->columns = 1;
}

void shelf_keep_dicts(shelf *s)
{
    for (size_t i = 0; i < s->count; i++)
        if (s->items[i] != NULL && !PyDict_Check(s->items[i]))
            Py_CLEAR(s->items[i]);
}
