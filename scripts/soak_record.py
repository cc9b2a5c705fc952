"""Writes what a run of the long tests came to: commit, command, outcome, seconds."""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def main(command: str, outcome: str, seconds: str) -> None:
    now = datetime.datetime.now(datetime.UTC)
    record = {
        "commit": git("rev-parse", "HEAD") or None,
        "changed_files": len(git("status", "--porcelain").splitlines()),
        "command": command.strip(),
        "outcome": outcome,
        "seconds": int(seconds),
        "finished": now.isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "transformers")},
        "machine": {"platform": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()},
    }
    path = Path("benchmarks/results/soak") / f"{now:%Y%m%d-%H%M%S}-{(record['commit'] or 'nogit')[:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"== wrote {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
