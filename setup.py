"""Builds the one extension, sinklora._C: C11, CPython's limited API 3.11, NumPy 2 C API, no torch headers.

SINKLORA_DEBUG=1     -O0 -g
SINKLORA_SANITIZE=1  address and undefined-behaviour sanitizers (run with the asan runtime preloaded)
SINKLORA_WERROR=1    warnings are errors
"""

import os
import platform
import tomllib
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc").glob("*/*.c")) + sorted(
    str(path) for path in Path("csrc/cpu/isa").glob("*.c")
)

with open("pyproject.toml", "rb") as settings:
    ISA_FLAGS = tomllib.load(settings)["tool"]["sinklora"]["isa-flags"]


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def common_flags() -> list[str]:
    flags = [
        "-std=c11",
        "-O3",
        "-g1",
        "-Wall",
        "-Wextra",
        "-Wstrict-prototypes",
        "-fvisibility=hidden",
        "-pthread",
    ]
    if flag("SINKLORA_DEBUG"):
        flags += ["-O0", "-g"]
    if flag("SINKLORA_SANITIZE"):
        flags += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
    if flag("SINKLORA_WERROR"):
        flags += ["-Werror"]
    return flags


class BuildExt(build_ext):
    """Compiles each file under csrc/cpu/isa with its own instruction-set flags."""

    def build_extension(self, ext: Extension) -> None:
        compile_file = self.compiler._compile

        def with_isa(obj, src, suffix, cc_args, extra, pp_opts):  # type: ignore[no-untyped-def]
            isa = ISA_FLAGS.get(Path(src).name, []) if platform.machine() in ("x86_64", "AMD64") else []
            compile_file(obj, src, suffix, cc_args, [*extra, *isa], pp_opts)

        self.compiler._compile = with_isa
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_file


setup(
    ext_modules=[
        Extension(
            "sinklora._C",
            SOURCES,
            include_dirs=[numpy.get_include()],
            define_macros=[
                ("Py_LIMITED_API", "0x030B0000"),
                ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
                ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION"),
            ],
            extra_compile_args=common_flags(),
            extra_link_args=["-pthread", "-lm", "-ldl"]
            + (["-fsanitize=address,undefined"] if flag("SINKLORA_SANITIZE") else []),
            depends=[str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".def", ".inc")],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
