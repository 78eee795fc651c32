"""Builds the native modules with CMake and Ninja; everything else is in pyproject.toml.

``FASTGPT_BUILD=0`` installs the Python part alone. The CUDA kernels are built where there is an nvcc that
can; ``FASTGPT_CUDA=1`` insists on them, ``=0`` leaves them out. ``FASTGPT_EMULATE=1`` adds the module by
which the tests run them without a GPU. ``FASTGPT_SANITIZE=1`` builds all but the CUDA kernels with
sanitizers, in a folder of its own. torch is not needed to build: the native code includes no torch header and
links against no torch library.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_NVCC = (12, 4)


def wanted(variable: str, default: str) -> bool:
    value = os.environ.get(variable, default)
    if value not in ("0", "1"):
        raise SystemExit(f"{variable}: got {value!r}, expected '0' or '1'")
    return value == "1"


def find_nvcc() -> tuple[str | None, str]:
    """The compiler of CUDA, or None and what is missing."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes), "nvcc"]
    found = filter(None, map(shutil.which, filter(None, [*places, "/usr/local/cuda/bin/nvcc"])))
    nvcc = next(found, None)
    if nvcc is None:
        return None, "nvcc was not found (looked for in CUDACXX, CUDA_HOME, PATH and /usr/local/cuda)"
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        return None, f"{nvcc} does not run: {error}"
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None or (int(release[1]), int(release[2])) < OLDEST_NVCC:
        return None, f"{nvcc} is not of CUDA 12.4 or later"
    return nvcc, f"{nvcc} of CUDA {release[1]}.{release[2]}"


def choose_nvcc() -> str | None:
    """The compiler by which the CUDA kernels are to be built, if they are; says so in a line."""
    asked = os.environ.get("FASTGPT_CUDA", "") != ""
    if wanted("FASTGPT_SANITIZE", "0") or (asked and not wanted("FASTGPT_CUDA", "0")):
        return None
    nvcc, found = find_nvcc()
    if nvcc is None and asked:
        raise SystemExit(f"fastgpt: FASTGPT_CUDA=1: {found}")
    print(f"fastgpt: {'with CUDA kernels' if nvcc else 'without CUDA kernels'}: {found}", flush=True)
    return nvcc


class CMakeBuild(build_ext):
    def build_extensions(self) -> None:
        cuda = [ext for ext in self.extensions if ext.name == "fastgpt._cuda"]
        if not cuda or os.environ.get("FASTGPT_CUDA"):
            return self.build()
        try:
            self.build()
        except SystemExit:  # an nvcc that nobody asked for, and a compiler that it does not know, say
            why = f"{NVCC} failed, as said above; FASTGPT_CUDA=1 insists on them"
            print(f"fastgpt: without CUDA kernels: {why}", flush=True)
            self.extensions.remove(*cuda)
            self.build()

    def build(self) -> None:
        sanitize = wanted("FASTGPT_SANITIZE", "0")
        name = f"cmake-{sysconfig.get_config_var('SOABI')}" + "-sanitize" * sanitize
        build_dir = ROOT / "build" / name
        build_dir.mkdir(parents=True, exist_ok=True)
        import pybind11

        names = [ext.name for ext in self.extensions]
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
            f"-DFASTGPT_CUDA={'ON' if 'fastgpt._cuda' in names else 'OFF'}",
            f"-DFASTGPT_EMULATE={'ON' if 'fastgpt._cuda_emulated' in names else 'OFF'}",
            # CMake reads it at the first configuration only.
            f"-DCMAKE_CXX_FLAGS={os.environ.get('CXXFLAGS', '')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if "fastgpt._cuda" in names:
            configure.append(f"-DCMAKE_CUDA_COMPILER={NVCC}")
        ninja = shutil.which("ninja")
        if ninja:
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        try:
            if subprocess.run(configure).returncode != 0:
                # An earlier cache may name a build environment, or a source folder, that is gone.
                subprocess.run([*configure, "--fresh"], check=True)
            subprocess.run(["cmake", "--build", str(build_dir)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            without = "FASTGPT_CUDA=0 leaves out the CUDA kernels; " if "fastgpt._cuda" in names else ""
            raise SystemExit(
                f"fastgpt: building the native modules failed ({error}). They need GCC 11 or later; {without}"
                "FASTGPT_BUILD=0 installs the Python part alone, which runs on the 'torch' and "
                "'reference' backends."
            ) from error
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            # Renamed into place: a running process may have the old file mapped.
            shutil.copy2(build_dir / target.name, f"{target}.new")
            os.replace(f"{target}.new", target)
        for name in {"fastgpt._cuda", "fastgpt._cuda_emulated"}.difference(names):
            # A wheel would have what an earlier build has left.
            Path(self.build_lib, self.get_ext_filename(name)).unlink(missing_ok=True)


NVCC = choose_nvcc() if wanted("FASTGPT_BUILD", "1") else None


def modules() -> list[str]:
    if not wanted("FASTGPT_BUILD", "1"):
        return []
    return ["_cpu", *["_cuda"] * bool(NVCC), *["_cuda_emulated"] * wanted("FASTGPT_EMULATE", "0")]


setup(
    ext_modules=[Extension(f"fastgpt.{name}", sources=[]) for name in modules()],
    cmdclass={"build_ext": CMakeBuild},
)
