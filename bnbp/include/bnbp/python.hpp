/// \file
/// \brief What an extension module needs besides the operators. Include `Python.h` before this header.
#ifndef BNBP_PYTHON_HPP
#define BNBP_PYTHON_HPP

#include <exception>
#include <new>

#include "bnbp/detail/call.hpp"

namespace bnbp {

/// \brief Sets the Python exception that means what the C++ exception in flight means. Needs the GIL.
///
/// Call it in a `catch (...)` block, and return null to Python after it. TypeError, ValueError and `std::bad_alloc`
/// become `TypeError`, `ValueError` and `MemoryError`; everything else becomes `RuntimeError`. The text stays the same,
/// but for numbers of another type than is expected: there it also says how to convert them.
inline void set_python_error() {
    try {
        throw;
    } catch (const detail::WrongNumberType& error) {
        PyErr_Format(PyExc_TypeError, "%s; use .astype(%s.%s)", error.what(),
                     error.expected == ElementType::bf16 ? "ml_dtypes" : "np", detail::name_of(error.expected).c_str());
    } catch (const TypeError& error) {
        PyErr_SetString(PyExc_TypeError, error.what());
    } catch (const ValueError& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const Interrupted& error) { // the signal's handler has raised its exception
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_RuntimeError, error.what());
        }
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (...) {
        PyErr_SetString(PyExc_RuntimeError, "an unknown C++ exception");
    }
}

} // namespace bnbp

#endif // BNBP_PYTHON_HPP
