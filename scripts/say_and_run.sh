# shellcheck shell=bash
# How the scripts start a program: they print its command first, with the variables that it depends on, so that the
# printed line does the same when it is pasted into a shell here.

settings=(OPENAI_LOGDIR)

run() {
  local name
  printf '+'
  for name in "${settings[@]}"; do printf ' %s=%q' "$name" "${!name}"; done
  printf ' %q' "$@"
  printf '\n'
  "$@"
}
