"""The README's first command: a policy that learns, on held-out sums, within minutes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxrft.tracking import read_metrics
from jaxrft.training.summary import held_out_by_stage
from tests.rollout.servers import vllm_python

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"

# Rewards of the right mean and spread that have nothing to do with the sample they are given to.
SHUFFLED = """
import random
from jaxrft.rewards import exact_match

reward = exact_match()
def shuffled(**columns):
    values = reward(**columns)
    random.Random(len(values)).shuffle(values)
    return values
"""


def run(run_python, *overrides: str, timeout: float = 1500) -> str:
    arguments = [str(QUICKSTART), *overrides]
    code = f"import sys; from jaxrft.train import main; sys.exit(main({arguments!r}))"
    return run_python(code, timeout=timeout).stdout


def stages(folder: Path) -> dict[str, float]:
    return dict(held_out_by_stage(read_metrics(folder / "metrics.jsonl")))


# A third of the run, its learning rate falling to 0 as in the whole: 0.38 to about 0.7. The control stays below 0.43.
SHORT = "max_steps=150"


def check_learned(folder: Path, gain: float | None = None) -> None:
    """Held-out accuracy of each stage: above 0.9 at the end, or by ``gain`` above where RL began."""
    reached = stages(folder)
    assert reached["accuracy before the warm start"] < 0.05
    assert 0.35 <= reached["accuracy after the warm start"] < 0.5
    assert reached["reward before RL"] == pytest.approx(reached["accuracy after the warm start"], abs=0.01)
    assert reached["reward after RL"] > (0.9 if gain is None else reached["reward before RL"] + gain)


@pytest.mark.timeout(1800)
def test_the_quickstart_learns(run_python, tmp_path):
    """The fast tier's case: what a user sees, and a gain that rewards dealt out at random do not give."""
    printed = run(run_python, f"output_dir={tmp_path}/run", SHORT)
    check_learned(tmp_path / "run", gain=0.2)
    for said in ("audit passed", "Sample answers", "learning curve", str(tmp_path / "run" / "final")):
        assert said in printed
    assert (tmp_path / "run" / "curve.png").exists()


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_whole_quickstart_gets_above_nine_of_ten(run_python, tmp_path, seed):
    start = time.monotonic()
    run(run_python, f"output_dir={tmp_path}/run", f"seed={seed}")
    print(f"the quickstart took {time.monotonic() - start:.0f} s", file=sys.stderr)
    check_learned(tmp_path / "run")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_quickstart_learns_on_a_vllm_server(run_python, tmp_path):
    """The same gain as with the native engine, from completions that a real server drew."""
    engine = ["rollout.engine=vllm", f"rollout.vllm.python={vllm_python()}"]
    printed = run(run_python, f"output_dir={tmp_path}/run", SHORT, *engine, timeout=3500)
    check_learned(tmp_path / "run", gain=0.2)
    assert "parity: engine and trainer agree within" in printed


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_shuffled_rewards_do_not_improve(run_python, tmp_path):
    """The control: same compute, same warm start, rewards dealt out at random."""
    (tmp_path / "control.py").write_text(SHUFFLED)
    run(
        run_python,
        f"output_dir={tmp_path}/run",
        SHORT,
        f"rewards.functions=[{tmp_path}/control.py:shuffled, exact_match]",
        "reward_weights=[1.0, 0.0]",
    )
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    right = [r["eval/rewards/exact_match/mean"] for r in records if "eval/rewards/exact_match/mean" in r]
    assert right[-1] < right[0] + 0.05


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ones_own_jsonl_learns(run_python, tmp_path):
    """The second config, on a file with columns of its own."""
    root = QUICKSTART.parent.parent
    script = root / "scripts" / "make_sums.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    arguments = [
        str(root / "configs" / "jsonl.yaml"), f"output_dir={tmp_path}/run",
        f"data.train={tmp_path}/train.jsonl", f"data.eval={tmp_path}/test.jsonl", SHORT,
    ]  # fmt: skip
    run_python(f"import sys; from jaxrft.train import main; sys.exit(main({arguments!r}))", timeout=1500)
    check_learned(tmp_path / "run", gain=0.2)
