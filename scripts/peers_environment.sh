#!/usr/bin/env bash
# Makes environments in which the benchmarks run other trainers: TRL and tunix, for the CPU.
#   scripts/peers_environment.sh [trl] [tunix]     both, where none is named; prints the options to hand on:
#   python -m benchmarks.run --suite cpu $(scripts/peers_environment.sh)
# JAXRFT_PEERS chooses the folder that the environments lie in (~/.cache/jaxrft/peers). What is there is left as it is.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"

peer_packages() { # The versions that the benchmarks were written for.
    case $1 in
        # Of 2.13.0 there is a build without CUDA where the index has one; torchvision is not needed.
        trl) echo "torch==2.13.0 trl==1.16.0 accelerate datasets" ;;
        # Its base asks for JAX alone; which device JAX is for is the caller's choice, here the CPU.
        tunix) echo "google-tunix==0.1.7 jax==0.10.2" ;;
        *) echo "error: no peer $1; there are trl and tunix" >&2 && return 1 ;;
    esac
}

make_peer() { # NAME
    local name=$1 packages folder stamp found log
    packages=$(peer_packages "$name") || return 1
    folder=${JAXRFT_PEERS:-$HOME/.cache/jaxrft/peers}/$name
    stamp=$folder/installed
    log=$folder/install.log
    if ! { [ "$(cat "$stamp" 2>/dev/null)" = "$packages" ] && "$folder/bin/python" -c '' 2>/dev/null; }; then
        found=$(find_python) || return 1
        mkdir -p "$(dirname "$folder")"
        # One clone of the repository at a time: they share the folder.
        exec 9>"$folder.lock"
        if command -v flock >/dev/null; then flock 9; fi
        echo "making $folder: $packages (some minutes, 1 to 3 GB; log in $log)" >&2
        "$found" -m venv --clear "$folder" || return 1
        # Unquoted: a word is a package.
        "$folder/bin/python" -m pip install --no-input --disable-pip-version-check --no-compile $packages \
            >"$log" 2>&1 || {
            tail -5 "$log" >&2
            echo "error: $name could not be installed; all that pip said is in $log" >&2
            return 1
        }
        echo "$packages" >"$stamp"
    fi
    echo "--$name $folder/bin/python"
}

status=0
for peer in "${@:-trl tunix}"; do
    # Unquoted: the default is two names.
    for name in $peer; do make_peer "$name" || status=1; done
done
exit $status
