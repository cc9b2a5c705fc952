"""metrics.jsonl, completions, TensorBoard and W&B: what is written, and what a resumed run makes of it."""

from __future__ import annotations

import builtins
import datetime
import json
import os
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.config import ConfigError, TrackingConfig
from jaxrft.tracking import JsonLines, Tracker, read_completions, read_metrics
from jaxrft.tracking.completions import CompletionFiles


def make_tracker(folder, resumed_step=None, report_to=(), **options):
    return Tracker(
        folder,
        run_name="test",
        report_to=list(report_to),
        tracking=TrackingConfig(progress=False, **options),
        config={"seed": 1, "model": {"dtype": "float32"}},
        total_steps=10,
        resumed_step=resumed_step,
    )


def run_steps(tracker, steps):
    for step in steps:
        tracker.log(step, {"reward": step / 10, "kl": 0.01 * step, "time/rollout": time.monotonic()})
        tracker.log_completions(step, [{"prompt": "p", "completion": f"c{step}", "reward": 1.0}])
        if step % 2 == 0:
            tracker.log(step, {"eval/reward": step / 20})


def without_times(folder):
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k != "time" and not k.startswith("time/")} for record in records]


def test_resumed_files_equal_those_of_a_run_without_interruption(tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stage = {"stage": "warm_start", "steps": 9, "eval/accuracy": 0.25}
    with make_tracker(whole) as tracker:
        tracker.log(9, stage)
        run_steps(tracker, range(1, 9))

    first = make_tracker(broken)
    first.log(9, stage)
    run_steps(first, range(1, 7))
    first.close("interrupted")
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rewa')  # what a killed process leaves behind
    with make_tracker(broken, resumed_step=4) as tracker:
        assert [r["step"] for r in read_metrics(broken / "metrics.jsonl")] == [9, 1, 2, 2, 3, 4, 4]
        assert max(row["step"] for row in read_completions(broken)) == 4
        run_steps(tracker, range(5, 9))

    assert without_times(broken) == without_times(whole)
    assert read_completions(broken) == read_completions(whole)
    assert sorted(p.name for p in broken.iterdir()) == ["completions", "messages.txt", "metrics.jsonl"]


def test_a_new_run_sets_older_files_aside(tmp_path, capsys):
    for _ in range(3):
        with make_tracker(tmp_path) as tracker:
            run_steps(tracker, [1, 2])
    assert (tmp_path / "metrics.jsonl.old2").read_text().count("\n") == 3
    assert len(list((tmp_path / "completions.old1").iterdir())) == 2
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_values_become_json(tmp_path):
    logger = JsonLines(tmp_path / "metrics.jsonl")
    values = {
        "nan": float("nan"), "inf": -np.inf, "numpy": np.float32(0.5), "jax": jnp.asarray(0.25), "count": np.int64(3),
        "none": None, "stage": "wärm",
    }  # fmt: skip
    logger.log(np.int64(2), values)
    line = (tmp_path / "metrics.jsonl").read_text()  # readable while the run goes on

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads(line, parse_constant=refuse)
    assert record.pop("time") > 1e9
    wanted = {"step": 2, "nan": None, "inf": None, "numpy": 0.5, "jax": 0.25, "count": 3, "none": None, "stage": "wärm"}
    assert record == wanted


def test_completions_of_any_content_come_back(tmp_path):
    hostile = 'line\u2028sep \x85 \x1b[31m \ud800 \r\n\t"quote" \\ 😀'
    row = {
        "prompt": [{"role": "user", "content": hostile}], "completion": hostile, "reward": np.float32(0.5),
        "rewards": {"a": float("nan"), "b": None}, "advantage": np.float64("inf"), "finish_reason": "length",
        "image": np.zeros((2, 3)), "made": datetime.date(2020, 1, 2), "thing": object(), "count": np.int32(7),
    }  # fmt: skip
    files = CompletionFiles(tmp_path)
    files.write(10, [row, row])
    files.write(9, [{"completion": "x"}])
    assert (tmp_path / "completions" / "step_000010.jsonl").exists()
    rows = read_completions(tmp_path)
    assert [r["step"] for r in rows] == [9, 10, 10]
    expected = {
        **row, "step": 10, "reward": 0.5, "rewards": {"a": None, "b": None}, "advantage": None,
        "image": "<ndarray (2, 3)>", "made": "2020-01-02", "thing": "<object>", "count": 7,
    }  # fmt: skip
    assert rows[1] == expected
    assert rows == read_completions(tmp_path / "completions")
    assert len(read_completions(tmp_path, step=10)) == 2
    with pytest.raises(FileNotFoundError, match="holds no completions"):
        read_completions(tmp_path / "elsewhere")


def events(folder):
    """(step, tag, value) of a folder's event files, and the steps from which TensorBoard hides older ones."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    scalars, purged = [], []
    for path in sorted(folder.glob("events.*"), key=lambda p: int(p.name.split(".")[3])):
        data = path.read_bytes()
        while data:
            # A record: its length (8 bytes), a checksum (4), the event, a checksum (4).
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                purged.append(event.step)
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return scalars, purged


def test_tensorboard_holds_the_metrics_and_purges_what_is_run_again(tmp_path, capsys):
    with make_tracker(tmp_path, report_to=["tensorboard"]) as tracker:
        tracker.log(5, {"stage": "warm_start", "loss": 2.0})
        for step in (1, 2, 3):
            tracker.log(step, {"reward": step / 4, "completions/mean_length": 7.0, "kl": None})
        assert tracker.where["tensorboard"] == f"tensorboard --logdir {tmp_path / 'tensorboard'}"
    expected = [(s, t, v) for s in (1, 2, 3) for t, v in (("reward", s / 4), ("completions/mean_length", 7.0))]
    assert events(tmp_path / "tensorboard") == (expected, [])
    assert events(tmp_path / "tensorboard" / "warm_start")[0] == [(5, "loss", 2.0)]

    with make_tracker(tmp_path, 2, report_to=["tensorboard"]) as tracker:
        tracker.log(3, {"reward": 0.9})
    scalars, purged = events(tmp_path / "tensorboard")
    assert purged == [3]
    assert (3, "reward", pytest.approx(0.9)) in scalars


def leveldb_records(data):
    """The records of a log in LevelDB's format, after a header of 7 bytes."""
    whole, start, block = b"", 7, 32768
    while start + 7 <= len(data):
        if block - start % block < 7:
            start += block - start % block
            continue
        length, kind = int.from_bytes(data[start + 4 : start + 6], "little"), data[start + 6]
        whole += data[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield whole
            whole = b""


def wandb_history(folder):
    """The logged records of each offline run of a folder, in order, and the runs' ids."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, history = [], []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.append(record.run.run_id)
            if record.HasField("history"):
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                history.append({k: v for k, v in items.items() if not k.startswith("_")})
    return history, ids


def test_wandb_offline_keeps_its_id_and_sends_nothing_twice(tmp_path, capsys, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")
    options = {"report_to": ["wandb"], "wandb_mode": "offline"}
    first = make_tracker(tmp_path, **options)
    first.log(20, {"stage": "warm_start", "eval/accuracy": 0.25})
    first.log(1, {"reward": 0.5})
    first.log(2, {"reward": 0.6})
    assert first.where["wandb"].startswith(f"wandb sync {tmp_path}/wandb/offline-run-")
    first.close("interrupted")
    # A run that goes on is another process, with a service of its own. In the same one, a run of the same id is lost
    # now and then while the service still puts the first away.
    wandb.teardown()
    with make_tracker(tmp_path, 1, **options) as tracker:
        tracker.log(2, {"reward": 0.6, "eval/reward": 0.3})
        tracker.log(3, {"reward": 0.7})

    history, ids = wandb_history(tmp_path)
    assert len(set(ids)) == 1
    assert ids[0] == json.loads((tmp_path / "wandb_run.json").read_text())["id"]
    assert history == [
        {"warm_start/step": 20, "warm_start/eval/accuracy": 0.25},
        {"step": 1, "reward": 0.5},
        {"step": 2, "reward": 0.6},
        {"step": 2, "eval/reward": 0.3},
        {"step": 3, "reward": 0.7},
    ]


def test_wandb_online_without_a_key_is_refused_before_the_run_is_touched(tmp_path):
    code = (
        "import sys; from pathlib import Path; from jaxrft.config import TrackingConfig; "
        "from jaxrft.tracking import Tracker\n"
        "Tracker(Path(sys.argv[1]), run_name='r', report_to=['wandb'], tracking=TrackingConfig(), config={}, "
        "total_steps=1)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    env = clean | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, env=env, timeout=120
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("jaxrft.config.base.ConfigError: report_to: wandb has no API key")
    assert "tracking.wandb_mode=offline" in last
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(("logger", "module"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_a_missing_library_is_one_clear_line(tmp_path, monkeypatch, logger, module):
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name == module:
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(ConfigError, match=rf"pip install 'jaxrft\[{logger}\]'") as caught:
        make_tracker(tmp_path, report_to=[logger])
    assert "\n" not in str(caught.value)
    make_tracker(tmp_path, report_to=["wandb"] if logger == "wandb" else [], wandb_mode="disabled").close("completed")


def test_a_logger_that_fails_is_dropped_and_the_run_goes_on(tmp_path, capsys):
    class Failing:
        name, where, closed = "failing", "", False

        def log(self, step, metrics):
            raise ConnectionError("server away")

        def close(self, status):
            raise OSError("still away")

    tracker = make_tracker(tmp_path)
    tracker._remote.append(Failing())
    tracker.log(1, {"reward": 0.5})
    tracker.log(2, {"reward": 0.5})
    tracker.close("completed")
    tracker.close("failed")
    assert tracker.console.warnings == ["failing stopped logging at step 1 (server away); metrics.jsonl goes on"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "interrupted"), (ValueError, "failed")])
def test_the_way_a_run_ended_is_kept(tmp_path, capsys, error, status):
    def run():
        with make_tracker(tmp_path) as tracker:
            tracker.message("hello")
            raise error

    with pytest.raises(error):
        run()
    lines = (tmp_path / "messages.txt").read_text().splitlines()
    assert [line[20:] for line in lines] == ["hello", f"run {status}"]
    assert capsys.readouterr().out == "hello\n"
