/// \file
/// \brief What every rule and every layout is about: a tensor without vectors of its own. Not an interface.
#ifndef BNBP_DETAIL_VIEW_HPP
#define BNBP_DETAIL_VIEW_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "bnbp/kernels.h"
#include "bnbp/tensor.hpp"

// Keeps a function's static variables to the library that it is compiled into. They would otherwise be one for the
// whole process, shared between extensions that were compiled against different versions of this header.
#if defined(__GNUC__)
#define BNBP_OWN __attribute__((visibility("hidden")))
#else
#define BNBP_OWN
#endif

namespace bnbp {
namespace detail {

/// A list with room of its own for as many axes as tensors have; only a longer one asks for memory.
template <typename T> class Short {
public:
    Short() = default;
    Short(const Short&) = delete;
    Short& operator=(const Short&) = delete;

    std::size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    T* begin() { return data_; }
    T* end() { return data_ + size_; }
    const T* begin() const { return data_; }
    const T* end() const { return data_ + size_; }
    T& operator[](std::size_t k) { return data_[k]; }
    const T& operator[](std::size_t k) const { return data_[k]; }
    T& back() { return data_[size_ - 1]; }

    void push_back(T value) {
        if (size_ == capacity_) {
            grow();
        }
        data_[size_++] = value;
    }

private:
    T own_[8];
    T* data_ = own_;
    std::size_t size_ = 0, capacity_ = 8;
    std::vector<T> more_;

    void grow() {
        std::vector<T> more(2 * capacity_);
        std::copy(begin(), end(), more.begin());
        more_.swap(more);
        data_ = more_.data();
        capacity_ = more_.size();
    }
};

/// A tensor whose shape and strides are in somebody else's memory: in a Tensor's vectors, or in what the Python
/// boundary has copied from an array. Making one asks for no memory.
struct View {
    ElementType element_type = ElementType::none;
    bool writable = false;
    std::size_t rank = 0;
    std::size_t stride_count = 0; // that of the axes, or 0: contiguous; a C++ caller may get it wrong
    const std::int64_t* shape = nullptr;
    const std::int64_t* strides = nullptr;
    void* data = nullptr;
    const char* type_name = nullptr; // of a type that is ElementType::other

    View() = default;
    explicit View(const Tensor& tensor)
        : element_type(tensor.element_type), writable(tensor.writable), rank(tensor.shape.size()),
          stride_count(tensor.strides.size()), shape(tensor.shape.data()), strides(tensor.strides.data()),
          data(tensor.data), type_name(tensor.type_name.empty() ? nullptr : tensor.type_name.c_str()) {}

    bool present() const { return element_type != ElementType::none; }
    bool has_strides() const { return stride_count != 0; }
};

inline bool is_half(ElementType type) { return type == ElementType::f16 || type == ElementType::bf16; }

inline std::int64_t item_size(ElementType type) { return is_half(type) ? 2 : type == ElementType::f32 ? 4 : 8; }

inline bnbp_type kernel_type(ElementType type) {
    switch (type) {
    case ElementType::f16:
        return BNBP_F16;
    case ElementType::bf16:
        return BNBP_BF16;
    case ElementType::f64:
        return BNBP_F64;
    default:
        return BNBP_F32;
    }
}

inline bnbp_activation kernel_activation(Activation activation) {
    return activation == Activation::relu ? BNBP_RELU : activation == Activation::relu6 ? BNBP_RELU6 : BNBP_IDENTITY;
}

inline const char* name_of(Activation activation) {
    return activation == Activation::relu ? "relu" : activation == Activation::relu6 ? "relu6" : "none";
}

inline std::string name_of(ElementType type) {
    switch (type) {
    case ElementType::none:
        return "None";
    case ElementType::f16:
        return "float16";
    case ElementType::bf16:
        return "bfloat16";
    case ElementType::f32:
        return "float32";
    case ElementType::f64:
        return "float64";
    case ElementType::other:
        break;
    }
    return "an unknown type";
}

inline std::string name_of(const View& view) { return view.type_name ? view.type_name : name_of(view.element_type); }

/// Whether the elements are real numbers, also of a type that no operator takes: by NumPy's names, int64, >f4 and such.
inline bool is_number(const View& view) {
    const char* name = view.type_name ? view.type_name : "";
    name += *name == '<' || *name == '>';
    return *name == 'f' || *name == 'i' || *name == 'u' || (view.present() && view.element_type != ElementType::other);
}

/// A shape as Python writes it: (), (3,), (4, 3, 2, 2).
inline std::string text_of(const std::int64_t* lengths, std::size_t rank) {
    std::string text = "(";
    for (std::size_t axis = 0; axis < rank; ++axis) {
        text += (axis ? ", " : "") + std::to_string(lengths[axis]);
    }
    return text + (rank == 1 ? ",)" : ")");
}

inline std::string shape_of(const View& view) { return text_of(view.shape, view.rank); }

inline std::int64_t product(const std::int64_t* first, const std::int64_t* last) {
    std::int64_t result = 1;
    for (; first != last; ++first) {
        result *= *first;
    }
    return result;
}

inline bool is_empty(const View& view) {
    return std::find(view.shape, view.shape + view.rank, 0) != view.shape + view.rank;
}

inline bool is_same_shape(const View& a, const View& b) {
    return a.rank == b.rank && std::equal(a.shape, a.shape + a.rank, b.shape);
}

/// The strides of all axes, written out.
inline void strides_of(const View& view, Short<std::int64_t>& strides) {
    for (std::size_t axis = 0; axis < view.rank; ++axis) {
        strides.push_back(view.has_strides() ? view.strides[axis] : 0);
    }
    std::int64_t step = item_size(view.element_type);
    for (std::size_t axis = view.has_strides() ? 0 : view.rank; axis-- > 0; step *= view.shape[axis]) {
        strides[axis] = step;
    }
}

/// Whether the elements lie in C order without gaps; the stride of an axis of length 1 says nothing.
inline bool is_contiguous(const View& view) {
    if (!view.has_strides() || is_empty(view)) {
        return true;
    }
    std::int64_t step = item_size(view.element_type);
    for (std::size_t axis = view.rank; axis-- > 0; step *= view.shape[axis]) {
        if (view.shape[axis] != 1 && view.strides[axis] != step) {
            return false;
        }
    }
    return true;
}

inline bool is_aligned(const View& view) { // sizes are powers of two
    return (reinterpret_cast<std::uintptr_t>(view.data) &
            static_cast<std::uintptr_t>(item_size(view.element_type) - 1)) == 0;
}

/// Whether two tensors of one shape have each element at the same place: an output that is an input, not one that
/// merely overlaps it.
inline bool is_same_memory(const View& a, const View& b) {
    if (a.data != b.data || a.element_type != b.element_type || !is_same_shape(a, b)) {
        return false;
    }
    if (is_contiguous(a) || is_contiguous(b)) {
        return is_contiguous(a) && is_contiguous(b);
    }
    for (std::size_t axis = 0; axis < a.rank; ++axis) {
        if (a.shape[axis] != 1 && a.strides[axis] != b.strides[axis]) {
            return false;
        }
    }
    return true;
}

} // namespace detail
} // namespace bnbp

#endif // BNBP_DETAIL_VIEW_HPP
