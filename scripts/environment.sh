# Sourced by the other scripts: a virtual environment with the package installed from this folder.
#   make_environment EXTRAS     EXTRAS such as "" or "[test,docs]"; sets $python
# PYTHON chooses the interpreter it is made with, JAXRFT_VENV the folder (.venv).

fits='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'

find_python() {
    local candidate candidates=(python3 python3.12 python3.11 python3.13 python)
    [ -n "${PYTHON:-}" ] && candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        # A name on the PATH may be a shim with nothing behind it: only running it tells.
        if "$candidate" -c "$fits" >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    if [ -n "${PYTHON:-}" ]; then
        echo "error: PYTHON=$PYTHON is not a Python 3.11 or newer with venv" >&2
    else
        echo "error: no Python 3.11 or newer with venv found; install one (on Debian and Ubuntu: apt install" \
            "python3-venv), or name it: PYTHON=/path/to/python3.12 $0" >&2
    fi
    return 1
}

make_environment() {
    local root extras=$1 venv stamp wanted found
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    venv=${JAXRFT_VENV:-$root/.venv}
    python=$venv/bin/python
    stamp=$venv/jaxrft-installed
    if ! "$python" -c "$fits" >/dev/null 2>&1; then
        found=$(find_python) || return 1
        echo "making $venv with $("$found" --version)" >&2
        "$found" -m venv --clear "$venv" || return 1
    fi
    # What is installed, one line for each set of extras; any of them will do where none is asked for.
    wanted="$root $(cksum <"$root/pyproject.toml") extras:$extras"
    grep -qF "$wanted" "$stamp" 2>/dev/null && return
    echo "installing jaxrft$extras into $venv (the first time: some minutes, 1.5 GB, with the test tools 3 GB)" >&2
    "$python" -m pip install -qq --no-input --disable-pip-version-check --editable "$root$extras" || {
        echo "error: the installation failed; what pip said stands above" >&2
        return 1
    }
    echo "$wanted" >>"$stamp"
}
