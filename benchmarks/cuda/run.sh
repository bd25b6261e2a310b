#!/usr/bin/env bash
# On a machine with a GPU, in one call under 8 minutes: build, check against float64, look for memory
# errors and races on small shapes, time, and print one table. Run from anywhere. Each part has a
# time limit and leaves the others if it fails; what failed is said at the end and in the exit status.
# Results, logs and the table go to $OUT (default build/cuda_bench). Needs a C++ compiler, nvcc, cmake
# and, for $PYTHON (default python3), numpy, ml_dtypes, pybind11 and pytest.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

python=${PYTHON:-python3}
out=${OUT:-$PWD/build/cuda_bench}
build=build/cuda_run
failed=()
mkdir -p "$out" build
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1

# part NAME SECONDS COMMAND...: its output into a log of its own; the end of it where it fails.
part() {
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  if timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1; then
    echo "== $name: $((SECONDS - began)) s"
  else
    echo "== $name: FAILED ($?) after $((SECONDS - began)) s, the end of $name.log:"
    tail -n 30 "$out/$name.log"
    failed+=("$name")
  fi
}

configure_and_build() {
  local generator=()
  command -v ninja > /dev/null && generator=(-G Ninja)
  cmake -S . -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DCODELLAMA_RT_CUDA=ON \
    -DCMAKE_INSTALL_PREFIX="$PWD/codellama_rt" -DPython3_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')" \
    && cmake --build "$build" --parallel "$(nproc)" && cmake --install "$build"
}
export -f configure_and_build
export python build

"$python" -c 'import numpy, ml_dtypes, pybind11, pytest' || exit
part build 120 bash -c configure_and_build
"$python" -c 'from codellama_rt import ops
usable, text = ops.available("cuda")
print(text)
raise SystemExit(not usable)' || exit
# FlashInfer compiles its kernels at the first use: beside the tests, which need one core
timeout 170 "$python" benchmarks/cuda/bench_cuda.py --smoke --section decode --out "$out/warm" \
  > "$out/peers.log" 2>&1 &
peers=$!
part tests 120 "$python" -m pytest -q tests/devices/cuda -k gpu -p no:cacheprovider
few="gpu and (page_sizes or three_weights or rope_and_cache or copy_blocks or merge)"
small=(-m pytest -q tests/devices/cuda -p no:cacheprovider -k "$few")
if command -v compute-sanitizer > /dev/null; then
  part memcheck 45 compute-sanitizer --tool memcheck --error-exitcode 1 "$python" "${small[@]}"
  part racecheck 45 compute-sanitizer --tool racecheck --error-exitcode 1 "$python" "${small[@]}"
else
  echo "== memcheck, racecheck: no compute-sanitizer on the path"
fi
wait "$peers" || echo "== peers: FlashInfer's first run did not end, see peers.log"
grep -h '^no peer\|cannot be set up\|does not run' "$out/peers.log"
seconds=$((465 - SECONDS))
"$python" benchmarks/cuda/bench_cuda.py --out "$out" --seconds "$((seconds > 60 ? seconds : 60))" \
  2>&1 | tee "$out/bench.log" || failed+=(bench)
echo "== all in $SECONDS s${failed:+, FAILED: ${failed[*]}}"
exit $((${#failed[@]} > 0))
