"""Every rule of the operators, with its message: which argument, what was expected, what came."""

import ctypes
import itertools
import warnings
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
from conftest import make_batch, same_bits

import bnbp

HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
TYPES = dict(zip(HALVES, ["np.float16", "ml_dtypes.bfloat16"], strict=True))
BATCH = make_batch((4, 3, 2, 2), dtype=np.float32)
NAMES = BATCH._fields
HINT = "; use .astype(np.float32)"


def call(name="batch_norm_training_backprop", *, options=None, **changes):
    count = {"batch_norm_training": 3, "batch_norm_inference": 5}.get(name, 6)
    inputs = BATCH._replace(**changes)[:count]
    return getattr(bnbp, name)(*inputs, **(options or {}))


def refused(kind, message, **arguments):
    """The call fails with exactly this message, and has changed none of its inputs."""
    before = [array.copy() for array in BATCH]
    with pytest.raises(kind) as caught:
        call(**arguments)
    assert str(caught.value) == message
    assert same_bits(before, BATCH)


# ---------------------------------------------------------------- types


@pytest.mark.parametrize(
    "dtype", ["int32", "bool", "complex64", ">f2", ">f4", "longdouble", "V2", "<U3", "object", "M8[s]"]
)
def test_the_element_type_of_the_input(dtype):
    array = np.zeros((4, 3, 2, 2), dtype)
    hint = HINT if np.dtype(dtype).kind in "iuf" else ""  # others are no real numbers
    message = f"input: expected float16, bfloat16, float32 or float64, got {np.dtype(dtype)}{hint}"
    refused(TypeError, message, input=array)


@pytest.mark.parametrize("name", ["gamma", "beta", "mean", "variance", "normalized_delta"])
@pytest.mark.parametrize("dtype", ["float64", "int8", ">f4"])
def test_the_element_type_of_the_others(name, dtype):
    array = np.zeros(getattr(BATCH, name).shape, dtype)
    refused(TypeError, f"{name}: expected float32, the type of input, got {np.dtype(dtype)}{HINT}", **{name: array})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("name", ["gamma", "variance", "normalized_delta"])
def test_what_the_message_says_to_do_helps(name, dtype):
    batch = BATCH._replace(**{each: getattr(BATCH, each).astype(dtype) for each in NAMES})._asdict()
    batch[name] = BATCH.input.astype(np.int32) if name == "normalized_delta" else np.ones(3, np.int32)
    with pytest.raises(TypeError, match=r"; use \.astype\(\S+\)$") as caught:
        bnbp.batch_norm_training_backprop(**batch)
    batch[name] = eval(f"array{str(caught.value).rpartition('; use ')[2]}", {**globals(), "array": batch[name]})
    if name == "gamma":  # of 16-bit data it may be float32, and then decides
        batch |= {each: getattr(BATCH, each).astype(batch[name].dtype) for each in ("beta", "mean", "variance")}
    assert bnbp.batch_norm_training_backprop(**batch).input_delta.dtype == dtype


class OwnMasked(np.ma.MaskedArray):
    pass


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [np.ma.MaskedArray, OwnMasked])
def test_a_masked_array_is_refused(name, kind):
    """NumPy would drop the mask without a word."""
    refused(
        TypeError,
        f"{name}: expected an array without a mask, got {kind.__name__}; use .filled(value), which says what stands "
        "for the masked elements",
        **{name: kind(getattr(BATCH, name), mask=False)},
    )


def test_a_masked_array_is_no_output():
    out = np.ma.MaskedArray(np.full((4, 3, 2, 2), 7, np.float32), mask=True)
    message = "expected an array without a mask, got MaskedArray; use .data, the array behind the mask"
    refused(TypeError, f"out[0]: {message}", options={"out": (out, None, None)})
    refused(TypeError, f"out[0]: {message}", name="batch_norm_inference", options={"out": out})
    assert (out.data == 7).all()


@pytest.mark.parametrize("name", ["mean", "variance", "normalized_delta"])
def test_only_gamma_and_beta_may_be_none(name):
    refused(TypeError, f"{name}: expected float32, the type of input, got None", **{name: None})


def test_the_input_may_not_be_none():
    refused(TypeError, "input: expected float16, bfloat16, float32 or float64, got None", input=None)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("name", ["gamma", "beta", "mean", "variance"])
def test_parameters_of_16_bit_inputs_are_of_their_type_or_float32(half, name):
    halves = {tensor: getattr(BATCH, tensor).astype(half) for tensor in ("input", "normalized_delta")}
    others = dict.fromkeys(("gamma", "beta"))
    vectors = {vector: getattr(BATCH, vector).astype(half) for vector in ("mean", "variance")}
    given = {**halves, **others, **vectors}
    wrong = np.zeros(3)
    first = name in ("gamma", "beta", "mean")  # of which the type is asked first
    expected = f"{half}, the type of input, or float32" if first else f"{half}, the type of mean"
    hint = HINT if first else f"; use .astype({TYPES[half]})"
    refused(TypeError, f"{name}: expected {expected}, got float64{hint}", **{**given, name: wrong})
    own = {vector: getattr(BATCH, vector).astype(half) for vector in ("gamma", "beta", "mean", "variance")}
    if name != "gamma":
        message = f"{name}: expected {half}, the type of gamma, got float32; use .astype({TYPES[half]})"
        refused(TypeError, message, **{**halves, **own, name: np.zeros(3, np.float32)})
    other = next(other for other in HALVES if other != half)
    message = f"normalized_delta: expected {half}, the type of input, got {other}; use .astype({TYPES[half]})"
    refused(TypeError, message, **{**halves, **own, "normalized_delta": BATCH.input.astype(other)})


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_results_of_16_bit_inputs(half):
    x = BATCH.input.astype(half)
    assert [a.dtype for a in bnbp.batch_norm_training(x, None, None)] == [half] * 3
    assert [a.dtype for a in bnbp.batch_norm_training(x, BATCH.gamma, None)] == [half, np.float32, np.float32]
    assert [a.dtype for a in bnbp.batch_norm_training(x, [1, 2, 3], None)] == [half] * 3
    assert [a.dtype for a in bnbp.batch_norm_training(x, BATCH.gamma, [1, 2, 3])] == [half, np.float32, np.float32]
    message = f"out[1] (batch_mean): expected {half}, the type of input, got float32"
    with pytest.raises(TypeError) as caught:
        bnbp.batch_norm_training(x, None, None, out=(None, np.zeros(3, np.float32), None))
    assert str(caught.value) == message


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("shape", [(), (3,)])
def test_the_rank_of_the_input(shape):
    refused(ValueError, f"input: expected at least 2 axes, got shape {shape}", input=np.zeros(shape, np.float32))


@pytest.mark.parametrize("name", ["gamma", "beta", "mean", "variance"])
@pytest.mark.parametrize("shape", [(4,), (), (3, 1), (1, 3)])
def test_the_shape_of_parameters_and_statistics(name, shape):
    refused(
        ValueError,
        f"{name}: expected shape (3,) for the 3 channels of input (4, 3, 2, 2), got {shape}",
        **{name: np.zeros(shape, np.float32)},
    )


@pytest.mark.parametrize("shape", [(4, 3, 2), (4, 2, 2, 3), (1, 3, 2, 2)])
def test_the_shape_of_normalized_delta(shape):
    refused(
        ValueError,
        f"normalized_delta: expected shape (4, 3, 2, 2), that of input, got {shape}",
        normalized_delta=np.zeros(shape, np.float32),
    )


@pytest.mark.parametrize("name", ["batch_norm_training", "batch_norm_inference", "batch_norm_inference_backprop"])
def test_the_other_operators_have_the_same_rules(name):
    message = "gamma: expected shape (3,) for the 3 channels of input (4, 3, 2, 2), got (2,)"
    refused(ValueError, message, name=name, gamma=np.zeros(2, np.float32))


def test_there_is_at_least_one_channel():
    refused(
        ValueError,
        "input: expected at least 1 channel on axis 1, got shape (4, 0, 2)",
        input=np.zeros((4, 0, 2), np.float32),
    )


# ---------------------------------------------------------------- attributes


@pytest.mark.parametrize("axis", [4, -5, 2**80, -(2**80)])
def test_the_channel_axis_is_one_of_the_inputs(axis):
    with pytest.raises(ValueError, match=r"^channel_axis: expected -4 to 3 for the axes of input \(4, 3, 2, 2\), got "):
        call(options={"channel_axis": axis})


@pytest.mark.parametrize("axis", [1.0, "1", None])
def test_the_channel_axis_is_an_integer(axis):
    refused(TypeError, f"channel_axis: expected an integer, got {axis!r}", options={"channel_axis": axis})


def test_the_channel_axis_decides_the_number_of_channels():
    refused(
        ValueError,
        "gamma: expected shape (4,) for the 4 channels of input (4, 3, 2, 2), got (3,)",
        options={"channel_axis": np.int64(0)},
    )


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [
        (-1, "-1"),
        (-1e-300, "-1e-300"),
        (np.nan, "nan"),
        (np.inf, "inf"),
        (10**400, "1" + "0" * 400),
    ],
)
@pytest.mark.parametrize("name", ["batch_norm_training", "batch_norm_inference", "batch_norm_training_backprop"])
def test_epsilon_is_finite_and_not_negative(epsilon, text, name):
    refused(
        ValueError,
        f"epsilon: expected a finite number >= 0, got {text}",
        name=name,
        options={"epsilon": epsilon},
    )


@pytest.mark.parametrize("epsilon", ["1e-5", None, 1j, [1e-5], np.ones(2)], ids=repr)
@pytest.mark.parametrize("name", ["batch_norm_training", "batch_norm_inference", "batch_norm_training_backprop"])
def test_epsilon_is_a_number(epsilon, name):
    refused(
        TypeError,
        f"epsilon: expected a finite number >= 0, got {epsilon!r}",
        name=name,
        options={"epsilon": epsilon},
    )


@pytest.mark.parametrize("count", [0, -1, -(2**80)])
def test_the_number_of_threads_is_positive(count):
    refused(ValueError, f"num_threads: expected at least 1, got {count}", options={"num_threads": count})


@pytest.mark.parametrize("count", [1.5, "2"])
def test_the_number_of_threads_is_an_integer(count):
    refused(TypeError, f"num_threads: expected an integer or None, got {count!r}", options={"num_threads": count})


def test_any_larger_number_of_threads_will_do():
    assert same_bits(call(), call(options={"num_threads": 2**80}))


def test_the_output_mask_has_an_entry_for_each_output():
    for mask in ((), (True,), (True, False), (True,) * 4, [True] * 4):
        refused(ValueError, f"output_mask: expected 3 booleans, got {len(mask)}", options={"output_mask": mask})
    refused(TypeError, "output_mask: expected 3 booleans, got 'yes'", options={"output_mask": "yes"})
    refused(TypeError, "output_mask: expected 3 booleans, got True", options={"output_mask": True})


# ---------------------------------------------------------------- activation and addend

GRADIENTS = ["batch_norm_training_backprop", "batch_norm_inference_backprop"]
FORWARD = ["batch_norm_training", "batch_norm_inference"]
TENSOR = BATCH.input


@pytest.mark.parametrize("wrong", ["gelu", "ReLU", "relu ", "", 1, True, b"relu", ["relu"], np.float32(6)], ids=repr)
@pytest.mark.parametrize("name", FORWARD + GRADIENTS)
def test_the_activation_is_one_of_two(name, wrong):
    kind = ValueError if isinstance(wrong, str) else TypeError
    message = f'activation: expected None, "relu" or "relu6", got {wrong!r}'
    refused(kind, message, name=name, options={"activation": wrong})


def test_the_halves_ask_for_the_same_activations():
    message = r"""^activation: expected None, "relu" or "relu6", got 'gelu'$"""
    with pytest.raises(ValueError, match=message):
        bnbp.batch_norm_training_backprop_reduce(BATCH.input, BATCH.mean, BATCH.input, activation="gelu")
    with pytest.raises(ValueError, match=message):
        bnbp.batch_norm_training_backprop_apply(*BATCH, *[np.zeros(3)] * 2, 16, activation="gelu")


@pytest.mark.parametrize(
    ("name", "tensor"), [*((n, "addend") for n in FORWARD), *((n, "normalized") for n in GRADIENTS)]
)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_other_tensors_are_like_the_input(name, tensor, activation):
    """The forward output is checked without an activation too, which has no use for it."""
    for wrong, kind, message in (
        (TENSOR.astype(np.float64), TypeError, f"expected float32, the type of input, got float64{HINT}"),
        (TENSOR.astype(np.int8), TypeError, f"expected float32, the type of input, got int8{HINT}"),
        (TENSOR[:1], ValueError, "expected shape (4, 3, 2, 2), that of input, got (1, 3, 2, 2)"),
        (TENSOR[0, 0, 0, 0], ValueError, "expected shape (4, 3, 2, 2), that of input, got ()"),
    ):
        refused(kind, f"{tensor}: {message}", name=name, options={tensor: wrong, "activation": activation})
    with pytest.raises(TypeError, match=f"^{tensor}: expected an array, got NoArray: Got unsupported"):
        call(name, options={tensor: NoArray(), "activation": activation})


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_with_an_addend_the_output_is_needed(name, activation):
    message = (
        f'normalized: expected the forward operator\'s output, which the gradient of activation "{activation}" '
        "with an addend needs, got None"
    )
    refused(ValueError, message, name=name, options={"activation": activation, "addend": True})
    call(name, options={"addend": True})  # without an activation it is not


def test_the_halves_need_what_tells_the_output():
    arguments = BATCH.input, BATCH.mean, BATCH.normalized_delta
    reduce = bnbp.batch_norm_training_backprop_reduce
    for given in ({}, {"gamma": BATCH.gamma, "beta": BATCH.beta}):
        with pytest.raises(ValueError, match=r"^variance: expected shape \(3,\) .*, got None$"):
            reduce(*arguments, activation="relu", **given)
    with pytest.raises(ValueError, match=r"^normalized: expected the forward operator's output, which .*, got None$"):
        reduce(*arguments, activation="relu", variance=BATCH.variance, addend=True)
    with pytest.raises(ValueError, match=r"^normalized: expected the forward operator's output, which .*, got None$"):
        bnbp.batch_norm_training_backprop_apply(*BATCH, *[np.zeros(3)] * 2, 16, activation="relu", addend=True)
    for name in ("gamma", "beta", "variance"):
        with pytest.raises(TypeError, match=f"^{name}: expected float32, the type of input, got float64; use"):
            reduce(*arguments, activation="relu", **{"variance": BATCH.variance, name: np.ones(3)})
    with pytest.raises(ValueError, match=r"^epsilon: expected a finite number >= 0, got -1$"):
        reduce(*arguments, activation="relu", variance=BATCH.variance, epsilon=-1)
    reduce(*arguments, activation="relu", normalized=BATCH.input)


@pytest.mark.parametrize("wrong", ["yes", 1.5, TENSOR], ids=["str", "float", "array"])
def test_of_a_gradient_the_addend_is_a_bool(wrong):
    with pytest.raises(TypeError, match=r"^addend: expected "):
        call(options={"addend": wrong})


def test_with_an_addend_there_are_four_outputs():
    options = {"addend": True, "normalized": TENSOR, "activation": "relu"}
    for mask in ((), (True,) * 3, (True,) * 5):
        message = f"output_mask: expected 4 booleans, got {len(mask)}"
        refused(ValueError, message, options={**options, "output_mask": mask})
    message = "out: expected 4 entries, an array or None for each output, got 3"
    refused(ValueError, message, options={**options, "out": (None,) * 3})
    message = "out: expected 3 entries, an array or None for each output, got 4"
    refused(ValueError, message, options={"out": (None,) * 4})
    for out, kind, message in (
        (TENSOR.astype(np.float64), TypeError, "expected float32, the type of input, got float64"),
        (TENSOR[0], ValueError, "expected shape (4, 3, 2, 2), that of input, got (3, 2, 2)"),
    ):
        refused(kind, f"out[3] (addend_delta): {message}", options={**options, "out": (None, None, None, out)})


def test_two_outputs_may_not_be_the_same_input():
    same = TENSOR.copy()
    message = "out[3] (addend_delta): expected memory of its own, got memory that overlaps out[0] (input_delta)"
    options = {"addend": True, "normalized": TENSOR, "activation": "relu", "out": (same, None, None, same)}
    refused(ValueError, message, normalized_delta=same, options=options)


@pytest.mark.parametrize("wrap", [list, memoryview], ids=["list", "memoryview"])
def test_anything_that_is_an_array_may_be_an_addend_or_an_output(wrap):
    other = TENSOR.tolist() if wrap is list else memoryview(TENSOR)
    for name, tensor in ((FORWARD[0], "addend"), (FORWARD[1], "addend"), *((name, "normalized") for name in GRADIENTS)):
        expected, got = (call(name, options={tensor: value, "activation": "relu"}) for value in (TENSOR, other))
        pair = ([expected], [got]) if isinstance(expected, np.ndarray) else (expected, got)
        assert same_bits(*pair)


# ---------------------------------------------------------------- outputs


def outputs():
    return [np.full((4, 3, 2, 2), 7, np.float32), np.full(3, 7, np.float32), np.full(3, 7, np.float32)]


class TestOut:
    WRONG: ClassVar = [
        (0, np.float64, (4, 3, 2, 2), TypeError,
         "out[0] (input_delta): expected float32, the type of input, got float64"),
        (0, np.float32, (4, 3, 4), ValueError,
         "out[0] (input_delta): expected shape (4, 3, 2, 2), that of input, got (4, 3, 4)"),
        (2, np.float32, (4,), ValueError,
         "out[2] (beta_delta): expected shape (3,) for the 3 channels of input (4, 3, 2, 2), got (4,)"),
        (1, np.int64, (3,), TypeError, "out[1] (gamma_delta): expected float32, the type of input, got int64"),
    ]  # fmt: skip

    @pytest.mark.parametrize(("place", "dtype", "shape", "kind", "message"), WRONG)
    def test_type_and_shape(self, place, dtype, shape, kind, message):
        out = outputs()
        out[place] = np.full(shape, 7, dtype)
        refused(kind, message, options={"out": out})
        assert all((array == 7).all() for array in out)

    def test_is_writable(self):
        out = outputs()
        out[1].flags.writeable = False
        refused(
            ValueError,
            "out[1] (gamma_delta): expected memory that can be written to, got read-only memory",
            options={"out": out},
        )
        assert all((array == 7).all() for array in out)

    def test_is_a_tuple(self):
        refused(
            TypeError,
            "out: expected a tuple with an array or None for each output, got ndarray",
            options={"out": np.zeros(3)},
        )
        refused(
            ValueError,
            "out: expected 3 entries, an array or None for each output, got 2",
            options={"out": (None, None)},
        )
        refused(
            TypeError,
            "out[1]: expected a NumPy array or None, got list",
            options={"out": (None, [0, 0, 0], None)},
        )

    @pytest.mark.parametrize("name", ["gamma", "beta", "mean", "variance"])
    def test_may_not_overlap_a_parameter(self, name):
        refused(
            ValueError,
            f"out[1] (gamma_delta): expected memory of its own, got memory that overlaps {name}",
            options={"out": (None, getattr(BATCH, name), None)},
        )

    @pytest.mark.parametrize("name", ["input", "normalized_delta"])
    def test_may_be_an_input_but_not_a_part_of_it(self, name):
        memory = np.zeros(49, np.float32)
        memory[1:] = getattr(BATCH, name).ravel()
        shifted, same = memory[:-1].reshape(4, 3, 2, 2), memory[1:].reshape(4, 3, 2, 2)
        message = (
            "out[0] (input_delta): expected memory of its own, or all of an input of the same shape, "
            f"got memory that overlaps {name}"
        )
        for out in (shifted, same[::-1]):
            refused(ValueError, message, options={"out": (out, None, None)}, **{name: same})
        expected = call()
        assert same_bits(expected, call(options={"out": (same, None, None)}, **{name: same}))

    def test_may_not_overlap_another_output(self):
        vector = np.zeros(4, np.float32)
        refused(
            ValueError,
            "out[2] (beta_delta): expected memory of its own, got memory that overlaps out[1] (gamma_delta)",
            options={"out": (None, vector[:3], vector[1:])},
        )
        whole = np.zeros((4, 3, 2, 2), np.float32)
        refused(
            ValueError,
            "out[1] (gamma_delta): expected memory of its own, got memory that overlaps out[0] (input_delta)",
            options={"out": (whole, whole[3, :, 1, 1], None)},
        )

    def test_may_lie_between_the_elements_of_an_input(self):
        memory = np.zeros((4, 6, 2, 2), np.float32)
        memory[:, ::2] = BATCH.input
        expected = call()
        assert same_bits(expected, call(input=memory[:, ::2], options={"out": (memory[:, 1::2], None, None)}))
        assert same_bits([BATCH.input], [memory[:, ::2]])

    def test_overlaps_no_tensor_without_elements(self):
        out, v = np.zeros(2), np.ones(2)
        empty = np.ndarray((3, 2, 0), buffer=out, offset=4)  # its address is in the middle of the output's memory
        got = bnbp.batch_norm_training_backprop(empty, v, v, v, v, empty, out=(None, out, None))
        assert got.gamma_delta is out

    def test_has_memory_for_each_element(self):
        message = "out[0] (input_delta): expected memory for each element, got elements that overlap each other"
        memory = np.zeros(1000, np.float32)
        for strides in (
            (0, 16, 8, 4),
            (48, 16, 8, 0),
            (48, 16, 4, 4),
            (20, 16, 8, 4),
            (-48, 16, 8, 2),
            (5, 400, 10, 40),
        ):
            out = np.lib.stride_tricks.as_strided(memory[500:], (4, 3, 2, 2), strides)
            refused(ValueError, message, options={"out": (out, None, None)})
        for strides in ((48, 16, 8, 4), (4, 16, 48, 96), (-48, -16, 8, -4), (12, 16, 80, 160)):
            out = np.lib.stride_tricks.as_strided(memory[500:], (4, 3, 2, 2), strides)
            assert same_bits(call(), call(options={"out": (out, None, None)}))

    def test_is_checked_even_where_the_masked_ones_are_not(self):
        out = (np.zeros(1), *outputs()[1:])
        result = call(options={"out": out, "output_mask": (False, True, True)})
        assert result.input_delta is None
        assert result.gamma_delta is out[1]


# ---------------------------------------------------------------- anything that can be an array


def test_lists_take_the_type_of_the_input():
    expected = call()
    lists = {name: getattr(BATCH, name).tolist() for name in NAMES[1:]}
    assert same_bits(expected, call(**lists))
    as_float64 = bnbp.batch_norm_training_backprop(*(array.tolist() for array in BATCH))
    assert as_float64.input_delta.dtype == np.float64
    ints = bnbp.batch_norm_training([[1, 2], [3, 4]], [1, 1], (0, 0))
    assert ints.batch_mean.tolist() == [2, 3]


class HasArray:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class HasDLPack:
    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("wrap", [HasArray, HasDLPack, memoryview], ids=lambda wrap: wrap.__name__)
def test_anything_with_a_buffer_array_or_dlpack_is_taken(wrap):
    assert same_bits(call(), call(**{name: wrap(getattr(BATCH, name)) for name in NAMES}))


class NoArray:
    def __array__(self, dtype=None, copy=None):
        raise TypeError("Got unsupported")


class OnADevice(HasDLPack):
    kind = 2

    def __dlpack_device__(self):
        return self.kind, 0

    def __dlpack__(self, **options):
        raise BufferError("this tensor lives on a device")


@pytest.mark.parametrize(("kind", "device"), [(2, "a CUDA device"), (10, "a ROCm device"), (77, "device type 77")])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_on_a_device_is_refused(kind, device, name):
    tensor = OnADevice(getattr(BATCH, name))
    tensor.kind = kind
    refused(
        TypeError,
        f"{name}: expected a tensor in the CPU's memory, got OnADevice on {device}; copy it to the CPU first",
        **{name: tensor},
    )


def field_of(capsule, kind, offset):
    """A field of what DLPack says of a tensor: its address at 0, the device's type at 8, the elements' at 20."""
    tensor = ctypes.pythonapi.PyCapsule_GetPointer
    tensor.restype, tensor.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return kind.from_address(tensor(capsule, b"dltensor") + offset)


class OnAHost(HasDLPack):
    """A tensor in memory that a device reads too."""

    kind = 3

    def __dlpack_device__(self):
        return self.kind, 0

    def __dlpack__(self, **options):
        capsule = self.array.__dlpack__()
        device = field_of(capsule, ctypes.c_int32, 8)
        assert device.value == 1  # the CPU
        device.value = self.kind
        return capsule


@pytest.mark.parametrize("kind", [3, 11, 13], ids=["CUDA's host", "ROCm's host", "CUDA's managed memory"])
@pytest.mark.parametrize("name", NAMES)
def test_memory_of_the_host_that_a_device_reads_too_is_taken(kind, name):
    tensor = OnAHost(getattr(BATCH, name))
    tensor.kind = kind
    assert same_bits(call(), call(**{name: tensor}))


class LikePyTorch(HasDLPack):
    """A tensor of bfloat16, which NumPy has no type for: `__array__` refuses, and DLPack has it."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Got unsupported ScalarType BFloat16")

    def __dlpack__(self, **options):
        capsule = self.array.view(np.uint16).__dlpack__()
        code = field_of(capsule, ctypes.c_uint8, 20)
        assert code.value == 1  # an unsigned integer
        code.value = 4  # bfloat16
        return capsule


def test_tensors_of_bfloat16_are_taken_through_dlpack():
    batch = make_batch((4, 3, 2, 2), dtype=ml_dtypes.bfloat16)
    expected = bnbp.batch_norm_training_backprop(*batch)
    assert same_bits(expected, bnbp.batch_norm_training_backprop(*map(LikePyTorch, batch)))


def test_what_cannot_be_an_array_is_named():
    with pytest.raises(TypeError, match=r"^gamma: expected an array, got NoArray: Got unsupported"):
        call(gamma=NoArray())
    with pytest.raises(TypeError, match=r"^mean: expected an array, got list: "):
        call(mean=[[1], [2, 3]])
    refused(TypeError, "mean: expected float32, the type of input, got <U4", mean="mean")
    refused(TypeError, "mean: expected float32, the type of input, got object", mean=object())


def test_a_lying_array_is_refused():
    class Lies:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("no")

    refused(TypeError, "beta: expected an array, got Lies: no", beta=Lies())


# ---------------------------------------------------------------- the two halves


SUMS = np.array([1.0, 2.0, 3.0])


def apply(count=16, delta_sum=SUMS, delta_centered_sum=SUMS, **changes):
    return bnbp.batch_norm_training_backprop_apply(*BATCH._replace(**changes), delta_sum, delta_centered_sum, count)


@pytest.mark.parametrize("name", ["delta_sum", "delta_centered_sum"])
def test_sums_are_float64_for_each_channel(name):
    for wrong, kind, message in (
        (SUMS.astype(np.float32), TypeError, "expected float64, got float32; use .astype(np.float64)"),
        (None, TypeError, "expected float64, got None"),
        (SUMS[:2], ValueError, "expected shape (3,) for the 3 channels of input (4, 3, 2, 2), got (2,)"),
    ):
        with pytest.raises(kind) as caught:
            apply(**{name: wrong})
        assert str(caught.value) == f"{name}: {message}"
    assert same_bits(apply(), apply(**{name: [1, 2, 3]}))


@pytest.mark.parametrize(
    ("count", "kind", "message"),
    [
        (15, ValueError, "expected at least 16, the elements of a channel of input (4, 3, 2, 2), got 15"),
        (-1, ValueError, "expected at least 0, got -1"),
        (-(2**80), ValueError, f"expected at least 0, got {-(2**53)}"),
        (16.0, TypeError, "expected an integer, got 16.0"),
        (None, TypeError, "expected an integer, got None"),
    ],
)
def test_the_count_is_that_of_the_whole_batch(count, kind, message):
    with pytest.raises(kind) as caught:
        apply(count)
    assert str(caught.value) == f"count: {message}"


def test_any_larger_count_will_do():
    assert np.isfinite(apply(2**80).input_delta).all()
    assert same_bits(apply(2**80), apply(2**53))


def test_the_halves_have_the_rules_of_the_whole():
    with pytest.raises(TypeError, match=r"^mean: expected float32, the type of input, got float64; use"):
        bnbp.batch_norm_training_backprop_reduce(BATCH.input, np.zeros(3), BATCH.normalized_delta)
    with pytest.raises(
        ValueError, match=r"^normalized_delta: expected shape \(4, 3, 2, 2\), that of input, got \(2,\)$"
    ):
        bnbp.batch_norm_training_backprop_reduce(BATCH.input, BATCH.mean, np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"^channel_axis: expected -4 to 3 "):
        bnbp.batch_norm_training_statistics(BATCH.input, channel_axis=4)
    with pytest.raises(ValueError, match=r"^num_threads: expected at least 1, got 0$"):
        bnbp.batch_norm_training_statistics(BATCH.input, num_threads=0)
    with pytest.raises(TypeError, match=r"^gamma: expected float32, the type of input, got int64; use"):
        apply(gamma=np.zeros(3, np.int64))


PART = (4, SUMS, SUMS)


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ((), ValueError, "merge_statistics: expected at least 1 part, got none"),
        (([],), ValueError, "merge_statistics: expected at least 1 part, got none"),
        ((PART, 3), TypeError, "parts[1]: expected (count, mean, m2), got int"),
        ((PART, (4, SUMS)), TypeError, "parts[1]: expected (count, mean, m2), got a tuple of 2"),
        ((PART, (4.0, SUMS, SUMS)), TypeError, "parts[1] (count): expected an integer, got 4.0"),
        (((-1, SUMS, SUMS), PART), ValueError, "parts[0] (count): expected at least 0, got -1"),
        ((PART, (4, SUMS.astype("f4"), SUMS)), TypeError, "parts[1] (mean): expected float64, got float32"),
        ((PART, (4, SUMS, SUMS[:2])), ValueError,
         "parts[1] (m2): expected shape (3,), that of parts[0] (mean), got (2,)"),
        (((4, SUMS, SUMS[:1]),), ValueError, "parts[0] (m2): expected shape (3,), that of parts[0] (mean), got (1,)"),
        (((4, SUMS[0], SUMS),), ValueError, "parts[0] (mean): expected one axis, the channels, got shape ()"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be_merged(parts, kind, message):
    with pytest.raises(kind) as caught:
        bnbp.merge_statistics(*parts)
    assert str(caught.value) == message


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(variance=np.full(3, -1, np.float32))


def rude(error):
    """An object whose every conversion raises this."""

    class Rude:
        def __index__(self):
            raise error

        __float__ = __iter__ = __array__ = __repr__ = lambda self, *args, **options: self.__index__()

    return Rude()


@pytest.mark.parametrize("error", [RuntimeError("out of order"), ValueError("out of order"), KeyError("x")], ids=repr)
@pytest.mark.parametrize("name", ["epsilon", "channel_axis", "num_threads", "output_mask", "input", "gamma", "mean"])
def test_what_an_objects_own_methods_raise_is_put_down_to_the_argument(name, error):
    arguments = {**make_batch((4, 3))._asdict(), name: rude(error)}
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*"):
        bnbp.batch_norm_training_backprop(**arguments)


@pytest.mark.parametrize("name", ["epsilon", "channel_axis", "num_threads"])
def test_numbers_too_long_to_print(name):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        bnbp.batch_norm_training(*make_batch((4, 3))[:3], **{name: -(10**5000)})


def test_an_array_that_is_resized_midway_is_taken_as_it_is_then():
    batch = make_batch((4, 3))

    class Saboteur:
        def __index__(self):
            batch.normalized_delta.resize((1,), refcheck=False)
            return 1

    with pytest.raises(ValueError, match=r"^normalized_delta: expected shape \(4, 3\), that of input, got \(1,\)"):
        bnbp.batch_norm_training_backprop(*batch, output_mask=(Saboteur(), True, True))


def test_an_output_that_lies_about_its_type_and_shape():
    class Liar(np.ndarray):
        dtype = property(lambda self: np.dtype(np.float64))
        shape = property(lambda self: (1000, 3))

    batch = make_batch((4, 3), dtype=np.float32)
    out = np.zeros((4, 3), np.float32)
    expected = bnbp.batch_norm_training(*batch[:3]).normalized
    bnbp.batch_norm_training(*batch[:3], out=(out.view(Liar), None, None))
    assert same_bits([out], [expected])


def test_what_only_says_that_it_is_an_array_is_no_output():
    class Poser:
        __class__ = np.ndarray

    with pytest.raises(TypeError, match=r"^out\[0\]: expected a NumPy array or None, got Poser"):
        bnbp.batch_norm_training(*make_batch((4, 3))[:3], out=(Poser(), None, None))


def test_a_mask_without_end():
    with pytest.raises(ValueError, match=r"^output_mask: expected 3 booleans, got "):
        bnbp.batch_norm_training_backprop(*make_batch((4, 3)), output_mask=itertools.repeat(True))


def test_a_list_beside_an_input_that_is_none():
    with pytest.raises(TypeError, match=r"^input: expected float16, bfloat16, float32 or float64, got None"):
        bnbp.batch_norm_training(None, [1.0], None)


@pytest.mark.parametrize(
    ("parts", "message"),
    [((5,), "parts: expected"), (((10**400, np.zeros(2), np.zeros(2)),), r"parts\[0\] \(count\): expected at most")],
    ids=["number", "count"],
)
def test_what_cannot_be_merged_is_named(parts, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        bnbp.merge_statistics(*parts)


def test_a_mode_that_is_no_text():
    with pytest.raises(ValueError, match=r"^mode: expected 'stdout' or 'dicts', got array"):
        bnbp.show_config(np.array(["dicts", "stdout"]))


@pytest.mark.parametrize("device", [(), (1,), None, ("x", 0), ([], 0)], ids=str)
def test_a_device_that_is_none_is_refused(device):
    class Tensor:
        def __dlpack__(self, **options):
            raise BufferError

        def __dlpack_device__(self):
            return device

    with pytest.raises(TypeError, match=r"^input: expected an array, got Tensor: "):
        bnbp.batch_norm_training(Tensor(), None, None)
