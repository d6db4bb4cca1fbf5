#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, from a checkout on a machine that has one: builds for that GPU, tests, sanitizes,
# times, and prints a table of what came of it last. All stages, or those named:
#
#   LANENORM_GPU_LOGS=folder tests/gpu_check.sh [tests] [sanitizer] [bench]      full logs there, default build/gpu/logs
#
# Needs, and fetches nothing beyond: nvcc 13, Python with CuPy 14, NumPy, pybind11, scikit-build-core, cmake, ninja and
# pytest; for the comparison PyTorch and Triton; ml_dtypes for bfloat16; google-benchmark for bench_cuda. PYTHON names
# the interpreter, LANENORM_GPU_FILTER the rows of the benchmarks, LANENORM_GPU_COMPARE the options of compare.py (else
# --quick: one or two problems a family, for torch.compile takes seconds for each). The exit status is 1 where something
# failed; 'not run' is no failure. What is built stays in build/gpu for the next time.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
build=$PWD/build/gpu
logs=${LANENORM_GPU_LOGS:-$build/logs}
filter=${LANENORM_GPU_FILTER:-}
mkdir -p "$build" "$logs" && logs=$(cd "$logs" && pwd)
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# ---- Steps and the table -----------------------------------------------------------------------------------------

table=()
failed=0
# result NAME VERDICT [DETAIL]
result() {
  table+=("$(printf '%-20s %-8s %s' "$1" "$2" "${3:-}")")
  printf '==== %s: %s %s\n' "$1" "$2" "${3:-}"
  [ "$2" != FAILED ] || failed=1
}

# step NAME SECONDS COMMAND...: into a log of that name, whose last line is the detail of the table
step() {
  local name=$1 limit=$2 begin=$SECONDS status detail
  shift 2
  printf '==== %s: %s\n' "$name" "$*"
  timeout "$limit" "$@" >"$logs/$name.log" 2>&1
  status=$?
  detail=$(grep -v '^[[:space:]]*$' "$logs/$name.log" | tail -n 1 | cut -c 1-100)
  if [ $status -eq 0 ]; then
    result "$name" ok "$((SECONDS - begin)) s; $detail"
  elif [ $status -eq 124 ]; then
    result "$name" FAILED "after its limit of $limit s"
  else
    result "$name" FAILED "exit status $status; $detail"
    tail -n 30 "$logs/$name.log"
  fi
  return $status
}

finish() {
  printf '\ngpu_check: full logs in %s\n' "$logs"
  printf '%s\n' "${table[@]}" | tee "$logs/table.txt"
  exit $failed
}

stages=" ${*:-tests sanitizer bench} "
for stage in $stages; do
  case $stage in
    tests | sanitizer | bench) ;;
    *) echo "no stage '$stage', there are: tests sanitizer bench" >&2; exit 2 ;;
  esac
done

# ---- Versions ----------------------------------------------------------------------------------------------------

versions() {
  nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total,clocks.max.sm --format=csv
  nvcc --version | grep release
  compute-sanitizer --version | grep -i version
  "$python" - <<'PYTHON'
import importlib.metadata as metadata
import platform

print("Python", platform.python_version(), platform.platform())
for name in ("numpy", "cupy-cuda13x", "ml_dtypes", "torch", "triton", "liger-kernel", "quack-kernels", "pybind11",
             "scikit-build-core", "cmake", "ninja", "pytest"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
PYTHON
  git log -1 --format='commit %h of %ad' 2>/dev/null
}
versions 2>&1 | tee "$logs/versions.log"
if ! nvidia-smi --query-gpu=compute_cap --format=csv,noheader >/dev/null 2>&1; then
  result gpu FAILED "nvidia-smi finds no GPU here"
  finish
fi

# ---- Build -------------------------------------------------------------------------------------------------------

# Beside the Python that runs it, not into it. No architecture is named: CMakeLists.txt takes that of the GPU.
configure=(cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DLANENORM_CUDA=ON
  -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)")
step configure 300 "${configure[@]}" -DLANENORM_BUILD_BENCH=OFF || finish
grep -h "lanenorm .*: ISAs" "$logs/configure.log"
step build 1500 cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}" || finish
rm -rf "$build/site" && mkdir "$build/site" && cp -r python/lanenorm "$build/site/"
step install 60 cmake --install "$build" --component python --prefix "$build/site/lanenorm" || finish
export PYTHONPATH=$build/site
step info 120 "$python" -m lanenorm info

# ---- Tests -------------------------------------------------------------------------------------------------------

if [[ $stages == *" tests "* ]]; then
  step tests 1800 "$python" -m pytest -m gpu -p no:cacheprovider -q tests
fi

# ---- Sanitizer ---------------------------------------------------------------------------------------------------

# The small suite takes CuPy's pool away (cupy.cuda.set_allocator(None)), so that every array is an allocation whose
# borders the sanitizer knows.
why_no_sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "there is no compute-sanitizer"
    return
  fi
  timeout 300 compute-sanitizer "$python" -c 'import cupy; cupy.zeros(1).sum().get()' >"$logs/sanitizer.log" 2>&1
  grep -iom 1 "device not supported.*\|.* is not supported on this .*" "$logs/sanitizer.log"
}
if [[ $stages == *" sanitizer "* ]]; then
  reason=$(why_no_sanitizer)
  for tool in memcheck racecheck initcheck synccheck; do
    if [ -n "$reason" ]; then
      result "$tool" "not run" "$reason"
    else
      step "$tool" 900 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
        "$python" tests/gpu_small_suite.py && ! grep -q "SUMMARY: 0 " "$logs/$tool.log" &&
        result "$tool" FAILED "its summary counts something"
    fi
  done
fi

# ---- Benchmarks --------------------------------------------------------------------------------------------------

if [[ $stages == *" bench "* ]]; then
  if timeout 300 "${configure[@]}" -DLANENORM_BUILD_BENCH=ON \
    -DLANENORM_BENCHMARK_SOURCE="${LANENORM_BENCHMARK_SOURCE:-}" >"$logs/bench_configure.log" 2>&1; then
    step bench_build 900 cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}" --target bench_cuda &&
      step bench_cuda 900 "$build/bench_cuda" --benchmark_filter="${filter:-bert|gpt2|llama|tall|wide|odd}" \
        --benchmark_out="$logs/bench_cuda.json" --benchmark_out_format=json
  else
    result bench_cuda "not run" "google-benchmark is not found (LANENORM_BENCHMARK_SOURCE names its source)"
  fi
  read -ra options <<<"${LANENORM_GPU_COMPARE:---quick}"
  step compare 1500 "$python" bench/compare.py --device cuda "${options[@]}" --filter "$filter" --output "$logs" &&
    sed -n '/^family: worst/,/^$/p' "$logs/compare.log"
fi
finish
