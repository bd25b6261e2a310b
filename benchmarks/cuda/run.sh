#!/usr/bin/env bash
# The first minutes on a GPU: run.sh [first | rest], both without an argument. `first` takes 8 minutes
# at most: build, roofs, a check of every kernel against float64, decoding, prefill, linear, rope, a
# 7B step, bits. `rest` takes 7 more: other batches, other libraries, the road of sm_80, all tests, and
# sanitizers. Every step is a process of its own with its own limit, so that what breaks the device or
# hangs costs its own rows only. To $OUT (default build/cuda_bench) go rows.jsonl, run.log and table.md.
# Needs a C++ compiler, nvcc, cmake and, for $PYTHON (default python3), numpy, ml_dtypes, pybind11 and
# pytest. ONLY=REGEX takes the steps whose names match. EMULATED=PATH, for tests, runs all of it dry:
# nothing is built, PATH is the emulator's module, and shapes are tiny.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

part=${1:-all}
python=${PYTHON:-python3}
out=${OUT:-$PWD/build/cuda_bench}
log=$out/run.log rows=$out/rows.jsonl
failed=()
# Of each file, what the dry run takes.
declare -A dry=([simple_ops]=copy_blocks_in [linear]="refusals" [attention]="decode-one and heads1 and 64"
  [causality]="key and 9" [quantized_cache]="same_rows" [aot]=rms_norm [model]=names_the_device)
mkdir -p "$out"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 python
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # whatever is installed: two seconds for each check
export PYTEST_ADDOPTS=                  # they may name plugins

# step NAME SECONDS COMMAND...: its output goes to the log, how it ended to the rows.
step() {
  local name=$1 limit=$2 began=$SECONDS left=$((end - SECONDS)) outcome=passed
  shift 2
  [[ $name =~ ${ONLY:-.} ]] || return 0
  [[ -n ${EMULATED:-} ]] && limit=300 left=300
  echo "== $name" >> "$log"
  if ((left < 5)); then
    outcome="no time"
  else
    timeout --kill-after=5 "$((left < limit ? left : limit))" "$@" >> "$log" 2>&1 \
      || outcome="failed ($?)"
  fi
  [[ $outcome == passed ]] || failed+=("$name")
  printf '{"step": "%s", "outcome": "%s", "seconds": %d}\n' "$name" "$outcome" \
    "$((SECONDS - began))" >> "$rows"
  echo "== $name: $outcome, $((SECONDS - began)) s"
}

# bench STEP SECONDS: of bench_cuda.py.
bench() {
  step "$1" "$2" "$python" benchmarks/cuda/bench_cuda.py "$1" --rows "$rows" \
    --seconds "$(($2 * 3 / 4))" ${EMULATED:+--smoke --module "$EMULATED"}
}

# check NAME SECONDS FILE [EXPRESSION [FURTHER]]: tests of tests/devices/cuda, against float64; the
# emulator takes those of them alone that FURTHER says.
check() {
  local those=gpu
  [[ -n ${EMULATED:-} ]] && those="emulated${5:+ and ($5)}"
  step "$1" "$2" "$python" -m pytest -q -p no:cacheprovider "tests/devices/cuda/test_cuda_$3.py" \
    -k "$those${4:+ and ($4)}"
}

# build FOLDER ARCHITECTURES: the device's libraries into the package; the CPU's where it has none.
build() {
  local generator=() targets=(_cuda)
  command -v ninja > /dev/null && generator=(-G Ninja)
  compgen -G "codellama_rt/_core*.so" > /dev/null || targets+=(_core)
  cmake -S . -B "$1" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DCODELLAMA_RT_CUDA=ON \
    -DCODELLAMA_RT_CUDA_ARCHITECTURES="$2" -DCODELLAMA_RT_ISAS=avx2 \
    -DPython3_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')" \
    && cmake --build "$1" --parallel "$(nproc)" --target "${targets[@]}" \
    && cp "$1"/*.so codellama_rt/
}
export -f build
make_libraries() { [[ -n ${EMULATED:-} ]] || step "$1" 150 bash -c "build $2 '$3'"; }

first() {
  make_libraries build build/cuda_90a 90a
  bench roofs 40
  # One kernel each; the last argument keeps the dry run short.
  check "check rms_norm" 25 simple_ops rms_norm "dim0 or 100-float16"
  check "check silu_and_mul" 25 simple_ops silu_and_mul
  check "check rope_and_cache" 25 simple_ops rope_and_cache "64 and float16"
  check "check embedding, copies" 25 simple_ops "embedding or copy_blocks or reshape"
  check "check merge_attention" 25 simple_ops merge_attention
  check "check linear, few" 25 linear "float_weights and -9" "bfloat16-same"
  check "check linear, many" 25 linear "float_weights and -130" "bfloat16-same"
  check "check linear, int8" 25 linear "quantized_weights and int8" "bfloat16"
  check "check linear, int4" 25 linear "quantized_weights and int4" "bfloat16"
  check "check attention, split" 25 attention "lengths and decode" "one and heads0"
  check "check attention, wgmma" 25 attention "lengths and chunks" "heads0 and bfloat16"
  check "check attention, fp8" 25 quantized_cache "attention and fp8" "queries0 and heads0"
  check "check attention, int8" 25 quantized_cache "attention and int8" "queries0 and heads0"
  check "check attention, any" 25 attention other_shapes "bfloat16-8"
  check "check flash_attention" 25 attention flash_attention "float32"
  bench decode-bfloat16 45
  bench decode-fp8 40
  bench decode-int8 40
  bench decode-fp8-8-warps 40
  bench decode-int8-8-warps 40
  bench prefill 40
  bench linear 40
  bench rope 25
  bench model-bf16 75
  bench model-int8-fp8 75
  bench bits 25
}

rest() {
  bench decode-batches 60
  bench peers 120
  make_libraries "build for all" build/cuda_all "80;90a"
  CUDA_FORCE_PTX_JIT=1 CODELLAMA_RT_CUDA_COPIES=cp.async \
    check "sm_80 on this device" 90 attention lengths "decode-one and heads0 and float16"
  local file tool few="page_sizes or three_weights or rope_and_cache or copy_blocks or merge"
  for file in simple_ops linear attention causality quantized_cache aot model; do
    check "tests of $file" 60 "$file" "" "${dry[$file]:-}"
  done
  command -v compute-sanitizer > /dev/null || return  # it refuses some machines as well
  for tool in memcheck racecheck; do
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q \
      -p no:cacheprovider tests/devices/cuda -k "gpu and ($few)"
  done
}

[[ $part == first || $part == rest || $part == all ]] || { echo "run.sh [first | rest]"; exit 2; }
for piece in first rest; do
  [[ $part == "$piece" || $part == all ]] || continue
  end=$((SECONDS + $([[ $piece == first ]] && echo 470 || echo 420)))
  "$piece"
done
"$python" benchmarks/cuda/bench_cuda.py table --rows "$rows" | tee "$out/table.md"
echo "== all in $SECONDS s${failed:+, FAILED: ${failed[*]}}"
exit $((${#failed[@]} > 0))
