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
PATH=$(dirname "$PYTHON"):$PATH # what pip installed beside it, as CMake and ninja
LIMIT=${LIMIT:-540}
BUILT=$ROOT/build/gpu
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
SITE=$WORK/site
# By importance: what is not reached in time is what matters least.
PHASES=(build environment cuda-tests tests linear-8192 model linear-1024 model-checkpointed linear-16384
  cuda-memcheck memcheck sweep-k linear-peers sweep-tokens cuda-racecheck racecheck)
# By name alone.
MORE=(cuda-initcheck cuda-synccheck linear-one-kernel linear-one-pass linear-patched)
# Percent of the time that a phase may take of what others need more: a kernel may hang.
declare -A SHARE=([build]=30 [environment]=10 [cuda-tests]=20 [tests]=20 [linear-8192]=30 [model]=35
  [cuda-memcheck]=20 [memcheck]=20)
LEAST=10   # seconds without which no phase is worth its start
RESERVE=3  # seconds for the end
MAX_FILES=8 MAX_BYTES=16000000
MINUTES=''
DRY_RUN=''
declare -A OUTCOME=()
FAILED=0
NOTES=''
HAS_CUDA='' # yes or no, once it was asked for

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
    [[ -z $NOTES ]] || printf '%s' "$NOTES"
  } >"$OUT/.summary"
  mv "$OUT/.summary" "$OUT/summary.txt" # so that there is a whole one at any moment
}

# Keeps OUTDIR within its bounds: of a log its beginning and its end, anything else compressed.
bound() {
  local file bytes count
  rm -f "$OUT"/.*.tmp # of a suite that was killed while it wrote
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
# What is stopped is interrupted first, so that pytest says what failed until then. Sets STATUS.
run() {
  local limit from
  limit=$(limit_of "$PHASE")
  START=$SECONDS
  OUTCOME[$PHASE]='started, and this is the last that was heard of it'
  write_summary
  echo "== $PHASE" | tee -a "$OUT/log.txt"
  from=$(stat -c %s "$OUT/log.txt")
  timeout --signal=INT --kill-after=5 "$limit" "$@" >>"$OUT/log.txt" 2>&1 &
  CHILD=$!
  wait "$CHILD"
  STATUS=$?
  CHILD=''
  tail -c +$((from + 1)) "$OUT/log.txt" | tail -n 5
  case $STATUS in
    0) outcome "$PHASE" "ok, $((SECONDS - START)) s" ;;
    124 | 137) outcome "$PHASE" "FAILED, stopped after $limit s; what it had is kept" ;;
    10) outcome "$PHASE" "FAILED for some candidates, which its results name; the others are measured" ;;
    *) outcome "$PHASE" "FAILED, status $STATUS, see log.txt" ;;
  esac
  ((STATUS == 0)) || FAILED=1
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
  for file in "$BUILT"/cmake/*.so; do
    [[ -e $file ]] && ln -sf "$file" "$SITE/neuroada_kernels/"
  done
  HAS_CUDA=''
}

# By somebody else. What was built here before is built anew, of which only changed files take time.
is_built() {
  [[ ! -e $BUILT/cmake && -e $SITE/neuroada_kernels/libneuroada.so ]] && "$PYTHON" -c '
import sys, neuroada_kernels._extension as e
sys.exit(bool(e.library_error or e.module_error))' 2>/dev/null
}

# By CMake alone: setup.py would ask for a newer setuptools than a machine with torch may have.
build() {
  local missing=() tool generator=() version
  is_built && { skip 'it is built already'; return; }
  for tool in cmake c++; do command -v $tool >/dev/null || missing+=("$tool"); done
  has pybind11 || missing+=(pybind11)
  ((${#missing[@]})) && { skip "missing: ${missing[*]}; the backends cpu and cuda cannot run"; return; }
  command -v ninja >/dev/null && generator=(-G Ninja)
  version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$ROOT/neuroada_kernels/_version.py")
  # shellcheck disable=SC2016
  run env NVCC_APPEND_FLAGS='--threads 4' bash -c 'cmake "$@" && cmake --build "$2" --parallel "$(nproc)"' build \
    -B "$BUILT/cmake" -S "$ROOT" "${generator[@]}" -DPython_EXECUTABLE="$PYTHON" -DNEUROADA_VERSION="$version" \
    -DNEUROADA_CUDA=AUTO -DNEUROADA_TESTS=OFF
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

# Asked for once: each answer is an import of torch.
has_cuda() {
  [[ -n $HAS_CUDA ]] || { "$PYTHON" -c '
import sys, neuroada_kernels as n
sys.exit(n.available_backends().get("cuda", "") is not None)' 2>/dev/null && HAS_CUDA=yes || HAS_CUDA=no; }
  [[ $HAS_CUDA == yes ]]
}

# STATUSES that say nothing of it: what measures is to go on without the CUDA kernels where these
# broke its process, or made it hang.
left_cuda_out() {
  [[ $STATUS =~ ^($1)$ ]] || ! has_cuda || (($(seconds_left) < LEAST)) && return 1
  HAS_CUDA=no
  NOTES+="$PHASE broke with the backend cuda (${OUTCOME[$PHASE]}); from there on that is left out"$'\n'
}

backend() {
  has_cuda && echo cuda || echo triton
}

results() { # NAME: of its file; one has the same candidates throughout
  has_cuda && echo "$OUT/$1.json" || echo "$OUT/$1-triton.json"
}

# --- phases -----------------------------------------------------------------------------------

environment() {
  nvidia-smi
  nvcc --version
  git -C "$ROOT" log -1 --oneline
  "$PYTHON" -c '
import json, pathlib, sys
from neuroada_kernels import info
from neuroada_kernels.benchmarks.environment import environment
info.main([])
facts = json.dumps(environment(sys.argv[2]), indent=1)
print(facts)
pathlib.Path(sys.argv[1]).write_text(facts + "\n")' "$OUT/environment.json" "$DEVICE"
}

tests() { # BACKEND: every test that runs on a backend, and the Triton kernels' own; what compiles comes last
  local files=(ops test_memory.py test_numerics.py test_threads.py test_compile.py) some=()
  has pytest || { skip "pytest is missing"; return; }
  [[ $1 == triton ]] && files=(triton_kernels "${files[@]}")
  has hypothesis && files+=(test_functional.py)
  # Compiling kernels is most of it. A worker that a test kills, or hangs, is replaced.
  has xdist && some+=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  has pytest_timeout && some+=(--timeout 60 --timeout-method thread)
  [[ -z $DRY_RUN ]] || { files=(ops/test_kept.py); some=(-k 'float32 and T17 and linear and not dispatched'); }
  run env NEUROADA_REQUIRE="$1" "$PYTHON" -m pytest -v --tb=short -ra -m on_backend "${some[@]}" \
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
# The backend is for `resident`, which names none.
bench_linear() {
  local file=$1
  shift
  STATUS=0
  has rich || { skip "rich is missing"; return; }
  local where=(--device "$DEVICE" --dtypes bfloat16)
  [[ -z $DRY_RUN ]] || where=(--device cpu --dtypes float32 --rounds 2 --shapes 32x48)
  run env NEUROADA_BACKEND="$(backend)" "$PYTHON" -m neuroada_kernels.cli bench linear --keep-going --json "$file" "$@" "${where[@]}"
}

linear() { # OPTIONS...: beside frozen, what the targets name
  local candidates=(neuroada-triton resident materialised masked-dense full)
  has_cuda && candidates+=(neuroada-cuda)
  [[ -z $DRY_RUN ]] && has peft && candidates+=(peft-lora-r16)
  bench_linear "$(results linear)" --candidates "${candidates[@]}" "$@"
  left_cuda_out '0|2|10' && linear "$@"
}

sizes() { # OPTIONS...: what a dry run takes instead, the last of an option being the one that counts
  [[ -z $DRY_RUN ]] || echo "$@"
}

model() { # MODE
  local methods=(frozen neuroada neuroada-resident materialised)
  if ! has transformers || ! has rich; then
    skip "transformers or rich is missing"
    return
  fi
  if [[ -z $DRY_RUN ]]; then
    has peft && methods+=(peft-lora-r16)
    methods+=(masked-dense)
  fi
  has_cuda
  # shellcheck disable=SC2046 # words
  run "$PYTHON" -m neuroada_kernels.benchmarks.model --device "$DEVICE" --backend "$(backend)" --modes "$1" \
    --methods "${methods[@]}" --json "$(results model)" $(sizes --hidden 32 --intermediate 64 --layers 1 \
      --heads 2 --kv-heads 1 --vocabulary 64 --sequence 8 --k 2 --steps 2 --warmup 1 --dtype float32)
  left_cuda_out '0|2|124|137' && model "$@" # it may just take long
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
    linear-peers) bench_linear "$OUT/linear-peers.json" --peers --shapes llama-3-8b --tokens 8192 --k 8 \
      --candidates resident "neuroada-$(backend)" $(sizes --tokens 4 --k 2 --candidates peft-ia3) ;;
    # The kernels for sm_90a with the product in them, where two kernels would be taken.
    linear-one-kernel) in_form 1 ;;
    linear-one-pass) in_form 2 ;; # the SDDMM in dx's kernel too
    linear-patched) in_form 3 ;;  # W's tiles patched: the rounding of resident
    # shellcheck disable=SC2046
    linear-8192) linear --cases T8192- $(sizes --tokens 8 --k 1 2 4 --cases T8-) ;;
    model) model plain ;;
    *)
      if [[ -n $DRY_RUN ]]; then
        skip "a dry run has one phase of its kind"
        return
      fi
      case $1 in
        linear-1024 | linear-16384) linear --cases "T${1#linear-}-" ;;
        sweep-*) linear --sweep "${1#sweep-}" ;;
        model-checkpointed) model checkpointed ;;
      esac
      ;;
  esac
}

in_form() { # FORM
  local NEUROADA_CUDA_FUSED=$1
  export NEUROADA_CUDA_FUSED
  bench_linear "$OUT/$PHASE.json" --cases T8192- --candidates neuroada-cuda
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
