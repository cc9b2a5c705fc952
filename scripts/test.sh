#!/usr/bin/env bash
# Installs the package with its test tools into .venv, then lints, checks types, builds the docs and runs the tests.
#   scripts/test.sh                     the fast tier, at most 20 minutes on 2 cores
#   scripts/test.sh --soak              the long tier too; writes a record to benchmarks/results/soak/
#   scripts/test.sh --only tests/data   pytest alone; arguments go to it
# Tests of the vLLM engine run against real servers on the CPU, in environments of their own (vllm_environment.sh).
# Every step runs, whatever failed before; the exit code is 0 when none failed.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"
source "$here/vllm_environment.sh"
command="scripts/test.sh $*"
soak=false only=false
while [ $# -gt 0 ]; do
    case $1 in
        --soak) soak=true ;;
        --only) only=true ;;
        -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
        *) break ;;
    esac
    shift
done
make_environment "[test,docs]" || exit 1
cd "$here/.." || exit 1
bin=$(dirname "$python")
failed=()

servers() { # VERSION NAME [--existing]
    make_vllm_environment "$1" "${3:-}" && export "$2=$vllm"
}

step() { # NAME COMMAND...
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    "$@" </dev/null || failed+=("$name")
    echo "== $name: $((SECONDS - start)) s"
}

docs() {
    local site status
    site=$(mktemp -d)
    NO_MKDOCS_2_WARNING=true "$bin/mkdocs" build --strict --quiet --site-dir "$site"
    status=$?
    rm -rf "$site"
    return $status
}

tests() { # PYTEST ARGUMENTS...
    local cores workers
    cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
    workers=$((cores > 8 ? 8 : cores))
    # No worker is replaced: xdist gives what a dead one had left to nobody, and waits for it for ever.
    "$python" -m pytest -n "$((workers > 1 ? workers : 0))" --dist loadfile --no-loadscope-reorder \
        --max-worker-restart 0 "$@"
}

# In the tests' environment only: the fast tier has one version, the soak two.
if $only; then
    servers 0.32.0 JAXRFT_TEST_VLLM --existing
    servers 0.24.0 JAXRFT_TEST_VLLM_0_24_0 --existing
else
    step "vLLM" servers 0.32.0 JAXRFT_TEST_VLLM
    $soak && step "vLLM, the older version" servers 0.24.0 JAXRFT_TEST_VLLM_0_24_0
fi
# A peer of the benchmarks, where peers_environment.sh has made it: the soak takes it along.
trl=${JAXRFT_PEERS:-$HOME/.cache/jaxrft/peers}/trl/bin/python
$soak && [ -x "$trl" ] && export JAXRFT_TEST_TRL=$trl
if ! $only; then
    step "ruff check" "$bin/ruff" check --output-format concise .
    step "ruff format" "$bin/ruff" format --check .
    step "import-linter" "$bin/lint-imports" --no-logo
    step "mypy" "$bin/mypy"
    step "mkdocs" docs
fi
if command -v nvidia-smi >/dev/null && ! $only; then
    step "pytest on the GPU" "$python" -m pytest -m gpu
fi
if $soak; then
    step "pytest, both tiers" tests -m "" "$@"
else
    step "pytest" tests "$@"
fi

outcome=passed
[ ${#failed[@]} -eq 0 ] || outcome="failed: $(printf '%s, ' "${failed[@]}" | sed 's/, $//')"
if $soak; then
    "$python" "$here/soak_record.py" "$command" "$outcome" "$SECONDS"
fi
echo "== $outcome ($SECONDS s)"
[ ${#failed[@]} -eq 0 ]
