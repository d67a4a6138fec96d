"""A batch spread over several devices, with `axis_name`; each check is in jax_worker.py."""

import re
from pathlib import Path

import pytest
from conftest import python

pytestmark = pytest.mark.jax

WORKER = Path(__file__).with_name("jax_worker.py")
CHECKS = re.findall(r"^def check_(\w+)", WORKER.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", CHECKS)
def test_several_devices(name):
    code = f"import runpy, sys; sys.path.insert(0, {str(WORKER.parent)!r}); sys.argv[1:] = [{name!r}]\n"
    code += f"runpy.run_path({str(WORKER)!r}, run_name='__main__')"
    assert python(code).endswith("checked")
