#!/usr/bin/env bash
# Installs the package into .venv and trains a small model from scratch to add, on whatever machine this is.
#   scripts/quickstart.sh [key=value ...]
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"
make_environment "" || exit 1

root=$(dirname "$here")
[ "$root" = "$PWD" ] && prefix= || prefix=$root/
output="output_dir=${prefix}runs/quickstart-$(date +%Y%m%d-%H%M%S)"
for argument in "$@"; do
    case $argument in output_dir=* | -*) output= ;; esac
done
[ -n "$output" ] && echo "training a small model to add two-digit numbers (about 5 minutes on 2 cores)" >&2
exec "$python" -m jaxrft.train "${prefix}configs/quickstart.yaml" ${output:+"$output"} "$@"
