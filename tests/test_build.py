"""What the build promises, and the rules of the source tree that can be grepped."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import facenet_ext

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "facenet_ext"
SOURCES = sorted(path for pattern in ("*.h", "*.cpp", "*.cu", "*.cuh") for path in (ROOT / "csrc").rglob(pattern))


def test_build_info():
    info = facenet_ext.build_info()
    assert set(info) == {"version", "cuda", "cuda_archs", "cuda_reason", "cpu_isa", "compiler"}
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", info["version"]) and info["version"] == facenet_ext.__version__
    assert isinstance(info["cuda"], bool) and bool(info["cuda_archs"]) == info["cuda"] and info["cuda_reason"]
    assert info["cpu_isa"][-1] == "portable" and set(info["cpu_isa"]) <= {"avx512", "avx2", "portable"}
    assert info["cpu_isa"] == sorted(info["cpu_isa"], key=["avx512", "avx2", "portable"].index)  # best first
    assert re.fullmatch(r"\w+ [\d.]+", info["compiler"])
    info["cuda"] = "changed"
    assert facenet_ext.build_info()["cuda"] != "changed"  # a fresh dict each time


def test_version_is_that_of_pyproject():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', text, re.MULTILINE).group(1) == facenet_ext.__version__


def test_no_torch_header_under_csrc():
    assert SOURCES
    for path in SOURCES:
        includes = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
        bad = [name for name in includes if re.match(r"(torch|ATen|c10|caffe2)/|torch\b", name)]
        assert not bad, f"{path.relative_to(ROOT)} includes {bad}"


def test_cmake_names_every_source():
    named = re.findall(r"\b(\w+/\w+\.(?:cpp|cu))\b", (ROOT / "csrc" / "CMakeLists.txt").read_text())
    compiled = {path.relative_to(ROOT / "csrc").as_posix() for path in SOURCES if path.suffix in (".cpp", ".cu")}
    assert set(named) == compiled - {"bindings.cpp"}


def imports(path: Path) -> set[str]:
    """What a module imports, relative ones with their dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            found |= {prefix} | {f"{prefix}.{a.name}" if node.module else prefix + a.name for a in node.names}
    return found


def test_only_backend_touches_the_compiled_module():
    touching = {
        path.name for path in PACKAGE.rglob("*.py") if any(name.split(".")[-1] == "_C" for name in imports(path))
    }
    assert touching == {"_backend.py"}


def test_reference_imports_nothing_of_ours():
    ours = {name for name in imports(PACKAGE / "reference.py") if name.startswith((".", "facenet_ext"))}
    assert not ours


def test_models_and_loss_do_not_import_each_other():
    of_the_loss = re.compile(r"(\.+|facenet_ext\.)(loss|functional|autograd|_backend|reference)\b")
    for path in (PACKAGE / "models").rglob("*.py"):
        assert not {name for name in imports(path) if of_the_loss.match(name)}, path
    for name in ("loss.py", "functional.py", "autograd.py", "_backend.py"):
        assert not any("models" in imported for imported in imports(PACKAGE / name)), name


def test_setup_does_not_import_torch():
    assert not {name for name in imports(ROOT / "setup.py") if name.split(".")[0] == "torch"}


def test_no_global_isa_flags():
    """-mavx… for a whole target would put illegal instructions before the run-time check."""
    text = (ROOT / "csrc" / "CMakeLists.txt").read_text()
    code = "\n".join(line.split("#")[0] for line in text.splitlines())
    for line in re.findall(r"[^\n]*-m(?:avx|fma|f16c|arch)[^\n]*", code):
        assert re.search(r"triplet_avx|COMPILE_OPTIONS", line), line
    assert "-ffast-math" not in code and "-march=native" not in code


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_module_needs_neither_torch_nor_cuda_libraries():
    from facenet_ext import _backend

    try:
        command = ["readelf", "-d", _backend._C.__file__]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("no readelf")
    needed = re.findall(r"NEEDED.*\[(.+)\]", text)
    assert "libgomp.so.1" in needed
    assert not [name for name in needed if re.search("torch|c10|cudart|cuda", name)], needed
    assert not re.search(r"R(UN)?PATH", text)


def test_import_needs_no_gpu_and_probes_none():
    code = "import facenet_ext, torch; assert not torch.cuda.is_initialized(); print(facenet_ext.build_info()['cuda'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
