#!/usr/bin/env python3
"""Writes a small data set of sums, as a stand-in for data of your own.

    python scripts/make_sums.py OUT_DIR [--largest 99] [--held-out 0.1] [--seed 0]

OUT_DIR gets train.jsonl and test.jsonl, one object a line, such as {"question": "34+87=", "solution": "121"}.
What is held out is drawn by value: where 34+87 is in test.jsonl then so is 87+34, and neither is in train.jsonl.
Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="OUT_DIR", type=Path)
    parser.add_argument("--largest", type=int, default=99, help="the largest number (default: %(default)s)")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of pairs held out (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is held out (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.largest < 1 or not 0 < arguments.held_out < 1:
        parser.error("--largest takes at least 1, --held-out a share between 0 and 1")
    for name, pairs in split(arguments.largest, arguments.held_out, random.Random(arguments.seed)).items():
        path = arguments.folder / f"{name}.jsonl"
        try:
            arguments.folder.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row(a, b)) + "\n" for a, b in pairs), encoding="utf-8")
        except OSError as error:
            sys.exit(f"error: cannot write {path} ({error.strerror})")
        print(f"{path}: {len(pairs)} rows")


def split(largest: int, held_out: float, rng: random.Random) -> dict[str, list[tuple[int, int]]]:
    """Pairs of both splits, each pair of different numbers in both orders, shuffled."""
    unordered = [(a, b) for a in range(largest + 1) for b in range(a, largest + 1)]
    rng.shuffle(unordered)
    cut = min(max(round(held_out * len(unordered)), 1), len(unordered) - 1)
    splits = {}
    for name, pairs in {"train": unordered[cut:], "test": unordered[:cut]}.items():
        splits[name] = [*pairs, *((b, a) for a, b in pairs if a != b)]
        rng.shuffle(splits[name])
    return splits


def row(a: int, b: int) -> dict[str, str]:
    return {"question": f"{a}+{b}=", "solution": str(a + b)}


if __name__ == "__main__":
    main()
