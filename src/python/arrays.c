#include "arrays.h"

/* ml_dtypes registers these as user types; they are recognised by name so that
 * the package need not be imported for models that have none of them. */
static const struct {
    pc_dtype dtype;
    const char *name;
} extension_types[] = {
    {PC_BF16, "bfloat16"},         {PC_F8_E5M2, "float8_e5m2"},         {PC_F8_E4M3, "float8_e4m3fn"},
    {PC_F8_E8M0, "float8_e8m0fnu"}, {PC_F8_E4M3FNUZ, "float8_e4m3fnuz"}, {PC_F8_E5M2FNUZ, "float8_e5m2fnuz"},
};
#define EXTENSION_TYPES (sizeof extension_types / sizeof extension_types[0])

static const struct {
    pc_dtype dtype;
    int typenum;
    const char *name;
} builtin_types[] = {
    {PC_F32, NPY_FLOAT32, "float32"}, {PC_F64, NPY_FLOAT64, "float64"},   {PC_F16, NPY_FLOAT16, "float16"},
    {PC_I64, NPY_INT64, "int64"},     {PC_I32, NPY_INT32, "int32"},       {PC_I16, NPY_INT16, "int16"},
    {PC_I8, NPY_INT8, "int8"},        {PC_U64, NPY_UINT64, "uint64"},     {PC_U32, NPY_UINT32, "uint32"},
    {PC_U16, NPY_UINT16, "uint16"},   {PC_U8, NPY_UINT8, "uint8"},        {PC_BOOL, NPY_BOOL, "bool"},
    {PC_C64, NPY_COMPLEX64, "complex64"},
};
#define BUILTIN_TYPES (sizeof builtin_types / sizeof builtin_types[0])

pc_dtype peftc_dtype_of(PyArray_Descr *descr)
{
    if (descr->type_num < 0 || PyArray_ISNBO(descr->byteorder) == 0) /* < 0: a dtype that is not NumPy's own */
        return PC_DTYPE_NONE;
    for (size_t i = 0; i < BUILTIN_TYPES; i++)
        if (PyArray_EquivTypenums(descr->type_num, builtin_types[i].typenum))
            return builtin_types[i].dtype;
    if (PyTypeNum_ISUSERDEF(descr->type_num)) {
        const char *full = descr->typeobj->tp_name;
        const char *dot = strrchr(full, '.');
        const char *name = dot != NULL ? dot + 1 : full;
        for (size_t i = 0; i < EXTENSION_TYPES; i++)
            if (strcmp(name, extension_types[i].name) == 0)
                return extension_types[i].dtype;
    }
    return PC_DTYPE_NONE;
}

PyArrayObject *peftc_native_array(PyObject *obj, int flags)
{
    PyArrayObject *array = (PyArrayObject *)PyArray_FROM_OF(obj, flags);
    /* NPY_ARRAY_NOTSWAPPED only where it is needed: NumPy 2.4 crashes when it is asked for with a dtype not its own. */
    if (array == NULL || PyArray_TYPE(array) < 0 || PyArray_ISNOTSWAPPED(array))
        return array;
    PyArrayObject *native = (PyArrayObject *)PyArray_FROM_OF((PyObject *)array, flags | NPY_ARRAY_NOTSWAPPED);
    Py_DECREF(array);
    return native;
}

PyArray_Descr *peftc_descr_of(peftc_state *state, pc_dtype dtype)
{
    (void)state;
    for (size_t i = 0; i < BUILTIN_TYPES; i++)
        if (builtin_types[i].dtype == dtype)
            return PyArray_DescrFromType(builtin_types[i].typenum);
    for (size_t i = 0; i < EXTENSION_TYPES; i++) {
        if (extension_types[i].dtype != dtype)
            continue;
        PyObject *module = PyImport_ImportModule("ml_dtypes");
        if (module == NULL) {
            if (PyErr_ExceptionMatches(PyExc_ImportError)) {
                PyErr_Clear();
                PyErr_Format(PyExc_TypeError,
                             "NumPy has no type for %s; install ml_dtypes to get such tensors as arrays "
                             "(pip install ml_dtypes)",
                             pc_dtype_get(dtype)->name);
            }
            return NULL;
        }
        PyObject *scalar = PyObject_GetAttrString(module, extension_types[i].name);
        Py_DECREF(module);
        if (scalar == NULL)
            return NULL;
        PyArray_Descr *descr = NULL;
        int ok = PyArray_DescrConverter(scalar, &descr);
        Py_DECREF(scalar);
        return ok == NPY_SUCCEED ? descr : NULL;
    }
    PyErr_Format(PyExc_TypeError, "NumPy has no type for %s", pc_dtype_get(dtype)->name);
    return NULL;
}

PyObject *peftc_array_over(peftc_state *state, pc_dtype dtype, int ndim, const npy_intp *shape, void *data,
                           PyObject *owner, int writeable)
{
    PyArray_Descr *descr = peftc_descr_of(state, dtype);
    if (descr == NULL)
        return NULL;
    PyObject *array = PyArray_NewFromDescr(&PyArray_Type, descr, ndim, shape, NULL, data,
                                           writeable ? NPY_ARRAY_CARRAY : NPY_ARRAY_CARRAY_RO, NULL);
    if (array == NULL)
        return NULL;
    if (PyArray_SetBaseObject((PyArrayObject *)array, Py_NewRef(owner)) < 0) {
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

pc_dtype peftc_dtype_from_object(PyObject *obj)
{
    if (PyUnicode_Check(obj)) {
        Py_ssize_t len;
        const char *name = PyUnicode_AsUTF8AndSize(obj, &len);
        if (name == NULL)
            return PC_DTYPE_NONE;
        pc_dtype dtype = pc_dtype_from_name(name, (size_t)len);
        for (size_t i = 0; dtype == PC_DTYPE_NONE && i < BUILTIN_TYPES; i++)
            if (strcmp(name, builtin_types[i].name) == 0)
                dtype = builtin_types[i].dtype;
        for (size_t i = 0; dtype == PC_DTYPE_NONE && i < EXTENSION_TYPES; i++)
            if (strcmp(name, extension_types[i].name) == 0)
                dtype = extension_types[i].dtype;
        if (dtype == PC_DTYPE_NONE)
            PyErr_Format(PyExc_TypeError, "unknown dtype %R", obj);
        return dtype;
    }
    PyArray_Descr *descr = NULL;
    if (PyArray_DescrConverter(obj, &descr) != NPY_SUCCEED)
        return PC_DTYPE_NONE;
    pc_dtype dtype = peftc_dtype_of(descr);
    Py_DECREF(descr);
    if (dtype == PC_DTYPE_NONE)
        PyErr_Format(PyExc_TypeError, "peftc has no equivalent of dtype %R", obj);
    return dtype;
}
