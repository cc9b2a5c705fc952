"""The same optimizer steps on one device and on many, whatever the strategy, and each device holds what theory says."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import QUICK_TO_COMPILE, ROOT
from tests.parallel import updates

LIMIT = 1e-5


def records(which, timeout, **changes):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "16",
        "PYTHONPATH": str(ROOT),
        **changes,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.updates", which],
        capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def too_far(found):
    return [
        (record["case"], name, value)
        for record in found
        for name, value in record.items()
        if name != "case" and not value <= LIMIT
    ]


def pairs(cases, names):
    values = [dataclasses.asdict(case) for case in cases]
    return {
        (a, v[a], b, v[b]) for v in values for a, b in itertools.combinations(names, 2)
    }  # fmt: skip


def test_the_fast_cases_hold_every_pair():
    names = ("strategy", "tensor", "sequence", "remat", "scan", "pack", "parts", "offload")
    held = pairs(updates.fast_cases(), names)
    wanted = pairs(updates.all_cases(), ("strategy", "tensor", "sequence"))
    assert wanted <= held
    for name, values in {
        "remat": updates.REMATS,
        "scan": (False, True),
        "pack": (False, True),
        "parts": (1, 2),
    }.items():
        assert {(case.tensor, getattr(case, name)) for case in updates.fast_cases()} >= set(
            itertools.product((1, 2, 4), values)
        )


def test_updates_equal_those_of_one_device():
    found = records("fast", 500, XLA_FLAGS=QUICK_TO_COMPILE)
    assert len(found) == 15
    assert not too_far(found)


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_every_strategy_with_every_tensor_and_sequence_size():
    found = records("all", 1400)
    assert len(found) == 60
    assert not too_far(found)
