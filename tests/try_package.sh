#!/usr/bin/env bash
# Install one built file into an environment of its own, and use it outside of the repository.
#   tests/try_package.sh FILE
# TRY_PYTHON chooses the Python, TRY_PIP options of pip (such as "-c constraints-lowest.txt").
set -euo pipefail
unset PYTHONPATH  # an lmerge there would count as installed
file=$(realpath "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${TRY_PYTHON:-python3}" -m venv "$folder/venv"
options=()
for option in ${TRY_PIP:-}; do
  if [ -f "$option" ]; then option=$(realpath "$option"); fi
  options+=("$option")
done
"$folder/venv/bin/python" -m pip install --quiet "${options[@]}" "$file"
cd "$folder"
bin="$folder/venv/bin"
"$bin/lmerge" --version
"$bin/lmerge" --help >/dev/null
"$bin/lmerge" fit --config best --print_config >/dev/null
"$bin/lmerge" export --help >/dev/null
"$bin/python" -c 'import lmerge; assert callable(lmerge.compress)'
test -f "$("$bin/python" -c 'import lmerge; print(lmerge.__path__[0])')/py.typed"
echo "$(basename "$file") works on $("$bin/python" --version)"
