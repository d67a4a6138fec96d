"""What pyproject.toml cannot say: the compiled extensions, and how this compiler is asked for OpenMP."""

import tempfile
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# Contracting a*b+c to one instruction where the machine has it would make the bits depend on the machine.
FLAGS = {"msvc": ["/O2", "/std:c++17"], "unix": ["-O3", "-std=c++17", "-ffp-contract=off"]}

# Compile and link flags, in the order to try them: GCC and Clang, then Apple's Clang with Homebrew's libomp.
OPENMP = {
    "msvc": [(["/openmp"], [])],
    "unix": [(["-fopenmp"], ["-fopenmp"]), (["-Xpreprocessor", "-fopenmp"], ["-lomp"])],
}


class BuildExt(build_ext):
    """Adds the flags once the compiler is known."""

    def build_extensions(self) -> None:
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        compile_args, link_args = next(filter(self.compiles, OPENMP[kind]), ([], []))
        if not compile_args:
            print("bnbp: this compiler has no OpenMP; building the serial kernels")
        for extension in self.extensions:
            extension.extra_compile_args = FLAGS[kind] + compile_args
            extension.extra_link_args = link_args
        super().build_extensions()

    def compiles(self, flags: tuple[list[str], list[str]]) -> bool:
        """Whether a small OpenMP program compiles and links."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags[0])
                self.compiler.link_executable(objects, "openmp", output_dir=folder, extra_postargs=flags[1])
            except (CompileError, LinkError):
                return False
        return True


def extension(name: str) -> Extension:
    headers = ["bnbp/include/bnbp/kernels.h", "bnbp/include/bnbp/batch_norm.hpp", "bnbp/kernels.pxd"]
    return Extension(
        f"bnbp.{name}", [f"bnbp/{name}.pyx"], include_dirs=["bnbp/include"], depends=headers, language="c++"
    )


setup(
    ext_modules=cythonize(
        [extension("_core"), extension("_kernels")],
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,  # the kernels' views have no Python object behind them; see _kernels.pyx, g
        },
    ),
    cmdclass={"build_ext": BuildExt},
)
