"""What pyproject.toml cannot say: the compiled extensions, and how this compiler is asked for OpenMP."""

import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# Contracting a*b+c to one instruction where the machine has it would make the bits depend on the machine.
# GCC unrolls loops of up to 16 turns before it looks for vectors, and then finds none in the kernels' lanes.
# What is declared inline is inlined, and nothing else: a kernel is then compiled once for each of its constant
# arguments, and its accumulators stay in registers, which they do not in the middle of a larger function.
FLAGS = {
    "msvc": ["/O2", "/std:c++17"],
    "unix": [
        "-O3",
        "-std=c++17",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-tree-loop-distribute-patterns",
        "--param=max-completely-peel-times=4",
        "-fno-inline-functions",
        "-fno-inline-functions-called-once",
        "-DCYTHON_INLINE=inline __attribute__((always_inline))",
    ],
}

# What has no loop over elements. That of JAX merges statistics in twofold arithmetic, which contraction would spoil.
PLAIN = {"msvc": ["/O2", "/std:c++17"], "unix": ["-O2", "-std=c++17", "-ffp-contract=off"]}

# Debug information would be five sixths of the files.
SMALL = {"msvc": [], "unix": ["-g0", "-fvisibility=hidden"]}

# For `make sanitize`: a build in which a wrong access to memory, or undefined behaviour, ends the process.
SANITIZE = (
    [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-g",
        "-O1",
        "-UCYTHON_INLINE",  # what is inlined for speed below would take four times as long to compile here
        "-DCYTHON_INLINE=inline",
        "-Wno-maybe-uninitialized",
    ]
    if os.environ.get("BNBP_SANITIZE")
    else []
)

# Compile and link flags, in the order to try them: GCC and Clang, then Apple's Clang with Homebrew's libomp.
OPENMP = {
    "msvc": [(["/openmp"], [])],
    "unix": [(["-fopenmp"], ["-fopenmp"]), (["-Xpreprocessor", "-fopenmp"], ["-lomp"])],
}

# The kernels are compiled once for each level of the instruction set; bnbp/engine/isa.py chooses one at import.
# GCC prefers 256-bit vectors unless told otherwise.
# The baseline is for CPUs of before 2013: -O3 would make it the largest of the three, for another 15 %.
X86_64 = {
    "x86_64": ["-O2"],
    "x86_64_v3": ["-march=x86-64-v3"],
    "x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
IS_X86_64 = os.name == "posix" and platform.machine() in ("x86_64", "AMD64")
LEVELS = X86_64 if IS_X86_64 else {"baseline": []}

# For builds that one machine uses: the levels to compile, such as "x86-64-v3". A process uses one of them.
if chosen := os.environ.get("BNBP_LEVELS", "").replace("-", "_").split():
    LEVELS = {level: LEVELS[level] for level in chosen}

# One build serves every CPython from 3.11 on, the first whose limited API has the buffers that memoryviews are made of.
# Free-threaded CPython has no limited API, and gets a build of its own.
Macros = Sequence[tuple[str, str]]
LIMITED_API: Macros = [] if sysconfig.get_config_var("Py_GIL_DISABLED") else [("Py_LIMITED_API", "0x030B0000")]

HEADERS = [str(path) for pattern in ("*.h", "*.hpp", "*.pxd", "*.pxi") for path in sorted(Path("bnbp").rglob(pattern))]


class BuildExt(build_ext):
    """Adds the flags once the compiler is known."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.parallel = os.cpu_count()

    def build_extensions(self) -> None:
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        compile_args, link_args = next(filter(self.compiles, OPENMP[kind]), ([], []))
        if not compile_args:
            print("bnbp: this compiler has no OpenMP; building the serial kernels")
        for extension in self.extensions:
            if extension in (torch, jax):
                extension.extra_compile_args = PLAIN[kind]
            elif extension is not shared:
                extension.extra_compile_args = FLAGS[kind] + compile_args + extension.extra_compile_args
                extension.extra_link_args = list(link_args)
            extension.extra_compile_args += SANITIZE or SMALL[kind]
            extension.extra_link_args += SANITIZE
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


def extension(name: str, source: str, macros: Macros = (), flags: Sequence[str] = ()) -> Extension:
    return Extension(
        f"bnbp.engine.{name}",
        [source],
        include_dirs=["bnbp/engine", "bnbp/engine/kernels", "bnbp/include"],
        define_macros=[*LIMITED_API, *macros],
        extra_compile_args=list(flags),
        depends=HEADERS,
        language="c++",
        py_limited_api=bool(LIMITED_API),
    )


def levels_of(generated: Extension) -> list[Extension]:
    """An extension for each level from the C++ of one: copies, so that they can be compiled at the same time.

    They are as old as it is, so that what has not changed is not compiled again.
    """
    extensions = []
    name = generated.name.removeprefix("bnbp.engine.")
    module = name.rpartition(".")[2]
    for level, flags in LEVELS.items():
        source = shutil.copy2(generated.sources[0], f"bnbp/engine/{name.replace('.', '/')}_{level}.cpp")
        rename = (f"PyInit_{module}", f"PyInit_{module}_{level}")
        extensions.append(extension(f"{name}_{level}", source, [rename], flags))
    return extensions


# The operators for PyTorch, which is not needed to compile them.
torch = Extension(
    "bnbp.torch.kernels",
    ["bnbp/torch/kernels.cc"],
    include_dirs=["bnbp/include"],
    define_macros=LIMITED_API,
    depends=HEADERS,
    language="c++",
    py_limited_api=bool(LIMITED_API),
)

# The operators for JAX, which is not needed to compile them either.
jax = Extension(
    "bnbp.jax.handlers",
    ["bnbp/jax/handlers.cc"],
    include_dirs=["bnbp/include"],
    define_macros=LIMITED_API,
    depends=HEADERS,
    language="c++",
    py_limited_api=bool(LIMITED_API),
)

# The last two are compiled for each level.
MODULES = ("boundary", "pool", "exact", "kernels.kernels", "floor")

# What memoryviews are made of, once for all modules and not 100 kB in each. Cython writes it, in C.
shared = Extension(
    "bnbp.engine._cyutility", ["bnbp/engine/_cyutility.c"], define_macros=LIMITED_API, py_limited_api=bool(LIMITED_API)
)
core, pool, exact, *generated, shared = cythonize(
    [*(extension(name, f"bnbp/engine/{name.replace('.', '/')}.pyx") for name in MODULES), shared],
    shared_utility_qualified_name=shared.name,
    compiler_directives={
        "language_level": 3,
        "boundscheck": False,
        "wraparound": False,
        "cdivision": True,
        "initializedcheck": False,  # the kernels' views have no Python object behind them; see kernels.pyx, h
    },
)

shared.language = "c++"  # to be linked as the others are: the C linker of some Pythons leaves a folder of theirs in it
for module in (core, pool):
    module.include_dirs.append(numpy.get_include())

setup(
    ext_modules=[shared, core, pool, exact, torch, jax, *(level for each in generated for level in levels_of(each))],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED_API else {},
)
