/// \file
/// \brief How the operands of a call are laid out for the kernels. Not an interface.
#ifndef BNBP_DETAIL_LAYOUT_HPP
#define BNBP_DETAIL_LAYOUT_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "bnbp/detail/view.hpp"

namespace bnbp {
namespace detail {

/// Whether the kernels take a vector as it is, or a tensor without strides.
inline bool is_plain(const View& view) { return is_contiguous(view) && is_aligned(view); }

/// A contiguous and aligned copy of a vector that is not plain.
class Packed {
public:
    explicit Packed(const View& vector)
        : vector_(vector), copy_(static_cast<std::size_t>(vector.shape[0] * item_size(vector.element_type))) {}
    void* data() { return copy_.data(); }
    void read() {
        walk([](char* packed, char* strided, std::size_t size) { std::memcpy(packed, strided, size); });
    }
    void write() {
        walk([](char* packed, char* strided, std::size_t size) { std::memcpy(strided, packed, size); });
    }

private:
    const View& vector_;
    std::vector<char> copy_; // of operator new, so aligned for every element type

    template <typename Move> void walk(Move move) {
        const std::int64_t size = item_size(vector_.element_type);
        const std::int64_t step = vector_.has_strides() ? vector_.strides[0] : size;
        for (std::int64_t i = 0; i < vector_.shape[0]; ++i) {
            move(copy_.data() + i * size, static_cast<char*>(vector_.data) + i * step, static_cast<std::size_t>(size));
        }
    }
};

/// The tensors of a call as (n, c, s), in the order of the input's memory: axes from the largest stride to the
/// smallest. Tensors that are dense in that order need no strides. If one is not, all have them, along as few axes as
/// describe them all.
class Layout {
public:
    /// Adds a tensor, the input first, and says where its strides will go.
    void add(const View& tensor, const std::ptrdiff_t* bnbp_arguments::* slot) {
        Operand& operand = operands_[count_++];
        operand.tensor = &tensor;
        operand.slot = slot;
    }

    /// Fills in the arguments, which may point into this object then.
    void describe(std::size_t channel_axis, bnbp_arguments& arguments) {
        const View& input = *operands_[0].tensor;
        arguments.c = static_cast<std::ptrdiff_t>(input.shape[channel_axis]);
        if (is_empty(input)) { // n = s = 0, whatever the other axes' product would overflow to
            return;
        }
        if (std::all_of(begin(), end(), [](const Operand& operand) { return is_plain(*operand.tensor); })) {
            const std::int64_t* const axis = input.shape + channel_axis;
            arguments.n = static_cast<std::ptrdiff_t>(product(input.shape, axis));
            arguments.s = static_cast<std::ptrdiff_t>(product(axis + 1, input.shape + input.rank));
            if (arguments.c == 1) { // as memory_order has it
                arguments.s *= std::exchange(arguments.n, 1);
                if (arguments.exact) { // which wants the samples apart
                    arguments.n = arguments.samples;
                    arguments.s /= arguments.samples;
                }
            }
            return;
        }
        for (Operand& operand : *this) {
            strides_of(*operand.tensor, operand.strides);
        }
        Short<std::size_t> order;
        memory_order(channel_axis, order);
        fold(order, channel_axis, arguments);
        if (!std::all_of(begin(), end(), [&](const Operand& operand) { return is_dense(operand, order); })) {
            lengths_.push_back(arguments.c); // last, and so that there is one
            arguments.lengths = lengths_.begin();
            for (Operand& operand : *this) {
                operand.steps.push_back(static_cast<std::ptrdiff_t>(operand.strides[channel_axis]));
                arguments.*(operand.slot) = operand.steps.begin();
            }
        }
    }

private:
    struct Operand {
        const View* tensor;
        const std::ptrdiff_t* bnbp_arguments::* slot;
        Short<std::int64_t> strides; // of the tensor's own axes
        Short<std::ptrdiff_t> steps; // of the folded axes
    };
    Operand operands_[5]; // an input, two tensors beside it, two outputs
    std::size_t count_ = 0;
    Short<std::ptrdiff_t> lengths_;

    Operand* begin() { return operands_; }
    Operand* end() { return operands_ + count_; }

    /// The axes from the input's largest stride to its smallest. A single channel may stand anywhere: first, so that
    /// all other axes are together.
    void memory_order(std::size_t channel_axis, Short<std::size_t>& order) const {
        const View& input = *operands_[0].tensor;
        const Short<std::int64_t>& strides = operands_[0].strides;
        if (input.shape[channel_axis] == 1) {
            order.push_back(channel_axis);
        }
        const std::size_t first = order.size();
        for (std::size_t axis = 0; axis < input.rank; ++axis) {
            if (input.shape[axis] > 1) { // inserted after those of the same stride
                order.push_back(axis);
                for (std::size_t k = order.size() - 1;
                     k > first && std::abs(strides[order[k - 1]]) < std::abs(strides[order[k]]); --k) {
                    std::swap(order[k - 1], order[k]);
                }
            }
        }
    }

    /// Folds neighbouring axes into one wherever every tensor walks through both in equal steps.
    void fold(const Short<std::size_t>& order, std::size_t channel_axis, bnbp_arguments& arguments) {
        const std::int64_t* const shape = operands_[0].tensor->shape;
        bool after = false, first = true;
        arguments.n = arguments.s = 1;
        for (std::size_t i = 0; i < order.size(); ++i) {
            const std::size_t axis = order[i];
            if (axis == channel_axis) {
                after = first = true;
                continue;
            }
            const auto length = static_cast<std::ptrdiff_t>(shape[axis]);
            (after ? arguments.s : arguments.n) *= length;
            const bool folds = !first && std::all_of(begin(), end(), [&](const Operand& operand) {
                return operand.strides[order[i - 1]] == operand.strides[axis] * shape[axis];
            });
            first = false;
            if (folds) {
                lengths_.back() *= length;
            } else {
                lengths_.push_back(length);
                ++(after ? arguments.after : arguments.before);
            }
            for (Operand& operand : *this) {
                const auto step = static_cast<std::ptrdiff_t>(operand.strides[axis]);
                if (folds) {
                    operand.steps.back() = step;
                } else {
                    operand.steps.push_back(step);
                }
            }
        }
    }

    static bool is_dense(const Operand& operand, const Short<std::size_t>& order) {
        const View& tensor = *operand.tensor;
        std::int64_t step = item_size(tensor.element_type);
        for (std::size_t i = order.size(); i-- > 0; step *= tensor.shape[order[i]]) {
            if (tensor.shape[order[i]] != 1 && operand.strides[order[i]] != step) {
                return false;
            }
        }
        return is_aligned(tensor);
    }
};

} // namespace detail
} // namespace bnbp

#endif // BNBP_DETAIL_LAYOUT_HPP
