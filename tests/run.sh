#!/usr/bin/env bash
# Make a fresh environment and run the tests in it.
#   bash tests/run.sh            everything but the slow set
#   bash tests/run.sh --quick    no real processes either
#   bash tests/run.sh --slow     everything
# VENV=folder keeps the environment there (default: .venv-test, made anew each time). Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  --quick) shift; select="not slow and not e2e" ;;
  --slow)  shift; select="" ;;
  *)       select="not slow" ;;
esac

venv="${VENV:-.venv-test}"
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
# shellcheck disable=SC1091
source "$venv/bin/activate"
python -m pip install --quiet --editable '.[test]'

ruff format --check .
ruff check .
mypy
if command -v shellcheck > /dev/null; then
  git ls-files '*.sh' .ci/run | xargs shellcheck
else
  echo "shellcheck is not installed: shell scripts are not checked"
fi
# One thread per process: tests start several processes, which crawl when they share cores.
export OMP_NUM_THREADS=1
exec python -m pytest -m "$select" "$@"
