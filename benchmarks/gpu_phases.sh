# shellcheck shell=bash
# The phases of gpu_run.sh, by importance, and what each runs. gpu_run.sh sources this file; its
# `run` and `skip` end a phase and set its line of the summary.

# By importance: phases that are not reached in time are the least important.
PHASES=(build environment cuda-smoke cuda-tests tests linear-8192 model linear-1024 model-checkpointed linear-16384
  cuda-memcheck memcheck sweep-k linear-peers sweep-tokens cuda-racecheck racecheck)
# Run only by name.
MORE=(cuda-initcheck cuda-synccheck linear-patched linear-no-onto linear-no-bulk linear-plain linear-two-tiles
  linear-unordered cuda-no-onto-tests cuda-plain-tests cuda-two-tiles-tests linear-triton-one-kernel kernels
  kernels-plain kernels-two-tiles)
# Variables that select non-default kernels for sm_90a, by the part of a phase's name that names the form.
declare -A FORM=([patched]=NEUROADA_CUDA_PATCHED=1 [no-onto]=NEUROADA_CUDA_ONTO=0 [no-bulk]=NEUROADA_CUDA_BULK=0
  [plain]='NEUROADA_CUDA_ONTO=0 NEUROADA_CUDA_BULK=0' [two-tiles]=NEUROADA_CUDA_TWO_TILES=1
  [unordered]=NEUROADA_CUDA_ORDER=0)
# Limits of phases, in percent of the whole time, so that a kernel that hangs leaves time for the others. A build
# cannot hang, and without it there is nothing to measure.
declare -A SHARE=([build]=60 [environment]=10 [cuda-smoke]=25 [cuda-tests]=22 [tests]=15 [linear-8192]=20 [model]=35
  [cuda-memcheck]=20 [memcheck]=20 [linear-patched]=12 [linear-no-onto]=12 [linear-no-bulk]=12
  [linear-plain]=12 [linear-two-tiles]=12 [linear-unordered]=12 [linear-triton-one-kernel]=12
  [cuda-no-onto-tests]=15 [cuda-plain-tests]=15 [cuda-two-tiles-tests]=15)

is_phase() {
  [[ " ${PHASES[*]} ${MORE[*]} " == *" $1 "* ]]
}

form_of() { # PHASE: the form of non-default kernels that it runs
  local form=${1#*-}
  form=${form%-tests}
  [[ -n ${FORM[$form]:-} ]] && echo "$form"
}

needs_cuda() {
  [[ $1 == cuda-* ]] || form_of "$1" >/dev/null
}

# --- what can run here ------------------------------------------------------------------------

HAS_CUDA='' # yes or no, after the first call of has_cuda

# Cached, since every check imports torch.
has_cuda() {
  [[ -n $HAS_CUDA ]] || { "$PYTHON" -c '
import sys, neuroada_kernels as n
sys.exit(n.available_backends().get("cuda", "") is not None)' 2>/dev/null && HAS_CUDA=yes || HAS_CUDA=no; }
  [[ $HAS_CUDA == yes ]]
}

# Without CUTLASS no form has its GEMM, and two forms are the same.
has_cutlass() {
  "$PYTHON" -c 'import sys, neuroada_kernels._extension as e; sys.exit(not e.cutlass_version())' 2>/dev/null
}

# STATUSES that do not point to the CUDA kernels. With any other status these crashed or hung the
# process, and the measurements continue without them.
left_cuda_out() {
  [[ $STATUS =~ ^($1)$ ]] || ! has_cuda || (($(seconds_left) < LEAST)) && return 1
  HAS_CUDA=no
  NOTES+="$PHASE broke with the backend cuda (${OUTCOME[$PHASE]}); from there on that is left out"$'\n'
}

backend() {
  has_cuda && echo cuda || echo triton
}

results() { # NAME: path of its file; all rows of a file have the same candidates
  has_cuda && echo "$OUT/$1.json" || echo "$OUT/$1-triton.json"
}

# --- what runs --------------------------------------------------------------------------------

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
  # Compiling kernels takes most of the time. A worker that a test kills or hangs is replaced.
  has xdist && some+=(-n "$(($(nproc) < 16 ? $(nproc) : 16))")
  # Of test_on_gpu.py, only the tests of this backend.
  [[ $1 != cuda ]] || { files+=(triton_kernels/test_on_gpu.py); some+=(-k 'cuda or not test_on_gpu'); }
  has pytest_timeout && some+=(--timeout 60 --timeout-method thread)
  [[ -z $DRY_RUN ]] || { files=(ops/test_kept.py); some=(-k 'float32 and T17 and linear and not dispatched'); }
  run env NEUROADA_REQUIRE="$1" TORCHINDUCTOR_COMPILE_THREADS=1 "$PYTHON" -m pytest -v --tb=short -ra -m on_backend "${some[@]}" \
    -c "$WORK/pytest.ini" --rootdir="$ROOT" -p no:cacheprovider "${files[@]/#/$ROOT/tests/}"
}

# Each form runs in its own process: if one crashes or hangs, the others still run. Form 0, the default, runs
# first, with time for a cold start: if it fails, the backend is left out.
smoke() {
  [[ -z $DRY_RUN ]] || { skip "there is no kernel to try on the CPU"; return; }
  local limit first each
  limit=$(limit_of "$PHASE")
  first=$((limit > 60 ? 40 : limit * 2 / 3))
  each=$(((limit - first) / 4 - 1)) # all forms end before the phase is stopped
  ((each < 30)) || each=30
  ((each > 0)) || each=1 # timeout ignores a limit of 0
  # shellcheck disable=SC2016
  run bash -c 'status=0
    for form in 0 1 2 3 4; do
      timeout --foreground --signal=KILL $((form == 0 ? $1 : $2)) "$PYTHON" "$ROOT/tests/triton_kernels/smoke_gpu.py" cuda --large --forms $form && continue
      said=$?
      echo "form $form FAILED, status $said"
      if ((form == 0 && said != 3)); then # 3: right, but rounded twice
        status=20
      elif ((status == 0)); then
        status=1
      fi
    done
    exit $status' smoke "$first" "$each"
  ((STATUS == 20)) && left_cuda_out 0
}

sanitize() { # TOOL BACKEND
  command -v compute-sanitizer >/dev/null || { skip "compute-sanitizer is not found"; return; }
  [[ -z $DRY_RUN ]] || { skip "there is nothing to sanitize on the CPU"; return; }
  local forms=()
  [[ $2 != cuda ]] || forms=(--forms 04321) # the default, then the newest: the last ones may be cut off
  # One allocation per tensor, so that out-of-bounds accesses are detected.
  run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$PYTHON" "$ROOT/tests/triton_kernels/smoke_gpu.py" "$2" "${forms[@]}"
}

# FILE OPTIONS...: the linear suite, its rows added to FILE; in a dry run at tiny sizes.
# NEUROADA_BACKEND is for the candidate `resident`, which names no backend.
bench_linear() {
  local file=$1
  shift
  STATUS=0
  has rich || { skip "rich is missing"; return; }
  local where=(--device "$DEVICE" --dtypes bfloat16)
  [[ -z $DRY_RUN ]] || where=(--device cpu --dtypes float32 --rounds 2 --shapes 32x48)
  run env NEUROADA_BACKEND="$(backend)" "$PYTHON" -m neuroada_kernels.cli bench linear --keep-going --json "$file" "$@" "${where[@]}"
}

linear() { # OPTIONS...: frozen, and the candidates that the targets name
  local candidates=(neuroada-triton resident materialised masked-dense full)
  has_cuda && candidates+=(neuroada-cuda)
  [[ -z $DRY_RUN ]] && has peft && candidates+=(peft-lora-r16)
  bench_linear "$(results linear)" --candidates "${candidates[@]}" "$@"
  left_cuda_out '0|2|10' && linear "$@"
}

sizes() { # OPTIONS...: of a dry run; placed last, they override earlier ones
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
  left_cuda_out '0|2|124|137' && model "$@" # a timeout need not be a fault of the kernels
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
    cuda-*-tests | linear-patched | linear-no-* | linear-plain | linear-two-tiles | linear-unordered | kernels-*)
      another_form "$1"
      ;;
    cuda-smoke) smoke ;;
    cuda-*) sanitize "${1#cuda-}" cuda ;;
    memcheck | racecheck) sanitize "$1" triton ;;
    # shellcheck disable=SC2046
    linear-peers) bench_linear "$OUT/linear-peers.json" --peers --shapes llama-3-8b --tokens 8192 --k 8 \
      --candidates resident "neuroada-$(backend)" $(sizes --tokens 4 --k 2 --candidates peft-ia3) ;;
    # shellcheck disable=SC2046
    kernels) run "$PYTHON" -m neuroada_kernels.cli bench kernels --device "$DEVICE" --cases T8192- \
      --candidates "neuroada-$(backend)" $(sizes --shapes 32x48 --tokens 8 --k 2 --cases T8- --steps 1) ;;
    # Triton's fused kernel, instead of torch's GEMM and a kernel for the bypass. One shape is enough to compare it
    # with the unfused ones, which linear-8192 measures.
    # shellcheck disable=SC2046
    linear-triton-one-kernel) NEUROADA_TRITON_FUSED=1 bench_linear "$OUT/$PHASE.json" --cases T8192-4096to4096- \
      --candidates neuroada-triton $(sizes --tokens 8 --k 2 --cases T8-) ;;
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

# The kernels for sm_90a that variables select: tests and timings.
another_form() { # PHASE
  local form setting
  form=$(form_of "$1")
  [[ $form != no-* ]] || has_cutlass || { skip "the CUDA kernels were built without CUTLASS"; return; }
  for setting in ${FORM[$form]}; do local -x "${setting?}"; done
  case $1 in
    cuda-*) tests cuda ;;
    linear-*)
      local candidates=(neuroada-cuda)
      [[ ${FORM[$form]} != *BULK* && $form != two-tiles ]] || candidates+=(resident) # its SDDMM differs in this form
      bench_linear "$OUT/$1.json" --cases T8192- --candidates "${candidates[@]}"
      ;;
    kernels-*) phase kernels ;;
  esac
}
