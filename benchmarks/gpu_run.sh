#!/usr/bin/env bash
# Tests, sanitizers and benchmarks on a GPU, in one command; nothing is downloaded or installed.
#
#   benchmarks/gpu_run.sh                      # every phase
#   benchmarks/gpu_run.sh tests linear-8192    # some, where a call may take only so long
#
# OUT              where logs and JSON go; default: benchmarks/results/<gpu>
# PYTHON           has torch and Triton; default: python3
# LIMIT            seconds that a phase may take; default: 540
# NEUROADA_COMMIT  the commit to note where the checkout has come without its .git
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "gpu_run.sh: no Python" >&2; exit 1; }
[[ $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
LIMIT=${LIMIT:-540}
SITE=$ROOT/build/gpu/site
PHASES=(environment tests cuda-tests memcheck racecheck
  cuda-memcheck cuda-racecheck cuda-initcheck cuda-synccheck
  linear-1024 linear-8192 linear-16384
  linear-one-kernel linear-one-pass linear-patched model model-checkpointed)
SUMMARY=()
FAILED=0

stop() {
  echo "gpu_run.sh: $*" >&2
  exit 1
}

has() {
  "$PYTHON" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)"
}

# The package as an import finds it, from the checkout: its parts lie in several folders there.
link_package() {
  rm -rf "$SITE"
  mkdir -p "$SITE/neuroada_kernels"
  ln -s "$ROOT"/neuroada_kernels/* "$ROOT/benchmarks" "$ROOT/triton_kernels" "$SITE/neuroada_kernels/"
  # The checkout's own settings need pytest-timeout, and make errors of other packages' warnings.
  printf '[pytest]\nmarkers = on_backend\n' >"$SITE/../pytest.ini"
  export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
  cd "$SITE" || exit 1 # python -m looks here first
}

say_what_is_missing() {
  local package needed_by
  while read -r package needed_by; do
    has "$package" || echo "missing: $package, which $needed_by"
  done <<'LIST'
pytest the phases tests and cuda-tests need
hypothesis tests/test_functional.py needs (left out)
rich the phases linear and model need
peft the phases linear and model compare LoRA by
transformers the phases model need
LIST
  command -v compute-sanitizer >/dev/null || echo "missing: compute-sanitizer, which memcheck and racecheck need"
  git -C "$ROOT" rev-parse HEAD >/dev/null 2>&1 || [[ -n ${NEUROADA_COMMIT:-} ]] ||
    echo "missing: the commit, which the JSON is to name; set NEUROADA_COMMIT"
}

# run NAME COMMAND...: within the limit, its output in a log; what fails does not stop the rest.
run() {
  local name=$1 start=$SECONDS status
  shift
  echo "== $name"
  timeout --kill-after=10 "$LIMIT" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  tail -n 5 "$OUT/$name.log"
  case $status in
    0) SUMMARY+=("$name: ok, $((SECONDS - start)) s") ;;
    124 | 137) SUMMARY+=("$name: FAILED, stopped after $LIMIT s") ;;
    *) SUMMARY+=("$name: FAILED, status $status, see $OUT/$name.log") ;;
  esac
  ((status == 0)) || FAILED=1
}

skip() {
  SUMMARY+=("$1: skipped, $2")
}

environment() {
  nvidia-smi
  nvcc --version
  git -C "$ROOT" log -1 --oneline
  "$PYTHON" -m neuroada_kernels.info
  "$PYTHON" -c '
import json, pathlib, sys
from neuroada_kernels.benchmarks.report import environment
facts = json.dumps(environment("cuda"), indent=1)
print(facts)
pathlib.Path(sys.argv[1]).write_text(facts + "\n")' "$OUT/environment.json"
}

tests() { # NAME BACKEND: every test that runs on a backend, and the Triton kernels' own
  local files=(triton_kernels ops test_compile.py test_memory.py test_numerics.py test_threads.py)
  has pytest || { skip "$1" "pytest is missing"; return; }
  has hypothesis && files+=(test_functional.py)
  run "$1" env NEUROADA_REQUIRE="$2" "$PYTHON" -m pytest -q -ra -m on_backend \
    -c "$SITE/../pytest.ini" --rootdir="$ROOT" -p no:cacheprovider --junit-xml="$OUT/$1.xml" \
    "${files[@]/#/$ROOT/tests/}"
}

sanitize() { # NAME TOOL BACKEND
  command -v compute-sanitizer >/dev/null || { skip "$1" "compute-sanitizer is not found"; return; }
  # Each tensor an allocation of its own, so that its bounds are seen.
  run "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$2" --error-exitcode 9 \
    "$PYTHON" "$ROOT/tests/triton_kernels/smoke_gpu.py" "$3"
}

linear() { # TOKENS: beside frozen, what the targets name
  has rich || { skip "linear-$1" "rich is missing"; return; }
  local candidates=(neuroada-triton materialised masked-dense)
  has_cuda && candidates+=(neuroada-cuda)
  has peft && candidates+=(peft-lora-r16)
  run "linear-$1" "$PYTHON" -m neuroada_kernels.benchmarks.linear --device cuda --dtypes bfloat16 \
    --cases "T$1-" --candidates "${candidates[@]}" --json "$OUT/linear-$1.json"
}

# NAME FORM: the kernels for sm_90a with the product in them, where two kernels would be taken.
linear_in_form() {
  has rich || { skip "$1" "rich is missing"; return; }
  run "$1" env NEUROADA_CUDA_FUSED="$2" "$PYTHON" -m neuroada_kernels.benchmarks.linear --device cuda \
    --dtypes bfloat16 --cases "T8192-" --candidates neuroada-cuda --json "$OUT/$1.json"
}

model() { # NAME OPTIONS...
  local name=$1 methods=(frozen neuroada materialised masked-dense) backend=triton
  shift
  if ! has transformers || ! has rich; then
    skip "$name" "transformers or rich is missing"
    return
  fi
  has peft && methods+=(peft-lora-r16)
  has_cuda && backend=cuda
  rm -f "$OUT/$name.json" # of an earlier commit, which this one's rows do not go with
  run "$name" "$PYTHON" -m neuroada_kernels.benchmarks.model --device cuda --backend "$backend" \
    --methods "${methods[@]}" --json "$OUT/$name.json" "$@"
}

has_cuda() {
  "$PYTHON" -c 'import sys, neuroada_kernels as n; sys.exit(n.available_backends().get("cuda", "") is not None)'
}

cuda_phase() {
  case $1 in
    cuda-tests) tests cuda-tests cuda ;;
    cuda-*) sanitize "$1" "${1#cuda-}" cuda ;;
    linear-one-kernel) linear_in_form "$1" 1 ;;
    linear-one-pass) linear_in_form "$1" 2 ;;  # the SDDMM in dx's kernel too
    linear-patched) linear_in_form "$1" 3 ;;   # W's tiles patched: the rounding of resident
  esac
}

phase() {
  case $1 in
    environment)
      export -f environment
      run environment bash -c environment
      ;;
    tests) tests tests triton ;;
    cuda-* | linear-one-* | linear-patched) if has_cuda; then cuda_phase "$1"; else skip "$1" "no such backend can run"; fi ;;
    memcheck | racecheck) sanitize "$1" "$1" triton ;;
    linear-*) linear "${1#linear-}" ;;
    model) model model --modes plain ;;
    model-checkpointed) model model-checkpointed --modes checkpointed ;;
  esac
}

main() {
  local name known=" ${PHASES[*]} "
  for name in "$@"; do
    [[ $known == *" $name "* ]] || stop "$name is no phase, expected of: ${PHASES[*]}"
  done
  has torch || stop "$PYTHON has no torch"
  has triton || stop "$PYTHON has no Triton"
  GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
  [[ -n $GPU ]] || stop "no GPU is visible"
  GPU=$(tr -cs 'a-z0-9' '-' <<<"${GPU,,}")
  GPU=${GPU#nvidia-}
  OUT=${OUT:-$ROOT/benchmarks/results/${GPU%-}}
  mkdir -p "$OUT" || stop "$OUT cannot be made"
  OUT=$(cd "$OUT" && pwd)
  export OUT PYTHON ROOT
  link_package
  say_what_is_missing
  (($#)) || set -- "${PHASES[@]}"
  for name in "$@"; do phase "$name"; done
  printf '\n== summary, in %s\n' "$OUT"
  printf '%s\n' "${SUMMARY[@]}" | tee "$OUT/summary.txt"
  exit "$FAILED"
}

main "$@"
