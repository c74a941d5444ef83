"""Build peftc._core.  Everything else about the package is in pyproject.toml.

Switches (environment variables):
    PEFTC_WERROR=1     warnings are errors (what CI uses)
    PEFTC_SANITIZE=1   AddressSanitizer + UndefinedBehaviorSanitizer, and the hooks that make allocations fail
"""

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
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


def openblas_folders(lib_dir: str, *, stays_in_source_tree: bool) -> list[str]:
    """Where the loader shall look for OpenBLAS (rpath)."""
    folders = ["$ORIGIN/../scipy_openblas32/lib"]  # installed: beside us in site-packages
    if stays_in_source_tree:
        sites = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        folders += [f"{site}/scipy_openblas32/lib" for site in sites]
        # An isolated build's own copy is gone when the build is: its folder must not be searched at run time.
        if Path(tempfile.gettempdir()).resolve() not in Path(lib_dir).resolve().parents:
            folders.append(lib_dir)
    return list(dict.fromkeys(folders))


class BuildCore(build_ext):
    """Finds the compile-time dependencies only when something is really built, and compiles files side by side."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.stays_in_source_tree = bool(self.inplace)  # setuptools clears inplace while it builds
        if on("PEFTC_SANITIZE"):
            self.build_temp += "-sanitize"

    def build_extension(self, ext: Extension) -> None:
        cjson_cflags, cjson_libs = pkg_config("--cflags"), pkg_config("--libs")

        import numpy
        import scipy_openblas32

        lib_dir = scipy_openblas32.get_lib_dir()
        in_tree = self.stays_in_source_tree or getattr(self, "editable_mode", False)
        for folder in (numpy.get_include(), scipy_openblas32.get_include_dir(), sysconfig.get_path("include")):
            ext.extra_compile_args += ["-isystem", folder]  # our warnings are for our code
        ext.extra_compile_args += [
            "-std=c11",
            "-O3",
            "-g1",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-fvisibility=hidden",
            *WARNINGS,
            *cjson_cflags,
        ]
        ext.extra_link_args += [f"-L{lib_dir}", "-lscipy_openblas", *cjson_libs, "-lm", "-pthread"]
        ext.extra_link_args += [f"-Wl,-rpath,{f}" for f in openblas_folders(lib_dir, stays_in_source_tree=in_tree)]
        if on("PEFTC_WERROR"):
            ext.extra_compile_args += ["-Werror"]
        if on("PEFTC_SANITIZE"):
            ext.define_macros += [("PC_TEST_HOOKS", "1")]
            flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
            ext.extra_compile_args += [*flags, "-O1"]
            ext.extra_link_args += flags

        compile_one = self.compiler.compile

        def compile_all(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: compile_one([source], **options), sources))
            return [name for names in objects for name in names]

        self.compiler.compile = compile_all
        super().build_extension(ext)


sources = sorted(str(path) for path in Path("src").rglob("*.c"))
headers = sorted(str(path) for path in Path("src").rglob("*.h"))
setup(
    ext_modules=[Extension("peftc._core", sources=sources, depends=headers)],
    cmdclass={"build_ext": BuildCore},
)
