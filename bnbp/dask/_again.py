"""Load the chunks of an array again.

An operator on a whole batch goes through it twice: once for its sums, and once more with them. If both passes took
their chunks from the same tasks, Dask would keep every chunk of the first one in memory for the second one. So each
pass has tasks of its own. They are copies under other names, except for data that is in memory anyway or is small.

``dask.graph_manipulation.clone`` does the same, but stops where the caller says. In Dask 2026.8 it does not rename the
references of the tasks of some layers, and ``clone(x.rechunk(2))`` cannot be computed.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import dask.array
from dask._task_spec import DataNode, TaskRef, convert_legacy_graph
from dask.base import clone_key
from dask.blockwise import Blockwise
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

__all__ = ["WHOLE", "again"]

#: The names of layers that hold sums of a whole batch begin like this. They are small, and are not computed again.
WHOLE = "bnbp-whole"

da: Any = dask.array  # whose functions have no type hints


def again(first: Sequence[Any], others: Sequence[Any], seed: Hashable) -> list[Any]:
    """Arrays of the same values, from tasks with other names. The same `seed` always gives the same names.

    Parameters
    ----------
    first : sequence of (dask array or None)
        The arrays that an earlier pass has read.
    others : sequence of (dask array or None)
        The arrays that only this pass reads. One is copied if it shares tasks with the `first`.
    seed : hashable
        A value that distinguishes this pass from others over the same arrays.

    Returns
    -------
    list of (dask array or None)
        The `first`, then the `others`.
    """
    graph = HighLevelGraph.merge(*(x.dask for x in [*first, *others] if x is not None))
    names = _layers_of((x.name for x in first if x is not None), graph)
    for x in others:
        more = set() if x is None else _layers_of([x.name], graph)
        if not names.isdisjoint(more):
            names |= more
    copies = _copies(names, graph, seed)
    return [x if x is None or x.name not in names else _renamed(x, copies, seed) for x in [*first, *others]]


def _layers_of(names: Iterable[str], graph: Any) -> set[str]:
    """The layers that arrays are made of, without those that have nothing to compute."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found or name.startswith(WHOLE) or _is_data(name, graph):
            continue
        found.add(name)
        waiting += graph.dependencies[name]
    return found


def _is_data(name: str, graph: Any) -> bool:
    """Whether a layer is in memory: its values are no tasks, but data, or futures of a cluster."""
    layer = graph.layers[name]
    if isinstance(layer, Blockwise) or graph.dependencies[name]:
        return False
    nodes = convert_legacy_graph(dict(layer))
    return all(isinstance(node, DataNode) or isinstance(layer[key], TaskRef) for key, node in nodes.items())


def _copies(names: set[str], graph: Any, seed: Hashable) -> HighLevelGraph:
    """The graph with copies of some of its layers. The copies refer to each other instead of to the originals."""
    all_layers: Any = graph.layers
    keys = {key for name in names for key in all_layers[name].get_output_keys()}
    # Other layers than Blockwise may also have keys that nothing outside of them refers to.
    inner = {key for name in names if not isinstance(all_layers[name], Blockwise) for key in all_layers[name]}
    renamed = {key: clone_key(key, seed) for key in keys | inner}
    known = graph.get_all_external_keys() | inner
    layers, dependencies = dict(graph.layers), dict(graph.dependencies)
    for name in names:
        layer, copy = graph.layers[name], clone_key(name, seed)
        if isinstance(layer, Blockwise):  # which stays one, so that Dask can fuse it with others
            layers[copy] = layer.clone(keys, seed)[0]
        else:
            tasks = convert_legacy_graph(dict(layer), known)
            copied = {renamed[key]: task.substitute(renamed, key=renamed[key]) for key, task in tasks.items()}
            layers[copy] = MaterializedLayer(copied, annotations=layer.annotations)
        dependencies[copy] = {clone_key(each, seed) if each in names else each for each in graph.dependencies[name]}
    return HighLevelGraph(layers, dependencies)


def _renamed(x: Any, graph: HighLevelGraph, seed: Hashable) -> Any:
    name = clone_key(x.name, seed)
    return da.Array(graph.cull_layers([name]), name, x.chunks, meta=x._meta)
