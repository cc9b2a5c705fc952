"""Packed micro-batches: the updates are those of padded ones, and of samples that stand alone."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxrft import RLTrainer, models
from jaxrft import algorithms as alg
from jaxrft.config import AlgorithmConfig, BatchingConfig
from jaxrft.parallel import Layout, make_mesh
from jaxrft.tracking import read_completions, read_metrics
from jaxrft.training import metrics
from jaxrft.training.batch import Sample, in_list_order, make_batch, pack_batch, select_step
from jaxrft.training.credit import Credit
from jaxrft.training.filling import Limits
from jaxrft.training.forward import response_logprobs
from jaxrft.training.learner import UNBOUNDED
from jaxrft.training.state import Placement, init_state
from jaxrft.training.step import make_score, make_train_step
from tests.training.learners import VOCAB, difference, drawn_of, host, initial_model, make_model, make_samples
from tests.training.learners import learner_of as make_learner
from tests.training.tiny import ROWS, digits, tiny_config

TIME, TEMPERATURE, RATE = 24, 0.8, 1e3
NEVER = Sample(prompt_ids=[3], response_ids=[4, 5], logprobs=np.full(2, -np.inf), advantage=np.nan, trained=False)


def ragged(count, seed):
    """With responses of one token and samples that are not trained, whatever these hold."""
    samples = make_samples(count, seed)
    if count > 3:
        samples[3] = NEVER
        samples[4] = dataclasses.replace(samples[4], response_ids=[7], logprobs=np.array([-2.0]))
    return samples


def packed_of(samples, rows=2, **options):
    return pack_batch(samples, rows, TIME, temperature=TEMPERATURE, **{"steps": 1} | options)


def padded_of(samples, rows):
    return make_batch(samples, rows, temperature=TEMPERATURE)


def place(batch, values):
    """Values [samples, response] in the order of the list, where the batch has these samples."""
    return np.where(batch.sample_ids[..., None] < 0, 0, values[batch.sample_ids]).astype(np.float32)


def with_noise(batch, samples, seed):
    """Old, reference and sampler log-probabilities that are not the policy's; the same for the same sample."""
    rng = np.random.default_rng(seed)
    shape = (len(samples), batch.mask.shape[-1])
    old, reference, sampler = (place(batch, rng.normal(-3.5, 0.5, shape)) for _ in range(3))
    use_old = np.ones_like(batch.use_old)
    return dataclasses.replace(
        batch, old_logprobs=old, ref_logprobs=reference, sampler_logprobs=sampler, use_old=use_old
    )


OBJECTIVES = {
    "grpo": alg.recipe("grpo").with_overrides({"kl_coef": 0.1}).policy,
    "gspo": alg.recipe("gspo").policy,
    "dr_grpo": alg.recipe("dr_grpo").with_overrides({"constant_length": 12}).policy,
    "dapo": alg.recipe("dapo").policy,
    "clip_cov": alg.recipe("clip_cov").with_overrides({"cov_share": 0.3, "cov_low": -9, "entropy_share": 0.6}).policy,
}


def gradients_of(step, batch):
    """Gradients and statistics of one optimizer step: one of plain descent, from the initial parameters."""
    params = nnx.split(make_model())[1]
    start = host(params)
    state, stats = step(init_state(params, optax.identity()), batch, UNBOUNDED, np.float32(0.1))
    return [(old - new) / RATE for old, new in zip(start, host(state.params))], jax.device_get(stats)


def one_by_one(objective):
    """The same, of samples that are alone: by ``token_logprobs``, and with none of the trainer's code."""
    graphdef, _ = initial_model(VOCAB)

    @jax.jit
    def forward(params, row):
        values = models.token_logprobs(nnx.merge(graphdef, params), row["tokens"], row["lengths"], TEMPERATURE)
        return tuple(jnp.take_along_axis(value, row["places"], axis=1) * row["valid"] for value in values)

    @jax.jit
    @jax.value_and_grad
    def loss(params, row, whole, selection):
        logprobs, entropy = forward(params, row)
        arrays = (row["old"], row["advantages"], row["mask"], row["sampler"], entropy, row["reference"])
        return alg.policy_loss(objective, logprobs, *arrays, whole=whole, selection=selection, num_groups=1)[0]

    def run(samples, batch):
        """Sums of losses and gradients; ``batch`` is a padded one of all samples in one micro-batch."""
        params = nnx.split(make_model())[1]
        names = ("tokens", "lengths", "places", "mask", "advantages")
        rows = {name: getattr(batch, name)[0] for name in names}
        rows |= {"old": batch.old_logprobs[0], "reference": batch.ref_logprobs[0], "sampler": batch.sampler_logprobs[0]}
        rows["valid"] = np.arange(batch.mask.shape[-1]) < np.array([[len(s.response_ids)] for s in samples])
        selection = None
        if objective.selects:
            logprobs, entropy = forward(params, rows)
            key = jax.random.fold_in(jax.random.key(0), 0)
            arrays = (logprobs, rows["old"], rows["advantages"], rows["mask"])
            selection = alg.token_selection(objective, *arrays, entropies=entropy, key=key)
        found = []
        for i in range(len(samples)):
            row, chosen = jax.tree.map(lambda a: a[i : i + 1], (rows, selection))  # noqa: B023
            found.append(loss(params, row, alg.totals(rows["mask"]), chosen))
        total = jax.tree.map(lambda *values: sum(values), *found)
        return float(total[0]), host(total[1])

    return run


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_is_padded_is_one_by_one(name):
    """Loss and every gradient, of samples in one micro-batch or several."""
    objective = OBJECTIVES[name]
    graphdef, params = initial_model(VOCAB)
    like = jax.eval_shape(lambda: init_state(params, optax.identity()))
    placement = Placement(Layout(make_mesh()))
    step = make_train_step(graphdef, optax.identity(), lambda _: RATE, objective, 0.0, placement=placement, like=like)
    alone = one_by_one(objective)
    # Samples, seed, rows of a micro-batch -> micro-batches used, and there; most samples of a row.
    cases = {(12, 1, 1): (5, 6, 3)}
    if name == "grpo":
        cases |= {(12, 0, 8): (1, 1, 2), (1, 0, 1): (1, 1, 1)}
    for (count, seed, rows), expected_shape in cases.items():
        samples = ragged(count, seed)
        loss, expected = alone(samples, with_noise(padded_of(samples, count), samples, seed))
        packed = with_noise(packed_of(samples, rows), samples, seed)
        assert (packed.used[0], packed.tokens.shape[0], packed.segment_ids.max()) == expected_shape
        batches, found = [packed], []
        if name in ("grpo", "clip_cov"):  # For the others, that padded ones add up is shown with the step's tests.
            batches.append(with_noise(padded_of(samples, -(-count // 4)), samples, seed))
        for batch in batches:
            gradients, stats = gradients_of(step, batch)
            found.append(stats)
            assert stats["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-7)
            size = max(np.linalg.norm(g) for g in expected)
            for ours, theirs in zip(gradients, expected, strict=True):
                assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs) + 1e-7 * size
        for key, value in found[-1].items():
            assert found[0][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def flat_sources(batch):
    """``sources`` counted over all micro-batches."""
    return np.arange(len(batch.sources))[:, None, None] * batch.temperature[0].size + batch.sources


def test_a_sample_sees_nothing_of_the_others_in_its_row():
    """Its log-probabilities are bit-equal whatever the others are; and the same with all steps projected."""
    graphdef, params = initial_model(VOCAB)
    score = make_score(graphdef, Layout(make_mesh()))
    samples = ragged(12, 0)
    batch = packed_of(samples, first_token_temperature=1.3)
    before = in_list_order(batch, score(params, batch))
    sizes = np.array([len(s.response_ids) for s in samples])
    assert ((before != 0) == (np.arange(before.shape[1]) < sizes[:, None])).all()
    temperatures = in_list_order(batch, np.ravel(batch.temperature)[flat_sources(batch)])
    expected = np.where(np.arange(before.shape[1]) == 0, np.float32(1.3), np.float32(TEMPERATURE))
    assert (temperatures == expected)[before != 0].all()
    for changed in (0, 5, 11):
        other = dataclasses.replace(samples[changed], prompt_ids=[(t + 1) % VOCAB for t in samples[changed].prompt_ids])
        changed_batch = packed_of([*samples[:changed], other, *samples[changed + 1 :]], first_token_temperature=1.3)
        after = in_list_order(batch, score(params, changed_batch))
        differs = (before != after).any(axis=1)
        assert differs.tolist() == [i == changed for i in range(12)]
    everywhere = packed_of(samples, pick=False, first_token_temperature=1.3)
    assert everywhere.places is None
    np.testing.assert_allclose(in_list_order(everywhere, score(params, everywhere)), before, atol=1e-6)


class Given(nnx.Module):
    """A model whose hidden states are its parameters."""

    def __init__(self, hidden, vocab):
        self.states = nnx.Param(jnp.asarray(hidden))
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (hidden.shape[-1], vocab)))

    @property
    def output_kernel(self):
        return self.kernel[...]

    def hidden(self, tokens, lengths, segment_ids):
        return self.states[...]


@pytest.mark.parametrize("pick", [True, False])
def test_not_a_number_where_nothing_is_predicted_reaches_nothing(pick):
    part = jax.tree.map(lambda a: a[0], packed_of(ragged(7, 0), rows=4, pick=pick))
    read = np.zeros(part.tokens.shape, bool)
    picks = np.unravel_index(part.sources[part.sources >= 0], part.temperature.shape)
    read[picks[0], part.places[picks] if pick else picks[1]] = True
    assert 0 < read.sum() == sum(len(s.response_ids) for s in ragged(7, 0)) < read.size
    states = np.random.default_rng(0).normal(size=(*read.shape, 6)).astype(np.float32)
    results = []
    for elsewhere in (0.0, np.nan):
        graphdef, params = nnx.split(Given(np.where(read[..., None], states, elsewhere), VOCAB))

        def total(params):
            logprobs, entropy = response_logprobs(nnx.merge(graphdef, params), part)  # noqa: B023
            return jnp.sum(logprobs * part.mask + 0.1 * entropy)

        value, gradients = jax.value_and_grad(total)(params)
        results.append([np.asarray(value), *host(gradients)])
    for clean, dirty in zip(*results):
        np.testing.assert_array_equal(clean, dirty)


def test_optimizer_steps_of_one_batch_each_have_their_samples():
    """Those of the list's order, whether they need few micro-batches or many."""
    short = [dataclasses.replace(NEVER, prompt_ids=[i], response_ids=[i], logprobs=np.zeros(1)) for i in range(12)]
    samples = [*ragged(12, 0), *short]
    batch = packed_of(samples, steps=2)
    assert batch.used[0] > batch.used[1] == 1
    assert batch.tokens.shape[0] == 2 * batch.used[0]
    for step, ids in ((0, range(12)), (1, range(12, 24))):
        part = select_step(batch, step, 2)
        assert sorted(part.sample_ids[part.sample_ids >= 0]) == list(ids)
        assert part.used.tolist() == [batch.used[step]]
        assert not part.lengths[part.used[0] :].any()
        assert not part.mask[part.used[0] :].any()


def test_a_rollout_with_a_kl_in_the_rewards_whitened_over_several_steps_and_passes():
    """Scores, advantages and parameters: packed as padded."""
    algorithm = AlgorithmConfig(recipe="reinforce_pp", gamma=0.9)
    settings = {"steps_per_generation": 6, "num_iterations": 2, "loss_type": None, "algorithm": algorithm}
    samples = sorted(ragged(12, 0), key=lambda s: -s.length)
    rewards = np.random.default_rng(3).normal(size=12).astype(np.float32)
    results = {}
    for pack in (False, True):
        batching = BatchingConfig(pack=pack, row_length=TIME if pack else None)
        changes = {"max_prompt_length": 4, "batching": batching}
        learner = make_learner(make_model(), 2, 3, **settings | changes)
        start = host(learner.state.params)
        # Another than the policy, so that there is a KL.
        learner.reference = jax.tree.map(lambda a: 1.1 * a, learner.state.params)
        batch = learner.prepare(samples, score_old=True)
        batch, kl = Credit(learner.recipe, [1.0], 12).assign(batch, drawn_of(samples, rewards, 1), None, range(12))
        updates = list(learner.update(batch, 99, None, 0.0))
        assert len(updates) == learner.step == 4
        listed = [in_list_order(batch, a) for a in (batch.old_logprobs, batch.ref_logprobs, batch.advantages)]
        results[pack] = [*listed, metrics.mean_advantages(batch), kl], host(learner.state.params), updates
    assert batch.used[0] > batch.used[1]
    assert abs(results[False][0][-1]) > 1e-2
    for ours, theirs in zip(results[True][0], results[False][0]):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert difference(results[True][1], results[False][1], start) < 1e-5
    for ours, theirs in zip(results[True][2], results[False][2]):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


# ------------------------------------------------------------------ whole runs


def run(folder, pack=True, **changes):
    batching = BatchingConfig(pack=True, row_length=16, tokens_per_device=16) if pack else BatchingConfig()
    changes = {"steps_per_generation": 2, "save_steps": 2, "beta": 0.05, "batching": batching} | changes
    trainer = RLTrainer(config=tiny_config(folder, **changes), reward_funcs=digits, train_dataset=ROWS)
    trainer.train()
    return trainer


def lasting(trainer):
    moving = ("time", "compiles", "tokens_per_second", "peak_memory")
    return [{k: v for k, v in r.items() if not k.startswith(moving)} for r in read_metrics(trainer.folder.metrics)]


def test_a_packed_run_is_audited_is_the_padded_run_and_resumes_bit_equal(tmp_path):
    packed, padded = run(tmp_path / "packed"), run(tmp_path / "padded", pack=False)
    for ours, theirs in zip(lasting(packed)[:2], lasting(padded)[:2], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    first, expected = (read_completions(t.folder.path, step=2) for t in (packed, padded))
    assert first == expected
    assert len({row["advantage"] for row in first}) > 4
    shutil.copytree(tmp_path / "packed", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    again = run(tmp_path / "again", resume_from_checkpoint=True)
    for a, b in zip(host(packed.learner.state), host(again.learner.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert lasting(again) == lasting(packed)


@pytest.mark.parametrize(
    ("prompt", "response", "expected"), [(8, 9, (24, 12)), (8, 20, (40, 24)), (8, 48, (80, 48)), (60, 2, (80, 48))]
)
def test_rows_are_as_short_as_the_longest_sample_allows(prompt, response, expected):
    """Of a run whose rows have 80 tokens at most, 48 of them a response's: halved both or neither."""
    sample = Sample(prompt_ids=[1] * prompt, response_ids=[1] * response, logprobs=np.zeros(response))
    assert Limits(80, 48).fitting([sample]) == expected
