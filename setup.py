"""Build peftc._core.  Everything else about the package is in pyproject.toml.

Switches (environment variables):
    PEFTC_WERROR=1     warnings are errors (what CI uses)
    PEFTC_SANITIZE=1   AddressSanitizer + UndefinedBehaviorSanitizer, and the hooks that make allocations fail
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wconversion",
    "-Wsign-conversion",
    "-Wstrict-prototypes",
    "-Wvla",
    "-Wpointer-arith",
    "-Wundef",
]


def on(switch: str) -> bool:
    return os.environ.get(switch, "") not in ("", "0")


def pkg_config(*args: str) -> list[str]:
    """Flags of cJSON, or one clear message about what to install."""
    try:
        out = subprocess.run(["pkg-config", *args, "libcjson"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        what = "pkg-config is not installed" if isinstance(error, FileNotFoundError) else "pkg-config does not find it"
        sys.exit(
            f"\npeftc needs the cJSON library to build, and {what}.\n"
            "  Debian, Ubuntu:  sudo apt-get install libcjson-dev pkg-config\n"
            "  Fedora:          sudo dnf install cjson-devel pkgconf\n"
            "  macOS:           brew install cjson pkgconf\n"
        )
    return shlex.split(out)


class BuildCore(build_ext):
    """Finds the compile-time dependencies only when something is really built."""

    def build_extension(self, ext: Extension) -> None:
        import numpy
        import scipy_openblas32

        lib_dir = scipy_openblas32.get_lib_dir()
        ext.include_dirs += [numpy.get_include(), scipy_openblas32.get_include_dir()]
        ext.extra_compile_args += ["-std=c11", "-O3", "-g1", "-fvisibility=hidden", *WARNINGS]
        ext.extra_compile_args += pkg_config("--cflags")
        ext.extra_link_args += [f"-L{lib_dir}", "-lscipy_openblas", *pkg_config("--libs"), "-lm", "-pthread"]
        # An installed peftc finds OpenBLAS beside itself in site-packages; one built in place finds it
        # where it was at build time.
        ext.extra_link_args += ["-Wl,-rpath,$ORIGIN/../scipy_openblas32/lib"]
        if self.inplace:
            ext.extra_link_args += [f"-Wl,-rpath,{lib_dir}"]
        if on("PEFTC_WERROR"):
            ext.extra_compile_args += ["-Werror"]
        if on("PEFTC_SANITIZE"):
            ext.define_macros += [("PC_TEST_HOOKS", "1")]
            flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
            ext.extra_compile_args += [*flags, "-O1"]
            ext.extra_link_args += flags
        super().build_extension(ext)


sources = sorted(str(path) for path in Path("src").rglob("*.c"))
headers = sorted(str(path) for path in Path("src").rglob("*.h"))
setup(
    ext_modules=[Extension("peftc._core", sources=sources, depends=headers)],
    cmdclass={"build_ext": BuildCore},
)
