"""What a run shows at its end: accuracy by stage, sample answers, the curve, and where everything is."""

from __future__ import annotations

from typing import Any

from jaxrft.tracking import Tracker, learning_curve, read_metrics
from jaxrft.training.folder import RunFolder
from jaxrft.training.rollouts import RolloutBatch

_SAMPLES = 8


def held_out_by_stage(records: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Held-out results before and after each stage, from the records of ``metrics.jsonl``.

    The warm start reports greedy accuracy, RL the mean reward of held-out prompts.
    """
    warm = [r["eval/accuracy"] for r in records if r.get("stage") == "warm_start" and "eval/accuracy" in r]
    evaluations = [r["eval/reward"] for r in records if r.get("eval/reward") is not None]
    rows = []
    if warm:
        rows += [("accuracy before the warm start", warm[0]), ("accuracy after the warm start", warm[-1])]
    if evaluations:
        rows.append(("reward before RL" if len(evaluations) > 1 else "reward", evaluations[0]))
    if len(evaluations) > 1:
        rows.append(("reward after RL", evaluations[-1]))
    return rows


def show(tracker: Tracker, folder: RunFolder, answers: RolloutBatch | None) -> None:
    """Draws the learning curve and prints the end of the run."""
    console = tracker.console
    curve = learning_curve(folder.path, folder.metrics)
    rows = held_out_by_stage(read_metrics(folder.metrics))
    if rows:
        console.banner(
            "On held-out prompts",
            [(name, f"{value:.1%}" if name.startswith("accuracy") else f"{value:.3f}") for name, value in rows],
        )
    if answers is not None:
        console.table(
            "Sample answers to held-out prompts",
            ["prompt", "answer", "reward"],
            [
                [answers.prompt_of(i).text, answers.texts[i], f"{answers.scores.total[i]:g}"]
                for i in range(0, len(answers.texts), max(len(answers.texts) // _SAMPLES, 1))
            ][:_SAMPLES],
        )
    places = {"learning curve": curve, "model (Hugging Face)": folder.final, "config": folder.config, **tracker.where}
    console.banner("Where everything is", [*places.items(), ("checkpoints", folder.checkpoints)])
