"""tools/wheel.py: it finds its tools where they are, says what is missing, and refuses a wheel that is wrong."""

import importlib.util
import re
import sys
import zipfile
from pathlib import Path

import pytest

TOOLS = ["pyproject-build", "abi3audit", "twine", "check-wheel-contents", "auditwheel", "patchelf"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what the tools do elsewhere has not been run")


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The module, with nothing on the path, as if this Python were in a folder that has all the tools."""
    spec = importlib.util.spec_from_file_location("wheel", Path(__file__).parent.parent / "tools" / "wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    for name in [*TOOLS, "strip", "compiler"]:
        program(folder / name, "exit 0")
    (tmp_path / "empty").mkdir()
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "compiler -O3")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "empty"))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr(module, "DIST", tmp_path / "dist")
    return module


def program(file, line):
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)


def make_wheel(tool, tmp_path, rpaths, without=""):
    """A wheel whose modules say, to a patchelf that prints them, where they look for libraries."""
    program(tmp_path / "bin" / "patchelf", 'read -r line < "$2"; echo "$line"')
    (tmp_path / "dist").mkdir()
    with zipfile.ZipFile(tmp_path / "dist" / "bnbp.whl", "w") as archive:
        for name, rpath in rpaths.items():
            archive.writestr(name, f"{rpath}\n")
        for name in tool.declarations() - {without}:
            archive.writestr(name, "")
    return tmp_path / "dist" / "bnbp.whl"


GOOD = {"bnbp/a.so": "$ORIGIN/../bnbp.libs", "bnbp/b.so": "", "bnbp/engine/c.so": "$ORIGIN/../../bnbp.libs"}


def test_a_wheel_is_checked_with_the_tools_beside_this_python(tool, tmp_path):
    tool.check(make_wheel(tool, tmp_path, GOOD))


@pytest.mark.parametrize(
    ("name", "rpath"),
    [
        ("bnbp/a.so", "/home/me/lib"),
        ("bnbp/a.so", "$ORIGIN/../bnbp.libs:/home/me/lib"),
        ("bnbp/a.so", "$ORIGIN/../../bnbp.libs"),
        ("bnbp/engine/c.so", "$ORIGIN/../bnbp.libs"),
        ("bnbp/engine/c.so", "/home/me/lib"),
    ],
)
def test_no_module_may_look_for_libraries_elsewhere(tool, tmp_path, name, rpath):
    wheel = make_wheel(tool, tmp_path, GOOD | {name: rpath})
    with pytest.raises(AssertionError) as caught:
        tool.check(wheel)
    assert str(caught.value) == f"{name} looks for libraries in {rpath}"


def test_a_wheel_has_modules(tool, tmp_path):
    with pytest.raises(AssertionError, match="no modules"):
        tool.check(make_wheel(tool, tmp_path, {"bnbp/__init__.py": ""}))


@pytest.mark.parametrize(
    "name",
    [
        "bnbp/batch_norm.pxd",
        "bnbp/kernels.pxd",
        *(f"bnbp/include/bnbp/{name}" for name in ("python.hpp", "detail/call.hpp")),
    ],
)
def test_a_wheel_has_what_compilers_read(tool, tmp_path, name):
    with pytest.raises(AssertionError) as caught:
        tool.check(make_wheel(tool, tmp_path, GOOD, without=name))
    assert str(caught.value) == f"not in the wheel: {name}"


def lacking(tool, monkeypatch):
    """What the script says, if it comes no further than its start."""
    monkeypatch.setattr(sys, "argv", ["wheel.py"])
    monkeypatch.setattr(tool, "build", lambda folder: pytest.fail("it has begun to build"))
    with pytest.raises(SystemExit) as caught:
        tool.main()
    return caught.value.code.splitlines()  # a text, which Python prints, and exits with 1


def test_nothing_is_missing_where_everything_is_beside_this_python(tool):
    lines = tool.lacking(tool.interpreters())
    assert [line for line in lines if "headers" not in line] == []  # a Python that only runs the tests may have none


@pytest.mark.parametrize("name", TOOLS)
def test_a_missing_tool_is_named_before_anything_is_built(tool, tmp_path, monkeypatch, name):
    (tmp_path / "bin" / name).unlink()
    assert f"the wheel needs {name} (pip install '.[wheel]')" in lacking(tool, monkeypatch)


def test_all_that_is_missing_is_named_in_a_line_each(tool, tmp_path, monkeypatch):
    for name in (*TOOLS, "strip", "compiler"):
        (tmp_path / "bin" / name).unlink()
    monkeypatch.setattr(tool.sysconfig, "get_path", lambda name: str(tmp_path / "empty"))
    monkeypatch.setattr(tool, "ASK", "import no_such_module")  # as ensurepip is on some systems
    things = ["a CPython", "the headers", "a C compiler, compiler", "a C++ compiler, compiler", "strip", *TOOLS]
    for line, thing in zip(lacking(tool, monkeypatch), things, strict=True):
        assert re.match(rf"the wheel needs {re.escape(thing)}\b", line)
