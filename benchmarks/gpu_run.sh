#!/usr/bin/env bash
# Tests, benchmarks and sanitizers on a GPU, in one command; nothing is downloaded or installed.
#
#   benchmarks/gpu_run.sh OUTDIR [--minutes 9]     # phases by importance, as far as the time goes
#   benchmarks/gpu_run.sh OUTDIR tests linear-8192 # some phases; --minutes bounds them where it is given
#   benchmarks/gpu_run.sh OUTDIR --dry-run         # tiny sizes on the CPU, Triton's interpreter; no GPU
#
# OUTDIR gets one log, a summary and a file of results for each suite: at most 8 files, none above
# 16 MB. They are whole after every row, so what is cut off leaves valid results, and a further call
# with the same OUTDIR and commit goes on. The summary says of every phase what became of it.
#
# OUT              OUTDIR; then all arguments are phases. Default: benchmarks/results/<gpu>
# PYTHON           has torch and Triton; default: python3
# LIMIT            seconds that a phase may take at most; default: 540
# NEUROADA_COMMIT  the commit to note where the checkout has come without its .git
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "gpu_run.sh: no Python" >&2; exit 1; }
[[ $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
LIMIT=${LIMIT:-540}
BUILT=$ROOT/build/gpu
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
SITE=$WORK/site
# By importance: what is not reached in time is what matters least.
PHASES=(build environment cuda-tests tests linear-8192 model linear-1024 sweep-k sweep-tokens
  model-checkpointed linear-16384 linear-peers memory memcheck racecheck cuda-memcheck)
# By name alone.
MORE=(cuda-racecheck cuda-initcheck cuda-synccheck linear-one-kernel linear-one-pass linear-patched)
# Percent of the time that a phase may take of what others need more.
declare -A SHARE=([build]=35 [cuda-tests]=25 [tests]=20)
LEAST=10   # seconds without which no phase is worth its start
RESERVE=3  # seconds for the end
MAX_FILES=8 MAX_BYTES=16000000
MINUTES=''
DRY_RUN=''
declare -A OUTCOME=()
FAILED=0

stop() {
  echo "gpu_run.sh: $*" >&2
  exit 1
}

has() { # PACKAGE
  "$PYTHON" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)"
}

is_phase() {
  [[ " ${PHASES[*]} ${MORE[*]} " == *" $1 "* ]]
}

# --- time -------------------------------------------------------------------------------------

seconds_left() { # of the whole run; without --minutes of one phase
  [[ -n $MINUTES ]] && echo $((MINUTES * 60 - SECONDS - RESERVE)) || echo "$LIMIT"
}

limit_of() { # PHASE: seconds that it may take now
  local limit share=${SHARE[$1]:-100}
  limit=$(seconds_left)
  [[ -n $MINUTES && $share -lt 100 ]] && ((MINUTES * 60 * share / 100 < limit)) &&
    limit=$((MINUTES * 60 * share / 100))
  echo $((limit < LIMIT ? limit : LIMIT))
}

# --- what is written --------------------------------------------------------------------------

outcome() { # PHASE WORDS
  OUTCOME[$1]=$2
  write_summary
}

write_summary() {
  local name
  {
    echo "gpu_run.sh, $SECONDS s${MINUTES:+ of $((MINUTES * 60))}, on ${DRY_RUN:+the CPU, a dry run: not }$GPU"
    for name in "${WANTED[@]}"; do echo "$name: ${OUTCOME[$name]:-not reached}"; done
    [[ -z ${NOTES:-} ]] || printf '%s\n' "$NOTES"
  } >"$OUT/.summary"
  mv "$OUT/.summary" "$OUT/summary.txt" # so that there is a whole one at any moment
}

# Keeps OUTDIR within its bounds: of a log its beginning and its end, anything else compressed.
bound() {
  local file bytes count
  for file in "$OUT"/*; do
    bytes=$(stat -c %s "$file")
    ((bytes > MAX_BYTES)) || continue
    if [[ $file == "$OUT/log.txt" ]]; then
      { head -c 1000000 "$file"; printf '\n[%s bytes left out]\n' $((bytes - 13000000)); tail -c 12000000 "$file"; } >"$WORK/log"
      mv "$WORK/log" "$file"
    else
      gzip -f "$file" && NOTES+="${file##*/} had $bytes bytes and is compressed"$'\n'
    fi
  done
  count=$(find "$OUT" -type f | wc -l)
  ((count <= MAX_FILES)) || NOTES+="$OUT has $count files, more than $MAX_FILES: some are of phases by name, or not of this run"$'\n'
}

finish() { # STATUS
  bound
  write_summary
  printf '\n== summary, in %s\n' "$OUT"
  cat "$OUT/summary.txt"
  exit "$1"
}

cut_off() {
  [[ -z ${CHILD:-} ]] || { kill "$CHILD" 2>/dev/null; wait "$CHILD"; }
  OUTCOME[$PHASE]="cut off after $((SECONDS - START)) s"
  finish 1
}

# run COMMAND...: the phase's, within its limit, its output in the log; what fails stops no other.
run() {
  local status limit from
  limit=$(limit_of "$PHASE")
  START=$SECONDS
  OUTCOME[$PHASE]='started, and this is the last that was heard of it'
  write_summary
  echo "== $PHASE" | tee -a "$OUT/log.txt"
  from=$(stat -c %s "$OUT/log.txt")
  timeout --kill-after=10 "$limit" "$@" >>"$OUT/log.txt" 2>&1 &
  CHILD=$!
  wait "$CHILD"
  status=$?
  CHILD=''
  tail -c +$((from + 1)) "$OUT/log.txt" | tail -n 5
  case $status in
    0) outcome "$PHASE" "ok, $((SECONDS - START)) s" ;;
    124 | 137) outcome "$PHASE" "FAILED, stopped after $limit s; what it had is kept" ;;
    *) outcome "$PHASE" "FAILED, status $status, see log.txt" ;;
  esac
  ((status == 0)) || FAILED=1
  bound
}

skip() {
  outcome "$PHASE" "skipped, $1"
}

# --- the package ------------------------------------------------------------------------------

# As an import finds it, from the checkout: its parts lie in several folders there.
link_package() {
  mkdir -p "$SITE/neuroada_kernels"
  ln -s "$ROOT"/neuroada_kernels/* "$ROOT/benchmarks" "$ROOT/triton_kernels" "$SITE/neuroada_kernels/"
  link_built
  # A machine with torch alone has pip, and pip a copy of rich.
  if ! has rich && has pip._vendor.rich; then
    ln -s "$("$PYTHON" -c 'import os, pip._vendor.rich as r; print(os.path.dirname(r.__file__))')" "$SITE/rich"
  fi
  # The checkout's own settings need pytest-timeout, and make errors of other packages' warnings.
  printf '[pytest]\nmarkers = on_backend\n' >"$WORK/pytest.ini"
  export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
  cd "$SITE" || exit 1 # python -m looks here first
}

link_built() {
  local file
  for file in "$BUILT"/lib/neuroada_kernels/*.so; do
    [[ -e $file ]] && ln -sf "$file" "$SITE/neuroada_kernels/"
  done
}

build() {
  local missing=() tool
  [[ -e $SITE/neuroada_kernels/libneuroada.so ]] && { skip 'it is built already'; return; }
  for tool in cmake ninja c++; do command -v $tool >/dev/null || missing+=("$tool"); done
  for tool in pybind11 setuptools; do has $tool || missing+=("$tool"); done
  ((${#missing[@]})) && { skip "missing: ${missing[*]}; the backends cpu and cuda cannot run"; return; }
  run env -C "$ROOT" NEUROADA_BUILD=auto "$PYTHON" setup.py -q build_ext --build-lib "$BUILT/lib" --build-temp "$BUILT/cmake"
  link_built
}

say_what_is_missing() {
  local package needed_by
  while read -r package needed_by; do
    has "$package" || echo "missing: $package, which $needed_by"
  done <<'LIST'
pytest the phases tests and cuda-tests need
hypothesis tests/test_functional.py needs (left out)
rich all benchmarks need
peft the phases linear and model compare LoRA by
transformers the phases model need
LIST
  command -v compute-sanitizer >/dev/null || echo "missing: compute-sanitizer, which memcheck and racecheck need"
  git -C "$ROOT" rev-parse HEAD >/dev/null 2>&1 || [[ -n ${NEUROADA_COMMIT:-} ]] ||
    echo "missing: the commit, which the JSON is to name; set NEUROADA_COMMIT"
}

has_cuda() {
  "$PYTHON" -c 'import sys, neuroada_kernels as n; sys.exit(n.available_backends().get("cuda", "") is not None)' 2>/dev/null
}

# --- phases -----------------------------------------------------------------------------------

environment() {
  nvidia-smi
  nvcc --version
  git -C "$ROOT" log -1 --oneline
  "$PYTHON" -m neuroada_kernels.info
  "$PYTHON" -c '
import json, pathlib, sys
from neuroada_kernels.benchmarks.report import environment
facts = json.dumps(environment(sys.argv[2]), indent=1)
print(facts)
pathlib.Path(sys.argv[1]).write_text(facts + "\n")' "$OUT/environment.json" "$DEVICE"
}

tests() { # BACKEND: every test that runs on a backend, and the Triton kernels' own
  local files=(triton_kernels ops test_compile.py test_memory.py test_numerics.py test_threads.py) some=()
  has pytest || { skip "pytest is missing"; return; }
  has hypothesis && files+=(test_functional.py)
  [[ -z $DRY_RUN ]] || { files=(ops/test_kept.py); some=(-k 'float32 and T17 and linear and not dispatched'); }
  run env NEUROADA_REQUIRE="$1" "$PYTHON" -m pytest -q -ra -m on_backend "${some[@]}" \
    -c "$WORK/pytest.ini" --rootdir="$ROOT" -p no:cacheprovider "${files[@]/#/$ROOT/tests/}"
}

sanitize() { # TOOL BACKEND
  command -v compute-sanitizer >/dev/null || { skip "compute-sanitizer is not found"; return; }
  [[ -z $DRY_RUN ]] || { skip "there is nothing to sanitize on the CPU"; return; }
  # Each tensor an allocation of its own, so that its bounds are seen.
  run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$PYTHON" "$ROOT/tests/triton_kernels/smoke_gpu.py" "$2"
}

# FILE OPTIONS...: the linear suite, its rows added to FILE; in a dry run at tiny sizes instead.
bench_linear() {
  local file=$1
  shift
  has rich || { skip "rich is missing"; return; }
  local where=(--device "$DEVICE" --dtypes bfloat16)
  [[ -z $DRY_RUN ]] || where=(--device cpu --dtypes float32 --rounds 2 --shapes 32x48)
  run "$PYTHON" -m neuroada_kernels.cli bench linear --json "$OUT/$file" "$@" "${where[@]}"
}

linear() { # OPTIONS...: beside frozen, what the targets name
  local candidates=(neuroada-triton materialised masked-dense full)
  has_cuda && candidates+=(neuroada-cuda)
  [[ -z $DRY_RUN ]] && has peft && candidates+=(peft-lora-r16)
  bench_linear linear.json --candidates "${candidates[@]}" "$@"
}

sizes() { # OPTIONS...: what a dry run takes instead, the last of an option being the one that counts
  [[ -z $DRY_RUN ]] || echo "$@"
}

model() { # FILE OPTIONS...
  local file=$1 methods=(frozen neuroada materialised masked-dense) backend=triton
  shift
  if ! has transformers || ! has rich; then
    skip "transformers or rich is missing"
    return
  fi
  [[ -z $DRY_RUN ]] && has peft && methods+=(peft-lora-r16)
  has_cuda && backend=cuda
  # shellcheck disable=SC2046 # words
  run "$PYTHON" -m neuroada_kernels.benchmarks.model --device "$DEVICE" --backend "$backend" \
    --methods "${methods[@]}" --json "$OUT/$file" "$@" $(sizes --hidden 32 --intermediate 64 --layers 1 \
      --heads 2 --kv-heads 1 --vocabulary 64 --sequence 8 --k 2 --steps 2 --warmup 1 --dtype float32)
}

memory() {
  local known='import sys, neuroada_kernels.benchmarks.suites as s; sys.exit("memory" not in s.SUITES)'
  "$PYTHON" -c "$known" || { skip "there is no such suite"; return; }
  [[ -z $DRY_RUN ]] || { skip "it measures on the CPU anyway, for minutes"; return; }
  run "$PYTHON" -m neuroada_kernels.cli bench memory --quick --json "$OUT/memory.json"
}

phase() {
  case $1 in
    build) build ;;
    environment)
      export -f environment
      run bash -c environment
      ;;
    tests) tests triton ;;
    cuda-tests) tests cuda ;;
    cuda-*) sanitize "${1#cuda-}" cuda ;;
    memcheck | racecheck) sanitize "$1" triton ;;
    # shellcheck disable=SC2046
    sweep-k) linear --sweep k $(sizes --tokens 4 --k 1 2 4) ;;
    # shellcheck disable=SC2046
    sweep-tokens) linear --sweep tokens $(sizes --tokens 1 2 4 --k 2) ;;
    # shellcheck disable=SC2046
    linear-peers) bench_linear linear-peers.json --peers --shapes llama-3-8b --tokens 8192 --k 8 $(sizes --tokens 4 --k 2) ;;
    # The kernels for sm_90a with the product in them, where two kernels would be taken.
    linear-one-kernel) in_form 1 ;;
    linear-one-pass) in_form 2 ;; # the SDDMM in dx's kernel too
    linear-patched) in_form 3 ;;  # W's tiles patched: the rounding of resident
    linear-1024 | linear-16384)
      [[ -z $DRY_RUN ]] || { skip "its sizes are those of linear-8192 in a dry run"; return; }
      linear --cases "T${1#linear-}-"
      ;;
    # shellcheck disable=SC2046
    linear-8192) linear --cases T8192- $(sizes --tokens 8 --k 2 --cases T8-) ;;
    model) model model.json --modes plain ;;
    model-checkpointed) model model-checkpointed.json --modes checkpointed ;;
    memory) memory ;;
  esac
}

in_form() { # FORM
  local NEUROADA_CUDA_FUSED=$1
  export NEUROADA_CUDA_FUSED
  bench_linear "$PHASE.json" --cases T8192- --candidates neuroada-cuda
  unset NEUROADA_CUDA_FUSED
}

needs_cuda() {
  [[ $1 == cuda-* || $1 == linear-one-* || $1 == linear-patched ]]
}

# --- the run ----------------------------------------------------------------------------------

read_arguments() {
  WANTED=()
  while (($#)); do
    case $1 in
      --minutes)
        [[ ${2:-} =~ ^[0-9]+$ ]] || stop "--minutes: '${2:-}', expected a whole number"
        MINUTES=$2
        shift
        ;;
      --dry-run) DRY_RUN=yes ;;
      -*) stop "$1 is no option, expected --minutes N or --dry-run" ;;
      *)
        if is_phase "$1"; then
          WANTED+=("$1")
        elif [[ -z ${OUT:-} && ${#WANTED[@]} -eq 0 ]]; then
          OUT=$1
        else
          stop "$1 is no phase, expected of: ${PHASES[*]} ${MORE[*]}"
        fi
        ;;
    esac
    shift
  done
  ((${#WANTED[@]})) || { WANTED=("${PHASES[@]}"); MINUTES=${MINUTES:-9}; }
}

find_device() {
  has torch || stop "$PYTHON has no torch"
  has triton || stop "$PYTHON has no Triton"
  GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
  DEVICE=cuda
  if [[ -n $DRY_RUN ]]; then
    DEVICE=cpu GPU='a GPU'
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=''
    OUT=${OUT:-$BUILT/dry-run}
  fi
  [[ -n $GPU ]] || stop "no GPU is visible; --dry-run does without"
  local folder
  folder=$(tr -cs 'a-z0-9' '-' <<<"${GPU,,}")
  folder=${folder#nvidia-}
  OUT=${OUT:-$ROOT/benchmarks/results/${folder%-}}
  mkdir -p "$OUT" || stop "$OUT cannot be made"
  OUT=$(cd "$OUT" && pwd)
  export OUT PYTHON ROOT DEVICE
}

main() {
  read_arguments "$@"
  find_device
  PHASE=start START=0
  trap cut_off INT TERM HUP
  link_package
  say_what_is_missing | tee "$OUT/log.txt"
  for PHASE in "${WANTED[@]}"; do
    if (($(seconds_left) < LEAST)); then
      skip "no time is left"
    elif needs_cuda "$PHASE" && ! has_cuda; then
      skip "the backend cuda cannot run"
    else
      phase "$PHASE"
    fi
  done
  finish "$FAILED"
}

main "$@"
