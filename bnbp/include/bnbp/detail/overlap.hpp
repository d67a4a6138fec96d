/// \file
/// \brief Where a tensor's bytes lie, and whether two tensors share one. Not an interface.
#ifndef BNBP_DETAIL_OVERLAP_HPP
#define BNBP_DETAIL_OVERLAP_HPP

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "bnbp/detail/view.hpp"

namespace bnbp {
namespace detail {

/// The first byte of a tensor and the one after its last; equal for tensors without elements, and without meaning for
/// memory that has no addresses.
struct Extent {
    std::intptr_t low = 0, high = 0;
    /// Whether the first element and the last are so close that sums of such distances are numbers, too.
    bool has_addresses = true;

    Extent() = default;
    explicit Extent(const View& view)
        : low(reinterpret_cast<std::intptr_t>(view.data)), high(reinterpret_cast<std::intptr_t>(view.data)) {
        if (!view.present()) {
            return;
        }
        // Distances are added up twice: rounded, which cannot overflow, and unsigned, where it may. Close to the limit
        // the answer is that of whole numbers.
        double distance = static_cast<double>(item_size(view.element_type));
        std::uint64_t back = 0, ahead = static_cast<std::uint64_t>(item_size(view.element_type));
        if (!view.has_strides()) {
            for (std::size_t axis = 0; axis < view.rank; ++axis) {
                distance *= static_cast<double>(view.shape[axis]);
                ahead *= static_cast<std::uint64_t>(view.shape[axis]);
            }
        } else if (view.stride_count != view.rank || is_empty(view)) {
            return;
        } else {
            for (std::size_t axis = 0; axis < view.rank; ++axis) {
                const std::int64_t most = view.shape[axis] - 1, stride = view.strides[axis];
                distance += static_cast<double>(most) * std::fabs(static_cast<double>(stride));
                (stride < 0 ? back : ahead) += static_cast<std::uint64_t>(most) * static_cast<std::uint64_t>(stride);
            }
        }
        has_addresses = distance < 0x1p60 || is_empty(view) || is_within_reach(view);
        if (has_addresses) {
            low += static_cast<std::intptr_t>(back);
            high += static_cast<std::intptr_t>(ahead);
        }
    }

    bool meets(const Extent& other) const { return std::max(low, other.low) < std::min(high, other.high); }

private:
    static bool is_within_reach(const View& view) {
        std::int64_t room = std::numeric_limits<std::int64_t>::max() / 4, step = item_size(view.element_type);
        for (std::size_t axis = view.rank; axis-- > 0; step *= view.shape[axis]) {
            const std::int64_t most = view.shape[axis] - 1, stride = view.has_strides() ? view.strides[axis] : step;
            if (most > 0 && (stride > room / most || stride < -(room / most))) {
                return false;
            }
            room -= most * (most > 0 ? std::abs(stride) : 0);
        }
        return true;
    }
};

/// Whether two tensors have a byte in common: whether `sum x_k step_k = target` has a solution with
/// `0 <= x_k <= most_k`, which is a bounded Diophantine equation. What is left of the target is cut off at every
/// step by the largest sum and by the common divisor of the remaining terms, so that the strides of real arrays
/// need a few dozen steps. Past the budget the answer is the cautious one.
class Overlap {
public:
    static bool between(const View& a, const Extent& extent_a, const View& b, const Extent& extent_b) {
        return extent_a.meets(extent_b) && between(a, b);
    }

    /// Whether two elements of one tensor have a byte in common.
    static bool within(const View& view) { return !is_contiguous(view) && has_repeated_bytes(view); }

private:
    static bool has_repeated_bytes(const View& view) {
        Short<Term> axes;
        for (std::size_t axis = 0; axis < view.rank; ++axis) {
            if (view.shape[axis] > 1) {
                axes.push_back({std::abs(view.strides[axis]), view.shape[axis] - 1, 0, 0});
            }
        }
        std::sort(axes.begin(), axes.end(), [](const Term& a, const Term& b) { return a.step < b.step; });
        const std::int64_t size = item_size(view.element_type);
        std::int64_t reach = size;
        bool apart = true; // each step leads past all that the smaller ones reach
        for (const Term& axis : axes) {
            if (axis.step == 0) {
                return true;
            }
            apart = apart && axis.step >= reach;
            reach += axis.step * axis.most;
        }
        // Otherwise: whether any two indices, which differ by 1 or more along axis k, are less than `size` bytes apart.
        for (std::size_t k = 0; !apart && k < axes.size(); ++k) {
            Overlap search;
            std::int64_t target = size - 1 - axes[k].step;
            for (std::size_t j = 0; j < axes.size(); ++j) {
                const std::int64_t most = j == k ? axes[j].most - 1 : 2 * axes[j].most;
                target += j == k ? 0 : axes[j].step * axes[j].most;
                if (most) {
                    search.terms_.push_back({axes[j].step, most, 0, 0});
                }
            }
            search.terms_.push_back({1, 2 * (size - 1), 0, 0});
            if (search.solve(target)) {
                return true;
            }
        }
        return false;
    }

    static bool between(const View& a, const View& b) {
        Overlap search;
        std::int64_t reach_a = 0, reach_b = 0;
        const std::int64_t low_a = search.add(a, reach_a), low_b = search.add(b, reach_b);
        // low_a + (a's offset) = low_b + reach_b - (b's offset, counted down)
        return search.solve(low_b - low_a + reach_b);
    }

    struct Term {
        std::int64_t step, most, reach, divisor; // the last two: of this term and all after it
    };
    std::vector<Term> terms_;
    int budget_ = 100000;

    std::int64_t add(const View& view, std::int64_t& reach) {
        std::int64_t low = static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(view.data));
        Short<std::int64_t> strides;
        strides_of(view, strides);
        for (std::size_t axis = 0; axis < view.rank; ++axis) {
            const std::int64_t most = view.shape[axis] - 1, step = most ? std::abs(strides[axis]) : 0;
            low += std::min<std::int64_t>(strides[axis], 0) * most;
            reach += step * most;
            if (step * most != 0) {
                terms_.push_back({step, most, 0, 0});
            }
        }
        terms_.push_back({1, item_size(view.element_type) - 1, 0, 0});
        reach += terms_.back().most;
        return low;
    }

    bool solve(std::int64_t target) {
        std::sort(terms_.begin(), terms_.end(), [](const Term& a, const Term& b) { return a.step > b.step; });
        std::vector<Term> merged;
        for (const Term& term : terms_) {
            if (!merged.empty() && merged.back().step == term.step) {
                merged.back().most += term.most;
            } else {
                merged.push_back(term);
            }
        }
        terms_ = std::move(merged);
        std::int64_t reach = 0, divisor = 0;
        for (std::size_t k = terms_.size(); k-- > 0;) {
            terms_[k].reach = reach += terms_[k].step * terms_[k].most;
            terms_[k].divisor = divisor = std::gcd(divisor, terms_[k].step);
        }
        return target >= 0 && solve_from(0, target);
    }

    bool solve_from(std::size_t k, std::int64_t target) {
        if (target == 0 || --budget_ < 0) {
            return true;
        }
        if (k == terms_.size() || target > terms_[k].reach || target % terms_[k].divisor != 0) {
            return false;
        }
        const Term& term = terms_[k];
        const std::int64_t rest = term.reach - term.step * term.most;
        const std::int64_t least = target > rest ? (target - rest + term.step - 1) / term.step : 0;
        for (std::int64_t x = std::min(term.most, target / term.step); x >= least; --x) {
            if (solve_from(k + 1, target - x * term.step)) {
                return true;
            }
        }
        return false;
    }
};

} // namespace detail
} // namespace bnbp

#endif // BNBP_DETAIL_OVERLAP_HPP
