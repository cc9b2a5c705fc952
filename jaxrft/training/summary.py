"""What a run shows at its start, and at its end: accuracy by stage, sample answers, the curve, where everything is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax

from jaxrft import algorithms as alg
from jaxrft.parallel import Layout
from jaxrft.tracking import Tracker, learning_curve, read_metrics
from jaxrft.training.folder import RunFolder
from jaxrft.training.rollouts import RolloutBatch

if TYPE_CHECKING:
    from jaxrft.training.trainer import RLTrainer

_SAMPLES = 8


def announce(tracker: Tracker, trainer: RLTrainer, continued_from: int | None) -> None:
    """Prints what is about to run, and the arithmetic of its batches."""
    config, recipe = trainer.config, trainer.recipe
    size = sum(p.size for p in jax.tree.leaves(trainer.learner.state.params))
    rows = [
        ("model", f"{size / 1e6:.2f}M parameters, computed in {config.model.dtype}"),
        ("algorithm", f"{config.algorithm.recipe}: {described(recipe)}"),
    ]
    for name, prompts in (("prompts", trainer.train_prompts), ("held out", trainer.eval_prompts)):
        if prompts is not None:
            dropped = f" ({prompts.dropped} dropped: longer than max_prompt_length)" if prompts.dropped else ""
            rows.append((name, f"{len(prompts.prompts)}{dropped}"))
    rows += [
        ("rollout", f"{config.rollout_prompts} prompts x {config.num_generations} completions"),
        ("updates", f"{config.updates_per_rollout} a rollout, {trainer.total_steps} in all"),
        ("devices", _devices(trainer.layout)),
        ("folder", str(trainer.folder.path)),
    ]
    if continued_from is not None:
        rows.append(("continues", f"from step {continued_from}"))
    tracker.console.banner("jaxrft", rows)


def _devices(layout: Layout) -> str:
    """How many, of what kind, and what they share."""
    mesh = layout.mesh
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}" + (f": {layout.strategy}, {sizes}" if sizes else "")


def described(recipe: alg.Recipe) -> str:
    """What a recipe does: the fields that always say something, and all that are not as they are by default."""
    always = {"baseline", "scale", "objective", "level", "reduction"} | (
        {"clip_low", "clip_high"} if "clip_low" in recipe.policy.reads else set()
    )
    said = []
    for part in (getattr(recipe, field.name) for field in dataclasses.fields(recipe)):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.name == "clip_high" and "clip_high" in always:
                value = part.upper
            if field.name == "constant_length" and part.reduction != "constant":
                continue
            if field.name in always or value != field.default:
                said.append(f"{field.name} {value}")
    return ", ".join(said)


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
