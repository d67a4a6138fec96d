// Rubbish in, for C++ callers: random tensors with random strides, lengths, types and null pointers. A call throws a
// TypeError or a ValueError that names an argument and leaves the memory as it was, or it computes; the sanitisers
// watch.
#include <Python.h>

#include <bnbp/batch_norm.hpp>

#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

namespace {

using bnbp::ElementType;
using bnbp::Tensor;

constexpr std::int64_t MOST = std::numeric_limits<std::int64_t>::max();

class Call {
public:
    explicit Call(std::uint64_t seed) : random_(seed) {}

    // Whether it computed; a text if something happened that must not.
    std::string run(bool& computed) {
        using namespace bnbp::op;
        shape_ = {1 + below(4), 1 + below(3)};
        for (std::int64_t more = below(3); more > 0; --more) {
            shape_.push_back(below(5));
        }
        type_ = static_cast<ElementType>(1 + below(4));
        if (one_in(10)) {
            shape_[static_cast<std::size_t>(below(static_cast<std::int64_t>(shape_.size())))] = integer();
        }
        const std::int64_t axis = one_in(8) ? integer() : 1;
        const double epsilon = one_in(10) ? -1 : 0.5;
        const std::int64_t count = one_in(3) ? integer() : 1000;
        const auto activation = static_cast<bnbp::Activation>(below(3));
        const bool addend = one_in(2);
        int inputs = 0, outputs = 3;
        try {
            std::unique_ptr<BatchNormBase> op;
            const std::int64_t which = below(7);
            std::vector<int> roles; // 0 a tensor, 1 a vector, 2 a sum
            switch (which) {
            case 0:
                op = std::make_unique<BatchNormTraining>(epsilon, axis), roles = {0, 1, 1, 0, 0, 1, 1}, inputs = 4;
                break;
            case 1:
                op = std::make_unique<BatchNormTrainingBackprop>(epsilon, axis);
                roles = {0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0}, inputs = 7, outputs = 3 + addend;
                break;
            case 2:
                op = std::make_unique<BatchNormTrainingStatistics>(axis);
                roles = {0, 2, 2}, inputs = 1, outputs = 2;
                break;
            case 3:
                op = std::make_unique<BatchNormTrainingBackpropReduce>(axis);
                roles = {0, 1, 0, 1, 1, 1, 0, 2, 2}, inputs = 7, outputs = 2;
                break;
            case 4:
                op = std::make_unique<BatchNormTrainingBackpropApply>(count, epsilon, axis);
                roles = {0, 1, 1, 1, 1, 0, 2, 2, 0, 0, 1, 1, 0}, inputs = 9, outputs = 3 + addend;
                break;
            case 5:
                op = std::make_unique<BatchNormInference>(epsilon, axis);
                roles = {0, 1, 1, 1, 1, 0, 0}, inputs = 6, outputs = 1;
                break;
            default:
                op = std::make_unique<BatchNormInferenceBackprop>(epsilon, axis);
                roles = {0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0}, inputs = 7, outputs = 3 + addend;
            }
            if (auto* activated = dynamic_cast<BatchNormActivated*>(op.get())) {
                activated->set_activation(activation);
                activated->set_addend(addend);
            }
            std::vector<Tensor> in, out;
            for (int k = 0; k < inputs + outputs; ++k) {
                (k < inputs ? in : out).push_back(tensor(roles[static_cast<std::size_t>(k)]));
            }
            if ((which == 0 || which == 5) && addend == one_in(20)) { // without an addend there is none to be given
                in.back() = {};
            }
            if (one_in(4)) {
                Tensor& place = out[one_in(3) ? out.size() - 1 : 0];
                place = in[one_in(2) ? 0 : in.size() - 1];
                place.writable = !one_in(4);
            }
            if (one_in(which == 2 ? 30 : 6)) { // most operators have inputs at the end that may be left out
                in.pop_back();
            }
            if (one_in(30)) {
                out.push_back({});
            }
            if (huge_) { // nobody has that memory: it must be refused, at the latest for the last output
                out.back() = Tensor(ElementType::f32, {1});
                out.back().writable = false;
            }
            before_.clear();
            for (const auto& block : blocks_) {
                before_.push_back(*block);
            }
            if (one_in(2)) {
                op->validate_and_infer_types(in);
            }
            op->evaluate(out, in, one_in(20) ? static_cast<int>(below(7)) - 3 : static_cast<int>(below(4)));
            computed = true;
            return "";
        } catch (const std::invalid_argument& error) { // the base of both; bnbp throws it for nothing else
            const std::string text = error.what(), name = text.substr(0, text.find(": "));
            const char* letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_[]() 0123456789";
            if (name.size() > 40 || name.find_first_not_of(letters) != std::string::npos) {
                return "names no argument: " + text;
            }
            for (std::size_t k = 0; k < before_.size(); ++k) {
                if (*blocks_[k] != before_[k]) {
                    return std::string("wrote, and then threw ") + error.what();
                }
            }
            return "";
        } catch (const std::bad_alloc&) { // a workspace for 2^31 channels
            return "";
        } catch (const std::exception& error) {
            return std::string("threw something else: ") + error.what();
        }
    }

private:
    std::mt19937_64 random_;
    bnbp::Shape shape_;
    ElementType type_ = ElementType::f32;
    std::vector<std::unique_ptr<std::vector<char>>> blocks_;
    std::vector<std::vector<char>> before_;

    std::int64_t below(std::int64_t end) {
        return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(end));
    }
    bool one_in(std::int64_t n) { return below(n) == 0; }
    std::int64_t integer() {
        const std::int64_t some[] = {
            0, 1, -1, 2, -2, 3, 7, -7, std::int64_t{1} << 31, std::int64_t{1} << 40, MOST, -MOST, -MOST - 1};
        return some[below(13)];
    }

    // Whether the elements fit into `room` bytes from `low` on: what is not so would be the caller's fault.
    static bool extent(const bnbp::Shape& shape, const bnbp::Strides& strides, std::int64_t size, std::int64_t& low,
                       std::int64_t& high) {
        low = 0, high = size;
        for (std::size_t axis = 0; axis < shape.size(); ++axis) {
            if (shape[axis] <= 0) {
                high = low = 0;
                return true;
            }
            const __int128 reach = static_cast<__int128>(strides[axis]) * (shape[axis] - 1);
            if (reach > 4096 || reach < -4096) {
                return false;
            }
            (reach < 0 ? low : high) += static_cast<std::int64_t>(reach);
        }
        return true;
    }

    Tensor tensor(int role) {
        if (one_in(role == 1 ? 6 : 60)) {
            return {};
        }
        bnbp::Shape shape = role ? bnbp::Shape{shape_[1]} : shape_;
        ElementType type = role == 2 ? ElementType::f64 : type_;
        if (one_in(60)) {
            shape = {integer(), integer(), 1};
        }
        if (one_in(60)) {
            type = static_cast<ElementType>(below(9) - 1);
        }
        const std::int64_t size = type == ElementType::f64 ? 8 : type == ElementType::f32 ? 4 : 2;
        Tensor tensor(type, shape);
        tensor.writable = !one_in(40);
        bnbp::Strides strides(shape.size());
        std::int64_t step = size;
        bool sane = true;
        for (std::size_t axis = shape.size(); axis-- > 0;) {
            strides[axis] = one_in(10) ? -step : one_in(15) ? integer() : step;
            sane = sane && step < 4096 && shape[axis] < 4096;
            step = sane ? step * std::max<std::int64_t>(shape[axis], 1) : step;
            if (one_in(12)) {
                step += size;
            }
        }
        const bool explicit_strides = one_in(2);
        if (!explicit_strides) {
            step = size;
            for (std::size_t axis = shape.size(); axis-- > 0;) {
                strides[axis] = step;
                step = shape[axis] < 4096 && step < 4096 ? step * std::max<std::int64_t>(shape[axis], 1) : 4096;
            }
        }
        std::int64_t low, high;
        const bool fits = extent(shape, strides, size, low, high);
        std::size_t lead = one_in(5) ? static_cast<std::size_t>(below(9)) : 0;
        if (!fits || one_in(80)) {
            tensor.data = fits ? nullptr : reinterpret_cast<void*>(std::uintptr_t{1} << 40);
            huge_ = huge_ || !fits;
        } else {
            blocks_.push_back(std::make_unique<std::vector<char>>(lead + static_cast<std::size_t>(high - low)));
            for (char& byte : *blocks_.back()) {
                byte = static_cast<char>(below(128));
            }
            tensor.data = blocks_.back()->data() + lead - low;
        }
        if (explicit_strides) {
            tensor.strides = strides;
            if (one_in(40)) {
                tensor.strides.push_back(8);
            }
        }
        return tensor;
    }

    bool huge_ = false;
};

PyObject* fuzz(PyObject*, PyObject* args) {
    unsigned long long seed;
    long long calls;
    if (!PyArg_ParseTuple(args, "KL", &seed, &calls) || !bnbp::import_kernels()) {
        return nullptr;
    }
    long long computed = 0;
    for (long long k = 0; k < calls; ++k) {
        Call call(seed * 1000003ULL + static_cast<unsigned long long>(k));
        bool done = false;
        const std::string finding = call.run(done);
        computed += done;
        if (!finding.empty()) {
            return PyErr_Format(PyExc_AssertionError, "C++ call %lld of seed %llu %s", k, seed, finding.c_str());
        }
    }
    return PyLong_FromLongLong(computed);
}

PyMethodDef methods[] = {{"fuzz", fuzz, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "fuzz_cpp", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit_fuzz_cpp() { return PyModule_Create(&module); }
