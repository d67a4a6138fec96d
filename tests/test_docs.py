"""The reference pages: their examples run, their formulas are the reference's, and docs/check.py sees what it should.

Building the pages is for `make docs`; nothing here needs Sphinx or Doxygen.
"""

import doctest
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import bnbp
from bnbp import reference

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.rst") if "_build" not in path.parts)
BACKPROP = "ops/batch_norm_training_backprop.rst"
OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "BatchNormTraining": ("ops/batch_norm_training.rst", bnbp.batch_norm_training),
    "BatchNormTrainingBackprop": (BACKPROP, bnbp.batch_norm_training_backprop),
    "BatchNormInference": ("ops/batch_norm_inference.rst", bnbp.batch_norm_inference),
}
IN_PARTS = "ops/in_parts.rst"
PARTS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "BatchNormTrainingStatistics": (bnbp.batch_norm_training_statistics, bnbp.BatchNormStatistics._fields[1:]),
    "BatchNormTrainingBackpropReduce": (
        bnbp.batch_norm_training_backprop_reduce,
        bnbp.BatchNormTrainingBackpropSums._fields,
    ),
    "BatchNormTrainingBackpropApply": (
        bnbp.batch_norm_training_backprop_apply,
        bnbp.BatchNormTrainingBackpropAddendResult._fields,
    ),
}
ATTRIBUTES = ("count", "epsilon", "activation", "addend", "channel_axis")
OPTIONS = ("output_mask", "out", "num_threads")
PARAMETERS = ("gamma", "beta", "mean", "variance", "gamma_delta", "beta_delta", "batch_mean", "batch_variance")
SUMS = ("m2", "delta_sum", "delta_centered_sum")


def text_of(page: str) -> str:
    return (DOCS / page).read_text("utf-8")


# ---------------------------------------------------------------- examples


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_the_pages_run(page: str) -> None:
    result = doctest.testfile(str(DOCS / page), module_relative=False, encoding="utf-8")
    assert result.failed == 0
    assert (result.attempted > 0) == (
        page in ("clusters.rst", "coming_from.rst", "faq.rst", "index.rst", "layouts.rst", IN_PARTS)
        or page.startswith("ops/batch")
    )


@pytest.mark.parametrize("name", ["bnbp.ops", "bnbp.reference", "bnbp._config", "bnbp._statistics"])
def test_examples_of_the_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0


def test_cpp_example_prints_what_its_page_says(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    library = sysconfig.get_config_var("LDLIBRARY") or ""
    folder = sysconfig.get_config_var("LIBDIR")
    if os.name != "posix" or not compiler or not re.fullmatch(r"libpython.*\.so", library):
        pytest.skip("needs a C++ compiler and a shared libpython")
    program = tmp_path / "gradient"
    include = [f"-I{bnbp.get_include()}", f"-I{sysconfig.get_path('include')}"]
    link = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-l" + library.removeprefix("lib").removesuffix(".so")]
    source = str(DOCS / "examples" / "gradient.cpp")
    subprocess.run(
        [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", *include, source, "-o", str(program), *link], check=True
    )
    packages = {str(Path(module.__file__ or "").parent.parent) for module in (bnbp, np)}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages), "PYTHONHOME": sys.base_prefix}
    shown = subprocess.run([program], env=environment, check=True, capture_output=True, text=True).stdout
    promised, _, _ = text_of("cpp.rst").partition("$ ./gradient\n")[2].partition("\n\n")
    assert shown.splitlines() == [line.strip() for line in promised.splitlines()]


# ---------------------------------------------------------------- the operator pages


HEADING = re.compile(r"^(\S.*)\n([=~-])\2{2,}$", re.MULTILINE)


def headings(page: str, *levels: str) -> list[str]:
    """Titles of the sections with one of these underlines."""
    return [title for title, level in HEADING.findall(text_of(page)) if level in levels]


def rows(page: str, section: str, within: str = "") -> list[list[str]]:
    """The cells of a section's first table, the head first; of the section after the title `within`."""
    pieces = HEADING.split(text_of(page))  # text, title, level, text, title, level, text ...
    body = pieces[pieces.index(section, pieces.index(within) if within else 0) + 2]
    body = body.partition("list-table::")[2].partition("list-table::")[0]
    table = [re.split(r"\n     - ", row) for row in re.split(r"\n   \* - ", body)[1:]]
    table[-1][-1] = table[-1][-1].partition("\n\n")[0]  # what follows the table
    return [[" ".join(cell.replace("``", "").split()) for cell in row] for row in table]


def column(table: list[list[str]]) -> list[str]:
    return [row[0] for row in table[1:]]


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_page_has_ngraphs_sections_in_its_order(name: str) -> None:
    page, _ = OPERATORS[name]
    assert headings(page, "=") == [name]
    assert headings(page, "-") == ["Description", "Mathematical Definition", "C++ Interface"]
    parts = ["Inputs", "Attributes", "Outputs"]
    assert headings(page, "-", "~")[:5] == ["Description", *parts, "Mathematical Definition"]
    assert f".. code-block:: cpp\n\n   {name}  // " in text_of(page).partition("\nDescription\n")[0]
    assert f".. doxygenclass:: bnbp::op::{name}\n   :project: bnbp\n   :members:\n" in text_of(page)


def inputs_and_attributes(function: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """Names of a function's parameters, in its order. `addend` is a tensor that may be None, or a bool."""
    defaults = {
        name: each.default for name, each in inspect.signature(function).parameters.items() if name not in OPTIONS
    }
    attributes = [name for name in defaults if name in ATTRIBUTES]
    if "addend" in defaults and defaults["addend"] is None:
        attributes.remove("addend")
    return [name for name in defaults if name not in attributes], attributes


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_page_has_the_rows_of_the_function(name: str) -> None:
    page, function = OPERATORS[name]
    tensors, names = inputs_and_attributes(function)
    inputs, attributes, outputs = (rows(page, section) for section in ("Inputs", "Attributes", "Outputs"))
    assert inputs[0] == outputs[0] == ["Name", "Element Type", "Shape"]
    assert attributes[0] == ["Name", "Type", "Notes"]
    assert column(inputs) == tensors
    assert column(attributes) == ["epsilon", "activation", "addend", "channel_axis"]
    assert set(names) == set(column(attributes)) - set(tensors)  # an input `addend` is an attribute too, in C++
    assert [row[1] for row in attributes[1:]] == ["double", "Activation", "bool", "int64_t"]
    assert all("bnbp's own" in row[2] for row in attributes[2:])
    assert_types_and_shapes(inputs, outputs)


def assert_types_and_shapes(inputs: list[list[str]], outputs: list[list[str]]) -> None:
    """What the tables must say of each input and output."""
    assert inputs[1][1:] == ["float16, bfloat16, float32 or float64", r":math:`(\bullet, C, \ldots)`"]
    type_ = "parameter type: same as input; or float32, if that is float16 or bfloat16"  # said once on a page
    parameters = {row[0] for row in inputs} & set(PARAMETERS)
    for row in [*inputs[2:], *outputs[1:]]:
        if row[0] in PARAMETERS and parameters:
            assert row[1:] == [type_, ":math:`(C)`"]
            type_ = "parameter type"
        elif row[0] in (*SUMS, "mean"):  # a mean without parameters is that of BatchNormTrainingStatistics
            assert row[1:] == ["float64", ":math:`(C)`"]
        else:
            assert row[1:] == ["same as input", "same as input"]


@pytest.mark.parametrize("name", PARTS)
def test_page_of_the_parts_has_the_rows_of_the_functions(name: str) -> None:
    function, results = PARTS[name]
    inputs, attributes, outputs = (rows(IN_PARTS, section, name) for section in ("Inputs", "Attributes", "Outputs"))
    assert inputs[0] == outputs[0] == ["Name", "Element Type", "Shape"]
    assert attributes[0] == ["Name", "Type", "Notes"]
    assert (column(inputs), column(attributes)) == inputs_and_attributes(function)
    assert tuple(column(outputs)) == results
    assert_types_and_shapes(inputs, outputs)
    assert f"   {name}  // " in re.sub(" +//", "  //", text_of(IN_PARTS).partition("\nDescription\n")[0])


def test_page_of_the_parts_has_its_sections() -> None:
    assert headings(IN_PARTS, "-") == ["Description", *PARTS, "Mathematical Definition", "C++ Interface"]


def test_page_of_the_types_names_every_argument_and_result() -> None:
    table = rows("layouts.rst", "Element types")
    assert table[1] == ["input", "float16, bfloat16, float32 or float64"]
    named = {name: row[1] for row in table[1:] for name in re.findall(r"\w+", row[0].partition(", and the ")[0])}
    types = {"same as input": "same as input", "float64": "float64"}
    tables = [rows(page, section) for page, _ in OPERATORS.values() for section in ("Inputs", "Outputs")]
    tables.append(rows(IN_PARTS, "Inputs", "BatchNormTrainingBackpropApply"))
    rest = {row[0]: row[1].partition(":")[0] for table in tables for row in table[1:]}
    del rest["input"], named["input"]
    assert set(named) == set(rest)
    assert all(named[name].startswith(types.get(type_, "the *parameter type*: ")) for name, type_ in rest.items())


@pytest.mark.parametrize("parameters", [np.float32, None])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_results_have_the_types_that_the_pages_say(dtype: Any, parameters: Any) -> None:
    x = np.arange(12).reshape(3, 2, 2).astype(dtype)
    per_channel = np.dtype(parameters if parameters and x.itemsize == 2 else dtype)
    gamma = np.ones(2, per_channel)
    forward = bnbp.batch_norm_training(x, gamma, None, activation="relu", addend=x)
    backward = bnbp.batch_norm_training_backprop(
        x, gamma, None, *forward[1:], x, activation="relu", normalized=forward.normalized, addend=True
    )
    results = {**forward._asdict(), **backward._asdict()}
    assert {name: array.dtype for name, array in results.items()} == {
        name: per_channel if name in PARAMETERS else x.dtype for name in results
    }
    assert bnbp.batch_norm_training(x).batch_mean.dtype == x.dtype


API = [name for name in bnbp.__all__ if name not in ("__version__", "exact", "reference")]


@pytest.mark.parametrize("name", API)
def test_every_public_name_has_one_place_in_the_api(name: str) -> None:
    is_class = inspect.isclass(getattr(bnbp, name))
    directive = f".. autoclass:: {name}\n   :members:\n" if is_class else f".. autofunction:: {name}\n"
    places = [page for page in PAGES if page.startswith("api/") and directive in text_of(page)]
    assert len(places) == 1
    assert is_class or places == [f"api/{name}.rst"]
    summary = text_of("api/index.rst").partition(".. toctree::")
    assert summary[0].count(f"\n   {name}\n") == 1
    assert is_class or f"\n   {name}\n" in summary[2]


def test_every_operator_class_is_on_a_page() -> None:
    header = Path(bnbp.get_include(), "bnbp", "batch_norm.hpp").read_text("utf-8")
    classes = re.findall(r"^class (\w+) : public BatchNorm(?:Base|Activated)\b", header, re.MULTILINE)
    assert {*OPERATORS, *PARTS, "BatchNormActivated"} < set(classes)
    for name in classes:
        assert sum(f".. doxygenclass:: bnbp::op::{name}\n" in text_of(page) for page in PAGES) == 1


@pytest.mark.parametrize("name", bnbp.ops.__all__)
def test_docstring_names_every_argument_and_error(name: str) -> None:
    function = getattr(bnbp, name)
    sections = re.split(r"\n(\w[\w ]+)\n-+\n", inspect.getdoc(function) or "")
    bodies = dict(zip(sections[1::2], sections[2::2], strict=True))
    named = re.findall(r"^(\w.*?)(?: : .*)?$", bodies["Parameters"], re.MULTILINE)
    assert ", ".join(named).split(", ") == list(inspect.signature(function).parameters)
    assert "TypeError" in bodies["Raises"]
    assert "ValueError" in bodies["Raises"]


def test_operator_pages_have_the_outputs_of_the_results() -> None:
    assert tuple(column(rows(OPERATORS["BatchNormTraining"][0], "Outputs"))) == bnbp.BatchNormTrainingResult._fields
    assert tuple(column(rows(BACKPROP, "Outputs"))) == bnbp.BatchNormTrainingBackpropAddendResult._fields
    assert column(rows(OPERATORS["BatchNormInference"][0], "Outputs")) == ["normalized"]


# ---------------------------------------------------------------- the formulas, executed as they stand

TOKEN = re.compile(  # one group, or nothing
    r"\\mathtt\{([^}]+)\}|(\\hat x)|\\(?:left|right|Bigl|Bigr|q?quad|,|;)|(\\[a-z]+)|([0-9m+\-/^(){}])|_i|[\s.]"
)
OF_PART = re.compile(r"(?:\\mathtt\{([^}]+)\}|(m))_([ab])")


def tokens(tex: str) -> list[str]:
    tex = OF_PART.sub(r"\\mathtt{\1\2\_\3}", tex)
    assert TOKEN.sub("", tex) == "", f"unknown TeX in {tex!r}"
    return [match[match.lastindex].replace(r"\_", "_") for match in TOKEN.finditer(tex) if match.lastindex]


class Formula:
    """A recursive descent over the little TeX that the pages use.

    Names stand for numbers, for vectors over i, or for functions of what follows in parentheses.
    """

    def __init__(self, left: list[str], values: dict[str, Any]) -> None:
        self.left = left.copy()
        self.values = values

    def value(self) -> Any:
        result = self.sum()
        assert not self.left, f"cannot read on at {self.left}"
        return result

    def next_is(self, *choices: str) -> bool:
        return bool(self.left) and self.left[0] in choices

    def sum(self) -> Any:
        result = 0 if self.next_is("-") else self.product()
        while self.next_is("+", "-"):
            sign = 1 if self.left.pop(0) == "+" else -1
            result = result + sign * self.product()
        return result

    def product(self) -> Any:
        result = 1
        while self.left and not self.next_is("+", "-", ")", "}"):
            if self.next_is(r"\sum"):  # of all factors that follow
                self.left.pop(0)
                result = result * np.sum(self.product())
            elif self.next_is("/"):
                self.left.pop(0)
                result = result / self.power()
            else:
                result = result * self.power()
        return result

    def power(self) -> Any:
        base = self.atom()
        if self.next_is("^"):
            self.left.pop(0)
            return base ** self.atom()
        return base

    def atom(self) -> Any:
        token = self.left.pop(0)
        if token in ("(", "{"):
            result = self.sum()
            assert self.left.pop(0) in (")", "}")
            return result
        if token == r"\frac":
            return self.atom() / self.atom()
        if token == r"\sqrt":
            return np.sqrt(self.atom())
        value = float(token) if token.isdigit() else self.values[token]
        return value(self.atom()) if callable(value) else value


ACTIVATED = "With an activation or an addend"  # the section whose formulas come after all the others of its page
EXACT = "The same bits however a batch is spread"


def lines(block: str) -> list[str]:
    """The lines of a formula. One without an equals sign goes on with the line before it."""
    whole: list[str] = []
    for line in block.split(r"\\"):
        if "=" in line or not whole:
            whole.append(line)
        else:
            whole[-1] += line
    return whole


def equations(page: str, activated: bool = False) -> Iterator[tuple[str, str]]:
    """Both sides of every equation in the blocks of a page; of a chain a = b = c, these are (a, b) and (a, c).

    They are those of the section ACTIVATED, or all the others but EXACT's, which test_exact.py computes in fractions.
    """
    pieces = HEADING.split(text_of(page))  # text, title, level, text, title, level, text ...
    sections = zip(["", *pieces[1::3]], pieces[::3], strict=True)
    text = "".join(body for title, body in sections if (title == ACTIVATED) == activated and title != EXACT)
    for block in re.findall(r"^\.\. math::\n\n((?:   .*\n)+)", text, re.MULTILINE):
        left = ""
        for line in lines(block):
            first, *sides = line.replace("&", "").split("=")
            left = first if first.strip() else left
            yield from ((left, side) for side in sides)


def execute(page: str, values: dict[str, Any], activated: bool = False) -> dict[str, Any]:
    """Run the equations of a page from top to bottom. What has a value already must have the same value again."""
    for left, right in equations(page, activated):
        value = Formula(tokens(right), values).value()
        if len(tokens(left)) == 1:
            values.setdefault(tokens(left)[0], value)
        again = Formula(tokens(left), values).value()
        np.testing.assert_allclose(value, again, rtol=1e-12, atol=1e-12, err_msg=f"{left} = {right}")
    return values


@pytest.fixture
def channel() -> dict[str, Any]:
    """One channel of 7 elements, under the names of the formulas."""
    rng = np.random.default_rng(3)
    return {
        "input": rng.normal(2, 3, 7),
        "normalized_delta": rng.normal(1, 1, 7),
        r"\gamma": 1.7,
        r"\beta": -0.4,
        r"\epsilon": 0.3,
        "m": 7,
    }


def run_reference(function: Callable[..., Any], channel: dict[str, Any], *names: str, **options: Any) -> Any:
    x, *vectors = (channel[name] for name in ("input", r"\gamma", r"\beta", *names))
    arguments = [np.reshape(vector, (-1, 1) if np.size(vector) > 1 else 1) for vector in vectors]
    return function(x.reshape(-1, 1), *arguments, epsilon=channel[r"\epsilon"], **options)


def agree(values: dict[str, Any], results: dict[str, Any]) -> None:
    for name, result in results.items():
        np.testing.assert_allclose(values[name], np.squeeze(result), rtol=1e-12, err_msg=name)


def test_formulas_of_training_are_those_of_the_reference(channel: dict[str, Any]) -> None:
    result = run_reference(reference.batch_norm_training, channel)
    agree(execute(OPERATORS["BatchNormTraining"][0], channel), result._asdict())


def test_formulas_and_derivation_of_the_gradient_are_those_of_the_reference(channel: dict[str, Any]) -> None:
    forward = run_reference(reference.batch_norm_training, channel)
    channel |= {"mean": forward.batch_mean.item(), "variance": forward.batch_variance.item()}
    result = run_reference(reference.batch_norm_training_backprop, channel, "mean", "variance", "normalized_delta")
    values = execute(BACKPROP, channel)
    agree(values, {**result._asdict(), "normalized": forward.normalized})
    assert {"gmul_delta", "variance_delta", "square_delta", "centered_delta", "mean_delta"} <= set(values)


def test_formulas_of_the_parts_are_those_of_the_reference(channel: dict[str, Any]) -> None:
    input, delta = (channel[name].reshape(-1, 1) for name in ("input", "normalized_delta"))
    whole = reference.batch_norm_training_statistics(input)
    for index, part in (("", slice(0, 7)), ("_a", slice(0, 3)), ("_b", slice(3, 7))):
        statistics = reference.batch_norm_training_statistics(input[part])
        sums = reference.batch_norm_training_backprop_reduce(input[part], whole.mean, delta[part])
        results = {"m": statistics.count, "mean": statistics.mean, "m2": statistics.m2, **sums._asdict()}
        channel |= {name + index: np.squeeze(result).item() for name, result in results.items()}
    channel["variance"] = whole.variance.item()
    result = run_reference(reference.batch_norm_training_backprop, channel, "mean", "variance", "normalized_delta")
    agree(execute(IN_PARTS, channel), result._asdict())


def test_formulas_of_inference_are_those_of_the_reference(channel: dict[str, Any]) -> None:
    channel |= {"mean": 1.5, "variance": 4.0, r"inv_std": 1 / np.sqrt(4.3)}
    normalized = run_reference(reference.batch_norm_inference, channel, "mean", "variance")
    result = run_reference(reference.batch_norm_inference_backprop, channel, "mean", "variance", "normalized_delta")
    agree(execute(OPERATORS["BatchNormInference"][0], channel), {**result._asdict(), "normalized": normalized})


ACTIVATIONS: dict[str | None, Callable[[Any], Any]] = {
    None: lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "relu6": lambda y: np.minimum(np.maximum(y, 0), 6),
}


@pytest.fixture(params=ACTIVATIONS)
def activated(request: pytest.FixtureRequest, channel: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The channel and an addend that takes its elements below 0, above 6 and between; and the reference's options."""
    addend = np.array([-9.0, 9.0, 3.0, -9.0, 2.0, 9.0, 4.0])
    channel |= {"addend": addend, "activation": ACTIVATIONS[request.param]}
    return channel, {"activation": request.param, "addend": addend.reshape(-1, 1)}


def page_with_activation(page: str, channel: dict[str, Any], normalized: Any) -> dict[str, Any]:
    """The formulas of a forward page, then those of its section on activations, whose `normalized` is another."""
    assert {side.item() for side in np.digitize(normalized, [1e-9, 6 - 1e-9])} == {0, 1, 2}
    channel = execute(page, channel)
    channel["batch_norm"] = channel.pop("normalized")
    return execute(page, channel, activated=True)


def test_formulas_of_training_with_an_activation_are_those_of_the_reference(activated: Any) -> None:
    channel, options = activated
    result = run_reference(reference.batch_norm_training, channel, **options)
    agree(page_with_activation(OPERATORS["BatchNormTraining"][0], channel, result.normalized), result._asdict())


def slope_of(normalized: Any, activation: str | None) -> Any:
    """What the table of slopes says of these numbers."""
    table = rows(BACKPROP, ACTIVATED)
    assert table[0][1:] == ["relu", "relu6"]
    assert column(table) == ["below or equal to 0", "between 0 and 6", "equal to or above 6", "NaN"]
    assert [row[1:] for row in table[1:]] == [["0", "0"], ["1", "1"], ["1", "0"], ["1", "1"]]
    column_of = {None: [1, 1, 1], "relu": [0, 1, 1], "relu6": [0, 1, 0]}[activation]
    return np.select([normalized <= 0, normalized < 6, normalized >= 6], column_of, 1).ravel()


def page_of_masked(page: str, channel: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The formulas of a gradient, with `masked_delta` in the place of `normalized_delta`."""
    masked = {"normalized_delta": values["masked_delta"], "addend_delta": values["addend_delta"]}
    return execute(page, {**channel, **masked})


def test_formulas_of_the_gradient_with_an_activation_are_those_of_the_reference(activated: Any) -> None:
    channel, options = activated
    forward = run_reference(reference.batch_norm_training, channel, **options)
    names = ("mean", "variance", "normalized_delta")
    channel |= {"mean": forward.batch_mean.item(), "variance": forward.batch_variance.item()}
    options |= {"normalized": forward.normalized, "addend": True}
    result = run_reference(reference.batch_norm_training_backprop, channel, *names, **options)
    channel["slope"] = slope_of(forward.normalized, options["activation"])
    values = execute(BACKPROP, dict(channel), activated=True)
    agree(page_of_masked(BACKPROP, channel, values), result._asdict())


def test_formulas_of_inference_with_an_activation_are_those_of_the_reference(activated: Any) -> None:
    channel, options = activated
    page = OPERATORS["BatchNormInference"][0]
    channel |= {"mean": 1.5, "variance": 4.0, "inv_std": 1 / np.sqrt(4.3)}
    normalized = run_reference(reference.batch_norm_inference, channel, "mean", "variance", **options)
    names = ("mean", "variance", "normalized_delta")
    gradient_options = {**options, "normalized": normalized, "addend": True}
    result = run_reference(reference.batch_norm_inference_backprop, channel, *names, **gradient_options)
    channel["slope"] = slope_of(normalized, options["activation"])
    values = page_with_activation(page, dict(channel), normalized)
    agree(values, {"normalized": normalized, "addend_delta": result.addend_delta})
    agree(page_of_masked(page, channel, values), result._asdict())


# ---------------------------------------------------------------- docs/check.py

FORMULA = (
    '<math><semantics><mi>x</mi><annotation encoding="application/x-tex">\\hat x</annotation></semantics></math>'
    '<code>"\\frac"</code> <a href="https://example.org">a link</a> <img src="data:image/png;base64,//8=">'
)


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_check", DOCS / "check.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def head(description: str) -> str:
    return f'<link rel="shortcut icon" href="icon.svg"><meta name="description" content="{description}">'


@pytest.fixture
def site(check: ModuleType, tmp_path: Path) -> Path:
    """A site without faults."""
    for name in check.PAGES_WITH_FORMULAS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        body = f'<p id="top">{FORMULA}</p><div class="math">{FORMULA}</div>'
        (tmp_path / name).write_text(f"{head(name)}{body}", "utf-8")
    links = (
        '<a href="ops/../ops/in_parts.html#top"></a><a href="#"></a><a href="style.css#x"></a><a href="?q=a#here"></a>'
    )
    (tmp_path / "index.html").write_text(f'{head("front")}<p id="here">{links}</p>', "utf-8")
    (tmp_path / "style.css").write_text(
        '/* url(https://example.org) */ a { background: url("data:image/svg+xml,http://www.w3.org") }', "utf-8"
    )
    return tmp_path


def test_check_passes_a_good_site(check: ModuleType, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(site)]) == 0
    assert "8 pages; 14 formulas, all rendered; 18 links" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        (r"<p>so \frac{a}{b}</p>", r"raw TeX in the text: \frac"),
        (r"<td>\mathtt{input}</td>", r"raw TeX in the text: \mathtt"),
        (r"<p>\[</p>", r"raw TeX in the text: \["),
        (r'<span class="math notranslate">x_i</span><math></math>', ""),
        (r'<span class="math notranslate">x_i</span>', "a formula is not rendered"),
        (r'<span class="math">x_i</span><div class="math"><math></math></div>', "a formula is not rendered"),
        ("<math><merror>?</merror></math>", "a formula shows an error"),
        ('<script src="https://example.org/x.js"></script>', "<script src> loads https://example.org/x.js"),
        ('<script src="//example.org/x.js"></script>', "<script src> loads //example.org/x.js"),
        ('<link rel="stylesheet" href="http://example.org/x.css">', "<link href> loads http://example.org/x.css"),
        ('<img alt="" src="HTTPS://example.org/x.png"/>', "<img src> loads HTTPS://example.org/x.png"),
        ('<img alt="" srcset="x.png, https://example.org/x.png 2x">', "<img srcset> loads"),
        ('<iframe src="https://example.org"></iframe>', "<iframe src> loads https://example.org"),
        ('<p style="background: url(//example.org/x.png)"></p>', "a style loads //example.org/x.png"),
        ("<style>@import 'https://example.org/x.css';</style>", "a style loads https://example.org/x.css"),
    ],
)
def test_check_finds(check: ModuleType, html: str, problem: str) -> None:
    problems = check.Page(html).problems
    assert [found.startswith(problem) for found in problems] == [True] * bool(problem), problems


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("api/batch_norm_training.html", head("x"), "api/batch_norm_training.html: has no formulas"),
        ("ops/index.html", None, "ops/index.html: there is no such page"),
        ("style.css", "@import url(https://example.org/x.css);", "style.css: a style loads https://example.org/x.css"),
        ("new.html", head("x") + r"<p>\sum</p>", r"new.html: raw TeX in the text: \sum"),
        ("new.html", head(""), "new.html: has no description"),
        ("new.html", head("ops/index.html"), "ops/index.html: has the description of new.html"),
        ("new.html", head("x").partition(">")[2], "new.html: has no icon"),
        (
            "ops/new.html",
            head("x") + '<a href="no.html">',
            "ops/new.html: a link leads to ops/no.html, which is not there",
        ),
        (
            "ops/new.html",
            head("x") + '<a href="../ops/index.html#bottom">',
            "ops/new.html: a link leads to ops/index.html#bottom, which has no such place",
        ),
        (
            "new.html",
            head("x") + '<p id="here"></p><a href="#here"></a><a href="#there"></a>',
            "new.html: a link leads to new.html#there, which has no such place",
        ),
    ],
)
def test_check_fails_a_site_with_one_fault(site: Path, name: str, text: str | None, problem: str) -> None:
    if text is None:
        (site / name).unlink()
    else:
        (site / name).write_text(text, "utf-8")
    command = [sys.executable, str(DOCS / "check.py"), str(site)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (1, f"docs/check.py: {problem}\n")
