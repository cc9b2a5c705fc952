"""Rows that are spread over 8 devices give the loss, gradient and statistics of one device."""

import json

from tests.algorithms.sharded import NAMES


def test_eight_devices_are_one(run_python):
    done = run_python("from tests.algorithms.sharded import main; main()", devices=8)
    report = json.loads(done.stdout.splitlines()[-1])
    wrong = {name: gap for name, gap in report["gaps"].items() if not gap < 1e-5}
    assert not wrong, wrong
    assert len(report["gaps"]) == 4 * (len(NAMES) + 1) + 2
    # A gradient that is 8 times another is seen only where there is one.
    assert min(report["sizes"].values()) > 1e-3, report["sizes"]
