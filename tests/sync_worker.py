"""What a process of `test_torch_sync.py` does: ``sync_worker.py RANK WORLD STORE SCENARIO...``; it prints JSON."""

import datetime
import hashlib
import json
import os
import signal
import sys
import traceback

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import bnbp.torch

BATCH, CHANNELS = 7, 4
SIZES = {1: [7], 2: [5, 2], 3: [4, 0, 3], 4: [2, 1, 0, 4]}  # of the shards: uneven ones, and empty ones


def shard(rank, world):
    start = sum(SIZES[world][:rank])
    return slice(start, start + SIZES[world][rank])


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    tensors = torch.randn(3, BATCH, CHANNELS, 3, 5, dtype=torch.float64, generator=generator)
    parameters = torch.rand(2, CHANNELS, dtype=torch.float64, generator=generator) + 0.5
    x, addend, delta = (3 * tensors + 1).to(dtype)
    return x, addend, delta, *parameters.to(torch.float32 if dtype.itemsize == 2 else dtype)


def layer(module, weight, bias):
    """A batch norm with these parameters, in their type."""
    module = module.to(weight.dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return module


def distance(got, right):
    """Relative to the largest element."""
    got, right = got.detach(), right.detach()
    return float((got.double() - right.double()).abs().max() / right.abs().max()) if got.numel() else 0.0


def gradients(rank, world):
    """Everything against PyTorch's batch norm on the whole batch in float64, in one process."""
    worst, digest = {}, hashlib.sha256()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for activation in (None, "relu", "relu6"):
            for with_addend in (False, True):
                for last in (False, True):
                    results = one_case(rank, world, dtype, activation, with_addend, last)
                    for got, right in results:
                        name = str(dtype).removeprefix("torch.")
                        worst[name] = max(worst.get(name, 0), distance(got, right))
                        digest.update(got.detach().double().numpy().tobytes())
    return {"worst": worst, "digest": digest.hexdigest()}


def one_case(rank, world, dtype, activation, with_addend, last):
    x, addend, delta, weight, bias = batch(dtype)
    whole = layer(torch.nn.BatchNorm2d(CHANNELS), weight.double(), bias.double())
    inputs = [tensor.double().clone().requires_grad_() for tensor in (x, addend)]
    y = whole(inputs[0]) + (inputs[1] if with_addend else 0)
    y = y if activation is None else getattr(torch.nn.functional, activation)(y)
    y.backward(delta.double())

    part = shard(rank, world)
    ours = layer(bnbp.torch.SyncBatchNorm(CHANNELS, activation=activation), weight, bias)
    own = [tensor[part].clone() for tensor in (x, addend)]
    own = [t.to(memory_format=torch.channels_last) if last else t for t in own]
    own = [tensor.requires_grad_() for tensor in own]
    got = ours(own[0], own[1] if with_addend else None)
    got.backward(delta[part])
    for parameter in ours.parameters():  # each process has its own sums
        distributed.all_reduce(parameter.grad)
    results = [
        (got, y[part]),
        (own[0].grad, inputs[0].grad[part]),
        (ours.weight.grad, whole.weight.grad),
        (ours.bias.grad, whole.bias.grad),
        (ours.running_mean, whole.running_mean),
        (ours.running_var, whole.running_var),
    ]
    if with_addend:
        results.append((own[1].grad, inputs[1].grad[part]))
    if activation and dtype.itemsize == 2:  # next to a corner, two roundings are on different sides of it
        results = [results[0], *results[4:6]]
    return results


def spread(rank, world):
    """The bits of everything, put together in the order of the samples."""
    digest = hashlib.sha256()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for activation, with_addend, last in ((None, False, False), ("relu", False, True), ("relu6", True, False)):
            x, addend, delta, weight, bias = batch(dtype)
            part = shard(rank, world)
            own = [tensor[part].clone() for tensor in (x, addend)]
            own = [(t.to(memory_format=torch.channels_last) if last else t).requires_grad_() for t in own]
            ours = layer(bnbp.torch.SyncBatchNorm(CHANNELS, activation=activation), weight, bias)
            y = ours(own[0], own[1] if with_addend else None)
            y.backward(delta[part])
            results = [y, own[0].grad, *([own[1].grad] if with_addend else [])]
            for result in results:
                parts = [None] * world
                distributed.all_gather_object(parts, result.detach().double().contiguous())
                digest.update(torch.cat(parts).numpy().tobytes())
            for buffer in (ours.running_mean, ours.running_var):
                digest.update(buffer.double().numpy().tobytes())
    return {"digest": digest.hexdigest()}


def collectives(rank, world):
    """How many numbers each collective moves: forward and backward."""
    return {"plain": moved(rank, world, False), "exact": moved(rank, world, True)}


def moved(rank, world, reproducible):
    moved, gather = [], distributed.all_gather

    def counting(parts, part, group=None):
        moved.append([part.numel(), str(part.dtype)])
        return gather(parts, part, group=group)

    distributed.all_gather = counting
    x, _, delta, weight, bias = batch()
    module = bnbp.torch.SyncBatchNorm(CHANNELS, activation="relu", reproducible=reproducible)
    module = layer(module, weight, bias)
    module(x[shard(rank, world)].requires_grad_()).backward(delta[shard(rank, world)])
    module.eval()(x)
    distributed.all_gather = gather
    return moved


def group(rank, world):
    """The first two processes are a group; the third one is not in it, and normalises by itself."""
    pair = distributed.new_group([0, 1])
    x, *_ = batch()
    module = bnbp.torch.SyncBatchNorm(CHANNELS, affine=False, process_group=pair).double()
    part = x[rank::2] if rank < 2 else x[:3]
    whole = x if rank < 2 else part
    right = torch.nn.functional.batch_norm(whole, None, None, training=True)
    y = module(part)
    return {
        "distance": distance(y, right[rank::2] if rank < 2 else right),
        "mean": distance(module.running_mean, 0.1 * whole.mean((0, 2, 3))),
    }


def other_addends(rank, world):
    """Addends that PyTorch broadcasts, or whose type it promotes to."""
    x, addend, delta, *_ = batch()
    part, worst = shard(rank, world), 0.0
    for added, dtype in ((addend[:1, :, :1, :1], x.dtype), (addend[part], torch.float32)):
        given = x.to(dtype)
        own = given[part].clone().requires_grad_()
        got = bnbp.torch.SyncBatchNorm(CHANNELS, activation="relu").to(dtype)(own, added)
        got.backward(delta[part])
        whole = given.to(torch.float64, copy=True).requires_grad_()
        normalized = torch.nn.functional.batch_norm(whole, None, None, training=True)
        y = torch.relu(normalized + (added if len(added) == 1 else addend))
        y.backward(delta)
        limit = 1e-13 if dtype is torch.float64 else 2e-6
        pairs = ((got, y[part]), (own.grad, whole.grad[part]))
        worst = max(worst, *(distance(a, b) / limit for a, b in pairs))
        assert got.dtype is torch.float64
    return {"worst": worst}


def twice(rank, world):
    """A second derivative is refused."""
    x, *_ = batch()
    own = x[shard(rank, world)].clone().requires_grad_()
    y = bnbp.torch.SyncBatchNorm(CHANNELS).double()(own)
    (first,) = torch.autograd.grad((y**3).sum(), own, create_graph=True)
    try:
        first.sum().backward()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def partly(rank, world):
    """Parameters that are frozen, and an input that needs no gradient, as that of a first layer."""
    x, _, delta, weight, bias = batch()
    part, distances = shard(rank, world), []
    for frozen in (False, True):
        results = []
        for module, given, dy in (
            (bnbp.torch.SyncBatchNorm(CHANNELS), x[part], delta[part]),
            (torch.nn.BatchNorm2d(CHANNELS), x, delta),
        ):
            leaf = given.clone().requires_grad_(frozen)
            layer(module, weight, bias).requires_grad_(not frozen)(leaf).backward(dy)
            results.append((module, leaf))
        (ours, own), (theirs, all_of_it) = results
        if frozen:
            distances.append(distance(own.grad, all_of_it.grad[part]))
            assert ours.weight.grad is None
        else:
            distributed.all_reduce(ours.weight.grad)
            distances.append(distance(ours.weight.grad, theirs.weight.grad))
            assert own.grad is None
    return {"distance": max(distances)}


def average(rank, world):
    """Running statistics that are the average of all batches, with empty shards among them."""
    x, *_ = batch()
    ours, theirs = (kind(CHANNELS, momentum=None).double() for kind in (bnbp.torch.SyncBatchNorm, torch.nn.BatchNorm2d))
    for k in (1, 2, 3):
        ours(k * x[shard(rank, world)])
        theirs(k * x)
    pairs = zip(ours.buffers(), theirs.buffers(), strict=True)
    return {"distance": max(distance(a, b) for a, b in pairs)}


def network(convert):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 3)]
    model = torch.nn.Sequential(*layers, torch.nn.BatchNorm2d(3), torch.nn.ReLU()).double()
    return bnbp.torch.convert(bnbp.torch.SyncBatchNorm.convert_sync_batchnorm(model)) if convert else model


def train(model, x, target):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        ((model(x) - target) ** 2).mean().backward()
        optimizer.step()
    return model


def ddp(rank, world):
    """Five steps of a network under DistributedDataParallel, and in one process on the whole batch."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4 * world, 2, 9, 9, dtype=torch.float64, generator=generator)
    target = torch.rand(4 * world, 3, 5, 5, dtype=torch.float64, generator=generator)
    right = train(network(False), x, target)
    own = slice(4 * rank, 4 * rank + 4)
    got = train(DistributedDataParallel(network(True)), x[own], target[own]).module
    pairs = zip(got.state_dict().items(), right.state_dict().items(), strict=True)
    return {"distance": max(distance(a.double(), b.double()) for (_, a), (_, b) in pairs)}


def death(rank, world):
    """The last process dies before the second step."""
    x, *_ = batch()
    module = bnbp.torch.SyncBatchNorm(CHANNELS).double()
    module(x)
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        module(x)
    except RuntimeError as error:
        return {"error": type(error).__name__}
    return {"error": None}


def too_small(rank, world):
    """One element in all processes."""
    module = bnbp.torch.SyncBatchNorm(CHANNELS)
    try:
        module(torch.ones(1 if rank == 0 else 0, CHANNELS, 1, 1))
    except ValueError as error:
        return {"error": str(error).partition(",")[0]}
    return {"error": None}


def compiled(rank, world):
    """It runs under torch.compile, outside the graph."""
    x, *_ = batch()
    part = x[shard(rank, world)] if world == 2 else x
    module = bnbp.torch.SyncBatchNorm(CHANNELS, affine=False).double()
    right = module(part)
    return {"distance": distance(torch.compile(module, backend="eager")(part), right)}


def main():
    rank, world, store, scenarios = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=20)
    )
    answers = {}
    for scenario in scenarios:
        try:
            answers[scenario] = globals()[scenario](rank, world)
        except Exception:
            answers[scenario] = {"failed": traceback.format_exc()}
            break  # the processes may no longer be at the same collective
    print(json.dumps(answers), flush=True)
    if "death" not in scenarios:
        distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may wait for a process that is dead


if __name__ == "__main__":
    main()
