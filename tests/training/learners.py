"""A learner of a model of a few thousand parameters, random samples, and what is compared of two runs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrft.config import RLConfig
from jaxrft.data.records import Prompt
from jaxrft.models.decoder import Decoder
from jaxrft.models.spec import DecoderSpec
from jaxrft.rewards.records import Scores
from jaxrft.rollout.records import Completion
from jaxrft.training.batch import Sample
from jaxrft.training.drawing import Drawn
from jaxrft.training.learner import Learner
from jaxrft.training.parts import build_layout, build_recipe
from jaxrft.training.rollouts import RolloutBatch

VOCAB, LONGEST = 37, 12


@functools.cache
def initial_model(vocab):
    spec = DecoderSpec(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=512,
        tie_embeddings=True,
        init_stddev=0.3,
    )
    graphdef, params = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)))
    return graphdef, jax.tree.map(np.array, params)


def make_model(vocab=VOCAB):
    graphdef, params = initial_model(vocab)
    return nnx.merge(graphdef, jax.tree.map(jnp.array, params))


def learner_of(module, /, rows, parts=1, **changes):
    """The epsilon keeps AdamW's steps close to the gradient: the signs of tiny gradients are rounding."""
    settings = {
        "learning_rate": 1.0,
        "adam_epsilon": 1.0,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "beta": 0.1,
        "epsilon": 0.02,
        "loss_type": "grpo",
        "num_generations": 1,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": parts,
        "max_completion_length": LONGEST,
        "temperature": 0.8,
    }
    config = RLConfig(**settings | changes)
    return Learner(config, build_recipe(config), module, build_layout(config), total_steps=10)


@functools.cache
def cached_learner(rows, parts, vocab, changes):
    return learner_of(make_model(vocab), rows, parts, **dict(changes))


def make_learner(rows, parts=1, vocab=VOCAB, **changes):
    """A learner at its start; those of the same settings share their programs."""
    learner = cached_learner(rows, parts, vocab, tuple(changes.items()))
    learner.reset(nnx.split(make_model(vocab))[1])
    learner.keep_reference()
    return learner


def make_samples(count, seed=0, vocab=VOCAB):
    """Ragged samples, the first of the greatest length; each third of them is not trained."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        prompt, size = (int(rng.integers(1, 5)), int(rng.integers(1, LONGEST + 1))) if number else (4, LONGEST)
        samples.append(
            Sample(
                prompt_ids=rng.integers(0, vocab, prompt).tolist(),
                response_ids=rng.integers(0, vocab, size).tolist(),
                logprobs=rng.normal(-3, 1, size),
                advantage=float(rng.normal()),
                trained=number % 3 != 2,
            )
        )
    return samples


def update(learner, samples, score_old=True):
    return list(learner.update(learner.prepare(samples, score_old=score_old), 99, None))


def host(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def bit_equal(a, b):
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(host(a), host(b), strict=True))


def difference(a, b, start):
    """How far two runs' changes of ``start`` are apart, relative to the change."""
    flat = [np.concatenate([np.ravel(leaf) for leaf in leaves]) for leaves in (a, b, start)]
    change = np.linalg.norm(flat[0] - flat[2])
    assert change > 1e-3
    return float(np.linalg.norm(flat[0] - flat[1]) / change)


def drawn_of(samples, rewards, group):
    """A rollout of samples, ``group`` of each prompt, with one reward of each; all of them are trained on."""
    completions = [
        Completion(token_ids=list(s.response_ids), logprobs=s.logprobs, sampled_logprobs=None, finish_reason="stop")
        for s in samples
    ]
    count = len(samples) // group
    rollout = RolloutBatch(
        prompts=[Prompt(i, "", "", [1], {}) for i in range(count)],
        completions=completions,
        texts=[""] * len(samples),
        scores=Scores(total=rewards, components={"a": rewards}),
        group=group,
    )
    return Drawn(rollout=rollout, groups=list(range(count)), dropped=np.zeros(count, bool), prompts=count)
