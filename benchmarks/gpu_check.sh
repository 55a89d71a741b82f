#!/bin/bash
# Builds the package and checks it on this machine's GPU, offline, in under eight minutes: tests, compute-sanitizer, accuracy of the
# real tensor cores, CUDA graphs, times. Writes one JSON under benchmarks/results/ and ends with a table; exit status 1 if a step failed.
#
#   bash benchmarks/gpu_check.sh [--quick]       --quick: build, tests and sanitizers only
#
# Needs torch with CUDA, nvcc, and the build requirements (cmake, ninja, pybind11, setuptools). PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu_check.py "$@"
