#!/usr/bin/env bash
# Everything that a machine can prove about this tree in one go: build, test, sanitize, measure.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: benchmarks/gpu_pass.sh OUT [--only OP] [--quick]

Builds this tree into a folder of its own, runs the test suite, compute-sanitizer and the benchmarks
against that build, and leaves log.txt, summary.txt and one CSV and JSON an operator in OUT. Needs no
network. Every step runs whatever became of the others; the exit code is 1 where any failed.

  --only OP   tests and benchmarks of this operator alone (knn, relation, jad)
  --quick     rough timings and half the time

Environment:
  PYTHON             default python3; must hold torch, setuptools, ninja, pybind11 and pytest
  PASS_SECONDS       time for everything (default 540, with --quick 240)
  BENCHMARKS_COMMIT  what the results call this tree, for a copy without its repository
  SANITIZER          default compute-sanitizer on PATH or in /usr/local/cuda/bin

example: benchmarks/gpu_pass.sh /tmp/pass --only knn --quick
TEXT
}

out="" only="" quick=""
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --only) only=${2:?--only needs an operator} && shift ;;
    --quick) quick=1 ;;
    -*) echo "unknown option $1" >&2 && usage >&2 && exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
[[ -n $out ]] || { usage >&2 && exit 2; }

python=${PYTHON:-python3}
total=${PASS_SECONDS:-$((quick ? 240 : 540))}
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
operators=(knn relation jad)
for op in "${operators[@]}"; do # an earlier pass must not pass for this one
  rm -f "$out/$op.csv" "$out/$op.json"
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
steps=$work/steps.txt # step|status|seconds
: >"$steps"

record() { printf '%s|%s|%s\n' "$1" "$2" "$3" >>"$steps"; }
remaining() { echo $((total - SECONDS)); }

# step NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, or what is left; always succeeds.
step() {
  local name=$1 limit=$2 left start status=0
  shift 2
  left=$(remaining)
  ((limit = limit < left ? limit : left)) || true
  printf '\n==== %s (at most %s s)\n' "$name" "$limit"
  if ((limit < 5)); then
    record "$name" "FAILED: out of time" 0
    return 0
  fi
  start=$SECONDS
  timeout --kill-after=10 "$limit" "$@" || status=$?
  case $status in
    0) status="ok" ;;
    77) status="skipped: no such tests" ;;
    124 | 137) status="FAILED: stopped after $limit s" ;;
    *) status="FAILED: exit code $status" ;;
  esac
  record "$name" "$status" $((SECONDS - start))
  printf '==== %s: %s\n' "$name" "$status"
}

# Nothing collected, pytest's exit code 5, must be seen but is no failure: an operator may have no such
# tests.
pytest_step() {
  # shellcheck disable=SC2016  # expanded by the inner shell
  step "$1" "$2" bash -c '"$@" || { code=$?; exit $((code == 5 ? 77 : code)); }' bash "${@:3}"
}

copy() { # copy FROM TO [tar's --exclude...]
  mkdir -p "$2"
  tar -C "$1" "${@:3}" -cf - . | tar -C "$2" -xf -
}

# Three copies, each where it cannot disturb: one to build in, so that nothing stale from build/ is
# installed and this tree stays clean; one for the tests that read the sources; and the benchmarks
# alone, because Python looks beside them first and must find the installed packages.
make_copies() {
  copy "$source" "$work/build" --exclude=./.git --exclude=./build --exclude='*.so' --exclude='__pycache__' \
    --exclude='*.egg-info' --exclude=./shared --exclude=./runs --exclude=./.venv \
    --exclude=./fer_kernels/_build_info.json
  copy "$work/build" "$work/tree"
  copy "$work/build/benchmarks" "$work/measure/benchmarks"
}

describe_machine() {
  printf '==== machine, commit %s\n' "$BENCHMARKS_COMMIT"
  "$python" --version
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  if ((gpu)); then nvidia-smi || true; fi
  if command -v nvcc >/dev/null; then nvcc --version; fi
}

run_pytest=() # set by pass: what every pytest step has in common

sanitize() { # sanitize TOOL LIMIT
  local name="sanitizer $1"
  if ((!gpu)); then
    record "$name" "skipped: no GPU" 0
  elif ! command -v "$sanitizer" >/dev/null; then
    record "$name" "FAILED: no compute-sanitizer" 0
  else
    # Torch's caching allocator would hide an access beyond one tensor in the next.
    pytest_step "$name" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "$sanitizer" --tool "$1" --error-exitcode 9 --target-processes all \
      "${run_pytest[@]}" -m sanitize "$work/tree/tests/kernels"
  fi
}

benchmark() { # benchmark OP LIMIT
  local name="$out/$1"
  step "benchmarks $1" "$2" "$python" -m benchmarks run --op "$1" --csv "$name.csv" --json "$name.json" \
    --budget "$budget" ${quick:+--quick}
}

summarize() {
  printf '\n%-24s %-32s %s\n' step status seconds
  while IFS='|' read -r name status seconds; do
    printf '%-24s %-32s %s\n' "$name" "$status" "$seconds"
  done <"$steps"
  printf '\n'
  local op tables=()
  for op in "${operators[@]}"; do
    if [[ -e $out/$op.csv ]]; then tables+=("$out/$op.csv"); fi
  done
  if ((${#tables[@]})); then "$python" -m benchmarks report --brief "${tables[@]}" || true; fi
}

pass() {
  gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))' || echo 0)
  sanitizer=${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
  run_pytest=("$python" -m pytest -q -p no:cacheprovider --rootdir "$work/tree" -c "$work/tree/pyproject.toml"
    ${only:+-k "$only"})
  budget=2
  [[ -z $quick ]] || budget=0.3
  export PYTHONDONTWRITEBYTECODE=1
  BENCHMARKS_COMMIT=${BENCHMARKS_COMMIT:-$(cd "$source" && "$python" -c \
    'from benchmarks import environment; print(environment.commit())' || echo unknown)}
  export BENCHMARKS_COMMIT

  describe_machine
  make_copies
  cd "$work/build"
  # A build without its CUDA half would pass every test that is left: where there is a GPU, insist.
  if ((gpu)); then export FORCE_CUDA=1; fi
  step "build" 240 "$python" -m pip install --no-build-isolation --no-deps --no-index \
    --disable-pip-version-check --target "$work/site" .
  cd "$work/measure"
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
  step "info" 60 "$python" -m fer_kernels.info
  # The kernels first: what only a GPU can show must not wait for what any machine can.
  pytest_step "tests kernels" $((total / 3)) "${run_pytest[@]}" "$work/tree/tests/kernels"
  sanitize memcheck $((total / 9))
  sanitize racecheck $((total / 9))
  local op measured=()
  for op in "${operators[@]}"; do
    if [[ -e benchmarks/$op.py && ${only:-$op} == "$op" ]]; then measured+=("$op"); fi
  done
  local waiting=${#measured[@]} kept=$((total / 7)) # kept for the other tests
  for op in "${measured[@]}"; do
    benchmark "$op" "$((($(remaining) - kept) / waiting--))"
  done
  # Folder by folder: pytest never enters one called build by itself.
  local folder others=()
  for folder in "$work"/tree/tests/*/; do
    if [[ $folder != */kernels/ ]]; then others+=("$folder"); fi
  done
  pytest_step "tests other" "$(($(remaining) - 10))" "${run_pytest[@]}" "${others[@]}"
  summarize | tee "$out/summary.txt"
  ! grep -q '|FAILED' "$steps"
}

pass 2>&1 | tee "$out/log.txt"
