"""What is read of an array, from its own fields: its type, flags, shape, strides and memory, whoever changes them."""

import os
import re

import ml_dtypes
import numpy as np
import pytest
from conftest import DTYPES, make_batch, python, same_bits

import bnbp
from bnbp import reference
from bnbp.engine import boundary

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def gradient(batch, **options):
    return bnbp.batch_norm_training_backprop(*batch, **options)


# ---------------------------------------------------------------- types


def test_a_type_with_metadata_is_the_type():
    batch = make_batch((4, 3, 2), dtype=np.float32)
    marked = np.dtype(np.float32, metadata={"unit": "m"})
    assert same_bits(gradient(batch), gradient([array.astype(marked) for array in batch]))


@pytest.mark.parametrize("dtype", [np.dtype(dtype) for dtype in DTYPES], ids=str)
def test_swapped_bytes_are_refused_after_the_type_has_been_seen(dtype):
    batch = make_batch((4, 3, 2), dtype=dtype)
    expected = gradient(batch)
    swapped = dtype.newbyteorder("S")
    hint = f"; use .astype(np.{dtype})" if dtype.kind == "f" else ""  # two bytes of no type are not converted
    message = f"normalized_delta: expected {dtype}, the type of input, got {swapped}{hint}"
    with pytest.raises(TypeError) as caught:
        gradient(batch._replace(normalized_delta=batch.normalized_delta.view(swapped)))
    assert str(caught.value) == message
    message = f"out[0] (input_delta): expected {dtype}, the type of input, got {swapped}"
    with pytest.raises(TypeError) as caught:
        gradient(batch, out=(np.empty(batch.input.shape, swapped), None, None))
    assert str(caught.value) == message
    assert same_bits(expected, gradient(batch))


def test_of_two_wrong_types_the_first_is_named():
    batch = make_batch((4, 3), dtype=np.float32)
    with pytest.raises(TypeError, match=r"^gamma: expected float32, the type of input, got \|S3$"):
        gradient(batch._replace(gamma=np.zeros(3, "S3"), mean=np.zeros(3, "M8[s]")))


def test_bfloat16_in_a_process_that_sees_it_first_as_an_output():
    code = """
import ml_dtypes, numpy as np, bnbp
x = np.array([[1, 2], [3, 6]], np.float32)
try:
    bnbp.batch_norm_training(x, None, None, out=(np.zeros((2, 2), ml_dtypes.bfloat16), None, None))
except TypeError as error:
    print(error)
out = np.zeros((2, 2), ml_dtypes.bfloat16)
print(bnbp.batch_norm_training(x.astype(out.dtype), None, None, 0.0, out=(out, None, None)).normalized.tolist())
"""
    message = "out[0] (normalized): expected float32, the type of input, got bfloat16"
    assert python(code).splitlines() == [message, "[[-1.0, -1.0], [1.0, 1.0]]"]


# ---------------------------------------------------------------- subclasses


class Liar(np.ndarray):
    dtype = property(lambda self: np.dtype(np.int8))
    shape = property(lambda self: (1000, 3))
    strides = property(lambda self: (1, 1))
    data = flags = size = ndim = property(lambda self: None)


@pytest.mark.parametrize("kind", [Liar, np.recarray], ids=lambda kind: kind.__name__)
def test_a_subclass_is_the_array_that_it_is(kind):
    batch = make_batch((4, 3, 2), dtype=np.float32)
    expected = gradient(batch)
    out = [array.view(kind) for array in (np.zeros_like(batch.input), *np.zeros((2, 3), np.float32))]
    got = gradient([array.view(kind) for array in batch], out=out)
    assert all(array is given for array, given in zip(got, out, strict=True))
    assert same_bits(expected, [np.ndarray.view(array, np.ndarray) for array in out])
    assert all(type(array) is np.ndarray for array in gradient([array.view(kind) for array in batch]))


def test_a_matrix_is_an_array_of_two_axes():
    batch = make_batch((4, 3), dtype=np.float64)
    out = np.zeros((4, 3)).view(np.matrix)
    assert same_bits(
        gradient(batch), gradient(batch._replace(input=batch.input.view(np.matrix)), out=(out, None, None))
    )


# ---------------------------------------------------------------- flags


def test_an_array_that_only_warns_when_it_is_written_to_is_read_only():
    batch = make_batch((4, 3), dtype=np.float32)
    out, _ = np.broadcast_arrays(np.zeros((4, 1), np.float32), np.zeros((4, 3)))
    assert memoryview(out).readonly
    with pytest.raises(
        ValueError, match=r"^out\[0\] \(input_delta\): expected memory that can be written to, got read"
    ):
        gradient(batch, out=(out, None, None))
    assert same_bits(gradient(batch), gradient(batch._replace(input=np.broadcast_arrays(batch.input, out)[0])))


def test_inputs_may_be_read_only():
    batch = make_batch((4, 3), dtype=np.float32)
    expected = gradient(batch)
    for array in batch:
        array.flags.writeable = False
    assert same_bits(expected, gradient(batch))


def test_arrays_without_alignment():
    batch = make_batch((4, 3, 2), dtype=np.float32)

    def shifted(array):
        memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
        copy = memory.view(array.dtype).reshape(array.shape)
        copy[...] = array
        assert not copy.flags.aligned
        return copy

    expected = gradient(batch)
    out = [shifted(np.zeros_like(array)) for array in expected]
    gradient([shifted(array) for array in batch], out=out)
    assert same_bits(expected, out)


# ---------------------------------------------------------------- shapes and strides


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [8, 9, 10, 17, 32, 33, 64])
def test_more_axes_than_there_is_room_for(rank, dtype):
    """Ten axes of length 2, which cannot be folded, between others of length 1."""
    rng = np.random.default_rng(rank)
    shape = np.ones(rank, int)
    places = rng.permutation(rank)[:10]
    shape[places] = 2
    channel = int(places[-1])

    def permuted(array):
        order = rng.permutation(rank)
        return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))

    batch = make_batch(tuple(shape), channel, dtype=dtype)
    exact = reference.batch_norm_training_backprop(*batch, channel_axis=channel)
    strange = batch._replace(input=permuted(batch.input), normalized_delta=permuted(batch.normalized_delta))
    out = permuted(np.zeros_like(batch.input))
    results = gradient(strange, channel_axis=channel, out=(out, None, None))
    tolerance = {2: 0.05, 4: 1e-4, 8: 1e-10}[batch.input.dtype.itemsize]
    for got, right in zip(results, exact, strict=True):
        np.testing.assert_allclose(got.astype(float), right.astype(float), rtol=tolerance, atol=tolerance)
    assert same_bits(results, gradient(strange, channel_axis=channel))


def test_an_error_in_many_axes_is_put_into_words():
    shape = (2, 3, *(1,) * 30)
    batch = make_batch(shape, dtype=np.float32)
    message = f"normalized_delta: expected shape {shape}, that of input, got (2, 3)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gradient(batch._replace(normalized_delta=batch.normalized_delta.reshape(2, 3)))


def test_the_stride_of_a_single_element_says_nothing():
    batch = make_batch((4, 3, 1, 2), dtype=np.float32)
    expected = gradient(batch)
    memory = np.zeros((4, 3, 5, 4), np.float32)
    same = memory[:, :, :1, ::2]  # neither C nor Fortran order
    same[...] = batch.input
    odd = np.lib.stride_tricks.as_strided(same, strides=(*same.strides[:2], 123456, same.strides[3]))
    assert odd.strides != same.strides
    got = gradient(batch._replace(input=odd), out=(same, None, None))  # in place, whatever that stride is
    assert same_bits(expected, [same, *got[1:]])


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        np.asfortranarray,
        lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        lambda x: x[:, ::-1],
        lambda x: np.broadcast_to(x[:, :, :1], x.shape),
        lambda x: np.repeat(x, 2, axis=3)[..., ::2],
        lambda x: x[:0],
    ],
    ids=["C", "Fortran", "channels-last", "reversed", "broadcast", "every second", "empty"],
)
def test_a_new_result_has_the_layout_of_the_input(layout):
    batch = make_batch((4, 3, 5, 2), dtype=np.float32)
    x = layout(batch.input)
    result = bnbp.batch_norm_inference(x, *batch[1:5])
    like = np.empty_like(x, subok=False)
    assert (result.strides, result.shape, result.dtype) == (like.strides, like.shape, like.dtype)
    assert result.base is None
    assert result.flags.owndata
    assert result.flags.writeable


# ---------------------------------------------------------------- whoever changes them


@pytest.mark.skipif(os.name != "posix", reason="this system sends no such signal to one process")
def test_arrays_that_change_during_a_call():
    """A call has references of its own, so nobody gets an array's memory freed who has not insisted on it with
    `refcheck=False`; and it has copies of shapes and strides, which anybody may change."""
    code = """
import os, signal, threading, numpy as np, bnbp
large = np.broadcast_to(np.float16(3), (1 << 15, 2, 1 << 14))
mean, gamma_delta, spaced = np.ones(2, np.float32), np.zeros(2, np.float32), np.zeros(64, np.float32)
beta_delta = spaced[::32]
out, said = [None, gamma_delta, beta_delta], []
del gamma_delta

def handler(*_):
    out.pop().shape = (2, 1)
    mean.shape = (1, 2)
    vector = out.pop()
    try:
        vector.resize(100000)
    except ValueError as error:
        said.append("cannot resize" in str(error))
    mean.resize(2, refcheck=False)  # the same memory

signal.signal(signal.SIGUSR1, handler)
threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
result = bnbp.batch_norm_training_backprop(
    large, None, None, mean, mean.copy(), large, 0.0, output_mask=(False, True, True), out=out, num_threads=2)
print(said, out, beta_delta.shape, result.beta_delta is beta_delta)
print(result.gamma_delta.tolist(), beta_delta.ravel().tolist(), spaced.nonzero()[0].tolist())
"""
    sums = [float(2**29 * 6), float(2**29 * 3)]
    assert python(code).splitlines() == [
        "[True] [None] (2, 1) True",
        f"{[sums[0]] * 2} {[sums[1]] * 2} [0, 32]",
    ]


def test_an_output_that_is_resized_midway_is_taken_as_it_is_then():
    batch = make_batch((4, 3), dtype=np.float32)
    out = np.zeros((4, 3), np.float32)

    class Saboteur:
        def __float__(self):
            out.resize((2, 3), refcheck=False)
            return 0.5

    message = r"^out\[0\] \(input_delta\): expected shape \(4, 3\), that of input, got \(2, 3\)"
    with pytest.raises(ValueError, match=message):
        gradient(batch, epsilon=Saboteur(), out=(out, None, None))


# ---------------------------------------------------------------- the function itself


def test_an_operator_is_called_with_all_that_it_takes():
    with pytest.raises(ValueError, match=r"^name: expected an operator, got 'BatchNorm'"):
        boundary.function_of("BatchNorm", None)
    function = boundary.function_of("BatchNormInference", None)
    for count in (0, 5, 12, 15):
        with pytest.raises(TypeError, match=f"^expected 6 inputs and 7 or 8 attributes, got {count} arguments"):
            function(*[None] * count)


@pytest.mark.parametrize("scalar", [np.float32(0.5), 1, True, np.float64(0.5)], ids=repr)
def test_numbers_that_are_no_floats(scalar):
    batch = make_batch((4, 3, 2))
    expected = gradient(batch, epsilon=float(scalar), channel_axis=1, num_threads=1)
    assert same_bits(expected, gradient(batch, epsilon=scalar, channel_axis=np.int8(-2), num_threads=True))


def test_results_are_named_tuples():
    batch = make_batch((4, 3, 2))
    for result, kind in (
        (bnbp.batch_norm_training(*batch[:3]), bnbp.BatchNormTrainingResult),
        (gradient(batch), bnbp.BatchNormTrainingBackpropResult),
        (bnbp.batch_norm_training_statistics(batch.input), bnbp.BatchNormStatistics),
    ):
        assert type(result) is kind
        assert isinstance(result, tuple)
        assert result == kind(*result)
        assert result._asdict().keys() == dict.fromkeys(kind._fields).keys()
    assert type(bnbp.batch_norm_training_statistics(batch.input).count) is int
    assert hash(kind(1, 2, 3)) == hash((1, 2, 3))
