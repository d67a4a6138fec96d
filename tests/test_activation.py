"""Activation and addend: what comes out, beside the plain operators, the reference, exact arithmetic and PyTorch.

The plain operators are tested elsewhere. With an activation the forward operators are they, an addition and a clamp,
and the gradients are they on a delta that is 0 where the activation is flat: so the bits must be theirs. Which elements
those are is taken from the forward output here; that the operators find the same ones is in test_border.py.
"""

import itertools
import sys
from fractions import Fraction

import hypothesis.extra.numpy as hnp
import ml_dtypes
import mpmath
import numpy as np
import pytest
from conftest import LAYOUTS, MIXED, eps, make_batch, python, same_bits, sum_bound, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_accuracy import CASES, hostile, off
from test_accuracy import LAYOUTS as OF_ONE_CHANNEL
from test_halves import SHAPE, parts_of, splits
from test_layouts import SHAPES, VIEWS, assert_same, packed_like, run
from test_operators import assert_backprop_close, backprop_terms
from test_schedule import SHAPES as LARGE
from test_schedule import TALL, caches, out_of_line

import bnbp
from bnbp import reference

ACTIVATIONS = ["relu", "relu6"]
GRADIENTS = ["training_backprop", "inference_backprop"]


@np.errstate(invalid="ignore")  # says ml_dtypes of a comparison with NaN
def activated(y, activation):
    """Comparisons leave NaN and -0.0 as they are."""
    zero, six = y.dtype.type(0), y.dtype.type(6)
    if activation is not None:
        y = np.where(y < zero, zero, y)
    return np.where(y > six, six, y) if activation == "relu6" else y


@np.errstate(invalid="ignore")
def flat(normalized, activation):
    """Where the activation is, from the forward output; nowhere where that is NaN."""
    zero, six = normalized.dtype.type(0), normalized.dtype.type(6)
    return (normalized <= zero) | (normalized >= six) if activation == "relu6" else normalized <= zero


def masked(batch, normalized, activation):
    """The same batch, its delta 0 where the activation is flat; arranged in memory as it was."""
    delta = batch.normalized_delta.copy("K")
    delta[flat(normalized, activation)] = 0
    return batch._replace(normalized_delta=delta)


def make_activated(shape, axis=1, dtype=np.float64, parameters=None, seed=0):
    """A batch, of which about a third of the outputs is below 0 and a third above 6; and an addend."""
    batch = make_batch(shape, axis, dtype, parameters=parameters, seed=seed)
    c = shape[axis]
    gamma = np.random.default_rng(seed + 1).choice([-9, -5, 5, 9], c)
    batch = batch._replace(gamma=gamma.astype(batch.gamma.dtype), beta=np.full(c, 3, batch.beta.dtype))
    return batch, np.random.default_rng(seed + 2).normal(0, 3, shape).astype(dtype)


def assert_telling(normalized, activation):
    """The data has elements of each kind."""
    shares = np.mean(normalized <= 0), np.mean(normalized >= 6)
    assert shares[0] > 0.1
    assert shares[1] > 0.1
    assert sum(shares) < 0.9
    assert activation is None or np.mean(flat(normalized, activation)) > 0.1


def forward_of(batch, epsilon=1e-5, **options):
    return bnbp.batch_norm_inference(*batch[:5], epsilon, **options)


def upwards(batch):
    """The same numbers in float32, if they have 16 bits: the type that they are computed in."""
    if batch.input.dtype.itemsize > 2:
        return batch
    return type(batch)(*(array.astype(np.float32) for array in batch))


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("with_addend", [False, True])
def test_forward_is_batch_norm_an_addition_and_a_clamp(layout, types, activation, with_addend):
    shape, axis = layout
    batch, addend = make_activated(shape, axis, *types)
    addend = addend if with_addend else None
    plain = forward_of(upwards(batch), channel_axis=axis)
    expected = activated((plain if addend is None else plain + addend.astype(plain.dtype)).astype(types[0]), activation)
    options = {"activation": activation, "addend": addend, "channel_axis": axis}
    assert same_bits([forward_of(batch, **options)], [expected])

    trained, before = (bnbp.batch_norm_training(*batch[:3], **o) for o in (options, {"channel_axis": axis}))
    assert same_bits(trained[1:], before[1:])
    if activation:  # the statistics are those that are returned
        again = bnbp.batch_norm_inference(*batch[:3], *trained[1:], **options)
        assert same_bits([trained.normalized], [again])
    if batch.input.size > 1000:
        assert_telling(plain, activation)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_forward_agrees_with_the_reference(layout, types, activation):
    shape, axis = layout
    batch, addend = make_activated(shape, axis, *types)
    options = {"activation": activation, "addend": addend, "channel_axis": axis}
    got, exact = (
        (module.batch_norm_training(*batch[:3], **options), module.batch_norm_inference(*batch[:5], **options))
        for module in (bnbp, reference)
    )
    u, size = eps(types[0]), 1 + np.abs(addend.astype(np.float64)).max()
    np.testing.assert_allclose(got[1].astype(np.float64), exact[1], rtol=4 * u, atol=64 * u * size)
    # The statistics have been rounded, which is as much as an error of the input.
    u = max(eps(types[1]), u)
    np.testing.assert_allclose(
        got[0].normalized.astype(np.float64), exact[0].normalized, rtol=4 * u, atol=99 * u * size
    )


def test_gamma_and_beta_may_be_left_out(dtype):
    x = make_batch((4, 3, 5), dtype=dtype).input
    for options in ({}, {"activation": "relu6"}):
        assert same_bits(bnbp.batch_norm_training(x, **options), bnbp.batch_norm_training(x, None, None, **options))


@pytest.mark.parametrize("shape", [(-1, 1), (1, 1, -1), (7, 1, -1)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zeros_keep_their_sign_and_nan_stays_nan(activation, shape, dtype):
    """With this scale and shift the output is the input, -0.0 too."""
    one, zero = np.ones(1, dtype), np.zeros(1, dtype)
    least, six = tiny(dtype), 6 * (1 + eps(dtype))
    given = [-np.inf, -6, -least, -0.0, 0, least, 1, 6 * (1 - eps(dtype)), 6, six, np.inf, np.nan, -np.nan, 100]
    expected = [0, 0, 0, -0.0, 0, least, 1, 6 * (1 - eps(dtype)), 6, six, np.inf, np.nan, np.nan, 100]
    x, expected = (np.array(7 * values).astype(dtype) for values in (given, expected))
    if activation == "relu6":
        expected = np.minimum(expected, dtype(6))
    got = bnbp.batch_norm_inference(x.reshape(shape), one, -zero, zero, one, 0.0, activation=activation).ravel()
    assert np.array_equal(got, expected, equal_nan=True)
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.signbit(got[numbers]), np.signbit(expected[numbers]))
    assert np.signbit(got[x == 0]).any()


@pytest.mark.parametrize("shape", [(40, 1), (1, 1, 40)], ids=str)
@pytest.mark.parametrize("half", [types[0] for types in MIXED[4:]])
def test_sixteen_bits_are_rounded_after_the_addition(half, shape):
    """1 + u is half way from 1 to the next number, and would be 1; with another u it is that number."""
    u = eps(half) / 2
    x, addend = np.ones(shape, half), np.full(shape, u, half)
    vectors = np.array([[1], [u], [0], [1]], np.float32)
    got = bnbp.batch_norm_inference(x, *vectors, 0.0, addend=addend)
    assert (got == half(1 + 2 * u)).all()
    assert (bnbp.batch_norm_inference(x, *vectors, 0.0) == 1).all()


@pytest.mark.parametrize("activation", [None, "relu6"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_every_layout_of_the_addend(shape, axis, types, activation):
    batch, addend = make_activated(shape, axis, *types)
    options = {"activation": activation, "channel_axis": axis}
    addends = {name: view(addend) for name, view in VIEWS.items()}
    outs = itertools.cycle([view(np.zeros_like(addend)) for view in [*VIEWS.values(), VIEWS["plain"]]])
    for name, (first, of_x) in itertools.product(("training", "inference"), VIEWS.items()):
        viewed = batch._replace(input=of_x(batch.input))
        expected = run(name, viewed, addend=packed_like(viewed.input, addend), **options)
        for (second, other), out in zip(addends.items(), outs, strict=False):  # each pair, in time
            results = run(name, viewed, addend=other, out=(out, *[None] * (len(expected) - 1)), **options)
            assert_same(results, expected, (name, first, second))
            assert results[0] is out
    assert all(np.array_equal(other, addend) for other in addends.values())


@pytest.mark.parametrize(
    "repeated",
    [(1, 1, 1, 1), (1, 4, 1, 1), (3, 4, 1, 1), (1, 1, 5, 6), (3, 1, 5, 6)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_an_addend_that_is_repeated_by_strides_of_zero(repeated, types):
    batch, addend = make_activated((3, 4, 5, 6), 1, *types)
    addend = addend[tuple(slice(length) for length in repeated)]
    for name, x in itertools.product(("training", "inference"), (batch.input, VIEWS["channels last"](batch.input))):
        seen, viewed = np.broadcast_to(addend, x.shape), batch._replace(input=x)
        expected = run(name, viewed, addend=packed_like(x, seen), activation="relu")
        assert_same(run(name, viewed, addend=seen, activation="relu"), expected, name)


@pytest.mark.parametrize("activation", [None, "relu6"])
@pytest.mark.parametrize("name", ["training", "inference"])
@pytest.mark.parametrize(("shape", "axis"), LARGE, ids=str)
def test_forward_in_place_on_every_schedule(shape, axis, name, activation, dtype, l2_size):
    batch, addend = make_activated(shape, axis, dtype)
    options = {"activation": activation, "channel_axis": axis}
    expected = run(name, batch, addend=addend, num_threads=1, **options)
    rest = [None] * (len(expected) - 1)
    for size, threads in itertools.product((1, *caches(shape, dtype)[3:5]), (1, 2)):
        l2_size(size)
        x, other = batch.input.copy(), addend.copy()
        for own, out in (((x, addend), x), ((batch.input, other), other)):
            results = run(
                name, batch._replace(input=own[0]), addend=own[1], out=(out, *rest), num_threads=threads, **options
            )
            assert results[0] is out
            assert_same(results, expected, (size, threads))
    both = batch.input.copy()  # the input, the addend and the output
    doubled = run(name, batch, addend=batch.input, **options)
    assert_same(run(name, batch._replace(input=both), addend=both, out=(both, *rest), **options), doubled, "all")


# ---------------------------------------------------------------- gradients


def gradients_of(name, batch, normalized, activation, **options):
    """The results of each way to say where the activation is flat; the last with the addend's gradient."""
    yield run(name, batch, activation=activation, **options)
    yield run(name, batch, activation=activation, normalized=normalized, **options)
    yield run(name, batch, activation=activation, normalized=normalized, addend=True, **options)


def assert_gradients(name, batch, normalized, activation, what, expected=None, **options):
    """That they are the plain operator's on the masked delta, bit for bit."""
    plain = masked(batch, normalized, activation)
    expected = expected or run(name, plain, **options)
    for results in gradients_of(name, batch, normalized, activation, **options):
        assert_same(results, [*expected, plain.normalized_delta][: len(results)], what)
    assert type(results) is bnbp.BatchNormTrainingBackpropAddendResult


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_the_gradient_is_that_of_the_masked_delta(layout, types, name, activation):
    shape, axis = layout
    batch, _ = make_activated(shape, axis, *types)
    for epsilon in (1e-5, 0.5):
        normalized = forward_of(batch, epsilon, activation=activation, channel_axis=axis)
        assert_gradients(name, batch, normalized, activation, epsilon, epsilon=epsilon, channel_axis=axis)
    if batch.input.size > 1000:
        assert_telling(forward_of(batch, channel_axis=axis), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_the_gradient_where_there_was_an_addend(layout, types, name, activation):
    """Where the activation is flat is not what it would be without the addend."""
    shape, axis = layout
    batch, addend = make_activated(shape, axis, *types)
    with_it, without = (forward_of(batch, activation=activation, addend=a, channel_axis=axis) for a in (addend, None))
    plain = masked(batch, with_it, activation)
    expected = *run(name, plain, channel_axis=axis), plain.normalized_delta
    options = {"activation": activation, "normalized": with_it, "channel_axis": axis}
    assert_same(run(name, batch, addend=True, **options), expected, name)
    assert_same(run(name, batch, **options), expected[:3], name)
    if batch.input.size > 1000:
        assert np.mean(flat(with_it, activation) != flat(without, activation)) > 0.1


@pytest.mark.parametrize("name", GRADIENTS)
def test_without_an_activation_the_addends_gradient_is_the_delta(layout, types, name):
    shape, axis = layout
    batch, _ = make_activated(shape, axis, *types)
    expected = run(name, batch, channel_axis=axis)
    for normalized in (None, batch.input):
        results = run(name, batch, normalized=normalized, addend=True, channel_axis=axis)
        assert_same(results, (*expected, batch.normalized_delta), name)
        assert not np.may_share_memory(results.addend_delta, batch.normalized_delta)


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "axis"), [*LARGE, TALL], ids=str)
def test_bits_do_not_depend_on_the_schedule(shape, axis, dtype, activation, name, l2_size):
    batch, _ = make_activated(shape, axis, dtype)
    normalized = forward_of(batch, activation=activation, channel_axis=axis)
    l2_size(1 << 40)
    expected = run(name, masked(batch, normalized, activation), channel_axis=axis, num_threads=1)
    # Where tensors begin in a cache line, and sizes of the cache; numbers of threads.
    sizes = caches(shape, dtype)
    schedules = list(itertools.product((sizes[0], *sizes[2:7]), (1, 2)))
    for k, (size, threads) in enumerate(schedules[:3] if (shape, axis) == TALL else schedules):
        l2_size(size)
        offset = (0, 4, 13, 1)[k % 4] * np.dtype(dtype).itemsize
        tensors = [out_of_line(shape, dtype, offset + 2 * j * (k % 3)) for j in range(5)]
        for tensor, values in zip(tensors, (batch.input, batch.normalized_delta, normalized), strict=False):
            tensor[...] = values
        moved = batch._replace(input=tensors[0], normalized_delta=tensors[1])
        options = {"expected": expected, "channel_axis": axis, "num_threads": threads}
        assert_gradients(name, moved, tensors[2], activation, (size, threads), **options)
        options = {"activation": activation, "addend": True, "channel_axis": axis, "num_threads": threads}
        run(name, moved, normalized=tensors[2], out=(tensors[3], None, None, tensors[4]), **options)
        assert same_bits([tensors[3]], expected[:1])
        for tensor in tensors:
            start = tensor.ctypes.data - tensor.base.ctypes.data
            assert (tensor.base[:start] == 7).all(), "it wrote before the output"
            assert (tensor.base[start + tensor.nbytes :] == 7).all(), "it wrote past the output"


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_every_layout_of_every_tensor(shape, axis, types, name):
    batch, addend = make_activated(shape, axis, *types)
    options = {"activation": "relu6", "channel_axis": axis}
    normalized = forward_of(batch, addend=addend, **options)
    # Of each tensor all views, in turns of coprime lengths.
    deltas = itertools.cycle([view(batch.normalized_delta) for view in VIEWS.values()])
    outputs = itertools.cycle([view(normalized) for view in list(VIEWS.values())[:9]])
    outs, others = (
        itertools.cycle([view(np.zeros_like(addend)) for view in list(VIEWS.values())[:count]]) for count in (7, 8)
    )
    for first, of_x in VIEWS.items():
        x = of_x(batch.input)
        plain = batch._replace(input=packed_like(x, x), normalized_delta=packed_like(x, batch.normalized_delta))
        expected = run(name, plain, normalized=packed_like(x, normalized), addend=True, **options)
        recomputed = run(name, plain, **options)
        for _ in range(11):
            viewed = batch._replace(input=x, normalized_delta=next(deltas))
            out = next(outs), None, None, next(others)
            results = run(name, viewed, normalized=next(outputs), addend=True, out=out, **options)
            assert results[0] is out[0]
            assert results[3] is out[3]
            assert_same(results, expected, first)
            assert_same(run(name, viewed, out=(out[0], None, None), **options), recomputed, first)
        new = run(name, batch._replace(input=x), normalized=normalized, addend=True, **options)
        assert new.addend_delta.strides == new.input_delta.strides == np.empty_like(x).strides


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize(("shape", "axis"), LARGE, ids=str)
def test_in_place_on_every_schedule(shape, axis, dtype, name, l2_size):
    """Both outputs, each over any tensor that is read."""
    batch, addend = make_activated(shape, axis, dtype)
    options = {"activation": "relu6", "channel_axis": axis}
    normalized = forward_of(batch, addend=addend, **options)
    expected = run(name, batch, normalized=normalized, addend=True, num_threads=1, **options)
    recomputed = run(name, batch, num_threads=1, **options)
    schedules = itertools.cycle(itertools.product((1, *caches(shape, dtype)[3:5]), (1, 2)))
    for first, last in itertools.permutations((0, 1, 2, None), 2):
        size, threads = next(schedules)
        l2_size(size)
        own = [batch.input.copy(), batch.normalized_delta.copy(), normalized.copy()]
        out = [None if place is None else own[place] for place in (first, last)]
        placed = batch._replace(input=own[0], normalized_delta=own[1])
        results = run(
            *(name, placed),
            normalized=own[2],
            addend=True,
            out=(out[0], None, None, out[1]),
            num_threads=threads,
            **options,
        )
        assert_same(results, expected, (first, last, size, threads))
        for result, place in zip((results[0], results[3]), out, strict=True):
            assert place is None or result is place
        if first in (0, 1) and last is None:
            own = batch._replace(**{name: getattr(batch, name).copy() for name in ("input", "normalized_delta")})
            place = own.input if first == 0 else own.normalized_delta
            assert_same(run(name, own, out=(place, None, None), num_threads=threads, **options), recomputed, first)


@pytest.mark.parametrize("mask", [tuple(bool(m >> k & 1) for k in range(4)) for m in range(16)], ids=str)
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("shape", [(4, 3, 5), (9, 2, 40), (70, 3)], ids=str)
def test_masked_outputs_are_none_and_the_others_unchanged(mask, name, shape, types):
    batch, addend = make_activated(shape, 1, *types)
    for activation in (None, "relu"):
        options = {"normalized": forward_of(batch, addend=addend, activation=activation), "activation": activation}
        full = run(name, batch, addend=True, **options)
        out = [np.full_like(result, 7) for result in full]
        for places in (None, out):
            part = run(name, batch, addend=True, output_mask=mask, out=places, **options)
            assert_same(part, [result if wanted else None for result, wanted in zip(full, mask, strict=True)], mask)
        for place, result, wanted in zip(out, part, mask, strict=True):
            assert result is place if wanted else (place == 7).all()
        part = run(name, batch, output_mask=mask[:3], activation=activation)
        recomputed = run(name, batch, activation=activation)
        assert_same(part, [r if wanted else None for r, wanted in zip(recomputed, mask[:3], strict=True)], mask)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_lets_the_gradient_pass_and_infinities_do_not(activation, types):
    """Where the forward output is not finite, whatever made it so."""
    x = np.array([[np.nan, np.inf, -np.inf, 1.0, -1.0]]).astype(types[0])
    vectors = np.ones((4, 5))
    vectors[1] = 0
    vectors[2] = 0
    normalized = bnbp.batch_norm_inference(x, *vectors.astype(types[1]), activation=activation)
    passes = [1, activation == "relu", 0, 1, 0]
    for told in (None, normalized):
        got = bnbp.batch_norm_inference_backprop(
            *(x, *vectors.astype(types[1]), np.ones_like(x)), activation=activation, normalized=told
        )
        assert got.beta_delta.tolist() == passes


# ---------------------------------------------------------------- other oracles


@settings(max_examples=100)
@given(data=st.data())
def test_any_shape_and_axis_agree_with_the_reference(data):
    """On the mask of the output that is given to both: float64 has another one where the output is next to 0."""
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=5, max_side=9))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    types, epsilon = data.draw(st.sampled_from(MIXED)), data.draw(st.sampled_from([1e-5, 1.0]))
    batch, addend = make_activated(shape, axis, *types, seed=data.draw(st.integers(0, 2**16)))
    activation, name = data.draw(st.sampled_from(ACTIVATIONS)), data.draw(st.sampled_from(GRADIENTS))
    options = {"activation": activation, "channel_axis": axis}
    normalized = forward_of(batch, epsilon, addend=addend, **options)
    options |= {"normalized": normalized, "addend": True}
    got = run(name, batch, epsilon=epsilon, num_threads=data.draw(st.integers(1, 4)), **options)
    expected = getattr(reference, f"batch_norm_{name}")(*batch, epsilon, **options)
    plain = masked(batch, normalized, activation)
    assert np.array_equal(got.addend_delta.astype(np.float64), expected.addend_delta)
    assert_backprop_close(got, plain, axis, epsilon, expected, backprop_terms(plain, axis, epsilon))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_references_mask_is_that_of_its_own_output(layout, activation):
    """In float64, where it is also the operator's but for elements next to the border."""
    shape, axis = layout
    batch, _ = make_activated(shape, axis)
    options = {"activation": activation, "channel_axis": axis}
    normalized = reference.batch_norm_inference(*batch[:5], **options)
    plain = masked(batch, normalized, activation)
    for name in GRADIENTS:
        function = getattr(reference, f"batch_norm_{name}")
        expected = *function(*plain, channel_axis=axis), plain.normalized_delta
        for told in (None, normalized):
            assert_same(function(*batch, normalized=told, addend=True, **options), expected, name)
        assert_same(function(*batch, **options), expected[:3], name)
        got = run(name, batch, **options)
        assert_backprop_close(
            got, plain, axis, 1e-5, function(*plain, channel_axis=axis), backprop_terms(plain, axis, 1e-5)
        )


@pytest.mark.parametrize("module", [bnbp, reference], ids=["bnbp", "reference"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "axis"), [((3, 2, 4), 1), ((2, 3, 2, 2), -1)])
def test_the_gradient_is_that_of_finite_differences(module, training, activation, shape, axis):
    """Of all four arguments, where no step reaches a corner of the activation."""
    batch, addend = make_activated(shape, axis, seed=3)
    x, gamma, beta, mean, variance, dy = batch
    options = {"activation": activation, "channel_axis": axis}

    def forward(x, gamma, beta, addend):
        if training:
            return module.batch_norm_training(x, gamma, beta, 1e-3, addend=addend, **options).normalized
        return module.batch_norm_inference(x, gamma, beta, mean, variance, 1e-3, addend=addend, **options)

    normalized = forward(x, gamma, beta, addend)
    assert 0.1 < flat(normalized, activation).mean() < 0.9
    plain = forward(x, gamma, beta, addend - 1e-3), forward(x, gamma, beta, addend + 1e-3)
    assert np.array_equal(flat(plain[0], activation), flat(plain[1], activation))  # far from corners
    name = "batch_norm_training_backprop" if training else "batch_norm_inference_backprop"
    got = getattr(module, name)(*batch, 1e-3, normalized=normalized, addend=True, **options)
    for place, gradient in enumerate(got):
        assert np.abs(gradient).max() > 0.1  # there is something to find
        for index in np.ndindex(gradient.shape):
            ends = []
            for step in (1e-6, -1e-6):
                arguments = [array.copy() for array in (x, gamma, beta, addend)]
                arguments[place][index] += step
                ends.append((forward(*arguments) * dy).sum())
            assert abs((ends[0] - ends[1]) / 2e-6 - gradient[index]) < 1e-6 * (1 + abs(gradient).max())


@pytest.mark.parametrize("layout", OF_ONE_CHANNEL)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("given", [False, True], ids=["recomputed", "given"])
def test_the_accuracy_contract_holds_for_the_masked_delta(case, layout, types, given):
    """Against exact sums of the elements that pass; their condition is what it is."""
    dtype, parameters = types
    x, dy, mean = hostile(case, dtype, 3000)
    arrange = OF_ONE_CHANNEL[layout]
    # 1 / sqrt(3.75 + 0.25) is a half, so that gamma_delta is an exact fraction as well.
    vectors = [np.array([value], parameters) for value in (3.0, 0.25, mean, 3.75)]
    normalized = bnbp.batch_norm_inference(arrange(x), *vectors, 0.25, activation="relu")
    passes = (normalized > 0).ravel()
    assert 0.1 < passes.mean() < 0.9
    got = bnbp.batch_norm_training_backprop(
        *(arrange(x), *vectors, arrange(dy), 0.25), activation="relu", normalized=normalized if given else None
    )
    delta = [Fraction(float(d)) if through else Fraction(0) for d, through in zip(dy, passes, strict=True)]
    centered = [Fraction(float(value)) - Fraction(float(vectors[2][0])) for value in x]
    products = [d * e / 2 for d, e in zip(delta, centered, strict=True)]
    for value, terms in ((got.beta_delta[0], delta), (got.gamma_delta[0], products)):
        lost = len(terms) * Fraction(5e-324) / 2 if dtype == np.float64 and case == "subnormal deltas" else 0
        assert off(value, sum(terms)) <= sum_bound(value, sum(map(abs, terms)), dtype) + lost
    u, m, scale = Fraction(eps(dtype)) / 2, len(delta), Fraction(3, 2)
    beta, gamma = sum(delta), sum(products)
    for value, d, e in zip(got.input_delta.ravel()[:500], delta, centered, strict=False):
        exact = scale * (d - beta / m - e / 2 * gamma / m)
        bound = 6 * u * scale * (abs(d) + abs(beta / m) + abs(e / 2 * gamma / m)) + 4 * Fraction(tiny(dtype))
        if abs(exact) > Fraction(float(ml_dtypes.finfo(dtype).max)):
            assert abs(value) == np.inf
        else:
            assert off(value, exact) <= bound


def test_forward_agrees_with_exact_arithmetic(dtype):
    """One rounding of each operation, and of 16-bit types one in all: to the last places of what is added."""
    batch, addend = make_activated((6, 4, 5), 1, dtype)
    got = forward_of(batch, activation="relu6", addend=addend)
    with mpmath.workdps(50):
        for index in np.ndindex(got.shape):
            gamma, beta, mean, variance = (mpmath.mpf(float(vector[index[1]])) for vector in batch[1:5])
            terms = (
                gamma * (float(batch.input[index]) - mean) / mpmath.sqrt(variance + 1e-5),
                beta,
                float(addend[index]),
            )
            exact = min(max(sum(terms), 0), 6)
            error = 8 * eps(np.float32) * sum(map(abs, terms)) + eps(dtype) * abs(exact) / 2 + tiny(dtype)
            if dtype == np.float64:
                error = 8 * eps(dtype) * sum(map(abs, terms))
            assert abs(float(got[index]) - exact) <= error


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_pytorch_has_the_same_gradients(dtype):
    """Of batch norm, an addition and ReLU or ReLU6, through autograd; and it treats NaN, -0.0 and the corners alike."""
    code = f"""
import numpy as np, torch, bnbp, bnbp.reference
from torch.nn import functional as F
rng, dtype = np.random.default_rng(0), np.{dtype}
def close(got, theirs):
    theirs = theirs.detach().numpy()
    assert np.abs(got - theirs).max() <= 2000 * np.finfo(dtype).eps * np.abs(theirs).max()
for activation, function in (("relu", F.relu), ("relu6", F.relu6)):
    for training in (True, False):
        for with_addend in (True, False):
            x, addend, dy = (s * rng.normal(size=(8, 5, 6, 7)).astype(dtype) for s in (1, 2, 1))
            gamma, beta, mean, variance = rng.uniform(1, 5, (4, 5)).astype(dtype)
            tensors = [torch.from_numpy(a).requires_grad_() for a in (x, gamma, beta, addend)]
            statistics = [torch.from_numpy(a.copy()) for a in (mean, variance)]
            y = F.batch_norm(tensors[0], *statistics, *tensors[1:3], training, 0.1, 1e-5)
            y = function(y + tensors[3] if with_addend else y)
            y.backward(torch.from_numpy(dy))
            if training:
                got, mean, variance = bnbp.batch_norm_training(
                    x, gamma, beta, activation=activation, addend=addend if with_addend else None)
                backprop = bnbp.batch_norm_training_backprop
            else:
                got = bnbp.batch_norm_inference(
                    x, gamma, beta, mean, variance, activation=activation, addend=addend if with_addend else None)
                backprop = bnbp.batch_norm_inference_backprop
            close(got, y)
            mask = dict(normalized=y.detach().numpy(), addend=True) if with_addend else {{}}
            results = backprop(x, gamma, beta, mean, variance, dy, activation=activation, **mask)
            for result, tensor in zip(results, tensors): close(result, tensor.grad)
    x = np.array([[np.nan, -np.inf, np.inf, -0.0, 0, 6, -1, 1, 7]], dtype)
    one, zero = np.ones(9, dtype), np.zeros(9, dtype)
    y = bnbp.batch_norm_inference(x, one, -zero, zero, one, 0.0, activation=activation)
    t = torch.from_numpy(x).requires_grad_()
    function(t).backward(torch.ones_like(t))
    theirs = function(t).detach().numpy()
    assert np.array_equal(y, theirs, equal_nan=True)
    assert np.array_equal(np.signbit(y)[0, 1:], np.signbit(theirs)[0, 1:])
    got = bnbp.batch_norm_inference_backprop(x, one, -zero, zero, one, np.ones_like(x), 0.0, activation=activation)
    some = slice(activation == "relu6", None)  # of NaN, its ReLU6 passes the gradient or not by the place in the array
    assert np.array_equal(got.beta_delta[some], t.grad[0].numpy()[some])
print("agreed")
"""
    assert python(code) == "agreed"


# ---------------------------------------------------------------- halves


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reduce_and_apply_make_the_operator(layout, types, activation):
    """Each half on the masked delta, whether it is told the output or finds it out again."""
    shape, axis = layout
    batch, _ = make_activated(shape, axis, *types)
    x, gamma, beta, mean, variance, delta = batch
    normalized = forward_of(batch, 0.5, activation=activation, channel_axis=axis)
    plain, count = masked(batch, normalized, activation), x.size // shape[axis]
    expected = bnbp.batch_norm_training_backprop_reduce(x, mean, plain.normalized_delta, channel_axis=axis)
    whole = *bnbp.batch_norm_training_backprop_apply(*plain, *expected, count, 0.5, channel_axis=axis), plain[5]
    options = {"activation": activation, "channel_axis": axis}
    again = {"gamma": gamma, "beta": beta, "variance": variance, "epsilon": 0.5}
    for forward in (again, {"normalized": normalized}, {"normalized": normalized, "addend": True, **again}):
        sums = bnbp.batch_norm_training_backprop_reduce(x, mean, delta, **forward, **options)
        assert same_bits(sums, expected)
    for forward in ({}, {"normalized": normalized}, {"normalized": normalized, "addend": True}):
        results = bnbp.batch_norm_training_backprop_apply(*batch, *sums, count, 0.5, **forward, **options)
        assert same_bits(results, whole[: len(results)])
        if types[0] != np.float64:  # whose sums are rounded between the halves
            at_once = bnbp.batch_norm_training_backprop(*batch, 0.5, **forward, **options)
            assert same_bits(results, at_once)
    assert len(results) == 4


def test_reduce_takes_ones_and_zeros_for_a_scale_and_shift_that_are_left_out(dtype):
    batch, _ = make_activated((6, 4, 30), 1, dtype)
    ones, zeros = np.ones_like(batch.gamma), np.zeros_like(batch.beta)
    arguments = batch.input, batch.mean, batch.normalized_delta
    options = {"variance": batch.variance, "activation": "relu"}
    given = bnbp.batch_norm_training_backprop_reduce(*arguments, gamma=ones, beta=zeros, **options)
    assert same_bits(bnbp.batch_norm_training_backprop_reduce(*arguments, **options), given)


@given(splits)
@pytest.mark.parametrize("types", MIXED, ids=str)
@pytest.mark.parametrize("with_addend", [False, True])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(types, with_addend, split):
    """Merged statistics, sums that are added; each part has its own piece of the addend and of the output."""
    batch, addend = make_activated(SHAPE, 1, *types)
    addends = parts_of(addend, split) if with_addend else itertools.repeat(None)
    inputs, deltas = parts_of(batch.input, split), parts_of(batch.normalized_delta, split)
    options = {"activation": "relu6"}
    outputs = [
        bnbp.batch_norm_inference(x, *batch[1:5], addend=a, **options) for x, a in zip(inputs, addends, strict=False)
    ]
    normalized = np.concatenate(outputs, split[0])
    assert same_bits([normalized], [forward_of(batch, addend=addend if with_addend else None, **options)])
    plain = masked(batch, normalized, "relu6")
    sums, expected = [], []
    for x, delta, part, y in zip(inputs, deltas, parts_of(plain.normalized_delta, split), outputs, strict=True):
        forward = {"gamma": batch.gamma, "beta": batch.beta, "variance": batch.variance}
        forward = {"normalized": y} if with_addend else forward
        sums.append(bnbp.batch_norm_training_backprop_reduce(x, batch.mean, delta, **forward, **options))
        expected.append(bnbp.batch_norm_training_backprop_reduce(x, batch.mean, part))
        assert same_bits(sums[-1], expected[-1])
    total = [sum(values) for values in zip(*sums, strict=True)]
    whole = bnbp.batch_norm_training_backprop_apply(*plain, *total, 70)
    results = [
        bnbp.batch_norm_training_backprop_apply(
            *(x, *batch[1:5], delta, *total, 70), normalized=y if with_addend else None, addend=with_addend, **options
        )
        for x, delta, y in zip(inputs, deltas, outputs, strict=True)
    ]
    assert same_bits([np.concatenate([result.input_delta for result in results], split[0])], whole[:1])
    assert all(same_bits(result[1:3], whole[1:]) for result in results)
    if with_addend:
        deltas = np.concatenate([result.addend_delta for result in results], split[0])
        assert same_bits([deltas], [plain.normalized_delta])


# ---------------------------------------------------------------- empty, tiny, and what is not read


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0), (0, 3, 2**28, 2**28)], ids=str)
def test_an_empty_batch(shape, activation, dtype):
    x, vector = np.empty(shape, dtype), np.zeros(3, dtype)
    forward = bnbp.batch_norm_training(x, vector, vector, activation=activation, addend=x)
    assert forward.normalized.shape == shape
    assert np.isnan(forward[1:]).all()
    assert bnbp.batch_norm_inference(x, *[vector] * 4, 0, activation=activation, addend=x).shape == shape
    for name in GRADIENTS:
        for forward in ({}, {"normalized": x}, {"normalized": x, "addend": True}):
            got = getattr(bnbp, f"batch_norm_{name}")(x, *[vector] * 4, x, 0, activation=activation, **forward)
            assert {result.shape for result in got[::3]} == {shape}
            assert (np.array(got[1:3]) == 0).all()
    sums = bnbp.batch_norm_training_backprop_reduce(x, vector, x, variance=vector, activation=activation)
    assert (np.array(sums) == 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 40), (1, 40, 1, 1)], ids=str)
def test_one_element_in_a_channel(shape, activation, types):
    """The output is the shift and the addend; input_delta is nothing, and the addend's gradient is the masked delta."""
    batch, addend = make_activated(shape, 1, *types)
    forward = bnbp.batch_norm_training(*batch[:3], activation=activation, addend=addend)
    # Of 16-bit types, the mean has been rounded to the input itself.
    exact = activated((batch.beta.astype(np.float64) + addend.ravel().astype(np.float64)).astype(types[0]), activation)
    np.testing.assert_array_equal(forward.normalized.ravel(), exact)
    plain = masked(batch, forward.normalized, activation)
    assert 0 < np.count_nonzero(plain.normalized_delta) < 40
    for epsilon in (0.0, 1e-5):
        got = bnbp.batch_norm_training_backprop(
            *(*batch[:3], *forward[1:], batch.normalized_delta, epsilon),
            **{"activation": activation, "normalized": forward.normalized, "addend": True},
        )
        assert (got.input_delta == 0).all()
        assert same_bits([got.addend_delta], [plain.normalized_delta])
        assert (got.beta_delta == plain.normalized_delta.ravel()).all()


def test_bits_do_not_depend_on_threads(dtype):
    for axis, activation in itertools.product((1, -1), ACTIVATIONS):
        batch, addend = make_activated((7, 13, 29, 31), axis, dtype)  # 81,809 elements: enough for a team
        options = {"activation": activation, "channel_axis": axis}
        one, *others = (run("training", batch, addend=addend, num_threads=count, **options) for count in (1, 2, 3, 5))
        assert all(same_bits(one, other) for other in others)
        for name in GRADIENTS:
            every = [list(gradients_of(name, batch, one[0], num_threads=n, **options)) for n in (1, 2, 3, 5)]
            for way in zip(*every, strict=True):
                assert all(same_bits(way[0], other) for other in way)


@pytest.mark.skipif(sys.platform == "win32", reason="it forbids to read memory by POSIX's mprotect")
def test_without_an_activation_the_output_is_not_read():
    code = """
import ctypes, mmap, numpy as np, bnbp
n = 1 << 20
memory = mmap.mmap(-1, 4 * n)
y = np.frombuffer(memory, np.float32).reshape(1, 4, -1)
x, vector = np.ones_like(y), np.ones(4, np.float32)
libc = ctypes.CDLL(None)
assert libc.mprotect(ctypes.c_void_p(y.ctypes.data), ctypes.c_size_t(4 * n), 0) == 0  # reading it ends the process
for view in (y, y[:, :, ::2]):
    delta = x[:, :, :view.shape[2]]
    got = bnbp.batch_norm_training_backprop(delta, None, None, vector, vector, delta, normalized=view, addend=True)
    print((got.addend_delta == 1).all())
"""
    assert python(code).split() == ["True", "True"]


@pytest.mark.parametrize("count", [3, 6], ids=["training", "training_backprop"])
def test_an_earlier_result_can_be_passed_back(count, dtype):
    (first, a), (second, b) = (make_activated((4, 3, 5), dtype=dtype, seed=seed) for seed in (1, 2))
    if count == 3:
        result = bnbp.batch_norm_training(*first[:3], activation="relu", addend=a)
        again = bnbp.batch_norm_training(*second[:3], activation="relu", addend=b, out=result)
        expected = bnbp.batch_norm_training(*second[:3], activation="relu", addend=b)
    else:
        options = {"activation": "relu", "addend": True}
        result = bnbp.batch_norm_training_backprop(*first, normalized=a, **options)
        again = bnbp.batch_norm_training_backprop(*second, normalized=b, out=result, **options)
        expected = bnbp.batch_norm_training_backprop(*second, normalized=b, **options)
    assert all(x is y for x, y in zip(result, again, strict=True))
    assert same_bits(again, expected)


def test_the_layouts_of_this_file_have_elements_of_each_kind():
    assert sum(np.prod(shape) > 1000 for shape, _ in LAYOUTS) > 5


@pytest.mark.parametrize("behind", [0, 16, 80, 144, 2064])
def test_the_place_of_the_outputs_in_their_pages_changes_no_bit(behind):
    """The tensors are large enough to be streamed; just behind an input, only one of the two outputs is."""
    shape = (32, 32, 56, 56)
    rng = np.random.default_rng(3)

    def placed(offset):
        size = 4 * int(np.prod(shape))
        memory = np.full(size + 8192, 0xFF, np.uint8)
        start = -memory.ctypes.data % 4096 + offset
        return memory[start : start + size].view(np.float32).reshape(shape)

    x, dy, y = placed(0), placed(0), placed(0)
    for tensor in (x, dy, y):
        tensor[...] = rng.normal(size=shape)
    one, zero = np.ones(32, np.float32), np.zeros(32, np.float32)
    dx, da = placed(behind), placed(behind)
    bnbp.batch_norm_training_backprop(
        x, one, zero, zero, one, dy, activation="relu", normalized=y, addend=True, out=(dx, None, None, da)
    )
    masked = np.where(y > 0, dy, np.float32(0))
    assert np.array_equal(da, masked)
    plain = bnbp.batch_norm_training_backprop(x, one, zero, zero, one, masked)
    assert np.array_equal(dx, plain.input_delta)
