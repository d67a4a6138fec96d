"""The how-to pages: each script runs, checks itself, and prints what its page says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bnbp

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "examples" / "howto").glob("*.py"))
PAGES = sorted(path.stem for path in (ROOT / "docs" / "howto").glob("*.rst") if path.stem != "index")


def run(command: str, folder: Path) -> str:
    """What a command of a page prints, with this Python, in a folder of its own."""
    program, *arguments = shlex.split(command.replace("examples/", f"{ROOT.as_posix()}/examples/"))
    arguments = {"python": arguments, "bnbp": ["-m", "bnbp", *arguments]}[program]
    path = os.pathsep.join([str(Path(bnbp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout


def console_of(page: str) -> dict[str, str]:
    """The commands of a page, and what it says they print."""
    text = (ROOT / "docs" / "howto" / f"{page}.rst").read_text("utf-8")
    blocks = re.findall(r"\.\. code-block:: console\n\n((?:   .*\n)+)", text)
    lines = [re.sub(r"^   ", "", block, flags=re.MULTILINE).partition("\n") for block in blocks]
    return {command.removeprefix("$ "): shown for command, _, shown in lines}


def test_every_script_has_its_page() -> None:
    assert SCRIPTS == PAGES
    for page in PAGES:
        text = (ROOT / "docs" / "howto" / f"{page}.rst").read_text("utf-8")
        assert f".. literalinclude:: ../../examples/howto/{page}.py\n" in text
        index = (ROOT / "docs" / "howto" / "index.rst").read_text("utf-8")
        assert f":doc:`{page}`" in index
        assert f"\n   {page}\n" in index


@pytest.mark.parametrize("page", PAGES)
def test_script_prints_what_its_page_says(page: str, tmp_path: Path) -> None:
    """The scripts raise if NumPy, a finite difference or another library has other numbers."""
    console = console_of(page)
    (command,) = (command for command in console if page in command)
    assert console[command]
    (tmp_path / "data").mkdir()
    assert run(command, tmp_path) == console[command]


def test_command_line_computes_what_the_script_for_files_does(tmp_path: Path) -> None:
    """The folder that the script makes is one that `bnbp run` takes, and gives the same gradient."""
    pytest.importorskip("typer")
    command, script = console_of("larger_than_memory")
    (tmp_path / "data").mkdir()
    run(script, tmp_path)
    run(command, tmp_path)
    ours, theirs = (np.load(tmp_path / folder / "input_delta.npy") for folder in ("data", "results"))
    assert np.abs(ours).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
