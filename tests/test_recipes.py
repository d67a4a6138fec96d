"""The recipes of the page on C++: CMake and Meson build its extension module and its program, which compute."""

import os
import re
import sys
import sysconfig

import numpy as np
import pytest
from building import PACKAGES, ROOT, copy_examples, load, run

from bnbp import reference

pytestmark = pytest.mark.skipif(os.name != "posix", reason="what CMake and Meson do elsewhere has not been run")

RECIPES = {
    "cmake": [
        ["cmake", "-S", ".", "-B", "build", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", "build"],
    ],
    "meson": [["meson", "setup", "build"], ["meson", "compile", "-C", "build"]],
}


@pytest.fixture(scope="module", params=[*RECIPES])
def build(request, tmp_path_factory):
    folder = copy_examples(tmp_path_factory.mktemp(request.param))
    for command in RECIPES[request.param]:
        run(*command, cwd=folder)
    return folder / "build"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_extension_module_computes_the_gradients(build, dtype):
    module = load(build, "gradients")
    rng = np.random.default_rng(15)
    x, dy = rng.normal(3, 2, (2, 4, 3, 5)).astype(dtype), rng.normal(1, 1, (5, 3, 4, 2)).astype(dtype).T
    x = x[:, ::-1]  # strides of its own, as dy has
    x.flags.writeable = False
    gamma, mean, variance = np.array([[1.5, -2.0, 0.5, 1], [3.5, 3, 2.5, 3], [4, 4.5, 3, 5]], dtype)
    out = np.empty(x.shape, dtype), np.empty(4, dtype), np.empty(4, dtype)
    assert module.gradient(x, gamma, mean, variance, dy, 0.5, *out) is None
    exact = [array.astype(np.float64) for array in (x, gamma, mean, variance, dy)]
    expected = reference.batch_norm_training_backprop(exact[0], exact[1], None, *exact[2:], 0.5)
    assert np.ptp(expected.input_delta) > 1
    for got, want in zip(out, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=8 * np.finfo(dtype).eps * np.abs(want).max())


def test_the_extension_module_raises_the_errors(build):
    module = load(build, "gradients")
    x, c = np.ones((3, 2, 2)), np.ones(2)
    out = np.full((3, 2, 2), 7.0), np.full(2, 7.0), np.full(2, 7.0)
    frozen = np.ones(2)
    frozen.flags.writeable = False
    for kind, text, arguments in [
        (ValueError, "epsilon: expected a finite number >= 0, got -1", (x, c, c, c, x, -1, *out)),
        (
            TypeError,
            "gamma: expected float64, the type of input, got format q; use .astype(np.float64)",
            (x, c.astype("q"), c, c, x, 1, *out),
        ),
        (
            ValueError,
            "mean: expected shape (2,) for the 2 channels of input (3, 2, 2), got (1,)",
            (x, c, c[:1], c, x, 1, *out),
        ),
        (
            ValueError,
            "out[1] (gamma_delta): expected memory that can be written to, got read-only memory",
            (x, c, c, c, x, 1, out[0], frozen, out[2]),
        ),
        (TypeError, "a bytes-like object is required, not 'int'", (x, c, c, c, 3, 1, *out)),
    ]:
        with pytest.raises(kind) as caught:
            module.gradient(*arguments)
        assert caught.type is kind
        assert str(caught.value) == text
    assert all((array == 7).all() for array in out)


@pytest.mark.skipif(
    not re.fullmatch(r"libpython.*\.so", sysconfig.get_config_var("LDLIBRARY") or ""),
    reason="a program needs Python as a shared library",
)
def test_the_program_prints_what_the_page_says(build):
    packages = os.pathsep.join({str(PACKAGES), *(path for path in sys.path if path.endswith("-packages"))})
    shown = run(build / "gradient", cwd=build, PYTHONPATH=packages, PYTHONHOME=sys.base_prefix)
    page = (ROOT / "docs" / "cpp.rst").read_text("utf-8")
    promised = page.partition("$ ./gradient\n")[2].partition("\n\n")[0]
    assert len(promised.splitlines()) == 2
    assert shown.splitlines() == [line.strip() for line in promised.splitlines()]
