"""What the package says of itself at the prompt: help(), signatures, the configuration; and what an import takes."""

import inspect
import pydoc
import re
from importlib import import_module

import numpy as np
import pytest
from conftest import python, same_bits

import bnbp
from bnbp._config import describe

MODULES = [
    "bnbp",
    "bnbp.exact",
    "bnbp.reference",
    pytest.param("bnbp.mpi", marks=pytest.mark.cluster),
    pytest.param("bnbp.dask", marks=pytest.mark.cluster),
    pytest.param("bnbp.jax", marks=pytest.mark.jax),
    pytest.param("bnbp.torch", marks=pytest.mark.torch),
]


def functions_of(name):
    module = import_module(name)
    found = [getattr(module, each) for each in module.__all__]
    return [each for each in found if inspect.isfunction(each)]


@pytest.mark.parametrize("name", MODULES)
def test_signatures_can_be_read(name):
    """Types are under their own names, not spelt out: of one that was, a signature had 2,700 characters."""
    functions = functions_of(name)
    assert len(functions) > 1
    for function in functions:
        signature = str(inspect.signature(function))
        assert len(signature) < 600, signature
        assert not re.search(r"numpy\.|_typing|jaxlib|_nested_sequence|bnbp\._", signature), signature


@pytest.mark.parametrize("name", bnbp.ops.__all__)
def test_help_starts_with_one_line_of_signature_and_a_sentence(name):
    function = getattr(bnbp, name)
    title, _, rest = pydoc.plain(pydoc.render_doc(function)).split("\n", 2)
    signature, _, text = rest.partition(")\n")
    signature = (
        re.sub(r"\(\s+", "(", re.sub(r",\s+", ", ", signature)).strip() + ")"
    )  # CPython 3.13 breaks it into lines
    sentence = text.splitlines()[0]
    assert title.endswith(f"function {name} in module bnbp.ops")
    assert signature == f"{name}{inspect.signature(function)}"
    assert ":" not in signature  # no types, as in NumPy
    assert len(signature) < 280
    assert re.fullmatch(r"    [A-Z][^`\\]+\.", sentence)  # neither markup nor formulas


@pytest.mark.parametrize("name", MODULES)
def test_formulas_come_after_what_there_is_to_give(name):
    for function in functions_of(name):
        before, _, after = inspect.getdoc(function).partition("\nParameters\n")
        assert before[0].isupper()
        assert ":math:" not in before
        assert ".. math::" not in before
        assert ".. math::" not in after.partition("\nNotes\n")[0]


def test_an_input_is_enough():
    x = np.random.default_rng(0).normal(3, 2, (5, 4, 3)).astype(np.float32)
    assert same_bits(bnbp.batch_norm_training(x), bnbp.batch_norm_training(x, np.ones(4, "f4"), np.zeros(4, "f4")))
    assert np.ptp(bnbp.batch_norm_training(x).batch_mean) > 0.1


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"caches": {"l2": 2 << 20}}, [("caches l2", "2 MiB")]),
        ({"caches": {"l2": 1280 << 10}}, [("caches l2", "1.2 MiB")]),
        ({"caches": {"l2": 48 << 10}}, [("caches l2", "48 KiB")]),
        ({"pool": {"limit": 3 << 29, "held": 0, "reused": 1024}},
         [("pool limit", "1.5 GiB"), ("pool held", "0 bytes"), ("pool reused", "1024")]),
        ({"openmp": {"enabled": True, "version": 201511}}, [("openmp enabled", "yes"), ("openmp version", "4.5")]),
        ({"openmp": {"enabled": False, "version": None}}, [("openmp enabled", "no"), ("openmp version", "none")]),
        ({"caches": {"L1": 32 << 10, "L3": 1 << 25}, "load": 0.59228515625},
         [("caches L1", "32 KiB"), ("caches L3", "32 MiB"), ("load", "0.59")]),
        ({"openmp": {"version": 203512}}, [("openmp version", "of 203512")]),
        ({"version": "0.1.0", "isa": {"usable": ["a", "b"]}}, [("version", "0.1.0"), ("isa usable", "a, b")]),
    ],
)  # fmt: skip
def test_the_configuration_in_words(config, shown):
    assert describe(config) == shown


def test_every_entry_is_printed(capsys):
    bnbp.show_config()
    printed = [line.split(":")[0].split() for line in capsys.readouterr().out.splitlines()]
    config = bnbp.show_config("dicts")
    entries = [(key, value if isinstance(value, dict) else [""]) for key, value in config.items()]
    assert printed == [f"{key} {name}".split() for key, names in entries for name in names]


def test_an_import_reads_no_metadata_of_packages():
    """That took longer than all the rest: 36 ms of 63, of CPU time, after NumPy."""
    code = """
import sys, numpy
before = set(sys.modules)
import bnbp
bnbp.__version__, bnbp.show_config("dicts")
new = set(sys.modules) - before
print(sorted(new & {"email", "importlib.metadata", "inspect", "numpy.ma", "typing_extensions"}))
"""
    assert python(code) == "[]"
