/* Many objects that are looked into together, one step at a time for all of them: what one look-up needs is fetched while
 * those before it are done (py_torch_dicts.h). */
#ifndef PEFTC_PYTHON_PY_TORCH_SHELF_H
#define PEFTC_PYTHON_PY_TORCH_SHELF_H

#include "py_torch_dicts.h"

/* Rows of `columns` objects; strong references, NULL where there is none. */
typedef struct shelf {
    PyObject **items;
    size_t rows, columns, count; /* count: rows × columns */
} shelf;

/* Those that make a shelf return false with an exception, and then too it can be cleared. */

/* One column: what is in a list. */
bool shelf_of_list(shelf *s, PyObject *list);

/* What is on the other. */
bool shelf_of_shelf(shelf *s, const shelf *other);

/* For each row, whose first item is a dict or NULL, its items with the names in a tuple. */
bool shelf_of_items(shelf *s, const shelf *dicts, PyObject *names);

/* One column of what is there. */
void shelf_close_up(shelf *s);

void shelf_clear(shelf *s);

/* Each object → its __dict__ (a dict: itself). False with TypeError for one without. */
bool shelf_to_dicts(shelf *s);

/* Each dict → its item called `key`; nothing for None. */
bool shelf_to_items(shelf *s, PyObject *key);

/* What is no dict → nothing. */
void shelf_keep_dicts(shelf *s);

/* Each object → the dict called `key` in its __dict__. */
static inline bool shelf_step_into(shelf *s, PyObject *key)
{
    const bool good = shelf_to_dicts(s) && shelf_to_items(s, key);
    if (good)
        shelf_keep_dicts(s);
    return good;
}

#endif
