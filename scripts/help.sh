# shellcheck shell=bash
# What --help of the shell scripts does: the settings are read from the scripts themselves, so that none is left out.

# help_if_asked FILE... -- ARGUMENT...: with --help among the arguments, print the comment at the head of the first file
# and every variable that the files take as ${NAME:-default}, ${NAME:=default} or ${NAME:?what to do}, and end the script.
help_if_asked() {
  local files=() argument
  while [ "$1" != -- ]; do files+=("$1"); shift; done
  for argument in "$@"; do
    if [ "$argument" = --help ]; then
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${files[0]}"
      echo "Variables and their defaults (of several, that of MODEL):"
      # shellcheck disable=SC2016
      grep -ho '\${[A-Z_]*:[-=?][^}]*}' "${files[@]}" |
        sed 's/^\${\([A-Z_]*\):[-=]/  \1=/; s/^\${\([A-Z_]*\):?/  \1: /; s/}$//' |
        awk '!seen[$0]++'
      exit 0
    fi
  done
}
