#!/usr/bin/env bash
# On a machine with a GPU, in one call under 8 minutes: build, check against float64, look for memory
# errors and races on small shapes, time, and print one table. Run from anywhere.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python3}
build=build/cuda_run
"$python" -m pip install -q cmake ninja pybind11 2> /dev/null || true
generator=(); command -v ninja > /dev/null && generator=(-G Ninja)
cmake -S . -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DCODELLAMA_RT_CUDA=ON \
  -DCMAKE_INSTALL_PREFIX="$PWD/codellama_rt" -DPython3_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')" > "$build.log"
cmake --build "$build" --parallel "$(nproc)" >> "$build.log"
cmake --install "$build" >> "$build.log"
echo "== built in $SECONDS s"

export PYTHONPATH="$PWD"
timeout 150 "$python" -m pytest -q tests/cuda -k gpu -p no:cacheprovider -x || failed=1
echo "== checked after $SECONDS s"
if command -v compute-sanitizer > /dev/null; then
  for check in memcheck racecheck; do
    timeout 60 compute-sanitizer --tool "$check" --error-exitcode 1 \
      "$python" -m pytest -q tests/cuda/test_cuda_attention.py -p no:cacheprovider \
      -k "gpu and (page_sizes or chunk)" || failed=1
  done
fi
echo "== sanitized after $SECONDS s"
timeout 200 "$python" benchmarks/cuda/bench_cuda.py
echo "== all in $SECONDS s"
exit "${failed:-0}"
