#include <Python.h>

#include <bnbp/batch_norm.hpp>
#include <cstdio>
#include <vector>

static int run() {
    if (!bnbp::import_kernels()) { // imports the Python package
        PyErr_Print();
        return 1;
    }
    const std::vector<double> x{1, 2, 3, 6}, dy{1, 0, 0, 1};
    const std::vector<double> gamma{2}, mean{3}, variance{3.5};
    std::vector<double> dx(4), dgamma(1), dbeta(1);
    const bnbp::Shape batch{4, 1}, channels{1};

    const bnbp::op::BatchNormTrainingBackprop gradient(/*epsilon=*/0.5);
    try {
        gradient.evaluate({{dx.data(), batch}, {dgamma.data(), channels}, {dbeta.data(), channels}},
                          {{x.data(), batch},
                           {gamma.data(), channels},
                           {}, // beta: not used
                           {mean.data(), channels},
                           {variance.data(), channels},
                           {dy.data(), batch}});
    } catch (const std::invalid_argument& error) { // TypeError or ValueError
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    std::printf("gamma_delta %g, beta_delta %g\n", dgamma[0], dbeta[0]);
    std::printf("input_delta %g %g %g %g\n", dx[0], dx[1], dx[2], dx[3]);
    return 0;
}

int main() {
    Py_Initialize();
    const int status = run();
    return Py_FinalizeEx() < 0 ? 1 : status;
}
