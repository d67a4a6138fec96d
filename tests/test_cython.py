"""Cython callers: the installed .pxd files declare what the headers have, and modules that cimport them compute."""

import ctypes
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from building import copy_examples, load, run

import bnbp
from bnbp import kernels, reference
from bnbp.engine import boundary

PACKAGE = Path(bnbp.__file__).parent
EVERY = Path(__file__).parent / "cython" / "every.pyx"


def header(name):
    """A header without its comments."""
    text = (PACKAGE / "include" / "bnbp" / name).read_text("utf-8")
    return re.sub(r"//.*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL))


# ---------------------------------------------------------------- what is declared


def structures(text, pattern, field):
    """Structure or enumeration -> what stands between its braces, or is indented below it, a type and a name each."""
    return {name: re.findall(field, body, re.MULTILINE) for name, body in re.findall(pattern, text)}


C_STRUCTURES = structures(
    header("kernels.h"), r"typedef struct (\w+) \{([^}]*)\}", r"^ +(.*?[ *]+)\(?\*?(\w+)(?:\)\(void\))?;"
)
ENUMERATION = r"(?:typedef enum|enum class) (\w+) \{([^}]*)\}"


def test_the_table_for_cython_is_the_header_s():
    pxd = (PACKAGE / "kernels.pxd").read_text("utf-8").replace("noexcept nogil", "")
    declared = structures(pxd, r"ctypedef struct (\w+):\n((?: {8}.*\n)+)", r"^ +(.*?[ *]+)\(?\*?(\w+)(?:\)\(\))?\s*$")
    assert [len(fields) for fields in C_STRUCTURES.values()] == [40, 13]
    names = {"ptrdiff_t": "Py_ssize_t"}

    def plain(fields):
        return [
            (re.sub(r"\w+", lambda word: names.get(word[0], word[0]), kind).replace(" ", ""), name)
            for kind, name in fields
        ]

    assert {name: plain(fields) for name, fields in declared.items()} == {
        name: plain(fields) for name, fields in C_STRUCTURES.items()
    }
    c_enumerations = structures(header("kernels.h"), ENUMERATION, r"(BNBP_\w+)")
    assert structures(pxd, r"ctypedef enum (\w+):\n((?: {8}.*\n)+)", r"(BNBP_\w+)") == c_enumerations
    for word in ("BNBP_KERNELS_ABI", "BNBP_KERNELS_CAPSULE"):
        assert word in pxd


def signatures(body, declaration):
    """The methods of a class: what each returns, its name, and the types it takes, once for each way to call it."""
    found = set()
    for returns, name, arguments in re.findall(declaration, body, re.MULTILINE):
        words = [" ".join(argument.split()) for argument in arguments.split(",") if argument.strip()]
        types = [word.partition(" =")[0].rpartition(" ")[0] for word in words]
        fewest = sum(" = " not in word for word in words)
        found |= {(returns.strip(), name, tuple(types[:count])) for count in range(fewest, len(types) + 1)}
    return found


def classes_of_the_headers():
    text = (header("tensor.hpp") + header("batch_norm.hpp")).replace("std::", "").replace("explicit ", "")
    text = re.sub(r"\bvector<(\w+)>", r"vector[\1]", text)
    found = {}
    for name, base, body in re.findall(r"^(?:class|struct) (\w+)(?: : public (\w+))? \{\n(.*?)^\};", text, re.M | re.S):
        public = re.sub(r"^(?:private|protected):.*?(?=^public:|\Z)", "", body, flags=re.M | re.S)
        found[name] = base, signatures(public, r"^ {4}((?:[\w\[\]&*]+ )*)(\w+)\(([^)]*)\)")
    return found


def test_the_classes_for_cython_are_the_headers():
    pxd = (PACKAGE / "batch_norm.pxd").read_text("utf-8").replace("cbool", "bool").replace("string ", "string ")
    declared = {
        name: (base, signatures(body, r"^ {8}((?:[\w\[\]&*]+ )*)(\w+)\(([^)]*)\)"))
        for name, base, body in re.findall(r"^ {4}cppclass (\w+)(?:\((\w+)\))?:\n((?: {8}.*\n|\n)+)", pxd, re.MULTILINE)
    }
    expected = classes_of_the_headers()
    # Cython cannot tell pointers to const from others: each pair of constructors is declared once.
    base, methods = expected["Tensor"]
    expected["Tensor"] = (
        base,
        {
            (returns, name, tuple(re.sub(r"^(\w+\*)", r"const \1", kind) for kind in types))
            for returns, name, types in methods
        },
    )
    for error in ("TypeError", "ValueError", "Interrupted"):  # which Cython callers see as Python's
        expected.pop(error)
    assert len(expected) == 10
    assert ("void", "evaluate", ("const vector[Tensor]&", "const vector[Tensor]&", "int")) in expected["BatchNormBase"][
        1
    ]
    assert declared == expected


def test_the_enumerations_and_the_tensor_for_cython_are_the_headers():
    pxd = (PACKAGE / "batch_norm.pxd").read_text("utf-8")
    expected = structures(header("tensor.hpp"), ENUMERATION, r"(\w+)")
    assert {*expected} == {"ElementType", "Activation"}
    assert structures(pxd, r"enum class (\w+):\n((?: {8}.*\n)+)", r"(\w+)") == expected
    tensor = re.search(r"struct Tensor \{(.*?)\n\};", header("tensor.hpp"), re.DOTALL)[1]
    fields = re.findall(r"^ {4}([\w:]+\*?) (\w+)(?: = .*)?;", tensor, re.MULTILINE)
    assert len(fields) == 6
    for kind, name in fields:
        assert f"        {kind.replace('std::', '').replace('bool', 'cbool')} {name}\n" in pxd


# ---------------------------------------------------------------- what is computed


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    folder = copy_examples(tmp_path_factory.mktemp("cython"))
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=folder)
    return load(folder, "cython_gradient")


def offsets(structure):
    """Cython that says where the fields of a structure of the header are."""
    fields = (f'("{name}", <char*> &it.{name} - <char*> &it, sizeof(it.{name}))' for _, name in C_STRUCTURES[structure])
    return f"""

from bnbp.kernels cimport {structure}

def layout_of_{structure}():
    cdef {structure} it
    return [{", ".join(fields)}], sizeof(it)
"""


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """The module that names everything, and one function for each structure of the table."""
    folder = copy_examples(tmp_path_factory.mktemp("every"))
    (folder / "every.pyx").write_text(EVERY.read_text("utf-8") + "".join(map(offsets, C_STRUCTURES)), "utf-8")
    setup = folder / "setup.py"
    setup.write_text(setup.read_text("utf-8").replace("cython_gradient", "every"), "utf-8")
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=folder)
    return load(folder, "every")


def batch():
    rng = np.random.default_rng(15)
    x, dy = rng.normal(3, 2, (5, 3, 4)), rng.normal(1, 1, (5, 3, 4))
    gamma = np.array([1.5, -2.0, 0.5])
    return x, dy, gamma, x.mean((0, 2)), x.var((0, 2))


def test_the_example_for_cython_is_the_reference(example):
    x, dy, gamma, mean, variance = batch()
    for array in (x, dy, gamma, mean, variance):
        array.flags.writeable = False
    expected = reference.batch_norm_training_backprop(x, gamma, None, mean, variance, dy, 0.5)
    assert np.ptp(expected.input_delta) > 1
    for got, exact in zip(example.gradient(x, gamma, mean, variance, dy, 0.5), expected, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-12)


def test_the_example_for_cython_refuses_what_the_package_refuses(example):
    x, dy, gamma, mean, variance = batch()
    for arguments in ((gamma, mean[:2], variance, dy, 0.5), (gamma, mean, variance, dy[:, :, 1:].copy(), 0.5)):
        with pytest.raises(ValueError, match=r"^(mean|normalized_delta): expected shape") as caught:
            example.gradient(x, *arguments)
        with pytest.raises(ValueError, match=r"^(mean|normalized_delta): expected shape") as own:
            bnbp.batch_norm_training_backprop(x, gamma, None, *arguments[1:])
        assert str(caught.value) == str(own.value)


def operand(array):
    return None if array is None else (array.ctypes.data, list(array.shape), list(array.strides))


@pytest.mark.parametrize("threads", [0, 2])
def test_every_operator_in_cython_is_the_reference(every, threads):
    x, dy, gamma, mean, variance = batch()
    beta, addend = np.array([0.5, 0.0, -1.0]), np.roll(x, 1)
    relu = {"activation": "relu"}
    y = reference.batch_norm_training(x, gamma, beta, 0.5, **relu, addend=addend).normalized
    assert {*np.sign(y.ravel())} == {0.0, 1.0}
    flat = {**relu, "normalized": y, "addend": True}
    sums = reference.batch_norm_training_backprop_reduce(x, mean, dy)
    statistics = reference.batch_norm_training_statistics(x)
    cases = {
        "BatchNormTraining": (
            (x, gamma, beta, addend),
            reference.batch_norm_training(x, gamma, beta, 0.5, **relu, addend=addend),
        ),
        "BatchNormTrainingBackprop": (
            (x, gamma, beta, mean, variance, dy, y),
            reference.batch_norm_training_backprop(x, gamma, beta, mean, variance, dy, 0.5, **flat),
        ),
        "BatchNormInference": (
            (x, gamma, beta, mean, variance, addend),
            (reference.batch_norm_inference(x, gamma, beta, mean, variance, 0.5, **relu, addend=addend),),
        ),
        "BatchNormInferenceBackprop": (
            (x, gamma, beta, mean, variance, dy, y),
            reference.batch_norm_inference_backprop(x, gamma, beta, mean, variance, dy, 0.5, **flat),
        ),
        "BatchNormTrainingStatistics": ((x,), statistics[1:]),
        "BatchNormTrainingBackpropReduce": ((x, mean, dy), sums),
        "BatchNormTrainingBackpropApply": (
            (x, gamma, None, mean, variance, dy, *sums),
            reference.batch_norm_training_backprop_apply(x, gamma, None, mean, variance, dy, *sums, 40, 0.5),
        ),
    }  # fmt: skip
    every.start()
    for name, (inputs, expected) in cases.items():
        outputs = [np.full(np.shape(exact), np.nan) for exact in expected]
        plain = any(word in name for word in ("Statistics", "Reduce", "Apply"))
        shapes = every.evaluate(
            name, [*map(operand, outputs)], [*map(operand, inputs)], 0.5, 1, 40,
            relu=not plain, addend=not plain, threads=threads,
        )  # fmt: skip
        assert shapes == [np.shape(exact) for exact in expected], name
        for got, exact in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(got, exact, rtol=1e-11, atol=1e-13, err_msg=name)


def test_attributes_in_cython(every):
    before, after, addend, counts = every.attributes()
    assert (before, after) == ((1e-5, 1, True), (0.25, -1, True))
    assert addend is True
    assert counts == [7, 9]
    plain, with_epsilon = (1e-5, 1), (0.25, 1)
    assert every.defaults() == [
        *(with_epsilon, plain, with_epsilon),
        *((0, 1), (0, 2)),  # the statistics have no epsilon
        *(plain, (1e-5, 2)),
        with_epsilon,
        *(plain, with_epsilon) * 2,
    ]


def test_a_pointer_to_const_makes_a_tensor_that_is_only_read(every):
    assert every.memory(0, 0) == [(True, True), (False, True), (True, False), (False, False), (False, False)]


@pytest.mark.parametrize(
    ("which", "kind", "text"),
    [
        (0, TypeError, "a type"),
        (1, ValueError, "a value"),
        (2, MemoryError, ""),
        (3, RuntimeError, "logic"),
        (4, RuntimeError, "interrupted"),
        (5, RuntimeError, "an unknown C++ exception"),
    ],
)
def test_a_cpp_exception_becomes_the_python_exception_of_its_meaning(every, which, kind, text):
    with pytest.raises(kind) as caught:
        every.throw(which)
    assert caught.type is kind
    assert str(caught.value) == text


# ---------------------------------------------------------------- another version of the table


@pytest.fixture
def older_kernels(monkeypatch):
    """A capsule like that of the kernels, with a table of the version before; the text that the caller gets."""
    table = np.zeros(1, kernels.TABLE)
    table["abi"] = kernels.ABI - 1
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    name = ctypes.c_char_p(b"bnbp.engine.boundary.kernels")  # which must live as long as the capsule
    capsule = new(("PyCapsule_New", ctypes.pythonapi))(table.ctypes.data, name, None)
    monkeypatch.setattr(boundary, "kernels", capsule)
    yield capsule
    del table, name


def test_a_module_for_another_version_of_the_table_is_refused_when_it_starts(every, older_kernels):
    text = (
        "bnbp: the installed kernels have version 4 of the function table, this program was compiled for version 5; "
        "compile it again"
    )
    with pytest.raises(ImportError) as caught:
        every.start()
    assert str(caught.value) == text
    with pytest.raises(RuntimeError) as caught:
        every.start_with_another_version()
    assert str(caught.value) == text
    with pytest.raises(ImportError, match=r"^bnbp\.kernels: expected version 5 of the function table, got 4;"):
        kernels._table(older_kernels)


@pytest.mark.parametrize("name", ["bnbp_arguments", "bnbp_kernels"])
def test_the_structures_for_numba_are_where_the_compiler_puts_them(every, name):
    fields, size = getattr(every, f"layout_of_{name}")()
    dtype = {"bnbp_arguments": kernels.ARGUMENTS, "bnbp_kernels": kernels.TABLE}[name]
    assert dtype.itemsize == size
    assert [(field, offset, kind.itemsize) for field, (kind, offset) in dtype.fields.items()] == fields


def test_the_constants_for_numba_are_the_header_s():
    text = header("kernels.h")
    assert f"#define BNBP_KERNELS_ABI {kernels.ABI}\n" in text
    constants = {name: int(value) for name, value in re.findall(r"BNBP_(\w+) = (\d+)", text)}
    assert len(constants) == 10
    assert {name: getattr(kernels, name) for name in constants} == constants
