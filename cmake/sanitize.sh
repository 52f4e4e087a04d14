#!/usr/bin/env bash
# Builds the CPU core with AddressSanitizer and UndefinedBehaviorSanitizer in build/sanitize, leaving the core in use
# alone, and runs the operator tests on it. Arguments go to pytest instead of the usual selection:
#   cmake/sanitize.sh
#   cmake/sanitize.sh python_tests/ops/_blend/test_blend.py -k sizes
#   cmake/sanitize.sh cuda          where a GPU is: the CUDA tests under compute-sanitizer, with the core in use
#   SANITIZER=racecheck cmake/sanitize.sh cuda python_tests/ops/cuda/test_cuda_blend.py     another of its tools
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
if [ "${1:-}" = cuda ]; then
  shift
  case "${1:-}" in -* | "") set -- python_tests/ops "$@" ;; esac
  exec compute-sanitizer --tool "${SANITIZER:-memcheck}" --target-processes all --error-exitcode 1 \
    "$python" -m pytest -q -p no:cacheprovider -m gpu "$@"
fi
folder=build/sanitize
site="$PWD/$folder/site"

# The package's Python files beside the instrumented core; sources may have moved since the last time.
rm -rf "$site"
mkdir -p "$site"
cp -r fedkern "$site/"
rm -f "$site"/fedkern/*.so
(
  cd csrc
  cmake --preset sanitize -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')" >"../$folder/configure.log" ||
    { cat "../$folder/configure.log" >&2; exit 1; }
  cmake --build --preset sanitize -j "${JOBS:-$(nproc)}" | tail -3
)
core=$(echo "$site"/fedkern/_cpu.*.so)
# Not grep -q: it ends before nm has written everything, which pipefail takes for a failure.
nm -D "$core" | grep __asan_report >/dev/null || { echo "$core is not instrumented" >&2; exit 1; }

if [ $# -eq 0 ]; then
  # Not what compiles with torch.compile or Triton, forks, or maps gigabytes: the kernels are the same ones. Inputs without
  # elements in every backend, the CUDA kernels instrumented too.
  set -- python_tests/ops --ignore=python_tests/ops/triton --ignore=python_tests/ops/cuda --ignore=python_tests/ops/_core/test_fork.py \
    -k "inputs_without_elements or (not triton and not compile and not opcheck and not beyond_32 and not exp_within)"
fi
# -P keeps the checkout's own fedkern off the path.
export PYTHONPATH="$site" FEDKERN_BACKEND= OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
export FEDKERN_EMULATED_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
export ASAN_OPTIONS="detect_leaks=0:abort_on_error=0:${ASAN_OPTIONS:-}" UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
  "$python" -P -c 'import torch, sys
from fedkern.ops._core import backend
path = backend.cpu_core().__file__
sys.exit(path != sys.argv[1] and f"tests would run {path}")' "$core"
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
  "$python" -P -m pytest -q -p no:cacheprovider --capture=sys "$@"  # a report goes to the process's own stderr
