"""bnbp.dask: lazily, in chunks of any shape, the operators' results; no more in memory than a few chunks."""

import doctest
import math
import threading
import time
import weakref

import dask
import dask.array as da
import numpy as np
import pytest
from conftest import eps, make_batch, make_telling, python, same_bits
from numpy.lib.stride_tricks import as_strided

import bnbp.dask
from bnbp import reference
from bnbp.dask import _again, _arguments, _blocks, _operators

pytestmark = pytest.mark.cluster

#: Shapes, channel axes and chunks: along each axis, of equal and other sizes, empty ones, single ones.
CHUNKED = [
    ((6, 4, 5, 3), 1, ((2, 4), (3, 1), (5,), (1, 2))),
    ((7, 3), 1, ((1,) * 7, (1,) * 3)),
    ((5, 4, 6), -1, ((2, 3), (4,), (1, 5))),
    ((4, 9, 2), 0, ((1, 3), (4, 5), (2,))),
    ((9, 2, 3), 1, ((3, 0, 6), (2,), (3,))),
    ((6, 5, 2), 1, ((6,), (2, 0, 3), (2,))),
    ((20, 2, 2, 2), 1, ((1,) * 20, (2,), (1, 1), (2,))),
]

#: An activation, whether there is an addend, and whether the gradient is given the forward operator's result.
FUSED = [
    (None, False, False),
    ("relu", False, False),
    ("relu6", False, True),
    ("relu", True, True),
    ("relu6", True, True),
    (None, True, False),
]


@pytest.fixture(autouse=True)
def _synchronous():
    """One task after the other, where a test does not say more."""
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel is called with elements to work on."""
    counts = {}

    def counted(module, name):
        function = getattr(module, name)

        def call(input, *args, **options):
            if input.size and options.get("out") is None:
                counts[name] = counts.get(name, 0) + 1
            return function(input, *args, **options)

        monkeypatch.setattr(module, name, call)

    for name in bnbp.ops.__all__:
        counted(bnbp, name)
    for name in ("batch_norm_training_statistics", "batch_norm_training_backprop_reduce"):
        counted(bnbp.exact, name)
    return counts


def whole_samples(shape, axis, rng):
    """Random chunks of whole samples; also along the channels, if these come next to the batch."""
    cut = (0, 1) if axis in (0, 1) else (0,)

    def sizes(length):
        places = np.sort(rng.integers(0, length + 1, rng.integers(0, 5)))
        return tuple(np.diff([0, *places, length]).tolist())

    return tuple(sizes(n) if k in cut else (n,) for k, n in enumerate(shape))


def both(batch, chunks, axis=1, **options):
    """The results of the two training operators, computed at once."""
    x, delta = (da.from_array(each, chunks=chunks) for each in (batch.input, batch.normalized_delta))
    forward = bnbp.dask.batch_norm_training(x, batch.gamma, batch.beta, channel_axis=axis, **options)
    backward = bnbp.dask.batch_norm_training_backprop(
        *(x, batch.gamma, batch.beta, forward.batch_mean, forward.batch_variance, delta), channel_axis=axis, **options
    )
    return dask.compute(*forward, *backward)


def assert_all_within(results, expected, scales, dtype, parameters):
    """Within a few roundings of the terms; sums within what the contract says of their terms."""
    for actual, exact, scale in zip(results, expected, scales, strict=True):
        of_channels = exact.ndim == 1
        assert actual.dtype == (parameters if of_channels else dtype)
        assert actual.shape == exact.shape
        term = 2.0**-20 if np.dtype(dtype).itemsize == 2 else 2.0**-44 if np.dtype(dtype).itemsize == 4 else 2.0**-51
        bound = eps(parameters) * abs(exact) + term * scale if of_channels else 8 * eps(dtype) * scale
        assert np.all(abs(actual.astype(np.float64) - exact) <= bound)


# ---------------------------------------------------------------- the results


@pytest.mark.parametrize("reproducible", [True, False])
@pytest.mark.parametrize(("shape", "axis", "chunks"), CHUNKED)
def test_results_are_those_of_the_whole_batch(shape, axis, chunks, types, reproducible):
    dtype, parameters = types
    batch = make_batch(shape, axis, dtype, parameters=parameters)
    results = both(batch, chunks, axis, reproducible=reproducible)
    x, gamma, beta, *_, delta = (each.astype(np.float64) for each in batch)
    forward = reference.batch_norm_training(x, gamma, beta, channel_axis=axis)
    statistics = [each.astype(np.float64) for each in results[1:3]]
    backward = reference.batch_norm_training_backprop(x, gamma, beta, *statistics, delta, channel_axis=axis)

    along = [1 if k != axis % len(shape) else -1 for k in range(len(shape))]
    others = tuple(k for k in range(len(shape)) if k != axis % len(shape))
    mean, variance = (each.reshape(along) for each in statistics)
    inverse = 1 / np.sqrt(variance + 1e-5)
    spread = abs(x - mean) * inverse
    sums = abs(delta).sum(others), (abs(delta) * spread).sum(others)
    count = math.prod(shape) // shape[axis]
    of_element = abs(delta) + (sums[0].reshape(along) + spread * sums[1].reshape(along)) / count
    scales = (
        abs(gamma).reshape(along) * (spread + 1) + abs(beta).reshape(along),
        abs(x).mean(others),
        forward.batch_variance + abs(x).mean(others),
        abs(gamma).reshape(along) * inverse * of_element,
        sums[1],
        sums[0],
    )
    assert_all_within(results, (*forward, *backward), scales, dtype, parameters)


@pytest.mark.parametrize("op", ["training", "inference"])
@pytest.mark.parametrize(("activation", "with_addend", "with_normalized"), FUSED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_options_are_the_operators_own(op, activation, with_addend, with_normalized, dtype):
    shape, chunks = (6, 4, 5, 3), ((2, 4), (3, 1), (5,), (1, 2))
    batch = make_batch(shape, 1, dtype)
    batch = batch._replace(gamma=4 * batch.gamma)
    addend = np.random.default_rng(5).normal(0, 3, shape).astype(dtype) if with_addend else None
    x = da.from_array(batch.input, chunks=chunks)
    statistics = [batch.mean, batch.variance]
    options = {"activation": activation, "epsilon": 1e-3}
    forward = *statistics[: 2 * (op == "inference")], 1e-3
    expected = getattr(bnbp, f"batch_norm_{op}")(
        *(batch.input, batch.gamma, batch.beta, *forward), activation=activation, addend=addend
    )
    actual = getattr(bnbp.dask, f"batch_norm_{op}")(
        *(x, batch.gamma, batch.beta, *forward), activation=activation, addend=addend
    )
    tight = {"rtol": 0, "atol": 64 * eps(dtype)}
    whole, lazy = (expected[0], actual[0]) if op == "training" else (expected, actual)
    np.testing.assert_allclose(lazy.compute(), whole, **tight)
    if activation:
        assert 0.1 < np.mean(whole == 0) < 0.9  # not degenerate
        assert (np.mean(whole == 6) > 0.01) == (activation == "relu6")

    options |= {"normalized": whole if with_normalized else None, "addend": with_addend}
    arguments = batch.gamma, batch.beta, *statistics, batch.normalized_delta
    expected = getattr(bnbp, f"batch_norm_{op}_backprop")(batch.input, *arguments, **options)
    actual = getattr(bnbp.dask, f"batch_norm_{op}_backprop")(x, *arguments, **options)
    assert type(actual) is type(expected)
    for name, lazy in actual._asdict().items():
        np.testing.assert_allclose(lazy.compute(), getattr(expected, name), rtol=8 * eps(dtype), atol=256 * eps(dtype))


@pytest.mark.parametrize("mask", [(1, 0, 0, 1), (0, 0, 0, 1), (0, 1, 0, 0), (0, 0, 1, 0), (1, 1, 1, 0), (0, 0, 0, 0)])
def test_what_the_mask_leaves_out_is_none(mask, calls):
    batch = make_batch((6, 4, 5))
    x = da.from_array(batch.input, chunks=(2, 4, 5))
    masked = [bool(each) for each in mask]
    options = {"activation": "relu", "addend": True, "normalized": batch.input, "output_mask": masked}
    lazy = bnbp.dask.batch_norm_training_backprop(x, *batch[1:], **options)
    assert [each is not None for each in lazy] == masked
    results = dask.compute(*lazy)
    assert calls.get("batch_norm_training_backprop_apply", 0) == 3 * (mask[0] | mask[3])
    for actual, expected in zip(results, bnbp.batch_norm_training_backprop(*batch, **options), strict=True):
        assert (actual is None) == (expected is None)
        assert actual is None or np.allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_operands_may_be_dask_arrays_of_other_chunks_numpy_arrays_and_lists():
    batch = make_batch((6, 4, 5), dtype=np.float32)
    x = da.from_array(batch.input, chunks=((2, 4), (3, 1), 5))
    vectors = [
        da.from_array(batch.gamma, chunks=2),
        batch.beta.tolist(),
        da.from_array(batch.mean, chunks=(3, 1)),
        batch.variance,
    ]
    expected = bnbp.dask.batch_norm_training_backprop(x, *batch[1:5], da.from_array(batch[5], chunks=x.chunks))
    for delta in (batch.normalized_delta, da.from_array(batch.normalized_delta, chunks=(5, 1, 2))):
        actual = bnbp.dask.batch_norm_training_backprop(x, *vectors, delta)
        assert actual.input_delta.chunks == x.chunks
        assert actual.gamma_delta.chunks == actual.beta_delta.chunks == ((3, 1),)
        assert same_bits(dask.compute(*actual), dask.compute(*expected))


def test_a_mean_far_from_zero_costs_nothing():
    rng = np.random.default_rng(0)
    values = (1e4 + rng.normal(size=(64, 2, 8))).astype(np.float32)  # the float32 mean is off by up to 5e-4
    lazy = bnbp.dask.batch_norm_training(da.from_array(values, chunks=(7, 2, 8)))
    expected = reference.batch_norm_training(values)
    np.testing.assert_allclose(lazy.normalized.compute(), expected.normalized, atol=1e-5)
    constant = bnbp.dask.batch_norm_training(da.full((9, 2), 0.1, chunks=2))
    assert not np.any(constant.batch_variance.compute())


@pytest.mark.parametrize("reproducible", [True, False])
def test_a_nan_or_an_infinity_stays_in_its_channel(reproducible):
    batch = make_batch((6, 4, 5))
    spoilt = batch.input.copy()
    spoilt[3, 1, 2], spoilt[0, 2, 0] = np.nan, np.inf
    chunks = ((2, 4), (4,), (5,))
    clean = both(batch, chunks, reproducible=reproducible)
    results = both(batch._replace(input=spoilt), chunks, reproducible=reproducible)
    for actual, expected in zip(results, clean, strict=True):
        actual, expected = (each if each.ndim == 1 else np.moveaxis(each, 1, 0) for each in (actual, expected))
        assert same_bits([actual[[0, 3]]], [expected[[0, 3]]])
    assert np.isnan(results[0][:, 1:3]).all()
    plain = bnbp.batch_norm_training(spoilt)
    np.testing.assert_array_equal(np.isnan(results[1]), np.isnan(plain.batch_mean))


@pytest.mark.parametrize("reproducible", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0), (1, 3)])
def test_batches_without_elements_and_of_one_are_as_the_operators_say(shape, reproducible):
    values, delta = np.ones(shape), np.full(shape, 2.0)
    x = da.from_array(values, chunks=2)
    lazy = bnbp.dask.batch_norm_training(x, reproducible=reproducible)
    vectors = None, None, np.ones(3), np.ones(3)
    back = bnbp.dask.batch_norm_training_backprop(x, *vectors, delta, reproducible=reproducible)
    expected = *bnbp.batch_norm_training(values), *bnbp.batch_norm_training_backprop(values, *vectors, delta)
    for actual, own in zip(dask.compute(*lazy, *back), expected, strict=True):
        np.testing.assert_array_equal(actual, own)
        assert actual.shape == own.shape


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize(
    ("shape", "axis"), [((24, 5, 7, 3), 1), ((40, 6), 1), ((17, 33, 9), -1), ((5, 16, 30), 0), ((12, 3, 400), 1)]
)
def test_bits_do_not_depend_on_how_whole_samples_are_chunked(shape, axis, dtype):
    rng = np.random.default_rng(1)
    batch = make_telling(shape, axis, dtype)
    x = batch.input
    vectors = batch.gamma, batch.beta
    seen, plain = set(), set()
    for k in range(20):
        chunks = whole_samples(shape, axis, rng)
        for reproducible, found in ((True, seen), (False, plain))[: 2 if k < 8 else 1]:
            lazy = (da.from_array(each, chunks=chunks) for each in (x, batch.normalized_delta))
            x_, delta = lazy
            with np.errstate(all="ignore"):
                forward = bnbp.dask.batch_norm_training(x_, *vectors, channel_axis=axis, reproducible=reproducible)
                backward = bnbp.dask.batch_norm_training_backprop(
                    *(x_, *vectors, batch.mean, batch.variance, delta), channel_axis=axis, reproducible=reproducible
                )
                results = dask.compute(*forward, *backward)
            found.add(b"".join(np.ascontiguousarray(each).tobytes() for each in results))
    assert len(seen) == 1
    if np.dtype(dtype).itemsize == 8:
        assert len(plain) > 1  # the data tells in which order it is summed up


def test_bits_do_not_depend_on_how_chunks_lie_in_memory():
    batch = make_telling((12, 5, 40, 6))

    def laid_out(array):
        last = np.moveaxis(array, 1, -1).copy()  # channels last in memory, with the channels on axis 1 of a view
        views = da.moveaxis(da.from_array(last, chunks=(4, 40, 6, 5)), -1, 1)
        copies = da.from_array(array, chunks=(3, 5, 40, 6))
        return views, copies, da.concatenate([views[:4], copies[4:]]), views.rechunk((1, 5, 40, 6))

    results = [
        dask.compute(
            *bnbp.dask.batch_norm_training(x)[1:],
            *bnbp.dask.batch_norm_training_backprop(x, None, None, batch.mean, batch.variance, delta)[1:],
        )
        for x in laid_out(batch.input)
        for delta in laid_out(batch.normalized_delta)
    ]
    assert all(same_bits(results[0], others) for others in results[1:])
    wide = as_strided(np.arange(30.0), (4, 3, 5), (40, 8, 16))  # axes that share memory
    assert _blocks._in_order(wide).flags.c_contiguous
    assert _blocks._in_order(np.broadcast_to(1.0, (4, 3, 5))).flags.c_contiguous
    assert _blocks._in_order(batch.input[::-1, :, ::2]).base is batch.input


@pytest.mark.parametrize("reproducible", [True, False])
def test_bits_do_not_depend_on_the_scheduler(reproducible):
    batch = make_telling((12, 5, 40), dtype=np.float32)
    chunks = ((5, 4, 3), (5,), (13, 27))
    first = both(batch, chunks, reproducible=reproducible)
    for scheduler in ("threads", "processes"):
        with dask.config.set(scheduler=scheduler, num_workers=2):
            assert same_bits(both(batch, chunks, reproducible=reproducible), first)
    assert same_bits(both(batch, chunks, reproducible=reproducible, num_threads=3), first)


# ---------------------------------------------------------------- laziness, names and meta


def test_nothing_is_computed_before_it_is_asked_for(calls):
    def fail(block):
        raise AssertionError("computed")

    x = da.ones((6, 3, 4), chunks=2).map_blocks(fail, meta=np.empty((0, 0, 0)))
    forward = bnbp.dask.batch_norm_training(x)
    bnbp.dask.batch_norm_training_backprop(x, None, None, *forward[1:], x)
    bnbp.dask.batch_norm_inference(x, None, None, *forward[1:])
    bnbp.dask.batch_norm_inference_backprop(x, None, None, *forward[1:], x)
    assert not calls


def test_a_slice_computes_only_what_it_needs(calls):
    batch = make_batch((8, 6, 4))
    x, delta = (da.from_array(each, chunks=(2, 3, 4)) for each in (batch.input, batch.normalized_delta))
    result = bnbp.dask.batch_norm_training_backprop(x, *batch[1:5], delta)
    result.input_delta[:2].compute()  # the first of four chunks, of each of two groups of channels
    assert calls == {"batch_norm_training_backprop_reduce": 8, "batch_norm_training_backprop_apply": 2}
    calls.clear()
    result.input_delta[3, 4].compute()  # the sums of the other channels are not needed
    assert calls == {"batch_norm_training_backprop_reduce": 4, "batch_norm_training_backprop_apply": 1}
    calls.clear()
    result.gamma_delta.compute()
    assert calls == {"batch_norm_training_backprop_reduce": 8}
    calls.clear()
    bnbp.dask.batch_norm_training(x).normalized[-1:, :3].compute()
    assert calls == {"batch_norm_training_statistics": 4, "batch_norm_inference": 1}
    calls.clear()
    bnbp.dask.batch_norm_inference(x, *batch[1:5])[:1, 0].compute()
    assert calls == {"batch_norm_inference": 1}
    calls.clear()
    bnbp.dask.batch_norm_inference_backprop(x, *batch[1:5], delta).input_delta[:1, 0].compute()
    assert calls == {"batch_norm_inference_backprop": 1}


def test_names_depend_on_all_arguments_and_on_nothing_else():
    batch = make_batch((8, 6, 4))

    def names(chunks=(2, 3, 4), gamma=batch.gamma, **options):
        x = da.from_array(batch.input, chunks=chunks, name="x")
        forward = bnbp.dask.batch_norm_training(x, gamma, None, **options)
        options.pop("addend", None)
        backward = bnbp.dask.batch_norm_training_backprop(x, gamma, None, *forward[1:], x, **options)
        inference = bnbp.dask.batch_norm_inference(x, gamma, None, *forward[1:], epsilon=options.get("epsilon", 1e-5))
        return [each.name for each in (*forward, *backward, inference)]

    first = names()
    assert len(set(first)) == len(first)
    assert names() == first
    others = [names(epsilon=0.1), names(activation="relu"), names(gamma=None), names(addend=batch.input)]
    assert all(first[0] != other[0] for other in others)
    assert first[3] != others[0][3]
    graph = bnbp.dask.batch_norm_training(da.from_array(batch.input, chunks=2, name="x"), batch.gamma).normalized
    again = bnbp.dask.batch_norm_training(da.from_array(batch.input, chunks=2, name="x"), batch.gamma).normalized
    assert set(graph.dask.to_dict()) == set(again.dask.to_dict())


def test_meta_shape_type_and_chunks_are_known_beforehand(types):
    dtype, parameters = types
    batch = make_batch((8, 6, 4), dtype=dtype, parameters=parameters)
    x = da.from_array(batch.input, chunks=((5, 3), (2, 4), (4,)))
    lazy = bnbp.dask.batch_norm_training(x, batch.gamma)
    lazy += bnbp.dask.batch_norm_training_backprop(x, batch.gamma, None, batch.mean, batch.variance, batch[5])
    lazy += bnbp.dask.batch_norm_inference_backprop(x, None, None, batch.mean, batch.variance, batch[5])
    lazy += (bnbp.dask.batch_norm_inference(x, None, None, batch.mean, batch.variance),)
    for each in lazy:
        result = each.compute()
        assert type(each._meta) is np.ndarray
        assert each._meta.dtype == each.dtype == result.dtype
        assert each._meta.ndim == each.ndim
        assert each.shape == result.shape
        assert each.chunks == (x.chunks if each.ndim > 1 else x.chunks[1:2])
        for index in np.ndindex(each.numblocks):
            assert each.blocks[index].compute().shape == tuple(c[k] for c, k in zip(each.chunks, index, strict=True))


# ---------------------------------------------------------------- unknown sizes


def test_chunks_of_unknown_size_along_the_batch():
    batch = make_batch((20, 3, 4))
    keep = np.random.default_rng(0).random(20) < 0.4
    chosen = da.from_array(keep, chunks=5)
    x, delta = (da.from_array(each, chunks=(5, 2, 4))[chosen] for each in (batch.input, batch.normalized_delta))
    assert math.isnan(x.shape[0])
    forward = bnbp.dask.batch_norm_training(x, batch.gamma, batch.beta)
    backward = bnbp.dask.batch_norm_training_backprop(x, *batch[1:5], delta)
    known = batch._replace(input=batch.input[keep], normalized_delta=batch.normalized_delta[keep])
    expected = *bnbp.batch_norm_training(*known[:3]), *bnbp.batch_norm_training_backprop(*known)
    for actual, exact in zip(dask.compute(*forward, *backward), expected, strict=True):
        np.testing.assert_allclose(actual, exact, rtol=1e-11, atol=1e-11)
    other = da.from_array(batch.normalized_delta, chunks=(4, 2, 4))[da.from_array(keep, chunks=4)]
    with pytest.raises(ValueError, match=r"^normalized_delta: expected 4 chunks along axis 0, as input has"):
        bnbp.dask.batch_norm_training_backprop(x, *batch[1:5], other)
    with pytest.raises(ValueError, match=r"^normalized_delta: expected a dask array with the chunks of input, which h"):
        bnbp.dask.batch_norm_training_backprop(x, *batch[1:5], known.normalized_delta)
    wrong = da.from_array(batch.normalized_delta, chunks=(5, 2, 4))[~chosen]
    with pytest.raises(ValueError, match=r"^normalized_delta: expected shape"):  # when its sizes are known
        bnbp.dask.batch_norm_training_backprop(x, *batch[1:5], wrong).input_delta.compute()


def test_chunks_of_unknown_size_along_the_channels():
    batch = make_batch((6, 12, 4))
    keep = np.arange(12) % 3 > 0
    x = da.from_array(batch.input, chunks=(2, 4, 4))[:, da.from_array(keep, chunks=4)]
    gamma = da.from_array(batch.gamma, chunks=4)[da.from_array(keep, chunks=4)]
    forward = bnbp.dask.batch_norm_training(x, gamma)
    expected = bnbp.batch_norm_training(batch.input[:, keep], batch.gamma[keep])
    for actual, exact in zip(dask.compute(*forward), expected, strict=True):
        np.testing.assert_allclose(actual, exact, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"^beta: expected 3 chunks, as the channels of input have, .* got 1$"):
        bnbp.dask.batch_norm_training(x, gamma, batch.beta[keep])


# ---------------------------------------------------------------- mistakes


X = np.ones((4, 3, 2), np.float32)
V = np.ones(3, np.float32)

WRONG = [
    ("training", {"gamma": np.ones(4, np.float32)}),
    ("training", {"gamma": np.ones(3)}),
    ("training", {"beta": np.ones((3, 1), np.float32)}),
    ("training", {"gamma": "x"}),
    ("training", {"addend": np.ones((4, 3, 1), np.float32)}),
    ("training", {"addend": np.ones((4, 3), np.float32)}),
    ("training", {"addend": np.ones((4, 3, 2))}),
    ("training", {"input": np.ones((4, 3, 2), int)}),
    ("training", {"input": np.ones(3)}),
    ("training", {"input": np.ones((3, 0))}),
    ("training", {"epsilon": -1}),
    ("training", {"epsilon": "x"}),
    ("training", {"channel_axis": 3}),
    ("training", {"channel_axis": 1.5}),
    ("training", {"activation": "tanh"}),
    ("training", {"num_threads": 0}),
    ("training_backprop", {"mean": np.ones(2, np.float32)}),
    ("training_backprop", {"mean": None}),
    ("training_backprop", {"normalized_delta": np.ones((4, 3, 3), np.float32)}),
    ("training_backprop", {"normalized_delta": np.ones((4, 3, 2))}),
    ("training_backprop", {"output_mask": (True, False)}),
    ("training_backprop", {"activation": "relu", "addend": True}),
    ("inference", {"variance": np.ones(4, np.float32)}),
    ("inference_backprop", {"normalized": np.ones((1, 3, 2), np.float32), "activation": "relu"}),
]


@pytest.mark.parametrize("lazily", [True, False])
@pytest.mark.parametrize(("op", "wrong"), WRONG)
def test_mistakes_are_answered_at_once_in_the_operators_words(op, wrong, lazily):
    operands = {"input": X, "gamma": V, "beta": V}
    if op != "training":
        operands |= {"mean": V, "variance": V}
    if op.endswith("backprop"):
        operands |= {"normalized_delta": X}
    operands |= wrong
    with pytest.raises((TypeError, ValueError)) as own:
        getattr(bnbp, f"batch_norm_{op}")(**operands)
    for name, value in operands.items():
        if isinstance(value, np.ndarray) and (name == "input" or lazily):
            operands[name] = da.from_array(value, chunks=2)
    with pytest.raises(own.type) as error:
        getattr(bnbp.dask, f"batch_norm_{op}")(**operands)
    assert str(error.value) == str(own.value)


def test_what_is_no_dask_array_of_numpy_arrays_is_refused():
    with pytest.raises(TypeError, match=r"^input: expected a dask array, got ndarray; dask.array.from_array makes one"):
        bnbp.dask.batch_norm_training(X)

    class Other(np.lib.mixins.NDArrayOperatorsMixin):
        shape, dtype, ndim = (0, 0), np.dtype(float), 2
        __array_function__ = __array_ufunc__ = None

    x = da.ones((4, 3), chunks=2)
    x._meta = Other()
    with pytest.raises(TypeError, match=r"^input: expected chunks that are NumPy arrays, got Other$"):
        bnbp.dask.batch_norm_training(x)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("sys.modules['dask'] = None", "bnbp.dask needs Dask; run: pip install 'bnbp[dask]'"),
        (
            "import importlib.metadata as m; m.version = lambda name: '2024.12.1'",
            "bnbp.dask: expected Dask 2025.1 or later, got 2024.12.1",
        ),
        (
            "dask.config.set({'array.query-planning': True})",
            "bnbp.dask: expected arrays of task graphs; set Dask's array.query-planning to False",
        ),
    ],
)
def test_without_dask_or_with_an_old_one_the_error_says_what_to_install(before, message):
    code = f"import dask, sys, bnbp; {before}\ntry: import bnbp.dask\nexcept ImportError as error: print(error)"
    assert python(code) == message


def test_examples_of_the_documentation_run():
    for module in (bnbp.dask, _operators, _again, _blocks, _arguments):
        result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
        assert not result.failed
        assert result.attempted or module not in (bnbp.dask, _operators)


# ---------------------------------------------------------------- memory


class Source:
    """Makes chunks, and counts them and those that are in memory at a time."""

    def __init__(self):
        self.lock, self.made, self.alive, self.most = threading.Lock(), 0, 0, 0

    def __dask_tokenize__(self):
        return id(self)

    def __call__(self, block_id=None):
        block = np.random.default_rng(block_id).normal(size=(2, 3, 50))
        with self.lock:
            self.made, self.alive = self.made + 1, self.alive + 1
            self.most = max(self.most, self.alive)
        weakref.finalize(block, self.died)
        time.sleep(0.001)  # so that the tasks of two threads overlap
        return block

    def died(self):
        with self.lock:
            self.alive -= 1

    def array(self, chunks=24, kind="blocks"):
        if kind == "blocks":
            sizes = (2,) * chunks, (3,), (50,)
            return da.map_blocks(self, chunks=sizes, dtype=float, meta=np.empty((0, 0, 0)))
        load = dask.delayed(self, pure=True)
        blocks = [da.from_delayed(load((k, 0, 0)), (2, 3, 50), float) for k in range(chunks)]
        x = da.concatenate(blocks)
        return x.rechunk((4, 3, 25)) if kind == "rechunked" else x


class Sink:
    """Takes a result, and keeps nothing."""

    def __setitem__(self, where, values):
        pass


@pytest.mark.parametrize("step", ["forward", "backward", "both", "addend", "inference", "deep"])
@pytest.mark.parametrize("kind", ["blocks", "delayed", "rechunked"])
def test_no_more_than_a_few_chunks_are_in_memory(kind, step):
    source, deltas = Source(), Source()
    x, delta = source.array(kind=kind), deltas.array(kind=kind)
    forward = bnbp.dask.batch_norm_training(x)
    backward = bnbp.dask.batch_norm_training_backprop(x, None, None, *forward[1:], delta - forward.normalized)
    if step == "backward":
        backward = bnbp.dask.batch_norm_training_backprop(x, None, None, np.zeros(3), np.ones(3), delta)
    fused = {"activation": "relu", "addend": True, "normalized": x}
    addend = bnbp.dask.batch_norm_training_backprop(x, None, None, *forward[1:], delta, **fused)
    inference = bnbp.dask.batch_norm_inference_backprop(x, None, None, np.zeros(3), np.ones(3), delta)
    deep = bnbp.dask.batch_norm_training(forward.normalized, activation="relu")
    wanted = {
        "forward": [forward.normalized],
        "backward": [backward.input_delta],
        "both": [forward.normalized, backward.input_delta],
        "addend": [addend.input_delta, addend.addend_delta],
        "inference": list(inference),
        "deep": [deep.normalized],
    }[step]
    with dask.config.set(scheduler="threads", num_workers=2):
        da.store(wanted, [Sink()] * len(wanted), lock=False)
    assert source.made >= (24 if step == "inference" else 48)  # each chunk twice, or oftener
    assert source.most <= 10
    assert deltas.most <= 10


def test_without_recompute_each_chunk_is_made_once_and_kept():
    source = Source()
    forward = bnbp.dask.batch_norm_training(source.array(), recompute=False)
    forward.normalized.compute()
    assert (source.made, source.most) == (24, 24)


def test_what_is_in_memory_is_not_made_again():
    source = Source()
    x = source.array().persist()
    forward = bnbp.dask.batch_norm_training(x)
    backward = bnbp.dask.batch_norm_training_backprop(x, None, None, *forward[1:], x)
    dask.compute(*forward, *backward)
    assert source.made == 24
    values = np.ones((4, 3, 2))
    graph = bnbp.dask.batch_norm_training(da.from_array(values, chunks=2)).normalized.dask.to_dict()
    arrays = [each for each in graph.values() if isinstance(getattr(each, "value", each), np.ndarray)]
    assert len(arrays) <= 4  # the chunks, once


def arrays_of_many_kinds():
    x = da.from_array(np.arange(64.0).reshape(8, 8), chunks=3)
    y = x + 1
    return {
        "rechunk": y.rechunk(2),
        "slice": y[1:7, ::2],
        "fancy": y[:, [4, 1, 1]],
        "mask": y[y[:, 0] > 20],
        "concatenate": da.concatenate([y, x * 2]),
        "stack": da.stack([y, y])[0],
        "reduction": y - y.mean(axis=0),
        "overlap": da.overlap.overlap(y, 1, "reflect"),
        "reshape": y.rechunk((2, 8)).reshape(64).reshape(8, 8),
        "transpose": y.T @ y,
        "delayed": da.from_delayed(dask.delayed(np.ones, pure=True)((3, 3)), (3, 3), float),
        "random": da.random.default_rng(1).normal(size=(8, 8), chunks=4),
        "where": da.where(y > 3, y, 0),
        "blocks": y.blocks[1:, :2],
        "whole": bnbp.dask.batch_norm_training(y).normalized,
    }


@pytest.mark.parametrize("kind", arrays_of_many_kinds())
def test_again_has_the_same_values_from_other_tasks(kind):
    x = arrays_of_many_kinds()[kind]
    (copy,) = _again.again([x], [], "seed")
    assert same_bits(dask.compute(copy), dask.compute(x))
    assert (copy.shape, copy.chunks, copy.dtype) == (x.shape, x.chunks, x.dtype) or math.isnan(x.shape[0])
    assert copy.name == _again.again([x], [], "seed")[0].name != x.name
    optimized = dask.optimize(copy)[0].dask
    shared = set(optimized) & set(x.dask.to_dict())
    shared = {key for key in shared if "whole" not in str(key) and "part" not in str(key)}
    kept = {key for key in shared if not str(key[0] if isinstance(key, tuple) else key).startswith("array-")}
    assert not kept or kind == "whole"
