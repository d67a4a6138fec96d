"""The operators in JAX: the bits of the NumPy functions, their checks, and XLA's interface beneath."""

import ctypes
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DTYPES, LAYOUTS, MIXED, make_batch, python

import bnbp
import bnbp.jax
from bnbp.jax import handlers

pytestmark = pytest.mark.jax


@pytest.fixture(autouse=True)
def _x64():
    """Float64 arrays, without which JAX makes them float32."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def assert_same(results, expected):
    assert type(results) is type(expected)
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(result).view(np.uint8), np.ascontiguousarray(value).view(np.uint8))


CASES = [(*layout, np.float32, np.float32) for layout in LAYOUTS] + [((3, 4, 5, 6), -2, *types) for types in MIXED]


@pytest.mark.parametrize(("shape", "axis", "dtype", "parameters"), CASES)
def test_bits_are_those_of_numpy(shape, axis, dtype, parameters):
    x, gamma, beta, mean, variance, delta = make_batch(shape, axis, dtype, parameters=parameters)
    training = bnbp.batch_norm_training(x, gamma, beta, 1e-3, channel_axis=axis)
    assert_same(bnbp.jax.batch_norm_training(x, gamma, beta, 1e-3, channel_axis=axis), training)
    statistics = x, gamma, beta, mean, variance
    for name in ("batch_norm_training_backprop", "batch_norm_inference_backprop"):
        expected = getattr(bnbp, name)(*statistics, delta, 1e-3, channel_axis=axis)
        assert_same(getattr(bnbp.jax, name)(*statistics, delta, 1e-3, channel_axis=axis), expected)
    inference = bnbp.batch_norm_inference(*statistics, 1e-3, channel_axis=axis)
    assert_same((bnbp.jax.batch_norm_inference(*statistics, 1e-3, channel_axis=axis),), (inference,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "added", "given"), [*itertools.product(["relu", "relu6", None], *[[0, 1]] * 2)])
def test_activation_and_addend(dtype, activation, added, given):
    x, gamma, beta, *_, delta = make_batch((6, 5, 19), 1, dtype)
    beta = beta + np.asarray(3, dtype)  # so that there are elements above 6
    addend = make_batch((6, 5, 19), 1, dtype, seed=1).input if added else None
    for g, b in ((gamma, beta), (None, None)):
        forward = bnbp.batch_norm_training(x, g, b, activation=activation, addend=addend)
        assert_same(bnbp.jax.batch_norm_training(x, g, b, activation=activation, addend=addend), forward)
        normalized, *statistics = forward
        options = {
            "activation": activation,
            "normalized": normalized if given or added else None,
            "addend": bool(added),
        }
        for name in ("batch_norm_training_backprop", "batch_norm_inference_backprop"):
            expected = getattr(bnbp, name)(x, g, b, *statistics, delta, **options)
            assert_same(getattr(bnbp.jax, name)(x, g, b, *statistics, delta, **options), expected)
        inference = bnbp.batch_norm_inference(x, g, b, *statistics, activation=activation, addend=addend)
        ours = bnbp.jax.batch_norm_inference(x, g, b, *statistics, activation=activation, addend=addend)
        assert_same((ours,), (inference,))


def test_without_x64_float64_is_float32():
    jax.config.update("jax_enable_x64", False)
    x, gamma, beta, *_ = make_batch((4, 3, 5), dtype=np.float64)
    single = bnbp.batch_norm_training(*(each.astype(np.float32) for each in (x, gamma, beta)))
    assert_same(bnbp.jax.batch_norm_training(x, gamma, beta), single)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)])
def test_empty_batch(shape):
    x = np.zeros(shape, np.float32)
    assert_same(bnbp.jax.batch_norm_training(x), bnbp.batch_norm_training(x))


EPSILON = np.float64(0)
X, V, W = np.zeros((4, 3, 2), np.float32), np.zeros(3, np.float32), np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("batch_norm_training", (X.astype(np.int32),), {}),
        ("batch_norm_training", (V,), {}),
        ("batch_norm_training", (X[:, :0],), {}),
        ("batch_norm_training", (X, W), {}),
        ("batch_norm_training", (X, V.astype(np.float16)), {}),
        ("batch_norm_training", (X.astype(np.float16), V, V.astype(np.float16)), {}),
        ("batch_norm_training", (X, V, V), {"addend": X[1:]}),
        ("batch_norm_training", (X,), {"channel_axis": 3}),
        ("batch_norm_training", (X,), {"channel_axis": 1.5}),
        ("batch_norm_training", (X,), {"epsilon": -1.0}),
        ("batch_norm_training", (X,), {"epsilon": np.nan}),
        ("batch_norm_training", (X,), {"epsilon": "x"}),
        ("batch_norm_training", (X,), {"activation": "gelu"}),
        ("batch_norm_training", (X,), {"activation": 3}),
        ("batch_norm_inference", (X, V, V, None, V), {}),
        ("batch_norm_training_backprop", (X, V, V, V, V, X[1:]), {}),
        ("batch_norm_training_backprop", (X, V, V, V, V, X), {"activation": "relu", "addend": True}),
        ("batch_norm_inference_backprop", (X, V, V, V, W, X), {}),
    ],
)
def test_errors_are_those_of_numpy(name, arguments, options):
    with pytest.raises((TypeError, ValueError)) as expected:
        getattr(bnbp, name)(*arguments, **options)
    with pytest.raises(type(expected.value)) as error:
        getattr(bnbp.jax, name)(*arguments, **options)
    assert str(error.value) == str(expected.value)


def test_errors_of_its_own():
    with pytest.raises(TypeError, match=r"gamma: expected an array, got list"):
        bnbp.jax.batch_norm_training(X, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"epsilon: expected a finite number >= 0, got a value that is not known"):
        jax.jit(bnbp.jax.batch_norm_training)(X, None, None, 1e-5)


def test_wrong_buffers_are_errors():
    """What the checks of a trace would not let through; the handler looks once more."""
    attributes = {name: np.int64(0) for name in ("activation", "addend")}
    attributes |= {"channel_axis": np.int64(1), "count": np.int64(-1), "wanted": np.int64(-1)}

    def call(*operands, present=0b111, epsilon=EPSILON, **more):
        shape, vector = jax.ShapeDtypeStruct((4, 3, 2), X.dtype), jax.ShapeDtypeStruct((3,), X.dtype)
        function = jax.ffi.ffi_call("bnbp.batch_norm_training", (shape, vector, vector))
        return function(*operands, present=np.int64(present), epsilon=epsilon, **attributes | more)

    assert call(X, V, V)[0].shape == X.shape
    with pytest.raises(RuntimeError, match=r"gamma: expected shape \(3,\)"):
        jax.block_until_ready(call(X, W, V))
    with pytest.raises(RuntimeError, match="another type"):
        jax.block_until_ready(call(X, V.astype(np.int32), V))
    for wrong in ({"present": 0b1111}, {"epsilon": np.float32(0.5)}):
        with pytest.raises(RuntimeError, match=r"bnbp.jax: expected"):
            jax.block_until_ready(call(X, V, V, **wrong))


# ---------------------------------------------------------------- what XLA asks a handler when it is registered


class Version(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("next", ctypes.c_void_p), ("major", ctypes.c_int), ("minor", ctypes.c_int)]


class Metadata(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("version", Version),
        ("traits", ctypes.c_uint32),
        ("guard", ctypes.c_uint32),  # where newer versions go on
        ("more", ctypes.c_int64),
    ]


class Extension(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(Metadata)),
    ]


class Api(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("next", ctypes.c_void_p),
        ("version", Version),
        ("more", ctypes.c_void_p * 2),
    ]


class Frame(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("extensions", ctypes.POINTER(Extension)),
        ("api", ctypes.POINTER(Api)),
        ("rest", ctypes.c_char * 256),
    ]


@pytest.mark.parametrize(("xla", "answer"), [((0, 1), (0, 1)), ((0, 9), (0, 9)), ((1, 0), (0, 1))])
def test_handlers_answer_for_their_version(xla, answer):
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    for capsule in handlers.capsules().values():
        metadata = Metadata(traits=7, guard=77, more=777)
        extension = Extension(ctypes.sizeof(Extension), 1, None, ctypes.pointer(metadata))
        api = Api(version=Version(24, None, *xla))
        frame = Frame(ctypes.sizeof(Frame), ctypes.pointer(extension), ctypes.pointer(api))
        handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(Frame))(pointer(capsule, None))
        assert handler(ctypes.byref(frame)) is None
        assert (metadata.version.major, metadata.version.minor) == answer
        assert (metadata.traits, metadata.guard, metadata.more) == (0, 77, 777)


# ---------------------------------------------------------------- import


def test_import_without_jax_says_what_is_missing():
    code = """
import sys
sys.modules["jax"] = None
try:
    import bnbp.jax
except ImportError as error:
    print(error)
"""
    assert "pip install jax" in python(code)


def test_import_of_bnbp_does_not_import_jax():
    assert python("import sys, bnbp; print('jax' in sys.modules)").strip() == "False"


def test_import_does_not_start_a_backend():
    """Whoever sets the number of devices, or the platform, after the import, must still be heard."""
    code = """
import bnbp.jax, jax
jax.config.update("jax_num_cpu_devices", 3)
print(jax.device_count())
"""
    assert python(code).strip() == "3"


def test_results_are_jax_arrays():
    assert isinstance(bnbp.jax.batch_norm_training(jnp.ones((2, 3))).normalized, jax.Array)
