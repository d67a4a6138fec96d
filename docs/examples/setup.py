import sys

from Cython.Build import cythonize
from setuptools import Extension, setup

import bnbp

setup(
    name="cython_gradient",
    ext_modules=cythonize(
        Extension(
            "cython_gradient",
            ["cython_gradient.pyx"],
            include_dirs=[bnbp.get_include()],
            extra_compile_args=["/std:c++17" if sys.platform == "win32" else "-std=c++17"],
            language="c++",
        )
    ),
)
