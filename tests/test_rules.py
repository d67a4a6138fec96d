"""Every rule of the operators, with its message: which argument, what was expected, what came."""

import warnings
from typing import ClassVar

import numpy as np
import pytest
from conftest import make_batch, same_bits

import bnbp

BATCH = make_batch((4, 3, 2, 2), dtype=np.float32)
NAMES = BATCH._fields


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


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float16", ">f4", "<U3", "object", "M8[s]"])
def test_the_element_type_of_the_input(dtype):
    array = np.zeros((4, 3, 2, 2), dtype)
    refused(TypeError, f"input: expected float32 or float64, got {np.dtype(dtype)}", input=array)


@pytest.mark.parametrize("name", ["gamma", "beta", "mean", "variance", "normalized_delta"])
@pytest.mark.parametrize("dtype", ["float64", "int8", ">f4"])
def test_the_element_type_of_the_others(name, dtype):
    array = np.zeros(getattr(BATCH, name).shape, dtype)
    refused(TypeError, f"{name}: expected float32, the type of input, got {np.dtype(dtype)}", **{name: array})


@pytest.mark.parametrize("name", ["mean", "variance", "normalized_delta"])
def test_only_gamma_and_beta_may_be_none(name):
    refused(TypeError, f"{name}: expected float32, the type of input, got None", **{name: None})


def test_the_input_may_not_be_none():
    refused(TypeError, "input: expected float32 or float64, got None", input=None)


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
        ("1e-5", "'1e-5'"),
        (None, "None"),
        (1j, "1j"),
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


@pytest.mark.parametrize("count", [0, -1, -(2**80)])
def test_the_number_of_threads_is_positive(count):
    refused(ValueError, f"num_threads: expected at least 1, got {count}", options={"num_threads": count})


@pytest.mark.parametrize("count", [1.5, "2"])
def test_the_number_of_threads_is_an_integer(count):
    refused(TypeError, f"num_threads: expected an integer or None, got {count!r}", options={"num_threads": count})


def test_any_larger_number_of_threads_will_do():
    assert same_bits(call(), call(options={"num_threads": 2**80}))


def test_the_output_mask_has_an_entry_for_each_output():
    refused(ValueError, "output_mask: expected 3 booleans, got 2", options={"output_mask": (True, False)})
    refused(TypeError, "output_mask: expected 3 booleans, got 'yes'", options={"output_mask": "yes"})
    refused(TypeError, "output_mask: expected 3 booleans, got True", options={"output_mask": True})


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


class OnADevice(HasDLPack):
    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **options):
        raise BufferError("this tensor lives on a device")


def test_what_cannot_be_an_array_is_named():
    with pytest.raises(TypeError, match=r"^gamma: expected an array, got OnADevice: .*device"):
        call(gamma=OnADevice(BATCH.gamma))
    with pytest.raises(TypeError, match=r"^mean: expected an array, got list: "):
        call(mean=[[1], [2, 3]])
    refused(TypeError, "mean: expected float32, the type of input, got <U4", mean="mean")
    refused(TypeError, "mean: expected float32, the type of input, got object", mean=object())


def test_a_lying_array_is_refused():
    class Lies:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("no")

    refused(TypeError, "beta: expected an array, got Lies: no", beta=Lies())


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(variance=np.full(3, -1, np.float32))
