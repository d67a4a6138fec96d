"""The examples of the pages, in a folder of their own, built as a user of the installed package would."""

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import bnbp

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
PACKAGES = Path(bnbp.__file__).parent.parent

ENVIRONMENT = {
    **os.environ,
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    "CXXFLAGS": "-O0",  # quick to compile
    "CFLAGS": "-O0",
}
if PACKAGES == ROOT:  # an editable installation is found by an import hook, which Cython does not run
    ENVIRONMENT["PYTHONPATH"] = str(ROOT)


def copy_examples(folder):
    return Path(shutil.copytree(EXAMPLES, folder / "examples"))


def run(*command, cwd, **environment):
    """What a command prints. With what it has printed, if it fails."""
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


def load(folder, name):
    """The extension module that was built in a folder."""
    file = next(path for suffix in EXTENSION_SUFFIXES if (path := folder / f"{name}{suffix}").exists())
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
