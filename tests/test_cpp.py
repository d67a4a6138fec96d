"""C++ callers: a program compiled against the installed header computes a gradient and gets the errors."""

import importlib.util
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext

import bnbp
from bnbp import reference

WARNINGS = [] if sys.platform == "win32" else ["-std=c++17", "-Wall", "-Wextra", "-Wconversion", "-Werror"]


@pytest.fixture(scope="session")
def caller(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpp")
    extension = Extension(
        "caller",
        [str(Path(__file__).parent / "cpp" / "caller.cpp")],
        include_dirs=[bnbp.get_include()],
        extra_compile_args=WARNINGS,
        language="c++",
    )
    build = build_ext(Distribution({"name": "caller", "ext_modules": [extension]}))
    build.build_lib = build.build_temp = str(folder)
    build.ensure_finalized()
    build.run()
    spec = importlib.util.spec_from_file_location("caller", build.get_ext_fullpath("caller"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_evaluate_before_import_kernels_says_so(caller):
    assert caller.before_import() == "bnbp: call bnbp::import_kernels() before evaluate()"


def test_a_gradient_computed_in_cpp_is_that_of_the_reference(caller):
    x, dy, gamma, *got = map(np.array, caller.gradient())
    x, dy = x.reshape(3, 2, 2), dy.reshape(3, 2, 2)
    forward = reference.batch_norm_training(x, gamma, None, 0.5)
    expected = reference.batch_norm_training_backprop(x, gamma, None, *forward[1:], dy, 0.5)
    assert np.ptp(expected.input_delta) > 1
    for result, exact in zip(got, expected, strict=True):
        np.testing.assert_allclose(result, exact.ravel(), rtol=1e-13)


def test_activation_and_addend_are_attributes_and_operands(caller):
    x, dy, gamma, *_ = map(np.array, caller.gradient())
    x, dy = x.reshape(3, 2, 2), dy.reshape(3, 2, 2)
    got = [np.array(values) for values in caller.activated()]
    vectors = gamma, [0.5, 3.0], [2.0, 2.5], [8.0, 4.0]
    y = reference.batch_norm_inference(x, *vectors, 0.5, activation="relu6", addend=dy)
    plain = reference.batch_norm_inference(x, *vectors, 0.5, activation="relu6")
    assert {*np.sign(y.ravel())} == {0.0, 1.0}
    assert (y != plain).any()
    whole = reference.batch_norm_training_backprop(x, *vectors, dy, 0.5, activation="relu6", normalized=y, addend=True)
    apart = reference.batch_norm_training_backprop(x, *vectors, dy, 0.5, activation="relu6")
    sums = [
        np.concatenate(reference.batch_norm_training_backprop_reduce(x, vectors[2], masked))
        for masked in (whole.addend_delta, np.where((plain > 0) & (plain < 6), dy, 0))
    ]
    expected = y, plain, whole.input_delta, whole.gamma_delta, whole.addend_delta, *sums, apart.input_delta
    for result, exact in zip(got, expected, strict=True):
        np.testing.assert_allclose(result, np.ravel(exact), rtol=1e-12, atol=1e-14)


def test_a_gradient_in_parts_is_that_of_the_whole(caller):
    x, *_ = map(np.array, caller.gradient())
    whole, apart, statistics = map(np.array, caller.parts())
    assert np.ptp(whole) > 1
    np.testing.assert_allclose(apart, whole, rtol=1e-13)
    part = x.reshape(3, 2, 2)[1:]
    expected = [part.mean((0, 2)), part.var((0, 2)) * 4]
    np.testing.assert_allclose(statistics, np.concatenate(expected), rtol=1e-13)


def test_sixteen_bits_in_cpp(caller):
    caller.gradient()  # imports the kernels
    float16, bfloat16 = np.array(caller.halves(), np.uint16).reshape(2, 4)
    assert float16.view(np.float16).tolist() == [-1, 0, 1, 2]
    assert bfloat16.view(ml_dtypes.bfloat16).tolist() == [-1, 0, 1, 2]


def test_cpp_gets_the_errors_of_python(caller):
    caller.gradient()  # imports the kernels
    assert caller.errors() == {
        "epsilon": "epsilon: expected a finite number >= 0, got -1",
        "type": "gamma: expected float64, the type of input, got float32",
        "shape": "mean: expected shape (2,) for the 2 channels of input (3, 2, 2), got (1,)",
        "count": "BatchNormInference: expected 5 or 6 inputs, got 4",
        "many": "BatchNormInference: expected 5 or 6 inputs, got 40",
        "many outputs": "BatchNormInference: expected 1 outputs, got 40",
        "outputs": "BatchNormInference: expected 1 outputs, got 2",
        "read-only": "out[0] (normalized): expected memory that can be written to, got read-only memory",
        "null": "out[0] (normalized): expected data, got a null pointer",
        "strides": "input: expected a stride for each of the 3 axes, got 1",
        "broadcast": "out[0] (normalized): expected memory for each element, got elements that overlap each other",
        "endless": "input: expected at most 9223372036854775807 bytes, got shape (1099511627776, 2, 1099511627776)",
        "whole": "count: expected at least 0, got -2",
        "reach": "input: expected memory that has addresses, got shape (3, 2, 2) with strides "
        "(4611686018427387904, 16, 8)",
        "unknown": "input: expected float16, bfloat16, float32 or float64, got an unknown type",
        "no addend": "addend: expected shape (3, 2, 2), that of input, got None",
        "addend": "addend: expected None without the attribute addend, got a tensor",
        "normalized": "normalized: expected the forward operator's output, which the gradient of activation "
        '"relu" with an addend needs, got None',
        "activation": "activation: expected none, relu or relu6, got number 7",
        "none": "0.000000",
        "length": "input: expected lengths >= 0, got shape (-3, 2, 2)",
    }
    x = np.zeros((3, 2, 2))
    with pytest.raises(ValueError, match=r"^mean: expected shape \(2,\) for the 2 channels of input \(3, 2, 2\), got"):
        bnbp.batch_norm_inference(x, None, None, np.zeros(1), np.zeros(2))
