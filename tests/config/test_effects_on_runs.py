"""What the fields of the loop change in two runs, from the files that they leave and what they print."""

import contextlib
import io
import sys
import threading
import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from jaxrft import RLTrainer
from jaxrft.config import AuditConfig, EvaluationConfig, ParallelConfig, RLConfig, TrackingConfig, WatchdogConfig
from jaxrft.config.parse import parse
from jaxrft.tracking import Tracker, read_completions, read_metrics
from jaxrft.training import loop
from jaxrft.training.learner import Learner
from jaxrft.training.watchdog import PhaseTimeout, Watchdog
from tests.training.tiny import ROWS, digits, tiny_config


def run(folder, **changes):
    """One run of the tiny model: its folder, and what it printed."""
    config = tiny_config(folder, per_device_train_batch_size=4, **changes)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        trainer = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS[:16], eval_dataset=ROWS[16:])
        trainer.train()
    return trainer.folder, output.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of four updates each that differ in everything that costs no compilation."""
    folder = tmp_path_factory.mktemp("runs")
    often = run(
        folder / "often",
        max_steps=4,
        logging_steps=2,
        eval_steps=2,
        num_generations_eval=2,
        evaluation=EvaluationConfig(temperature=1.0),
        save_steps=1,
        save_total_limit=3,
        num_completions_to_print=2,
    )
    seldom = run(
        folder / "seldom",
        max_steps=-1,
        num_train_epochs=0.25,  # Of 16 prompts, one a rollout.
        eval_on_start=False,
        save_total_limit=1,
        log_completions=False,
        shuffle_dataset=False,
        audit=AuditConfig(enabled=False),
    )
    return {"often": often, "seldom": seldom}


def records(folder, key):
    return [record["step"] for record in read_metrics(folder.metrics) if key in record]


def test_length_of_a_run(runs):
    """``max_steps``, or ``num_train_epochs`` where that is -1."""
    for folder, _ in runs.values():
        assert max(records(folder, "reward")) == 4


def test_logging_steps(runs):
    """``logging_steps``: a record for every so many, the mean of them."""
    assert records(runs["often"][0], "reward") == [2, 4]
    assert records(runs["seldom"][0], "reward") == [1, 2, 3, 4]


def test_evaluations(runs):
    """``eval_on_start``, ``eval_steps``, ``num_generations_eval``."""
    assert records(runs["often"][0], "eval/reward") == [0, 2, 4]
    assert records(runs["seldom"][0], "eval/reward") == [4]
    assert "evaluation 8/8" in runs["often"][1]
    assert "evaluation 4/4" in runs["seldom"][1]


def test_checkpoints(runs):
    """``save_steps``: the newest ``save_total_limit`` of those made are there."""
    steps = {
        name: sorted(int(p.name) for p in folder.checkpoints.iterdir() if p.name.isdigit())
        for name, (folder, _) in runs.items()
    }
    assert steps == {"often": [2, 3, 4], "seldom": [4]}


def test_completions(runs):
    """``log_completions`` and ``num_completions_to_print``."""
    often, printed = runs["often"]
    assert len(list((often.path / "completions").iterdir())) == 4
    assert printed.count("Completions of step") == 4
    seldom, printed = runs["seldom"]
    assert not (seldom.path / "completions").exists()
    assert "Completions of step" not in printed


def test_shuffle_dataset(tmp_path, runs):
    """The order of the prompts, with and without it."""
    made = [row["prompt"] for row in read_completions(runs["often"][0].path)][::4]
    assert made != [row["prompt"] for row in ROWS[:4]]
    config = tiny_config(tmp_path, per_device_train_batch_size=4, shuffle_dataset=False)
    order = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS[:16]).order
    assert [order.indices(number)[0] for number in range(4)] == [0, 1, 2, 3]


def test_audit_enabled(runs):
    """``audit.enabled``."""
    assert "audit passed" in runs["often"][1]
    assert "audit passed" not in runs["seldom"][1]


def test_output_dir(runs):
    """Everything lies in ``output_dir``, the config that repeats the run too."""
    folder, _ = runs["seldom"]
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "final"} <= {path.name for path in folder.path.iterdir()}
    config = parse([str(folder.config)])
    assert config.output_dir == str(folder.path)
    assert not config.shuffle_dataset


PHASES = ["rollout", "rewards", "training", "evaluation", "checkpoint"]


@pytest.mark.parametrize("phase", PHASES)
def test_watchdog(tmp_path, runs, phase):
    """The budget of each phase ends it; null does not; and a run has phases of these names."""
    short = Watchdog(WatchdogConfig(**{phase: 0.05}), tmp_path)
    with pytest.raises(PhaseTimeout, match=f"^{phase} took longer than its budget of 0.05 s"), short.phase(phase):
        time.sleep(5)
    with Watchdog(WatchdogConfig(**{phase: None}), tmp_path).phase(phase):
        assert not [thread for thread in threading.enumerate() if phase in thread.name]
    assert f"{phase} " in runs["often"][1]


def test_tracker(tmp_path, monkeypatch):
    """``run_name``, ``report_to`` and the whole of ``tracking`` go to the tracker."""
    given = {}

    class Stop(Exception):
        """Ends the run where it would begin."""

    def stop(folder, **options):
        given.update(options)
        raise Stop

    monkeypatch.setattr(loop, "Tracker", stop)
    tracking = TrackingConfig(progress=False, wandb_project="p")
    for run_name, shown in ((None, "run"), ("named", "named")):
        folder = tmp_path / (run_name or "none") / "run"
        config = tiny_config(folder, run_name=run_name, report_to=["wandb"], tracking=tracking)
        trainer = RLTrainer(config=config, reward_funcs=digits, train_dataset=ROWS)
        with pytest.raises(Stop):
            trainer.train()
        assert (given["run_name"], given["report_to"], given["tracking"]) == (shown, ["wandb"], tracking)


def test_wandb(tmp_path, monkeypatch):
    """``wandb_project`` and ``wandb_mode``."""
    given = {}

    def init(**options):
        given.update(options)
        return MagicMock(id="x", offline=True)

    monkeypatch.setitem(sys.modules, "wandb", MagicMock(init=init))
    for mode, started in (("disabled", {}), ("offline", {"project": "p", "mode": "offline", "name": "n"})):
        tracking = TrackingConfig(wandb_project="p", wandb_mode=mode)
        Tracker(tmp_path, run_name="n", report_to=["wandb"], tracking=tracking, config={}, total_steps=1).close(
            "completed"
        )
        assert {name: given[name] for name in ("project", "mode", "name") if name in given} == started


@pytest.mark.parametrize("progress", [True, False])
def test_progress(tmp_path, monkeypatch, progress):
    class Terminal(io.StringIO):
        """Text that takes itself for a terminal."""

        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    tracking = TrackingConfig(progress=progress)
    tracker = Tracker(tmp_path, run_name="n", report_to=[], tracking=tracking, config={}, total_steps=1)
    with tracker.console.phase("rollout", 3) as bar:
        bar.update(1, 3)
        time.sleep(0.3)
    tracker.close("completed")
    assert ("━" in terminal.getvalue()) == progress


@pytest.mark.parametrize(
    ("value", "backend", "ahead"), [(True, "cpu", 1), (False, "gpu", 0), (None, "cpu", 0), (None, "gpu", 1)]
)
def test_compile_ahead(monkeypatch, value, backend, ahead):
    """None: where there is a GPU."""
    monkeypatch.setattr("jaxrft.training.learner.jax.default_backend", lambda: backend)
    config = RLConfig(parallel=ParallelConfig(compile_ahead=value))
    assert Learner.compiles_ahead.fget(SimpleNamespace(config=config)) == ahead
