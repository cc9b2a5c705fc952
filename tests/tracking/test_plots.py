"""What the learning curve shows, read from the figure."""

from __future__ import annotations

import json

import matplotlib.image
import numpy as np
import pytest

from jaxrft.tracking.plots import draw, learning_curve, series, smooth


def records(steps=60, every=20, supervised=0):
    rng = np.random.default_rng(0)
    found = [
        {"stage": "warm_start", "step": step, "steps": 99, "loss": 1.0, "eval/accuracy": step / 200}
        for step in range(0, supervised + 1, 10)
        if supervised
    ]
    for step in range(steps + 1):
        if step:
            found.append({
                "step": step, "time": 1.0, "reward": step / 100 + 0.01 * rng.standard_normal(),
                "entropy": 2 - step / 60, "completions/mean_length": 30.0 + step, "completions/clipped_ratio": 0.5,
                "kl": 1e-3 * step, "sampling/logprob_difference/mean": 1e-6,
            })  # fmt: skip
        if step % every == 0:
            found.append({"step": step, "eval/reward": 0.2 + step / 100})
    return found


def panels(figure):
    return {axes.get_title(loc="left") or axes.get_ylabel(): axes for axes in figure.axes}


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


def test_every_panel_shows_its_metric_with_labelled_axes():
    data = records()
    shown = panels(draw(data))
    top = lines(shown["Reward and held-out accuracy"])
    np.testing.assert_allclose(top["held-out reward"].get_xydata(), [[0, 0.2], [20, 0.4], [40, 0.6], [60, 0.8]])
    steps, rewards = series(data, "reward")
    raw = next(line for line in top.values() if line.get_alpha())
    np.testing.assert_allclose(raw.get_xydata(), np.stack([steps, rewards], 1))
    np.testing.assert_allclose(top["training reward, smoothed"].get_xydata()[:, 1], smooth(rewards))
    assert [t.get_text() for t in shown["Reward and held-out accuracy"].texts] == ["before 0.200", "after 0.800"]
    np.testing.assert_allclose(lines(shown["KL"])["KL to the reference"].get_ydata(), 1e-3 * steps)
    np.testing.assert_allclose(lines(shown["KL"])["gap to the engine"].get_ydata(), 1e-6)
    np.testing.assert_allclose(shown["Entropy"].lines[0].get_ydata(), 2 - steps / 60)
    np.testing.assert_allclose(shown["Completion length and truncation"].lines[0].get_ydata(), 30 + steps)
    np.testing.assert_allclose(shown["truncated, %"].lines[0].get_ydata(), 50)
    for axes in shown.values():
        assert axes.get_ylabel()
        assert axes.get_xlabel() or axes is shown["truncated, %"]
        for line in axes.lines:
            low, high = axes.get_ylim()
            assert low <= np.min(line.get_ydata()) <= np.max(line.get_ydata()) <= high


def test_smoothing_is_a_centred_mean_that_keeps_constants():
    values = np.random.default_rng(1).normal(size=57)
    half = 2
    expected = [values[max(i - half, 0) : i + half + 1].mean() for i in range(57)]
    np.testing.assert_allclose(smooth(values), expected)
    np.testing.assert_allclose(smooth(np.full(9, 0.7)), 0.7)
    long = np.random.default_rng(2).normal(size=400)
    np.testing.assert_allclose(smooth(long)[200], long[180:221].mean())


def test_a_supervised_stage_stands_left_of_rl_with_its_boundary():
    figure = draw(records(supervised=100))
    figure.canvas.draw()
    axes = panels(figure)["Reward and held-out accuracy"]
    shown = lines(axes)["held-out accuracy, supervised"].get_xydata()
    np.testing.assert_allclose(shown[:, 1], np.arange(0, 101, 10) / 200)
    np.testing.assert_allclose(shown[:, 0], (np.arange(0, 101, 10) / 100 - 1) * 60 * 0.35, atol=1e-9)
    assert any(line.get_linestyle() == "--" and set(line.get_xdata()) == {0} for line in axes.lines)
    words = {text.get_text(): text.get_position()[0] for text in axes.texts}
    assert words["supervised"] < 0 < words["RL"]
    ticks = dict(zip([round(float(x), 6) for x in axes.get_xticks()], [t.get_text() for t in axes.get_xticklabels()]))
    assert ticks[-21.0] == "0"
    assert ticks[-10.5] == "50"
    assert ticks[0.0] == "100 | 0"
    assert all(float(label) == place for place, label in ticks.items() if place > 0)
    assert axes.get_xlim()[0] < -21 < 60 < axes.get_xlim()[1]
    # The other panels are of RL alone: the supervised loss is not in them.
    assert panels(figure)["Entropy"].lines[0].get_xdata().min() == 1


@pytest.mark.parametrize(
    "few",
    [
        [{"step": 1, "reward": 0.5}],
        [{"step": 0, "eval/reward": 0.5}],
        [{"step": s, "reward": -3.0 * s, "kl": 0.0, "entropy": None} for s in range(3)],
        [{"step": 1, "reward": None, "kl": -0.1, "completions/clipped_ratio": 0.5}],
        [{"step": 20, "stage": "warm_start", "eval/accuracy": 0.3}],
        [{"step": 0, "stage": "warm_start"}, {"step": 1, "reward": 2.0, "entropy": 0.0, "kl": 1.0}],
        [{"step": 5, "other": 1.0}],
    ],
)
def test_few_points_and_missing_metrics(few, recwarn):
    figure = draw(few)
    figure.canvas.draw()
    top = panels(figure)["Reward and held-out accuracy"]
    drawn = [point for line in top.lines for point in line.get_ydata() if line.get_linestyle() != "--"]
    wanted = [r[k] for r in few for k in ("reward", "eval/reward", "eval/accuracy") if r.get(k) is not None]
    assert sorted(drawn) == sorted(wanted)
    empty = [axes for axes in figure.axes if any(text.get_text() == "not recorded" for text in axes.texts)]
    missing = [not any(r.get(k) is not None for r in few) for k in ("entropy", "completions/mean_length", "kl")]
    assert len(empty) == sum(missing)
    assert not [warning for warning in recwarn if "matplotlib" in str(warning.filename)]


def test_the_picture_is_written(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps(record) + "\n" for record in records(supervised=40))
    metrics.write_text(text + '{"step": 61, "rew')  # the run is being written
    path = learning_curve(tmp_path / "pictures", metrics)
    assert path == tmp_path / "pictures" / "curve.png"
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 100
    metrics.write_text("")
    with pytest.raises(ValueError, match="nothing to draw"):
        learning_curve(tmp_path, metrics)
