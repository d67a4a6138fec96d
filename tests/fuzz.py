"""Rubbish in: random calls of everything that is public, to be run in a sanitised build (`make sanitize`).

A call is made of good arguments, of which some are then spoilt: types, shapes, strides, overlaps, objects whose methods
lie, raise, or write to and resize the other arguments midway. Then

- a call that returns has results that agree with bnbp.reference, has written to its outputs and nowhere else, and its
  outputs share no byte with anything but the input that they are;
- a call that raises raises a TypeError or a ValueError whose message starts with the name of an argument, and has
  written nowhere.

`bnbp run` is given damaged files: it ends with code 0, 1 or 2, one line on stderr if not 0, and leaves nothing behind.

A call depends on the seed and its number alone. It runs in a worker process, so that a crash or a hang is a finding
like others: ``python tests/fuzz.py --seed 1 --first 1234 --calls 1`` makes call 1234 again.
"""

import argparse
import array as stdlib_array
import contextlib
import faulthandler
import io
import itertools
import mmap
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np

import bnbp
from bnbp import reference
from bnbp.engine import boundary

DTYPES = [np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]
WRONG = [np.dtype(t) for t in ("i4", "u1", "?", "c8", ">f4", ">f8", ">f2", "O", "S3", "U2", "M8[s]", "V2", "V4",
                               [("a", "f4")], [("a\udc80", "f8")], np.longdouble)]  # fmt: skip
INPUTS = {name.removeprefix("BatchNorm"): inputs for name, inputs in {
    "batch_norm_training": ("input", "gamma", "beta", "addend"),
    "batch_norm_training_backprop": ("input", "gamma", "beta", "mean", "variance", "normalized_delta", "normalized"),
    "batch_norm_training_statistics": ("input",),
    "batch_norm_training_backprop_reduce": ("input", "mean", "normalized_delta", "gamma", "beta", "variance",
                                            "normalized"),
    "batch_norm_training_backprop_apply": ("input", "gamma", "beta", "mean", "variance", "normalized_delta",
                                           "delta_sum", "delta_centered_sum", "normalized"),
    "batch_norm_inference": ("input", "gamma", "beta", "mean", "variance", "addend"),
    "batch_norm_inference_backprop": ("input", "gamma", "beta", "mean", "variance", "normalized_delta", "normalized"),
}.items()}  # fmt: skip
OUTPUTS = {"batch_norm_training": 3, "batch_norm_training_backprop": 3, "batch_norm_training_backprop_apply": 3,
           "batch_norm_inference": 1, "batch_norm_inference_backprop": 3}  # fmt: skip
TENSORS, SUMS = ("input", "normalized_delta", "addend", "normalized"), ("delta_sum", "delta_centered_sum")
ARGUMENTS = (
    "input|gamma|beta|mean|variance|normalized_delta|delta_sum|delta_centered_sum|count|epsilon|channel_axis|"
    "activation|addend|normalized|"
    r"output_mask|num_threads|limit|mode|merge_statistics|parts(\[\d+\])?( \(\w+\))?|out(\[\d+\])?( \(\w+\))?"
)
NAMED = re.compile(rf"({ARGUMENTS}): ")


class FindingError(Exception):
    """Something that must not happen."""


# ---------------------------------------------------------------- memory


class Memory:
    """What the arguments of a call are views of: what it was before, and who may write where."""

    def __init__(self, rng):
        self.rng = rng
        self.blocks, self.before, self.owners = [], [], []
        self.sabotaged = False

    def place(self, values, shared):
        """An array with these values in some layout: a view of memory of its own, or of one with other arrays in it."""
        rng, dtype, shape = self.rng, values.dtype, values.shape
        if rng.random() < 0.15:  # an array that owns its memory, and can be resized
            owner = np.array(values, order=rng.choice("CF"))
            self.owners.append(owner)
            return owner
        strides, step = [0] * len(shape), dtype.itemsize
        for axis in rng.sample(range(len(shape)), len(shape)) if rng.random() < 0.5 else range(len(shape))[::-1]:
            if rng.random() < 0.1:
                step += rng.choice([1, dtype.itemsize, 3 * dtype.itemsize])
            strides[axis] = step * (-1 if rng.random() < 0.15 else 1)
            step *= max(shape[axis], 1)
        if rng.random() < 0.1:
            strides[rng.randrange(len(shape))] = rng.choice([0, 0, 1, dtype.itemsize, -dtype.itemsize])
        low = sum(min(s, 0) * (n - 1) for s, n in zip(strides, shape, strict=True) if n)
        high = sum(max(s, 0) * (n - 1) for s, n in zip(strides, shape, strict=True) if n) + dtype.itemsize
        if 0 in shape:
            low, high = 0, 0
        if shared and self.blocks:
            k = rng.randrange(len(self.blocks))
            room = self.blocks[k].size - (high - low)
            if room >= 0:
                at = rng.choice([0, room, rng.randint(0, room), min(room, 64)])
                return self._view(k, at - low, shape, dtype, strides, None)
        lead = rng.choice([0, 0, 0, 1, 2, 4, 8, 24])  # ASan guards the end; what is left over is guarded by us
        tail = rng.choice([0, 0, 8, 100]) if not shared else rng.choice([0, high - low])
        block = np.frombuffer(rng.randbytes(lead + high - low + tail), np.uint8).copy()
        self.blocks.append(block)
        return self._view(len(self.blocks) - 1, lead - low, shape, dtype, strides, values)

    def _view(self, k, offset, shape, dtype, strides, values):
        view = np.ndarray(shape, dtype, self.blocks[k], 0 if 0 in shape else offset, strides)
        if values is not None:
            view[...] = values
        return view

    def snapshot(self):
        self.before = [block.tobytes() for block in self.blocks]
        self.before_owners = [owner.tobytes() for owner in self.owners]

    def mask(self, view):
        """Which bytes of its block belong to a view of it: the number of the block, and a bool for each byte."""
        address, itemsize = address_of(view), view.dtype.itemsize
        for k, block in enumerate(self.blocks):
            offset = address - address_of(block)
            if view.size and 0 <= offset < block.size:
                mask = np.zeros(block.size, bool)
                np.ndarray((*view.shape, itemsize), bool, mask, offset, (*view.strides, 1))[...] = True
                return k, mask
        return None

    def check(self, outputs, inputs):
        """Nothing has changed but the outputs, and they overlap nothing but the input that a tensor of them is."""
        if self.sabotaged:
            return
        outputs = [np.ndarray.view(array, np.ndarray) for array in outputs]
        allowed = [np.zeros(block.size, bool) for block in self.blocks]
        masks = [(array, self.mask(array)) for array in outputs]
        others = [(array, self.mask(array)) for array in inputs]
        for array, place in masks:
            if place is None:
                continue
            k, mask = place
            if (allowed[k] & mask).any():
                raise FindingError("outputs that overlap were taken")
            if mask.sum() != array.nbytes:
                raise FindingError("an output whose elements overlap was taken")
            allowed[k] |= mask
            for other, theirs in others:
                same = array.ndim > 1 and is_same(other, array)
                if theirs is not None and theirs[0] == k and (theirs[1] & mask).any() and not same:
                    raise FindingError("an output that overlaps an input was taken")
        for block, before, mask in zip(self.blocks, self.before, allowed, strict=True):
            changed = block != np.frombuffer(before, np.uint8)
            if (changed & ~mask).any():
                raise FindingError(f"bytes {np.flatnonzero(changed & ~mask)[:5]} were written that are no output's")
        for owner, before in zip(self.owners, self.before_owners, strict=True):
            if not any(np.may_share_memory(owner, array) for array in outputs) and owner.tobytes() != before:
                raise FindingError("an array was written to that is no output")


def is_same(a, b):
    """Whether two arrays are the same memory, seen in the same way."""
    steps = [[step for step, length in zip(v.strides, v.shape, strict=True) if length != 1] for v in (a, b)]
    return address_of(a) == address_of(b) and a.shape == b.shape and steps[0] == steps[1] and a.dtype == b.dtype


def address_of(array):
    return array.__array_interface__["data"][0]


# ---------------------------------------------------------------- liars

ERRORS = [TypeError, ValueError, RuntimeError, OverflowError, ZeroDivisionError, KeyError, AttributeError, OSError,
          IndexError, AssertionError, StopIteration, RecursionError]  # fmt: skip


class Rude(Exception):
    """An error that cannot even be printed."""

    def __str__(self):
        raise RuntimeError("rude")

    __repr__ = __str__


class Saboteur:
    """Does something to the other arguments, once, and then gives what it was asked for."""

    def __init__(self, memory, rng, answer, victims):
        self.memory, self.rng, self.answer, self.victims = memory, rng, answer, victims

    def act(self):
        self.memory.sabotaged = True
        for victim in self.victims:
            with contextlib.suppress(Exception):
                if isinstance(victim, list):
                    victim.clear()
                elif self.rng.random() < 0.7:
                    victim.resize(self.rng.choice([(0,), (1,), (100_000,)]), refcheck=False)
                elif self.rng.random() < 0.5:
                    victim.setflags(write=False)
                else:
                    victim[...] = 7
        if isinstance(self.answer, type) and issubclass(self.answer, BaseException):
            raise self.answer("out of order")
        return self.answer

    def __index__(self):
        return self.act()

    def __float__(self):
        return self.act()

    def __bool__(self):
        return self.act()

    def __array__(self, dtype=None, copy=None):
        return self.act()

    def __eq__(self, other):
        return self.act()

    __hash__ = None

    def __repr__(self):
        return self.act()


class Scalar:
    """A number that lies."""

    def __init__(self, answer, text="a liar"):
        self.answer, self.text = answer, text

    def _answer(self, *args):
        if isinstance(self.answer, type) and issubclass(self.answer, BaseException):
            raise self.answer("out of order") if self.answer is not Rude else Rude
        return self.answer

    __index__ = __float__ = __bool__ = __int__ = __len__ = __iter__ = __eq__ = _answer
    __hash__ = None

    def __repr__(self):
        if self.text is None:
            raise RuntimeError("no text")
        return self.text


class ArrayLiar:
    def __init__(self, answer):
        self.answer = answer

    def __array__(self, *args, **options):
        if isinstance(self.answer, type) and issubclass(self.answer, BaseException):
            raise self.answer("out of order") if self.answer is not Rude else Rude
        return self.answer


class DlpackLiar:
    def __init__(self, capsule, device):
        self.capsule, self.device = capsule, device

    def __dlpack__(self, **options):
        if isinstance(self.capsule, type) and issubclass(self.capsule, BaseException):
            raise self.capsule("out of order")
        return self.capsule

    def __dlpack_device__(self):
        if isinstance(self.device, type) and issubclass(self.device, BaseException):
            raise self.device("out of order")
        return self.device


class AttributeLiar:
    """Whatever is asked of it goes wrong."""

    def __init__(self, error):
        object.__setattr__(self, "error", error)

    def __getattribute__(self, name):
        raise object.__getattribute__(self, "error")(f"no {name}")


class InterfaceLiar:
    def __init__(self, interface):
        self.__array_interface__ = interface


class LyingArray(np.ndarray):
    """An array that says of itself what is not so."""

    dtype = property(lambda self: np.dtype(np.float64))
    shape = property(lambda self: (1000, 3))
    strides = property(lambda self: (8, 8))
    size = property(lambda self: 10**6)

    def __array__(self, *args, **options):
        raise RuntimeError("no")


class PosingArray:
    """Not an array, but isinstance believes it."""

    __class__ = np.ndarray

    def __init__(self, array=None):
        self.array = array

    def __getattr__(self, name):
        return getattr(self.array, name)


class LyingList(list):
    def __len__(self):
        return 3

    def __iter__(self):
        return iter([None] * 5)

    def __getitem__(self, k):
        raise RuntimeError("no")


class LyingTuple(tuple):
    def __len__(self):
        return 3

    def __iter__(self):
        return iter([0.0, 1.0, "x", None])


class Unequal:
    def __eq__(self, other):
        raise RuntimeError("no")

    def __ne__(self, other):
        raise RuntimeError("no")

    __hash__ = None

    def __index__(self):
        return 1


def integer_liar(rng, memory, victims):
    return rng.choice([
        lambda: Scalar(rng.choice([*ERRORS, Rude, None, 1.5, "1", 10**30, -1, 2]),
                       rng.choice(["liar", "two\nlines", None])),
        lambda: Saboteur(memory, rng, rng.choice([1, 2, 0, RuntimeError, None]), victims),
        lambda: rng.choice([None, 1.0, "1", b"1", [], np.float64(1), np.array([1, 2]), np.array(1), True, 10**5000,
                            -(10**5000), -1, 0, 2**31, 2**63, 2**64, -(2**63) - 1, float("nan"), object()]),
        lambda: AttributeLiar(rng.choice(ERRORS)),
        Unequal,
    ])()  # fmt: skip


def float_liar(rng, memory, victims):
    return rng.choice([
        lambda: Scalar(rng.choice([*ERRORS, Rude, None, 1, "1", 10.0, -1.0, float("inf")]), rng.choice(["liar", None])),
        lambda: Saboteur(memory, rng, rng.choice([1.0, RuntimeError, None]), victims),
        lambda: rng.choice([None, "1", "nan", float("nan"), float("inf"), -1e-300, 10**5000, 10**400, 1j, [], object(),
                            np.array([1.0, 2.0]), np.array([[0.5]]), np.float32(0.5), True, -1]),
        lambda: AttributeLiar(rng.choice(ERRORS)),
    ])()  # fmt: skip


class LyingText(str):
    def __eq__(self, other):
        return True

    __hash__ = None


class RudeText(str):
    def __eq__(self, other):
        raise RuntimeError("no")

    __hash__ = None


def activation_liar(rng, memory, victims):
    return rng.choice([
        lambda: rng.choice(["gelu", "RELU", "relu\0", "", "\udc80", "relu6" * 1000, b"relu", 0, 1, 6.0, True, [], {},
                            type, ("relu",), np.array("relu"), np.str_("relu"), object(), float("nan"), None]),
        lambda: rng.choice([LyingText, RudeText])(rng.choice(["relu", "gelu"])),
        lambda: Saboteur(memory, rng, rng.choice(["relu", None, RuntimeError]), victims),
        lambda: AttributeLiar(rng.choice(ERRORS)),
        Unequal,
    ])()  # fmt: skip


def array_liar(rng, memory, array, victims):
    def used_capsule():
        capsule = np.zeros((2, 2)).__dlpack__()
        np.from_dlpack(DlpackLiar(capsule, (1, 0)))
        return DlpackLiar(capsule, (1, 0))

    def raw(*shape):
        return {"shape": shape, "typestr": "<f8", "version": 3, "data": bytes(64)}

    return rng.choice([
        lambda: ArrayLiar(rng.choice([*ERRORS, Rude, None, 1, "x", [1.0], [[1.0], 2.0], array, array.T, array.tolist(),
                                      np.zeros(()), np.zeros((0, 0)), np.zeros((7, 3)), np.zeros(array.shape, "i4"),
                                      array.view(LyingArray), np.ma.masked_array(np.zeros((2, 2)))])),
        lambda: Saboteur(memory, rng, rng.choice([array, None, RuntimeError]), victims),
        lambda: DlpackLiar(rng.choice([None, 1, object(), *ERRORS]), rng.choice([(1, 0), (3, 0)])),
        lambda: DlpackLiar(None, rng.choice([None, (), ([], 0), ("x", 0), (2, 0), (99, 0), (None,), 7, *ERRORS,
                                             (Unequal(), 0), (10**5000, 0)])),
        used_capsule,
        lambda: AttributeLiar(rng.choice(ERRORS)),
        lambda: InterfaceLiar(rng.choice([None, {}, 1, raw(2, 2), raw(2, 4), raw(-1, 2), raw()])),
        lambda: array.view(LyingArray),
        lambda: PosingArray(array),
        lambda: rng.choice([None, 1, 1.5, "x", b"12345678", [], [[]], [None], [1, [2]], [10**30], object(), [1e300],
                            {}, set(), ..., NotImplemented, range(3), [[1j]], [[array]], memoryview(b"abcdefgh"),
                            bytearray(16), stdlib_array.array("d", [1.0, 2.0]), np.float64(2), LyingList([1.0]), type,
                            np.ma.masked_array(np.zeros((2, 2))), np.matrix([[1.0, 2.0]])]),
        lambda: memoryview(array) if array.dtype in DTYPES[2:] else array,
    ])()  # fmt: skip


# ---------------------------------------------------------------- a call of an operator

VECTORS = ("gamma", "beta", "mean", "variance")
SHAPES = [(2, 3), (1, 1), (4, 3, 2), (2, 3, 4, 5), (0, 3), (3, 2, 0), (5, 1), (1, 5, 1, 1), (7, 2, 3), (2, 2, 1, 3, 2),
          (40, 3), (3, 2, 65), (2, 33), (2, 1, 1, 2, 1, 3)]  # fmt: skip


def operator_call(rng, memory):
    """A public function, its arguments by name, and whether nothing is wrong with them."""
    name = rng.choice(list(INPUTS))
    shape = (
        rng.choice(SHAPES) if rng.random() < 0.9 else tuple(rng.randint(0, 4) or 1 for _ in range(rng.randint(2, 7)))
    )
    if rng.random() < 0.01:
        shape = (rng.choice([3000, 40]), 2, rng.choice([5, 100]))
    axis = rng.randrange(-len(shape), len(shape))
    if shape[axis] == 0 or rng.random() < 0.5:
        axis = next(k for k in range(len(shape)) if shape[k])
    dtype = rng.choice(DTYPES)
    parameters = rng.choice([dtype, DTYPES[2]]) if dtype.itemsize == 2 else dtype
    normal = np.random.default_rng(rng.getrandbits(32))
    shared = rng.random() < 0.2
    channels = shape[axis]

    def vector(low, high, kind=parameters):
        return normal.uniform(low, high, channels).astype(kind)

    values = {
        "input": (normal.normal(size=shape) * rng.choice([1, 1, 3]) + rng.choice([0, 0, 2])).astype(dtype),
        "gamma": vector(-2, 2),
        "beta": vector(-1, 1),
        "mean": vector(-1, 1),
        "variance": vector(0.5, 2),
        "normalized_delta": normal.normal(size=shape).astype(dtype),
        "addend": (3 * normal.normal(size=shape)).astype(dtype),
        "normalized": (normal.normal(size=shape) * rng.choice([1, 5])).astype(dtype),
        "delta_sum": vector(-3, 3, np.float64),
        "delta_centered_sum": vector(-3, 3, np.float64),
    }
    if rng.random() < 0.05 and values["input"].size:
        spoilt = rng.choice([n for n in INPUTS[name] if n not in SUMS])
        values[spoilt].flat[rng.randrange(values[spoilt].size)] = rng.choice([np.nan, np.inf, -np.inf, 6e4, -0.0])
    kwargs = {n: memory.place(values[n], False) for n in INPUTS[name]}
    clean = True
    for n in ("gamma", "beta", "addend", "normalized"):
        if n in kwargs and rng.random() < (0.2 if n in VECTORS else 0.5):
            kwargs[n] = None
    activation = rng.choice([None, None, "relu", "relu6"]) if name != "batch_norm_training_statistics" else None
    if activation or (name != "batch_norm_training_statistics" and rng.random() < 0.2):
        kwargs["activation"] = activation
    has_addend = "normalized" in kwargs and rng.random() < 0.4
    if has_addend or ("normalized" in kwargs and rng.random() < 0.2):
        kwargs["addend"] = has_addend
    if name.endswith("reduce"):
        for n in ("gamma", "beta", "variance"):
            if rng.random() < 0.3:
                kwargs[n] = None
        clean = not (activation and kwargs["normalized"] is None and kwargs["variance"] is None)
    if activation and has_addend and kwargs["normalized"] is None:
        clean = False
    if shared:
        for n in INPUTS[name]:
            if kwargs[n] is not None and n not in SUMS and rng.random() < 0.3:
                kwargs[n] = memory.place(values[n], True)
    kwargs["channel_axis"] = axis
    if rng.random() < 0.3:
        kwargs["num_threads"] = rng.randint(1, 4)
    if name != "batch_norm_training_statistics":
        kwargs["epsilon"] = rng.choice([1e-5, 0.5, 0, 0.0, np.float32(0.25), 1])
    if name.endswith("apply"):
        kwargs["count"] = values["input"].size // channels + rng.choice([0, 0, 1, 1000])
    outputs = outputs_of(name, kwargs)
    if outputs >= 3 and name != "batch_norm_training" and rng.random() < 0.3:
        kwargs["output_mask"] = rng.choice([tuple, list])(rng.random() < 0.5 for _ in range(outputs))
    if outputs and rng.random() < 0.6:
        out = []
        for k in range(outputs):
            like = values["input"] if k in (0, 3) else values["mean"]
            if rng.random() < 0.2:
                out.append(None)
            elif k in (0, 3) and rng.random() < 0.2:
                out.append(kwargs[rng.choice([n for n in TENSORS if is_array(kwargs.get(n))])])
                clean = clean and (k == 0 or out[0] is None or out[3] is not out[0])
            else:
                out.append(memory.place(np.zeros_like(like), shared))
                clean = clean and not shared
        clean = clean and not shared  # the input, which may be the output, may overlap another
        kwargs["out"] = rng.choice([tuple, list])(out)
        if outputs == 1 and is_array(out[0]) and rng.random() < 0.3:
            kwargs["out"] = out[0]
        for array in out:  # not every layout will do for an output
            if array is not None and not memory.owners and (array.base is None or 0 in array.strides):
                clean = False
        clean = clean and all(a is None or a.flags.c_contiguous for a in out)
        if name == "batch_norm_training" and kwargs["gamma"] is None and kwargs["beta"] is None:
            clean = clean and parameters == dtype
    return name, kwargs, clean


def outputs_of(name, kwargs):
    """The number of outputs, if the arguments are what they should be."""
    of_addend = "normalized" in INPUTS[name] and kwargs.get("addend") is True
    return OUTPUTS.get(name, 0) + of_addend * (name in OUTPUTS)


def arrays_of(kwargs):
    out = kwargs.get("out")
    out = [out] if is_array(out) else list(out) if type(out) in (list, tuple) else []
    values = [*kwargs.values(), *out]
    return [v for v in values if is_array(v)] + [v for v in values if type(v) is list]


def without_views(value):
    """The array, to make views of. One that can be resized is copied: NumPy's own views would be of nothing then."""
    if not is_array(value) or value.dtype not in DTYPES or value.size > 10**5:
        return np.zeros((2, 3))
    return value.copy() if value.base is None else value


def entries_of(out):
    """What is in a tuple or list, whatever a subclass says."""
    for kind in (list, tuple):
        if issubclass(type(out), kind):
            return list(kind.__iter__(out))
    return []


def is_array(value):
    return issubclass(type(value), np.ndarray)  # isinstance would ask the liars


def spoil(rng, memory, name, kwargs):
    """Put something wrong, or at least strange, into the place of an argument."""
    key = rng.choice([*kwargs, "channel_axis", "num_threads", "out", "output_mask", "epsilon", "activation"])
    if key in ("out", "output_mask", "epsilon") and (key not in kwargs and OUTPUTS.get(name, 0) < 3):
        return
    if key == "output_mask" and name == "batch_norm_training":
        return
    if key == "activation" and name == "batch_norm_training_statistics":
        return
    arrays = arrays_of(kwargs)
    victims = [v for v in rng.sample(arrays, min(2, len(arrays))) if type(v) in (np.ndarray, list)]
    old = kwargs.get(key)
    if key in ("channel_axis", "num_threads", "count"):
        kwargs[key] = rng.choice([integer_liar(rng, memory, victims), rng.randint(-9, 9)])
    elif key == "epsilon":
        kwargs[key] = float_liar(rng, memory, victims)
    elif key == "activation":
        kwargs[key] = activation_liar(rng, memory, victims)
    elif key == "addend" and "normalized" in INPUTS[name]:
        kwargs[key] = rng.choice([integer_liar(rng, memory, victims), rng.choice([True, False, None])])
    elif key == "output_mask":
        kwargs[key] = rng.choice([
            lambda: (True, rng.choice([integer_liar(rng, memory, victims), 2, 0]), False),
            lambda: [integer_liar(rng, memory, victims) for _ in range(3)],
            lambda: itertools.repeat(True), lambda: itertools.count(), lambda: LyingList([True]), lambda: (True,) * 4,
            lambda: LyingTuple((True, True, True)), lambda: np.array([True, False, True]), lambda: "abc", lambda: 7,
            lambda: Scalar(rng.choice(ERRORS)), lambda: (Unequal(), Unequal(), True), lambda: {1: 2, 0: 1, 3: 4},
            lambda: iter([True, False, True]), lambda: (Saboteur(memory, rng, 1, victims), True, True),
        ])()  # fmt: skip
    elif key == "out":
        out = (
            list(old) if type(old) in (list, tuple) and old else [old] + [None] * ((outputs_of(name, kwargs) or 1) - 1)
        )
        k = rng.randrange(len(out))
        array = without_views(out[k])
        choice = rng.choice([
            lambda: array.view(LyingArray), lambda: PosingArray(array), lambda: array_liar(rng, memory, array, victims),
            lambda: rng.choice(arrays), lambda: array[:0], lambda: array.T, lambda: array[None],
            lambda: np.broadcast_to(np.zeros((), array.dtype), array.shape),
            lambda: np.zeros(array.shape, rng.choice([d for d in [*DTYPES, *WRONG] if d.kind != "O"])),
            lambda: memory.place(np.zeros(array.shape, rng.choice(DTYPES)), True),
        ])()  # fmt: skip
        out[k] = choice
        kwargs[key] = rng.choice([
            tuple(out), out, tuple(out[:-1]), [*out, None], LyingList(out), LyingTuple(out), choice, "abc", 7,
            np.zeros((3, 2)), Scalar(rng.choice(ERRORS)), AttributeLiar(rng.choice(ERRORS)), iter(out),
        ] + [tuple(out)] * 10)  # fmt: skip
    else:
        array = without_views(old)
        kwargs[key] = rng.choice([
            lambda: array_liar(rng, memory, array, victims),
            lambda: array_liar(rng, memory, array, victims),
            lambda: array.T, lambda: array[None], lambda: array[..., :-1], lambda: array.tolist(), lambda: array[()],
            lambda: array.view(np.ma.MaskedArray) if array.dtype in DTYPES else array,
            lambda: np.zeros(array.shape, rng.choice(WRONG)),
            lambda: memory.place(array.astype(rng.choice(DTYPES)), False) if array.size < 10**5 else None,
            lambda: memory.place(array, True) if array.size < 10**5 else None,
            lambda: np.broadcast_to(np.zeros((), array.dtype), (2**40, 2, 2**18)),
            lambda: None,
        ])()  # fmt: skip


def expected_of(name, kwargs):
    """What the reference has to say, or None where it says nothing definite."""
    given = {n: v for n, v in kwargs.items() if n not in ("out", "num_threads")}
    for n, v in given.items():
        if n in INPUTS[name] and not (v is None or (type(v) is np.ndarray and v.dtype in DTYPES and v.size < 10**5)):
            return None
        if n in INPUTS[name] and v is not None and v.size and not np.isfinite(v.astype(np.float64)).all():
            return None
        if n == "output_mask" and type(v) not in (tuple, list):
            return None
        if n in ("channel_axis", "count") and type(v) is not int:
            return None
        if n == "activation" and not (v is None or (type(v) is str and v in ("relu", "relu6"))):
            return None
        if n == "addend" and "normalized" in INPUTS[name] and type(v) is not bool:
            return None
    try:
        if given.get("activation") and "normalized" in INPUTS[name] and given.get("normalized") is None:
            # Where the output is next to a corner, float64 has another mask: that of the operator's own output counts.
            options = {n: v for n, v in given.items() if n in ("channel_axis", "activation", "epsilon")}
            vectors = {n: given[n] for n in VECTORS}
            given["normalized"] = bnbp.batch_norm_inference(given["input"], **vectors, **options)
        if "epsilon" in given:
            given["epsilon"] = float(given["epsilon"])
        with np.errstate(all="ignore"):
            return getattr(reference, name)(**given), given
    except Exception:
        return None


def compare(name, got, expected, given):
    x = given["input"].astype(np.float64)
    eps = given.get("epsilon", 0.0)
    results, exact = ((got,), (expected,)) if name == "batch_norm_inference" else (got, expected)
    variance = given.get("variance")
    if name == "batch_norm_training":
        variance = expected.batch_variance
    with np.errstate(all="ignore"):
        inv_std = 1.0 if variance is None else np.max(1 / np.sqrt(variance.astype(np.float64) + eps), initial=1.0)
        arrays = [given[n] for n in INPUTS[name] if given.get(n) is not None]
        largest = max(np.max(np.abs(array.astype(np.float64)), initial=0) for array in arrays)
        scale = (1 + np.max(np.abs(x), initial=0)) * max(inv_std, 1.0) ** 2 * (1 + largest) ** 2
    for k, (a, b) in enumerate(zip(results, exact, strict=True)):
        if (a is None) != (b is None):
            raise FindingError(f"result {k}: {a!r}, the reference {b!r}")
        if a is None:
            continue
        b = np.asarray(b)
        a = np.asarray(a)
        if a.shape != b.shape:
            raise FindingError(f"result {k}: shape {a.shape}, the reference's {b.shape}")
        if b.ndim == 0:
            if a != b:
                raise FindingError(f"result {k}: {a}, the reference {b}")
            continue
        unit = float(ml_dtypes.finfo(a.dtype).eps)
        if given["input"].dtype.itemsize == 2:  # the gradient's sums of 16-bit numbers, 2^-20 of their terms
            unit = max(unit, 2.0**-24)
        if not np.isfinite(scale) or np.max(np.abs(b), initial=0) > 1e4 or not np.isfinite(b).all():
            continue
        error = np.max(np.abs(a.astype(np.float64) - b), initial=0)
        if not error <= 16 * unit * scale * (1 + np.max(np.abs(b), initial=0)) * (1 + x.size * 1e-3):
            raise FindingError(f"result {k}: an error of {error}, the scale is {scale}, {a.dtype}")


def run_operator(rng):
    memory = Memory(rng)
    name, kwargs, clean = operator_call(rng, memory)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 1, 1, 2, 3])):
        clean = False
        spoil(rng, memory, name, kwargs)
    inputs = [v for n, v in kwargs.items() if n in INPUTS[name] and type(v) is np.ndarray]
    expected = expected_of(name, kwargs)
    if expected is not None:
        given = {n: v.copy() if is_array(v) else v for n, v in expected[1].items()}
    out = kwargs.get("out")
    out = [out] if is_array(out) else entries_of(out)
    memory.snapshot()
    function = getattr(bnbp, name)
    # What has 2^40 samples is summed up sample by sample, for days.
    if hasattr(bnbp.exact, name) and rng.random() < 0.5 and not any(is_array(v) and v.size > 2**40 for v in inputs):
        function = rounded(getattr(bnbp.exact, name))
    results = attempt(function, kwargs, clean)
    if results is None:
        memory.check([], [])
        return False
    tuple_of = (results,) if is_array(results) else results
    memory.check([a for a, r in zip(out, tuple_of, strict=False) if a is not None and r is not None], inputs)
    for array, result in zip(out, tuple_of, strict=False):
        if array is not None and result is not None and array is not result:
            raise FindingError("a result that is not the array in `out`")
    if expected is not None and not memory.sabotaged:
        compare(name, results, expected[0], given)
    return True


def rounded(function):
    """The numbers that a function of `bnbp.exact` gives."""
    return lambda *args, **kwargs: function(*args, **kwargs).round()


def attempt(function, kwargs, clean, args=()):
    """The results, or None after an error that is as it should be."""
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        if not NAMED.match(str(error)):
            raise FindingError(f"{type(error).__name__} that names no argument: {error}") from error
        if clean:
            raise FindingError(f"good arguments were refused: {error}") from error
    except MemoryError as error:
        if not any(is_array(v) and v.size > 2**40 for v in kwargs.values()):
            raise FindingError("MemoryError") from error
    except Exception as error:
        raise FindingError(f"{type(error).__name__} is no TypeError or ValueError: {error!r}") from error
    return None


def run_other(rng):
    """The functions that are no operators."""
    memory = Memory(rng)
    kind = rng.randrange(3)
    if kind == 0:
        limit = rng.choice([integer_liar(rng, memory, []), rng.choice([0, 1 << 20, 1 << 28])])
        return attempt(bnbp.set_pool_limit, {}, type(limit) is int and limit >= 0, (limit,)) is not None
    if kind == 1:
        mode = rng.choice(["stdout", "dicts", integer_liar(rng, memory, []), np.array(["dicts", "x"]), Unequal()])
        with contextlib.redirect_stdout(io.StringIO()):
            return attempt(bnbp.show_config, {}, type(mode) is str and mode in ("stdout", "dicts"), (mode,)) is not None
    channels = rng.randint(0, 3)
    parts = []
    for _ in range(rng.randint(0, 4)):
        count = rng.choice([0, 1, 5, 10**6])
        parts.append((count, np.full(channels, rng.random()), np.full(channels, rng.random() if count else 0.0)))
    clean = bool(parts)
    for _ in range(rng.choice([0, 1, 1, 2])):
        if parts:
            clean = False
            k = rng.randrange(len(parts))
            part = list(parts[k]) if type(parts[k]) is tuple else [1, np.zeros(channels), np.zeros(channels)]
            field = rng.randrange(len(part))
            if field == 0:
                part[0] = rng.choice([integer_liar(rng, memory, part[1:]), 10**400, 2**63, 2**53 + 1])
            else:
                array = np.zeros(channels)
                part[field] = array_liar(rng, memory, array, [v for v in part[1:] if type(v) is np.ndarray])
            parts[k] = rng.choice(
                [tuple(part), tuple(part), tuple(part), part, LyingTuple(part), tuple(part[:2]), None]
            )
    args = rng.choice([tuple(parts), (parts,), (iter(parts),), (tuple(parts),)])
    if rng.random() < 0.1:
        clean = False
        args = (rng.choice([5, None, AttributeLiar(RuntimeError), "abc", Scalar(ValueError), np.zeros(3)]),)
    if not clean or len(parts) < 1:
        return attempt(bnbp.merge_statistics, {}, False, args) is not None
    result = attempt(bnbp.merge_statistics, {}, True, args)
    expected = reference.merge_statistics([bnbp.BatchNormStatistics(*part) for part in parts])
    if result.count != expected.count:
        raise FindingError(f"merged {result.count} elements, the reference {expected.count}")
    np.testing.assert_allclose(result.m2, expected.m2, rtol=1e-6, atol=1e-6)
    return True


# ---------------------------------------------------------------- bnbp run

OPS = {"training": 3, "training_backprop": 6, "inference": 5, "inference_backprop": 6}


def damage(rng, data):
    """A file's bytes with something wrong in them, most often in the header."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[rng.randrange(min(len(data), 128))] = rng.randrange(256)
        elif kind == 1 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[rng.randint(0, len(data)) :]
        elif kind == 3:
            data += rng.randbytes(rng.randint(1, 40))
        elif kind == 4 and data:
            at = rng.randrange(len(data))
            del data[at : at + rng.randint(1, 8)]
        else:
            old = rng.choice([b"<f8", b"<f4", b"False", b"shape", b"descr", b"(2, 3, 4)", b"(3,)", b"2", b"3",
                              b"NUMPY\x01", b"'", b",", b" "])  # fmt: skip
            new = rng.choice([b">f8", b"|O", b"V2", b"V0", b"M8[s]", b"True", b"(2, 3L, 4)", b"(-3,)", b"()", b"(3.0,)",
                              b"(9223372036854775807, 9223372036854775807)", b"(1000000, 3, 1000000)", b"0", b"None",
                              b"'\\d'", b"1if 2else 3", b"((((((", b"[('a', '<f8')]", b"NUMPY\x02", b"NUMPY\x03",
                              b"\0", b"\n", b"\xff", b"1" * 5000, b"-" * 3000 + b"1", b"True, True", b"S8",
                              b"|b1"])  # fmt: skip
            at = data.find(old)
            if at >= 0:
                replaced = data[:at] + new + data[at + len(old) :]
                if rng.random() < 0.8:  # the header keeps its length
                    surplus = len(replaced) - len(data)
                    end = replaced.find(b"    ", at)
                    if surplus > 0 and end > 0:
                        del replaced[end : end + surplus]
                    elif surplus < 0 and end > 0:
                        replaced[end:end] = b" " * -surplus
                data = replaced
    return bytes(data)


def run_files(rng, folder):
    """`bnbp run` in this process, on files of which some are damaged."""
    from bnbp import cli

    normal = np.random.default_rng(rng.getrandbits(32))
    op = rng.choice(list(OPS))
    names = ("input", "gamma", "beta", "mean", "variance", "normalized_delta")[: OPS[op]]
    dtype = rng.choice(["f8", "f4"])
    order = rng.choice("CCF")
    arrays = {
        n: np.asarray(normal.uniform(0.5, 2, (2, 3, 4) if n in TENSORS else (3,)), dtype, order=order) for n in names
    }
    if rng.random() < 0.2:
        arrays.pop(rng.choice(list(arrays)))
    if rng.random() < 0.1:
        arrays[rng.choice(["inptu", "x\ny", "\x1b[1m", "mean "])] = np.zeros(3)
    in_folder = rng.random() < 0.5
    source, target = folder / "in", folder / ("out" if in_folder else "out.npz")
    spoilt = rng.random() < 0.8
    if in_folder:
        source.mkdir()
        for n, array in arrays.items():
            np.save(source / f"{n}.npy", array)
        if spoilt and arrays:
            file = source / f"{rng.choice(list(arrays))}.npy"
            file.write_bytes(damage(rng, file.read_bytes()))
            if rng.random() < 0.03:
                file.unlink()
                file.mkdir()
    else:
        source = folder / "in.npz"
        if rng.random() < 0.5:
            np.savez(source, **arrays)
            if spoilt:
                source.write_bytes(damage(rng, source.read_bytes()))
        else:  # a sound archive of a damaged array
            import zipfile

            with zipfile.ZipFile(source, "w") as archive:
                bad = rng.choice([*arrays, None]) if spoilt else None
                for n, array in arrays.items():
                    stream = io.BytesIO()
                    np.save(stream, array)
                    archive.writestr(f"{n}.npy", damage(rng, stream.getvalue()) if n == bad else stream.getvalue())
    argv = ["bnbp", "run", str(source), "-o", str(target), "--op", op]
    if rng.random() < 0.3:
        argv += rng.choice([["--epsilon", "nan"], ["--epsilon", "x"], ["--channel-axis", "7"], ["--num-threads", "0"],
                            ["--channel-axis=-2"], ["--num-threads", "2"], ["--bad"], ["--epsilon", "1e400"],
                            ["--channel-axis", "9" * 5000], ["--force"], ["a\nb"]])  # fmt: skip
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    out, err = io.StringIO(), io.StringIO()
    old_argv, sys.argv = sys.argv, argv
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)
            code = cli.main()
    except BaseException as error:
        raise FindingError(f"bnbp run: {type(error).__name__}: {error}") from error
    finally:
        sys.argv = old_argv
    text = err.getvalue()
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if code not in (0, 1, 2):
        raise FindingError(f"bnbp run: exit code {code}")
    if code == 0 and text:
        raise FindingError(f"bnbp run: success, and yet {text!r}")
    if code and (text.count("\n") != 1 or not text.startswith("bnbp: ")):
        raise FindingError(f"bnbp run: not one line: {text!r}")
    if code and (after != before or target.exists()):
        raise FindingError("bnbp run: failed, and left something behind")
    if code == 0 and any(after.get(path) != data for path, data in before.items()):
        raise FindingError("bnbp run: an input file has changed")
    if code == 0 and not target.exists():
        raise FindingError("bnbp run: success without results")
    return code == 0


# ---------------------------------------------------------------- the loop


def one(seed, number, folder):
    """Make a call; whether it succeeded."""
    rng = random.Random(f"{seed}:{number}")
    if number % 64 == 0:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return run_files(rng, folder)
    if number % 32 == 1:
        return run_other(rng)
    boundary.set_l2_size(rng.choice([1 << 10, 1 << 20]))  # so that small arrays reach every schedule
    return run_operator(rng)


def work(options, progress):
    """Make calls until there are enough, and say of each how it went."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    end = time.monotonic() + options.seconds if options.seconds else None
    with tempfile.TemporaryDirectory(prefix="bnbp-fuzz-") as name:
        for number in range(options.first, options.first + options.calls):
            progress[:8] = number.to_bytes(8, "little")
            try:
                kind = "returned" if one(options.seed, number, Path(name)) else "refused"
            except FindingError as finding:
                kind = "findings"
                print(f"call {number}: {str(finding) or type(finding).__name__}"[:500], flush=True)
                if options.calls == 1:
                    traceback.print_exc()
            except Exception as error:  # of the fuzzer itself, or a result that cannot even be looked at
                kind = "findings"
                print(f"call {number}: {type(error).__name__} in the fuzzer: {error!r}"[:500], flush=True)
                if options.calls < 10_000:
                    traceback.print_exc()
            index = ("returned", "refused", "findings").index(kind)
            at = 8 + 8 * index
            progress[at : at + 8] = (int.from_bytes(progress[at : at + 8], "little") + 1).to_bytes(8, "little")
            if end and time.monotonic() > end:
                return


def work_in_cpp(options):
    """As many calls of the C++ classes; what goes wrong there ends the process."""
    import fuzz_cpp

    computed = fuzz_cpp.fuzz(options.seed, options.calls)
    print(f"{options.calls} C++ calls with seed {options.seed}: {computed} computed, 0 findings")


def main():
    """Run the calls in worker processes; the exit code is 1 if there were findings."""
    parser = argparse.ArgumentParser(description="Random calls of bnbp's public surface.")
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=0, help="stop after this time; 0 for never")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cpp", action="store_true", help="calls of the C++ classes; needs what make sanitize builds")
    options = parser.parse_args()
    if options.cpp:
        work_in_cpp(options)
        return 0
    if options.worker:
        with options.worker.open("r+b") as stream:
            work(options, mmap.mmap(stream.fileno(), 32))
        return 0
    started, first, last, totals, crashes = time.monotonic(), options.first, options.first + options.calls, [0, 0, 0], 0
    with tempfile.TemporaryDirectory(prefix="bnbp-fuzz-") as folder:
        shared = Path(folder, "progress")
        while first < last:
            shared.write_bytes(bytes(32))
            command = [sys.executable, __file__, "--worker", shared, "--seed", options.seed, "--first", first]
            left = max(options.seconds - (time.monotonic() - started), 0.1) if options.seconds else 0
            worker = subprocess.Popen(list(map(str, [*command, "--calls", last - first, "--seconds", left])))
            number, since, hung = -1, time.monotonic(), False
            while worker.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.wait(1)
                now = int.from_bytes(shared.read_bytes()[:8], "little")
                if now != number:
                    number, since = now, time.monotonic()
                elif time.monotonic() - since > 60:
                    hung = True
                    worker.kill()
            state = shared.read_bytes()
            number, *counts = (int.from_bytes(state[k : k + 8], "little") for k in range(0, 32, 8))
            totals = [a + b for a, b in zip(totals, counts, strict=True)]
            if worker.returncode == 0:
                break
            crashes += 1
            print(f"call {number}: {'hung' if hung else f'ended the process, {worker.returncode}'}", flush=True)
            first = number + 1
            if options.seconds and time.monotonic() - started > options.seconds:
                break
    findings, seconds = totals[2] + crashes, time.monotonic() - started
    print(
        f"{sum(totals) + crashes} calls from {options.first} with seed {options.seed} in {seconds:.0f} s: "
        f"{totals[0]} returned, {totals[1]} were refused, {findings} findings"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
