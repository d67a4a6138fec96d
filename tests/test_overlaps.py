"""Which overlaps are refused: what is said of any shapes and strides is compared with sets of bytes.

An output has memory for each of its elements, and shares none with an input or another output; but a tensor may be all
of an input. Memory is small here, and tensors lie anywhere in it, at any distance from element to element.
"""

from collections import Counter

import numpy as np
import pytest
from conftest import make_batch, same_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bnbp

INPUTS = ("input", "gamma", "beta", "mean", "variance", "normalized_delta")
TENSORS = ("input", "normalized_delta", "input_delta")
# What may lie in the memory that they share; the others have their own.
SHARING = (*TENSORS, "mean", "gamma_delta", "beta_delta")
MIDDLE = 4096


@st.composite
def strides_for(draw, shape, size):
    """Any at all; some that add up to another; those of a dense array in any order and direction, with gaps or not."""
    kind = draw(st.sampled_from(["any", "sum", "dense"]))
    if kind == "dense":
        strides, step = [0] * len(shape), size
        for axis in draw(st.permutations(range(len(shape)))):
            strides[axis] = step * draw(st.sampled_from([1, -1]))
            step *= shape[axis] + draw(st.sampled_from([0, 0, 1]))
        return tuple(strides)
    unit, most = (1, 40) if kind == "any" else (size, 20)
    strides = [unit * draw(st.integers(-most, most)) for _ in shape]
    if kind == "sum":
        strides[-1] = sum(stride * draw(st.sampled_from([1, -1])) for stride in strides[:-1])
    return tuple(strides)


@st.composite
def calls(draw):
    """The type, the shape of the tensors, and of some arguments where they begin and their strides."""
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    size = np.dtype(dtype).itemsize
    shape = tuple(draw(st.lists(st.sampled_from([2, 3, 1]), min_size=2, max_size=4)))
    placed = {}
    for name in draw(st.lists(st.sampled_from(SHARING), min_size=1, max_size=3, unique=True)):
        of = shape if name in TENSORS else shape[1:2]
        others = [other for other in placed if (other in TENSORS) == (name in TENSORS)]
        if others and draw(st.booleans()):  # where another is, or beside it, and a part of its strides
            begin, strides = placed[draw(st.sampled_from(others))]
            begin += draw(st.sampled_from([0, 0, 0, size, -size, 1]))
            strides = draw(st.sampled_from([strides, strides, strides[::-1], draw(strides_for(of, size))]))
            placed[name] = begin, strides
        else:
            placed[name] = draw(st.integers(-100, 100)), draw(strides_for(of, size))
    return dtype, shape, placed


def bytes_of(array):
    """The addresses of an array's bytes, in the order of its elements."""
    places = np.array([array.__array_interface__["data"][0]])
    for length, stride in zip(array.shape, array.strides, strict=True):
        places = np.add.outer(places, np.arange(length) * stride)
    return np.add.outer(places, np.arange(array.itemsize)).ravel().tolist()


def is_refused(inputs, outputs):
    """By the rules, with sets."""
    for k, output in enumerate(outputs):
        own = bytes_of(output)
        if len(set(own)) < len(own):
            return True
        same = [k == 0 and x.shape == output.shape and bytes_of(x) == own for x in inputs]
        if any(set(own) & set(bytes_of(x)) and not all_of for x, all_of in zip(inputs, same, strict=True)):
            return True
        if any(set(own) & set(bytes_of(other)) for other in outputs[:k]):
            return True
    return False


HALF, SINGLE, DOUBLE = np.float16, np.float32, np.float64
KNOWN = [  # what a search has overlooked
    (SINGLE, (2, 2, 2, 2), {"input_delta": (0, (64, 28, 52, 40))}),
    (SINGLE, (1, 2), {"gamma_delta": (0, (4,)), "beta_delta": (4, (4,))}),
    (DOUBLE, (1, 2), {"mean": (8, (8,)), "beta_delta": (0, (8,))}),
    (SINGLE, (2, 3), {"input_delta": (0, (12, 4)), "beta_delta": (8, (4,))}),
    (SINGLE, (2, 2), {"input": (0, (8, 4)), "input_delta": (0, (4, 8))}),
    (HALF, (3, 3), {"normalized_delta": (0, (6, 2)), "input_delta": (0, (6, -2))}),
    (SINGLE, (2, 2), {"input": (0, (8, 4)), "input_delta": (0, (8, 4))}),
]


def test_what_is_refused_is_what_overlaps():
    answers = Counter()

    def check(call):
        dtype, shape, placed = call
        # Bytes of which any two, four or eight are a number of moderate size.
        memory = np.random.default_rng(0).integers(0x3E, 0x42, 2 * MIDDLE, np.uint8)
        batch = make_batch(shape, 1, dtype)._asdict()
        arrays = batch | {"input_delta": np.zeros(shape, dtype)}
        arrays |= {name: np.zeros(shape[1], dtype) for name in ("gamma_delta", "beta_delta")}
        for name, (begin, strides) in placed.items():
            of = arrays[name].shape
            # An axis of length 1 has a stride that says nothing; here tensors agree about it.
            strides = [stride if length > 1 else 0 for length, stride in zip(of, strides, strict=True)]
            arrays[name] = np.ndarray(of, dtype, memory, MIDDLE + begin, strides)
        inputs, outputs = [arrays[name] for name in INPUTS], [arrays[name] for name in arrays if name not in INPUTS]
        expected = bnbp.batch_norm_training_backprop(*inputs)
        before = memory.copy()
        refused = is_refused(inputs, outputs)
        if refused:
            with pytest.raises(ValueError, match=r"^out\[\d\] "):
                bnbp.batch_norm_training_backprop(*inputs, out=outputs)
            assert np.array_equal(memory, before)
        else:
            assert same_bits(bnbp.batch_norm_training_backprop(*inputs, out=outputs), expected)
        answers[refused] += 1

    for call in KNOWN:
        check = example(call)(check)
    settings(max_examples=1500)(given(calls())(check))()
    assert min(answers[True], answers[False]) > 200, answers


# With an addend: another tensor that is read, and of the gradient another that is written.
WITH_ADDEND = ("input", "normalized_delta", "normalized", "input_delta", "addend_delta")


@st.composite
def calls_with_addend(draw):
    """The type, the shape, and of some tensors where they begin and their strides."""
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    size = np.dtype(dtype).itemsize
    shape = tuple(draw(st.lists(st.sampled_from([2, 3, 1]), min_size=2, max_size=4)))
    placed = {}
    for name in draw(st.lists(st.sampled_from(WITH_ADDEND), min_size=2, max_size=4, unique=True)):
        if placed and draw(st.booleans()):
            begin, strides = placed[draw(st.sampled_from(list(placed)))]
            placed[name] = begin + draw(st.sampled_from([0, 0, 0, size, 1])), strides
        else:
            placed[name] = draw(st.integers(-100, 100)), draw(strides_for(shape, size))
    return dtype, shape, placed


def placed_tensors(shape, dtype, placed, memory):
    for name, (begin, strides) in placed.items():
        strides = [stride if length > 1 else 0 for length, stride in zip(shape, strides, strict=True)]
        yield name, np.ndarray(shape, dtype, memory, MIDDLE + begin, strides)


def is_refused_with_addend(inputs, outputs):
    """Each output may be one of the inputs, all of it, but no two may be the same."""
    taken = set()
    for output in outputs:
        own = bytes_of(output)
        if len(set(own)) < len(own) or taken & set(own):
            return True
        if any(set(own) & set(bytes_of(x)) and bytes_of(x) != own for x in inputs):
            return True
        taken |= set(own)
    return False


def test_with_an_addend_too():
    answers = Counter()

    def check(call):
        dtype, shape, placed = call
        memory = np.random.default_rng(0).integers(0x3E, 0x42, 2 * MIDDLE, np.uint8)
        batch, new = make_batch(shape, 1, dtype), dict(placed_tensors(shape, dtype, placed, memory))
        x, delta, y = (
            new.get(name, like)
            for name, like in zip(WITH_ADDEND, (batch[0], batch[5], batch[0] + dtype(1)), strict=False)
        )
        out, other = (new.get(name, np.zeros(shape, dtype)) for name in WITH_ADDEND[3:])
        vectors = batch[1:5]
        backward = bnbp.batch_norm_training_backprop, (x, *vectors, delta), {"normalized": y, "addend": True}
        forward = bnbp.batch_norm_inference, (x, *vectors), {"addend": y}
        for (function, arguments, options), inputs, outputs in (
            (backward, (x, delta, y), (out, None, None, other)),
            (forward, (x, y), (out,)),
        ):
            start = memory.copy()
            expected = function(*arguments, activation="relu", **options)
            written = [array for array in outputs if array is not None]
            refused = is_refused_with_addend(inputs, written)
            if refused:
                with pytest.raises(ValueError, match=r"^out\[\d\] "):
                    function(*arguments, activation="relu", out=outputs, **options)
                assert np.array_equal(memory, start)
            else:
                got = function(*arguments, activation="relu", out=outputs, **options)
                pair = (got, expected) if function is backward[0] else ([got], [expected])
                assert same_bits(*pair)
                memory[...] = start
            answers[function.__name__, refused] += 1

    settings(max_examples=800)(given(calls_with_addend())(check))()
    assert min(answers.values()) > 80, answers
    assert len(answers) == 4
