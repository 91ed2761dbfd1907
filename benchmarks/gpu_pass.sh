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
    124 | 137) status="FAILED: stopped after $limit s" ;;
    *) status="FAILED: exit code $status" ;;
  esac
  record "$name" "$status" $((SECONDS - start))
  printf '==== %s: %s\n' "$name" "$status"
}

# pytest's exit code 5, nothing collected, must be seen but is nobody's failure: the suite may not
# have such tests yet.
pytest_step() {
  local name=$1 limit=$2
  shift 2
  # shellcheck disable=SC2016  # expanded by the inner shell
  step "$name" "$limit" bash -c '"$@" || { code=$?; ((code == 5)) && touch "$0"; exit "$code"; }' \
    "$work/nothing" "$@"
  if [[ -e $work/nothing ]]; then
    rm "$work/nothing"
    sed -i "s/^$name|FAILED: exit code 5|/$name|skipped: no such tests|/" "$steps"
  fi
}

copy() { # copy FROM TO [tar's --exclude...]
  mkdir -p "$2"
  tar -C "$1" "${@:3}" -cf - . | tar -C "$2" -xf -
}

make_copies() {
  # Built from a copy, so that nothing stale in build/ is installed and the tree stays clean.
  copy "$source" "$work/source" --exclude=./.git --exclude=./build --exclude='*.so' --exclude='__pycache__' \
    --exclude='*.egg-info' --exclude=./shared --exclude=./runs --exclude=./.venv --exclude="./fer_kernels/_build_info.json"
  # Run from a second one without the packages, which would shadow the installed ones.
  copy "$work/source" "$work/run" --exclude=./fer_kernels --exclude=./fer_models
}

describe_machine() {
  printf '==== machine, commit %s\n' "$BENCHMARKS_COMMIT"
  "$python" --version
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  if ((gpu)); then nvidia-smi || true; fi
  if command -v nvcc >/dev/null; then nvcc --version; fi
}

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
      "$python" -m pytest -q -p no:cacheprovider -m sanitize "${matching[@]}" tests
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
  matching=(${only:+-k "$only"})
  budget=2
  [[ -z $quick ]] || budget=0.3
  export PYTHONDONTWRITEBYTECODE=1
  BENCHMARKS_COMMIT=${BENCHMARKS_COMMIT:-$(cd "$source" && "$python" -c \
    'from benchmarks import environment; print(environment.commit())' || echo unknown)}
  export BENCHMARKS_COMMIT

  describe_machine
  make_copies
  cd "$work/source"
  # A build without its CUDA half would pass every test that is left: where there is a GPU, insist.
  if ((gpu)); then export FORCE_CUDA=1; fi
  step "build" 240 "$python" -m pip install --no-build-isolation --no-deps --no-index \
    --disable-pip-version-check --target "$work/site" .
  cd "$work/run"
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
  step "info" 60 "$python" -m fer_kernels.info
  # What follows must leave time for the benchmarks, which save what they have after every case.
  pytest_step "tests" $((total / 3)) "$python" -m pytest -q -p no:cacheprovider "${matching[@]}" tests
  sanitize memcheck $((total / 8))
  sanitize racecheck $((total / 8))
  local op measured=()
  for op in "${operators[@]}"; do
    if [[ -e benchmarks/$op.py && ${only:-$op} == "$op" ]]; then measured+=("$op"); fi
  done
  local waiting=${#measured[@]}
  for op in "${measured[@]}"; do
    benchmark "$op" "$((($(remaining) - 10) / waiting--))"
  done
  summarize | tee "$out/summary.txt"
  ! grep -q '|FAILED' "$steps"
}

pass 2>&1 | tee "$out/log.txt"
