/* What the boundary needs of NumPy: what arrays are, the operands of a call, and new arrays for its results.

   An array's fields are read as NumPy's C interface has them, not through the buffer protocol: an exported buffer
   protects an array from nothing but what a reference protects it from too, and takes ten times as long.

   For boundary.pyx alone, after Python.h. */
#ifndef BNBP_ARRAYS_H
#define BNBP_ARRAYS_H

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#include "bnbp/batch_norm.hpp"

#include <atomic>
#include <cstdint>
#include <forward_list>
#include <new>
#include <string>
#include <vector>

static int import_numpy() {
    import_array1(-1);
    return 0;
}

static PyArrayObject* array_at(PyObject* array) { return reinterpret_cast<PyArrayObject*>(array); }

// Whether this is an array itself, not one of a subclass, which can say what it likes of its type and shape.
static int is_array(PyObject* value) { return PyArray_CheckExact(value); }

// The number that NumPy gave to bfloat16 when ml_dtypes was imported, once one has been seen.
static std::atomic<int> bfloat16_number{-1};

static void remember_bfloat16(PyObject* array) {
    const int number = PyArray_DESCR(array_at(array))->type_num;
    if (number >= NPY_USERDEF) // newer kinds of types have no number of their own
        bfloat16_number.store(number, std::memory_order_relaxed);
}

// The element type, or `other` where Python has to be asked.
static bnbp::ElementType known_type(PyObject* array) {
    const PyArray_Descr* const type = PyArray_DESCR(array_at(array));
    if (PyArray_ISNBO(type->byteorder)) {
        switch (type->type_num) {
        case NPY_FLOAT:
            return bnbp::ElementType::f32;
        case NPY_DOUBLE:
            return bnbp::ElementType::f64;
        case NPY_HALF:
            return bnbp::ElementType::f16;
        default:
            if (type->type_num == bfloat16_number.load(std::memory_order_relaxed))
                return bnbp::ElementType::bf16;
        }
    }
    return bnbp::ElementType::other;
}

// The operands of a call: references of its own to the arrays, which other threads may let go of in the meantime; and
// copies of their shapes and strides, which other threads may change.
struct Operands {
    bnbp::detail::View inputs[bnbp::detail::MOST_INPUTS], outputs[bnbp::detail::MOST_OUTPUTS];
    PyObject* results[bnbp::detail::MOST_OUTPUTS] = {}; // as they are in `out`, or new; null if not asked for
    PyObject* arrays[bnbp::detail::MOST_INPUTS] = {};   // of the inputs

    Operands() = default;
    Operands(const Operands&) = delete;
    ~Operands() {
        for (PyObject* array : arrays)
            Py_XDECREF(array);
        for (PyObject* array : results)
            Py_XDECREF(array);
    }

    void hold_input(Py_ssize_t k, PyObject* array) { hold(arrays[k], array); }
    void hold_result(Py_ssize_t k, PyObject* array) { hold(results[k], array); }

    // Describes an array of a known type. These return -1, with an exception, if that cannot be done.
    int describe(bnbp::detail::View& view, PyObject* object, bnbp::ElementType type) {
        PyArrayObject* const array = array_at(object);
        const int flags = PyArray_FLAGS(array);
        view.data = PyArray_DATA(array);
        view.writable = flags & NPY_ARRAY_WRITEABLE;
        if (!(flags & NPY_ARRAY_C_CONTIGUOUS)) {
            view.stride_count = static_cast<std::size_t>(PyArray_NDIM(array));
            view.strides = copy(PyArray_STRIDES(array), view.stride_count);
            if (!view.strides)
                return -1;
        }
        if ((flags & ~KNOWN) != 0 && ask_writable(view, object) < 0)
            return -1;
        return describe_shape(view, array, type);
    }

    // Describes an array of another type, which is refused with this name.
    int describe_other(bnbp::detail::View& view, PyObject* array, const char* type_name) {
        try {
            view.type_name = type_names_.emplace_front(type_name).c_str();
        } catch (const std::bad_alloc&) {
            PyErr_NoMemory();
            return -1;
        }
        return describe_shape(view, array_at(array), bnbp::ElementType::other);
    }

private:
    enum { ROOM = 64, KNOWN = NPY_ARRAY_CARRAY | NPY_ARRAY_F_CONTIGUOUS | NPY_ARRAY_OWNDATA };
    std::int64_t room_[ROOM]; // enough for three tensors of eight axes with strides
    std::size_t used_ = 0;
    std::forward_list<std::vector<std::int64_t>> more_;
    std::forward_list<std::string> type_names_;

    static void hold(PyObject*& place, PyObject* array) {
        Py_XINCREF(array);
        PyObject* const old = place;
        place = array;
        Py_XDECREF(old);
    }

    int describe_shape(bnbp::detail::View& view, PyArrayObject* array, bnbp::ElementType type) {
        view.element_type = type;
        view.rank = static_cast<std::size_t>(PyArray_NDIM(array));
        view.shape = copy(PyArray_DIMS(array), view.rank);
        return view.shape ? 0 : -1;
    }

    // Null, with an exception, if there is no memory for as many.
    const std::int64_t* copy(const npy_intp* numbers, std::size_t count) {
        std::int64_t* place = room_ + used_;
        if (count <= ROOM - used_) {
            used_ += count;
        } else {
            try {
                place = more_.emplace_front(count).data();
            } catch (const std::bad_alloc&) {
                PyErr_NoMemory();
                return nullptr;
            }
        }
        for (std::size_t k = 0; k < count; ++k) // a call of memmove would take longer
            place[k] = numbers[k];
        return place;
    }

    // NumPy has flags that are not public, of arrays that only warn when they are written to. A buffer knows.
    static int ask_writable(bnbp::detail::View& view, PyObject* array) {
        Py_buffer buffer;
        if (PyObject_GetBuffer(array, &buffer, PyBUF_STRIDES) < 0)
            return -1;
        view.writable = !buffer.readonly;
        PyBuffer_Release(&buffer);
        return 0;
    }
};

static Py_ssize_t size_of(PyObject* array) { return PyArray_SIZE(array_at(array)); }
static Py_ssize_t bytes_of(PyObject* array) {
    return PyArray_SIZE(array_at(array)) * static_cast<Py_ssize_t>(PyArray_ITEMSIZE(array_at(array)));
}

// What `numpy.empty_like(array, subok=False)` returns: the shape, the type, and the order of axes in memory.
static PyObject* new_tensor(PyObject* like) { return PyArray_NewLikeArray(array_at(like), NPY_KEEPORDER, nullptr, 0); }

// A vector of one of NumPy's own types, or of that of an array.
static PyObject* new_vector(npy_intp length, bnbp::ElementType type, PyObject* like) {
    PyArray_Descr* descr;
    if (type == bnbp::ElementType::f32 || type == bnbp::ElementType::f64)
        descr = PyArray_DescrFromType(type == bnbp::ElementType::f32 ? NPY_FLOAT : NPY_DOUBLE);
    else {
        descr = PyArray_DESCR(array_at(like));
        Py_INCREF(reinterpret_cast<PyObject*>(descr));
    }
    return PyArray_NewFromDescr(&PyArray_Type, descr, 1, &length, nullptr, nullptr, 0, nullptr);
}

// The named tuple `type` of these results, the items; as `tuple.__new__` makes it, which its own constructor calls.
static PyObject* named_tuple(PyObject* type, PyObject* const* items, Py_ssize_t count) {
    static const newfunc tuple_new = reinterpret_cast<newfunc>(PyType_GetSlot(&PyTuple_Type, Py_tp_new));
    PyObject* const plain = PyTuple_New(count);
    if (!plain)
        return nullptr;
    for (Py_ssize_t k = 0; k < count; ++k) {
        PyObject* const item = items[k] ? items[k] : Py_None;
        Py_INCREF(item);
        PyTuple_SetItem(plain, k, item);
    }
    PyObject* const arguments = PyTuple_Pack(1, plain);
    PyObject* const result = arguments ? tuple_new(reinterpret_cast<PyTypeObject*>(type), arguments, nullptr) : nullptr;
    Py_XDECREF(arguments);
    Py_DECREF(plain);
    return result;
}

#endif /* BNBP_ARRAYS_H */
