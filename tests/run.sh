#!/usr/bin/env bash
# Make a fresh environment and run the tests in it.
#   bash tests/run.sh            everything but the slow set
#   bash tests/run.sh --quick    no real processes either
#   bash tests/run.sh --slow     everything
#   bash tests/run.sh --gpu      what only a GPU can show, and a table of speeds in the folder $OUT (default: gpu_report)
# --no-install after that uses the environment that is active, and runs the tests alone.
# VENV=folder keeps the environment there (default: .venv-test, made anew each time). Further arguments go to pytest:
# -n 0 runs the files one after another, as --pdb needs it, instead of side by side.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  --quick) shift; select="not slow and not e2e" ;;
  --slow)  shift; select="" ;;
  --gpu)   shift; select="gpu" ;;
  *)       select="not slow" ;;
esac

install=yes
if [ "${1:-}" = --no-install ]; then
  shift
  install=no
fi
# One thread per process: tests start several processes, which crawl when they share cores.
export OMP_NUM_THREADS=1
# Files run side by side, one for each core up to four; the tests of a file share what they made.
cores=$(getconf _NPROCESSORS_ONLN)
side_by_side=(--numprocesses "$((cores < 4 ? cores : 4))" --dist loadfile)
on_gpu() { # the tests, then the table
  local there
  there=$(python -c 'import torch; print(torch.cuda.is_available())')
  if [ "$there" != True ]; then
    echo "There is no CUDA device here: the tests that need one, and the table, are skipped."
    return 0
  fi
  python -m pytest -m gpu tests/gpu "$@"
  python scripts/gpu_report.py --out "${OUT:-gpu_report}"
}
if [ "$install" = no ]; then
  if [ "$select" = gpu ]; then
    on_gpu "$@"
    exit
  fi
  exec python -m pytest -m "$select" "${side_by_side[@]}" "$@"
fi

venv="${VENV:-.venv-test}"
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
# shellcheck disable=SC1091
source "$venv/bin/activate"
python -m pip install --quiet --editable '.[test]'
if [ "$select" = gpu ]; then
  on_gpu "$@"
  exit
fi

ruff format --check .
ruff check .
mypy
if command -v shellcheck > /dev/null; then
  git ls-files '*.sh' .ci/run | xargs shellcheck
else
  echo "shellcheck is not installed: shell scripts are not checked"
fi
exec python -m pytest -m "$select" "${side_by_side[@]}" "$@"
