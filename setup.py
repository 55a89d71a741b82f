"""Builds facenet_ext._C: CMake configures, Ninja compiles. Everything else about the package stands in pyproject.toml.

torch is not imported here and not needed to build: no source under csrc/ includes a torch header (see csrc/triplet.h),
so `pip install .` works with build isolation, and one wheel serves every torch. Two environment variables are the only
switches:

    FACENET_EXT_CUDA=AUTO|ON|OFF    AUTO (default): CUDA if a working nvcc is found; ON: fail without one; OFF: CPU only
    CMAKE_CUDA_ARCHITECTURES=...    for example "90" or "80;90"; default: see csrc/CMakeLists.txt
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Written by CMake at configure time: "ON <reason>" or "OFF <reason>".
CUDA_REPORT = "facenet_ext_cuda.txt"


def find_tool(name: str, bin_dir_attribute: str) -> str:
    """The tool of the build environment's own package first; it is there under build isolation, whatever PATH says."""
    try:
        bin_dir = getattr(importlib.import_module(name), bin_dir_attribute)
    except (ImportError, AttributeError):
        bin_dir = None
    found = (bin_dir and shutil.which(name, path=bin_dir)) or shutil.which(name)
    if not found:
        raise RuntimeError(f"{name} not found: install it (pip install {name}) or build with pip's build isolation")
    return found


def switches() -> list[str]:
    cuda = os.environ.get("FACENET_EXT_CUDA", "AUTO").upper()
    if cuda not in ("AUTO", "ON", "OFF"):
        raise RuntimeError(f"FACENET_EXT_CUDA={cuda}: accepted are AUTO, ON and OFF")
    arguments = [f"-DFACENET_EXT_CUDA={cuda}"]
    architectures = os.environ.get("CMAKE_CUDA_ARCHITECTURES")
    if architectures:
        if not re.fullmatch(r"[\w;\- ]+", architectures):
            raise RuntimeError(f"CMAKE_CUDA_ARCHITECTURES={architectures!r}: accepted is a list such as '80;90'")
        arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
    else:
        arguments.append("-UCMAKE_CUDA_ARCHITECTURES")  # an earlier build's choice must not linger in the cache
    return arguments


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = (ROOT / self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        # Every path is given anew: under build isolation cmake, ninja and pybind11 stand in another folder at each
        # build, and a cache of the last one must not be believed.
        subprocess.run(
            [
                cmake,
                f"-S{ROOT / 'csrc'}",
                f"-B{build_dir}",
                "-GNinja",
                f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DFACENET_EXT_VERSION={self.distribution.get_version()}",
                f"-DFACENET_EXT_MODULE_NAME={target.name}",
                f"-DFACENET_EXT_MODULE_DIR={target.parent}",
                f"-DFACENET_EXT_CUDA_REPORT={build_dir / CUDA_REPORT}",
                *switches(),
            ],
            check=True,
        )
        self.announce_cuda((build_dir / CUDA_REPORT).read_text().strip())
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs = ["--parallel", str(self.parallel)] if self.parallel else []
        subprocess.run([cmake, "--build", str(build_dir), "--target", "_C", *jobs], check=True)
        self.serve_checkout(target)

    @staticmethod
    def serve_checkout(target: Path) -> None:
        """Beside the sources too: Python started in the checkout finds those first, not the installed package."""
        beside_sources = ROOT / "facenet_ext" / target.name
        if beside_sources != target:
            partial = beside_sources.with_name(beside_sources.name + ".partial")
            shutil.copy2(target, partial)
            os.replace(partial, beside_sources)

    @staticmethod
    def announce_cuda(report: str) -> None:
        bar = "=" * 100
        print(f"{bar}\nfacenet_ext: CUDA backend {report}\n{bar}", file=sys.stderr, flush=True)


setup(ext_modules=[Extension("facenet_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
