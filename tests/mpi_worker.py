"""What a process of `test_mpi.py` does: ``mpi_worker.py FOLDER SCENARIO...``; it writes JSON into the folder."""

import hashlib
import itertools
import json
import sys
import traceback
from pathlib import Path

import ml_dtypes
import numpy as np
from mpi4py import MPI

import bnbp.mpi
from bnbp import reference

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.Get_rank(), WORLD.Get_size()

BATCH, CHANNELS = 11, 4
#: Samples of each rank: uneven, and none.
SPLITS = {1: [11], 2: [7, 4], 3: [6, 0, 5], 5: [2, 0, 1, 5, 3]}
TYPES = [
    (np.float16, np.float16),
    (np.float16, np.float32),
    (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
    (ml_dtypes.bfloat16, np.float32),
    (np.float32, np.float32),
    (np.float64, np.float64),
]
EPSILON = 0.25


def part_of(tensor, axis, rank=RANK, size=SIZE):
    """The samples of a rank, of a tensor whose batch axis is 0 or, where that is the channels', 1."""
    start = sum(SPLITS[size][:rank])
    samples = slice(start, start + SPLITS[size][rank])
    return tensor[:, samples] if axis == 0 else tensor[samples]


def batch(dtype, parameters, axis, offset=3.0):
    """input, addend, normalized_delta, gamma, beta."""
    rng = np.random.default_rng(7)
    along = (CHANNELS, 1, 1) if axis % 4 == 1 else (CHANNELS,) if axis % 4 == 3 else (CHANNELS, 1, 1, 1)
    shape = [BATCH, 3, 5]
    shape.insert(axis % 4, CHANNELS)
    scale, shift = (rng.uniform(low, high, CHANNELS).reshape(along) for low, high in ((0.5, 4), (-offset, offset)))
    x = rng.normal(size=shape) * scale + shift
    others = rng.normal(0.2, 1, (2, *shape))
    gamma, beta = rng.uniform(-2, 2, (2, CHANNELS))
    return *(each.astype(dtype) for each in (x, *others)), gamma.astype(parameters), beta.astype(parameters)


def wide(*arrays):
    return [None if each is None else np.asarray(each, np.float64) for each in arrays]


def eps(dtype):
    return float(ml_dtypes.finfo(dtype).eps)


def ratio(got, right, allowed):
    """The largest error in units of what is allowed; infinite where one of the two is not finite."""
    got, right = wide(got, right)
    if not got.size:
        return 0.0
    error = abs(got - right) / allowed
    return float(np.max(np.where(np.isfinite(error), error, np.inf)))


def along(vector, axis):
    shape = [1] * 4
    shape[axis % 4] = -1
    return np.asarray(vector, np.float64).reshape(shape)


def digest(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(each).tobytes() for each in arrays)).hexdigest()


def gathered(part, axis):
    """A tensor of which each rank has a part."""
    dtype = part.dtype
    parts = WORLD.allgather(np.ascontiguousarray(part).view(f"V{dtype.itemsize}"))
    return np.concatenate([each.view(dtype) for each in parts], 1 if axis == 0 else 0)


CASES = [
    (types, axis, activation, has_addend)
    for k, (types, axis) in enumerate(itertools.product(TYPES, (1, -1, 0)))
    for activation, has_addend in ([(None, False), ("relu", True)] if k % 2 else [("relu6", False), (None, True)])
]


def operators():
    """All operators, against the reference in float64 on the whole batch; digests of what the ranks have."""
    worst, common, of_all = {}, hashlib.sha256(), {True: hashlib.sha256(), False: hashlib.sha256()}
    for (types, axis, activation, has_addend), reproducible in itertools.product(CASES, (True, False)):
        for name, value in one_case(types, axis, activation, has_addend, reproducible, common, of_all).items():
            worst[name] = max(worst.get(name, 0.0), value)
    return {
        "worst": worst,
        "common": common.hexdigest(),
        "reproducible": of_all[True].hexdigest(),
        "plain": of_all[False].hexdigest(),
    }


def one_case(types, axis, activation, has_addend, reproducible, common, of_all):
    dtype, parameters = types
    x, addend, dy, gamma, beta = batch(dtype, parameters, axis)
    added = addend if has_addend else None
    options = {"channel_axis": axis, "activation": activation}
    how = {**options, "reproducible": reproducible}
    own = [part_of(each, axis) for each in (x, addend, dy)]
    if axis == 1 and activation:  # any layout: this rank's part is in Fortran order, or a window
        own[0] = np.asfortranarray(own[0]) if not reproducible else np.repeat(own[0], 2, 0)[::2]
    others = tuple(k for k in range(4) if k != axis % 4)
    m = x.size // CHANNELS

    y, mean, variance = bnbp.mpi.batch_norm_training(
        own[0], gamma, beta, EPSILON, addend=own[1] if has_addend else None, **how
    )
    right = reference.batch_norm_training_statistics(x, channel_axis=axis)
    spread = np.sqrt(right.m2 / m)
    ulp = eps(parameters)
    worst = {
        "mean": ratio(mean, right.mean, ulp * abs(right.mean) + 2.0**-40 * spread),
        "variance": ratio(variance, right.m2 / m, max(ulp, 2.0**-50) * right.m2 / m),
    }
    statistics = (mean, variance) if activation else (right.mean, right.m2 / m)  # as in one process
    expected = reference.batch_norm_inference(*wide(x, gamma, beta, *statistics), EPSILON, addend=added, **options)
    xhat = (wide(x)[0] - along(right.mean, axis)) / np.sqrt(along(right.m2 / m, axis) + EPSILON)
    terms = abs(along(gamma, axis) * xhat) + abs(along(beta, axis)) + (abs(wide(addend)[0]) if has_addend else 0)
    worst["normalized"] = ratio(y, *(part_of(each, axis) for each in (expected, 4 * eps(dtype) * terms)))
    of_y = gathered(y, axis)

    gradients = [gamma, beta, mean, variance]
    with_normalized = y if activation and (has_addend or eps(dtype) > 1e-4) else None
    given = of_y if with_normalized is not None else None
    digests = [of_y, mean, variance]
    for op in ("training", "inference"):
        result = getattr(bnbp.mpi, f"batch_norm_{op}_backprop")(
            *(own[0], *gradients, own[2], EPSILON), normalized=with_normalized, addend=has_addend, **how
        )
        right = getattr(reference, f"batch_norm_{op}_backprop")(
            *wide(x, *gradients, dy), EPSILON, normalized=given, addend=has_addend, **options
        )
        inv_std = 1 / np.sqrt(wide(variance)[0] + EPSILON)
        xhat = (wide(x)[0] - along(mean, axis)) * along(inv_std, axis)
        sums_of_terms = [np.sum(abs(wide(dy)[0] * each), others) for each in (xhat, np.ones(()))]
        of_sum = 2.0**-20 if np.dtype(dtype).itemsize == 2 else 2.0**-44
        for name, magnitude in zip(("gamma_delta", "beta_delta"), sums_of_terms, strict=True):
            value = getattr(right, name)
            error = ratio(getattr(result, name), value, ulp * abs(value) + of_sum * magnitude)
            worst[name] = max(worst.get(name, 0), error)
        size = abs(wide(dy)[0])
        if op == "training":
            size = (
                size + along(sums_of_terms[1], axis) / m * of_sum / eps(dtype) + abs(along(right.beta_delta, axis)) / m
            )
            size = size + abs(xhat) * (
                along(sums_of_terms[0], axis) / m * of_sum / eps(dtype) + abs(along(right.gamma_delta, axis)) / m
            )
        allowed = 4 * eps(dtype) * abs(along(gamma * inv_std, axis)) * size
        pair = (part_of(each, axis) for each in (right.input_delta, allowed))
        worst["input_delta"] = max(worst.get("input_delta", 0), ratio(result.input_delta, *pair))
        if has_addend:
            same = np.array_equal(wide(result.addend_delta)[0], part_of(right.addend_delta, axis))
            worst["addend_delta"] = 0.0 if same and worst.get("addend_delta", 0.0) == 0.0 else np.inf
        digests += [gathered(result.input_delta, axis), *result[1:3]]
        common.update(digest(*result[1:3]).encode())
    common.update(digest(mean, variance).encode())
    if not (axis == 1 and activation):  # with several layouts only the plain contract holds
        of_all[reproducible].update(digest(*digests).encode())
    return worst


def in_place():
    """`out`: the input itself, the arriving gradient itself, and arrays of the caller's."""
    x, addend, dy, gamma, beta = batch(np.float32, np.float32, 1)
    own = [part_of(each, 1).copy() for each in (x, addend, dy)]
    plain = bnbp.mpi.batch_norm_training(own[0], gamma, beta, activation="relu", addend=own[1])
    vectors = [np.full(2 * CHANNELS, 7, np.float32)[::2], np.empty(CHANNELS, np.float32)]
    target = own[0].copy()
    result = bnbp.mpi.batch_norm_training(target, gamma, beta, activation="relu", addend=own[1], out=(target, *vectors))
    same = [result.normalized is target, result.batch_mean is vectors[0], result.batch_variance is vectors[1]]
    same += [np.array_equal(a, b) for a, b in zip(result, plain, strict=True)]
    operands = own[0], gamma, beta, plain.batch_mean, plain.batch_variance
    options = {"activation": "relu", "normalized": plain.normalized, "addend": True}
    for operator in (bnbp.mpi.batch_norm_training_backprop, bnbp.mpi.batch_norm_inference_backprop):
        every = operator(*operands, own[2], **options)
        delta = own[2].copy()
        got = operator(*operands, delta, **options, out=(delta, None, vectors[0], None))
        same += [got.input_delta is delta, got.beta_delta is vectors[0]]
        same += [np.array_equal(a, b) for a, b in zip(got, every, strict=True)]
        # Every rank wants something else.
        mask = [bool(RANK >> k & 1) for k in range(4)]
        some = operator(*operands, own[2], **options, output_mask=mask)
        same += [
            a is None if not wanted else np.array_equal(a, b) for a, b, wanted in zip(some, every, mask, strict=True)
        ]
    return {"same": same}


def nothing():
    """A batch that is empty on all ranks, and parameters that are left out."""
    x = np.empty((0, CHANNELS, 3), np.float32)
    forward = bnbp.mpi.batch_norm_training(x)
    backward = bnbp.mpi.batch_norm_training_backprop(x, None, None, *forward[1:], x)
    return {
        "shapes": [forward.normalized.shape, backward.input_delta.shape],
        "nan": [bool(np.isnan(each).all()) for each in forward[1:]],
        "zero": [bool((each == 0).all()) for each in backward[1:]],
    }


def far():
    """A mean of a million, beside deviations that float32 cannot subtract its rounded value from."""
    x, *_ = batch(np.float64, np.float64, 1)
    x = (x + 1e6).astype(np.float32)
    y = bnbp.mpi.batch_norm_training(part_of(x, 1)).normalized
    return {"error": float(abs(gathered(y, 1) - reference.batch_norm_training(x).normalized).max())}


def special():
    """A NaN on one rank, an infinity on another one: they do not leave their channels."""
    x, *_ = batch(np.float32, np.float32, 1)
    x[0, 1, 0, 0], x[-1, 2, 0, 0] = np.nan, np.inf
    right = bnbp.batch_norm_training(x)
    answer = []
    for reproducible in (True, False):
        _, mean, variance = bnbp.mpi.batch_norm_training(part_of(x, 1), reproducible=reproducible)
        finite = [0, 3]
        answer.append(bool(np.array_equal(mean[1:3], right.batch_mean[1:3], equal_nan=True)))
        answer.append(bool(np.array_equal(variance[1:3], right.batch_variance[1:3], equal_nan=True)))
        answer.append(bool(np.allclose(mean[finite], right.batch_mean[finite], rtol=1e-6)))
    return {"same": answer}


def called(operator, *arguments, **options):
    """The type and the message of what it raises."""
    try:
        operator(*arguments, **options)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def disagreements():
    """The last rank is given something else; each kind of it. In between, a good call must work."""
    x, addend, dy, gamma, beta = batch(np.float32, np.float32, 1)
    x, addend, dy = (part_of(each, 1) for each in (x, addend, dy))
    mean, variance = np.zeros(CHANNELS, np.float32), np.ones(CHANNELS, np.float32)
    last = RANK == SIZE - 1
    training, backprop = bnbp.mpi.batch_norm_training, bnbp.mpi.batch_norm_training_backprop
    forward, backward = (x, gamma, beta), (x, gamma, beta, mean, variance, dy)

    def but(arguments, k, value):
        return [value if last and k == i else each for i, each in enumerate(arguments)]

    double = [each.astype(np.float64) for each in backward]
    other = gamma.copy()
    other[2] += 1
    calls = {
        "operator": lambda: called(training, *forward) if last else called(backprop, *backward),
        "epsilon": lambda: called(training, *forward, 1e-3 if last else 1e-5),
        "channels": lambda: called(training, x[:, : 3 if last else 4]),
        "type": lambda: called(backprop, *(double if last else backward)),
        "parameter type": lambda: called(
            training, x.astype(np.float16), gamma.astype(np.float16 if last else np.float32)
        ),
        "activation": lambda: called(training, *forward, activation="relu" if last else None),
        "addend": lambda: called(training, *forward, addend=addend if last else None),
        "reproducible": lambda: called(training, *forward, reproducible=not last),
        "gamma": lambda: called(training, *but(forward, 1, other)),
        "beta": lambda: called(backprop, *but(backward, 2, None)),
        "mean": lambda: called(backprop, *but(backward, 3, other)),
        "variance": lambda: called(backprop, *but(backward, 4, 2 * variance)),
    }
    answers = {}
    for name, call in calls.items():
        answers[name] = call()
        training(*forward)
    return answers


def failures():
    """The last rank is given rubbish, and must be the only one to have more than its number to say."""
    x, _, dy, gamma, beta = batch(np.float32, np.float32, 1)
    x, dy = part_of(x, 1).copy(), part_of(dy, 1)
    mean, variance = np.zeros(CHANNELS, np.float32), np.ones(CHANNELS, np.float32)
    last = RANK == SIZE - 1
    training, backprop = bnbp.mpi.batch_norm_training, bnbp.mpi.batch_norm_training_backprop
    untouched = np.full_like(x, 7)
    short = (untouched, None, np.empty(CHANNELS + 1, np.float32))

    class Broken:
        def __array__(self, *arguments, **options):
            raise KeyError("no data")

    class NoMemory:
        def __array__(self, *arguments, **options):
            raise MemoryError

    calls = {
        "shape": lambda: called(training, x, gamma[: 3 if last else 4]),
        "type": lambda: called(training, x.astype(np.int64) if last else x),
        "out": lambda: called(training, x, out=short if last else (untouched, None, None)),
        "out of the gradient": lambda: called(
            backprop, x, gamma, beta, mean, variance, dy, out=short if last else (untouched, None, None)
        ),
        "array": lambda: called(training, Broken() if last else x),
        "memory": lambda: called(training, NoMemory() if last else x),
        "all": lambda: called(training, x, epsilon=-1),
    }
    answers = {}
    for name, call in calls.items():
        answers[name] = call()
        training(x)
    answers["untouched"] = bool((untouched == 7).all())
    return answers


def communicators():
    """Some of the processes, one alone, and what is no communicator."""
    x, *_ = batch(np.float64, np.float64, 1)
    half = WORLD.Split(RANK % 2, -RANK)  # the ranks in the other order
    mine = x[half.Get_rank() :: half.Get_size()]
    forward = bnbp.mpi.batch_norm_training(mine, comm=half)
    right = reference.batch_norm_training(x)
    answers = {"half": float(abs(forward.batch_mean - right.batch_mean).max())}
    for name, one in (("self", MPI.COMM_SELF), ("inference", None)):
        if RANK == 0:  # alone
            if one:
                forward = bnbp.mpi.batch_norm_training(x, comm=one)
            y = bnbp.mpi.batch_norm_inference(x, None, None, *forward[1:], comm=one)
            answers[name] = float(abs(y - right.normalized).max())
    answers["wrong"] = [called(bnbp.mpi.batch_norm_training, x, comm=comm) for comm in (3, MPI.COMM_NULL)]
    if SIZE > 1:
        others_first = SIZE - 2 if (SIZE - 1) % 2 == RANK % 2 else SIZE - 1  # the first one of the other half
        between = half.Create_intercomm(0, WORLD, others_first, 5)
        answers["wrong"].append(called(bnbp.mpi.batch_norm_training, x, comm=between))
        between.Free()
    half.Free()
    return answers


def main():
    folder, scenarios = Path(sys.argv[1]), sys.argv[2:]
    answers = {}
    for scenario in scenarios:
        try:
            answers[scenario] = globals()[scenario]()
        except Exception:
            answers[scenario] = {"failed": traceback.format_exc()}
            break  # the processes may no longer be at the same collective
    (folder / f"{RANK}.json").write_text(json.dumps(answers))
    if any("failed" in answer for answer in answers.values()):
        sys.stdout.flush()
        WORLD.Abort(1)


if __name__ == "__main__":
    main()
