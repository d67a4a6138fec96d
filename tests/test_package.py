"""What is shipped: headers, one version, an example that runs, and a build without OpenMP."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import metadata
from pathlib import Path

import pytest

import bnbp

ROOT = Path(__file__).parent.parent
PACKAGE = Path(bnbp.__file__).parent


def test_the_headers_and_the_type_marker_are_installed():
    for name in (
        "py.typed",
        "engine/boundary.pyi",
        "batch_norm.pxd",
        "kernels.pxd",
        "include/bnbp/batch_norm.hpp",
        "include/bnbp/kernels.h",
        "include/bnbp/python.hpp",
        "include/bnbp/tensor.hpp",
        *(f"include/bnbp/detail/{part}.hpp" for part in ("call", "layout", "overlap", "signature", "view")),
    ):
        assert (PACKAGE / name).is_file(), name
    assert Path(bnbp.get_include()) == PACKAGE / "include"


def test_one_build_serves_every_later_cpython():
    modules = sorted(path.name for path in PACKAGE.rglob("*.*") if path.suffix in (".so", ".pyd"))
    levels = len(bnbp.show_config("dicts")["isa"]["built"])
    # The core, the pool, exact sums, what they share, PyTorch's and JAX's; the kernels and the floor.
    assert len(modules) == 6 + 2 * levels
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):  # which has no limited API
        versioned = [name for name in modules if re.search(r"cpython|cp3\d", name)]
        assert not versioned


def test_the_example_of_the_readme_runs():
    code, in_pytorch = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 10
    assert "bnbp.torch.convert" in in_pytorch  # tests/test_torch_convert.py runs it
    names = {}
    exec(code, names)
    assert names["dx"].shape == names["x"].shape


def test_the_package_and_the_changelog_have_the_version():
    assert bnbp.__version__ == metadata("bnbp")["Version"]
    assert f"\n## {bnbp.__version__} (" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="wraps the Unix compiler")
def test_a_compiler_without_openmp_builds_the_serial_kernels(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "bnbp", source / "bnbp", ignore=shutil.ignore_patterns("*.so", "*.c", "*.cpp", "__pycache__")
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("cc", "c++"):
        wrapper = tmp_path / name
        wrapper.write_text(
            f'#!/bin/sh\nfor a; do case "$a" in -fopenmp|-lomp) echo "no $a here" >&2; exit 1;; esac; done\n'
            f'exec {name} "$@"\n'
        )
        wrapper.chmod(0o755)
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source,
        capture_output=True,
        text=True,
        env={**os.environ, "CC": f"{tmp_path}/cc", "CXX": f"{tmp_path}/c++"},
    )
    assert build.returncode == 0, build.stderr
    assert build.stdout.count("bnbp: this compiler has no OpenMP; building the serial kernels\n") == 1
    check = (
        "import numpy as np, bnbp; c = bnbp.show_config('dicts')['openmp'];"
        "print(c['enabled'], bnbp.batch_norm_training(np.ones((300, 300)), None, None, num_threads=2).batch_mean.sum())"
    )
    run = subprocess.run([sys.executable, "-c", check], cwd=source, capture_output=True, text=True)
    assert run.stdout == "False 300.0\n", run.stderr
