"""Builds the native modules with CMake and Ninja; everything else is in pyproject.toml.

``FASTGPT_BUILD=0`` installs the Python part alone; ``FASTGPT_SANITIZE=1`` builds with sanitizers, in a folder
of its own. torch is not needed to build: the
native code includes no torch header and links against no torch library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def wanted(variable: str, default: str) -> bool:
    value = os.environ.get(variable, default)
    if value not in ("0", "1"):
        raise SystemExit(f"{variable}: got {value!r}, expected '0' or '1'")
    return value == "1"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        sanitize = wanted("FASTGPT_SANITIZE", "0")
        name = f"cmake-{sysconfig.get_config_var('SOABI')}" + "-sanitize" * sanitize
        build_dir = ROOT / "build" / name
        build_dir.mkdir(parents=True, exist_ok=True)
        import pybind11

        configure = [
            "cmake",
            "-S",
            str(ROOT / "csrc"),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DFASTGPT_SANITIZE={'ON' if sanitize else 'OFF'}",
            # CMake reads it at the first configuration only.
            f"-DCMAKE_CXX_FLAGS={os.environ.get('CXXFLAGS', '')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        ninja = shutil.which("ninja")
        if ninja:
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        try:
            if subprocess.run(configure).returncode != 0:
                # An earlier cache may name a build environment, or a source folder, that is gone.
                subprocess.run([*configure, "--fresh"], check=True)
            subprocess.run(["cmake", "--build", str(build_dir)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"fastgpt: building the native CPU module failed ({error}). It needs GCC 11 or later; "
                "FASTGPT_BUILD=0 installs the Python part alone, which runs on the 'torch' and "
                "'reference' backends."
            ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a running process may have the old file mapped.
        shutil.copy2(build_dir / target.name, f"{target}.new")
        os.replace(f"{target}.new", target)


setup(
    ext_modules=[Extension("fastgpt._cpu", sources=[])] if wanted("FASTGPT_BUILD", "1") else [],
    cmdclass={"build_ext": CMakeBuild},
)
