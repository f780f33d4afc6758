#!/usr/bin/env bash
# Tests, benchmarks and sanitizers on a GPU, in one command; nothing is downloaded or installed.
#
#   benchmarks/gpu_run.sh OUTDIR [--minutes 9]     # phases by importance, until the time is up
#   benchmarks/gpu_run.sh OUTDIR tests linear-8192 # some phases; bounded by --minutes if given
#   benchmarks/gpu_run.sh OUTDIR --dry-run         # tiny sizes on the CPU, Triton's interpreter; no GPU
#
# OUTDIR gets one log, a summary and a file of results for each suite: at most 8 files, none above
# 16 MB. Results are complete after every row, so an interrupted run leaves valid results, and a
# further call with the same OUTDIR and commit resumes it. The summary has the outcome of every phase.
#
# OUT              OUTDIR; if set, all arguments are phases. Default: benchmarks/results/<gpu>
# PYTHON           has torch and Triton; default: python3
# LIMIT            seconds that a phase may take at most; default: 540
# NEUROADA_COMMIT  the commit to record if the checkout has no .git, or that of another commit
# NEUROADA_CUTLASS CUTLASS's include folder to build with, if PyPI's nvidia-cutlass is not installed
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "gpu_run.sh: no Python" >&2; exit 1; }
[[ $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
PATH=$(dirname "$PYTHON"):$PATH # for programs that pip installed beside it, such as CMake and ninja
LIMIT=${LIMIT:-540}
BUILT=$ROOT/build/gpu
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
SITE=$WORK/site
LEAST=10   # minimum seconds left to start a phase
RESERVE=3  # seconds reserved for the end
MAX_FILES=8 MAX_BYTES=16000000
MINUTES=''
DRY_RUN=''
declare -A OUTCOME=()
FAILED=0
NOTES=''
# shellcheck source=benchmarks/gpu_phases.sh
source "$ROOT/benchmarks/gpu_phases.sh"

stop() {
  echo "gpu_run.sh: $*" >&2
  exit 1
}

has() { # PACKAGE
  "$PYTHON" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)"
}

# --- time -------------------------------------------------------------------------------------

seconds_left() { # of the whole run; without --minutes, of one phase
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
  mv "$OUT/.summary" "$OUT/summary.txt" # atomic, so that the summary is always complete
}

# Keeps OUTDIR within its bounds: keeps the beginning and end of a log, compresses other files.
bound() {
  local file bytes count
  rm -f "$OUT"/.*.tmp # left by a suite that was killed while writing
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

# run COMMAND...: runs a phase's command within its limit, with its output in the log; a failure does
# not stop other phases. A timeout sends SIGINT first, so that pytest reports failures. Sets STATUS.
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

# Links the package for imports: in the checkout its parts are in several folders.
link_package() {
  mkdir -p "$SITE/neuroada_kernels"
  ln -s "$ROOT"/neuroada_kernels/* "$ROOT/benchmarks" "$ROOT/triton_kernels" "$SITE/neuroada_kernels/"
  link_built
  # A machine with torch alone has pip, which has a copy of rich.
  if ! has rich && has pip._vendor.rich; then
    ln -s "$("$PYTHON" -c 'import os, pip._vendor.rich as r; print(os.path.dirname(r.__file__))')" "$SITE/rich"
  fi
  # The checkout's own settings need pytest-timeout, and turn other packages' warnings into errors.
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

# Built elsewhere. An earlier build by this script is run again, which recompiles only changed files.
is_built() {
  [[ ! -e $BUILT/cmake && -e $SITE/neuroada_kernels/libneuroada.so ]] && "$PYTHON" -c '
import sys, neuroada_kernels._extension as e
sys.exit(bool(e.library_error or e.module_error))' 2>/dev/null
}

# By CMake alone: setup.py may require a newer setuptools than the machine has.
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
  ! has_cuda || has_cutlass ||
    NOTES+='built without CUTLASS: neuroada-cuda is the product first, see NEUROADA_CUTLASS'$'\n'
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
        elif [[ ${#WANTED[@]} -eq 0 && (-z ${OUT:-} || $1 == "$OUT") ]]; then
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
