"""A short supervised stage that gives a model made from scratch something for RL to build on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxrft import algorithms as alg
from jaxrft.config import ConfigError, WarmStartConfig
from jaxrft.data.order import PromptOrder
from jaxrft.data.records import Prompt
from jaxrft.data.tokenizers import encode_text
from jaxrft.parallel import replicated
from jaxrft.tracking import Tracker
from jaxrft.training.batch import Sample, TrainBatch, make_batch
from jaxrft.training.forward import response_logprobs
from jaxrft.training.optimizer import clip_by_norm
from jaxrft.training.phases import Phases
from jaxrft.training.rollouts import evaluation_sampling

if TYPE_CHECKING:
    from jaxrft.training.learner import Learner
    from jaxrft.training.trainer import RLTrainer


def answer_of(prompt: Prompt, column: str) -> str:
    """The text to learn.

    Raises:
        ConfigError: the prompt has none.
    """
    if column not in prompt.columns:
        raise ConfigError(
            f"warm_start.answer_column: the data has no column {column!r}, "
            f"takes one of {', '.join(sorted(prompt.columns)) or 'none but prompt'}"
        )
    return str(prompt.columns[column])


def supervised_samples(prompts: Sequence[Prompt], column: str, tokenizer: Any) -> list[Sample]:
    """Prompts with their answers as responses, ended by the end-of-sequence token.

    Raises:
        ConfigError: a prompt has no answer.
    """
    samples = []
    for prompt in prompts:
        what = f"warm_start: the answer of row {prompt.index}"
        response = [*encode_text(tokenizer, answer_of(prompt, column), what), tokenizer.eos_token_id]
        samples.append(
            Sample(prompt_ids=prompt.token_ids, response_ids=response, logprobs=np.zeros(len(response)), advantage=0.0)
        )
    return samples


class SupervisedStage:
    """Trains on the training prompts' answers until greedy accuracy on held-out prompts reaches its target.

    Args:
        trainer: whose model is trained; its parameters are donated.
        phases: where progress goes.
        tracker: where metrics go, as records of the stage ``warm_start``.
        check: called now and then; raises to leave.
    """

    def __init__(self, trainer: RLTrainer, phases: Phases, tracker: Tracker, check: Callable[[], None]):
        self.trainer, self.phases, self.tracker, self.check = trainer, phases, tracker, check
        self.config, self.settings = trainer.config, trainer.config.warm_start
        held_out = trainer.eval_prompts.prompts if trainer.eval_prompts else []
        self.answers = [answer_of(prompt, self.settings.answer_column) for prompt in held_out]

    def run(self) -> None:
        """Leaves the learner with the trained parameters, also where it ends early."""
        assert self.trainer.train_prompts is not None
        settings, learner = self.settings, self.trainer.learner
        samples = supervised_samples(self.trainer.train_prompts.prompts, settings.answer_column, self.trainer.tokenizer)
        # Each stage draws its order from a seed of its own.
        order = PromptOrder(len(samples), min(settings.batch_size, len(samples)), seed=self.config.seed + 1)
        optimizer = optax.scale_by_adam(b2=0.99)
        step_fn = _make_step(learner, optimizer, settings)
        params = learner.state.params
        like = jax.eval_shape(optimizer.init, params)
        opt_state = jax.jit(optimizer.init, out_shardings=learner.layout.shardings("moments", like))(params)
        longest = max(samples, key=lambda s: len(s.prompt_ids) + len(s.response_ids))
        self._look(params, 0, {})
        try:
            for step in range(1, settings.max_steps + 1):
                batch = _one_shape([samples[i] for i in order.indices(step - 1)], longest)
                params, opt_state, loss = step_fn(params, opt_state, batch, step)
                looks = step % settings.eval_steps == 0 or step == settings.max_steps
                if looks and self._look(params, step, {"loss": float(loss)}) >= settings.target_accuracy:
                    break
        finally:
            learner.reset(params)
            self.trainer.hand_over()

    def _look(self, params: Any, step: int, metrics: dict[str, float]) -> float:
        """Reports greedy accuracy on the held-out prompts; 0 without any."""
        self.check()
        accuracy = 0.0
        if self.trainer.eval_prompts is not None:
            self.trainer.engine.update_weights(self.trainer.learner.for_rollout(params), -1)
            prompts = self.trainer.eval_prompts.prompts
            sampling = dataclasses.replace(evaluation_sampling(self.config), temperature=0.0)
            _, texts = self.trainer.collector.complete(prompts, 1, sampling, 0, self.phases, "evaluation")
            accuracy = float(np.mean([text == answer for text, answer in zip(texts, self.answers)]))
            metrics = metrics | {"eval/accuracy": accuracy}
        self.tracker.log(step, {"stage": "warm_start", "steps": self.settings.max_steps, **metrics})
        return accuracy


def _one_shape(chosen: Sequence[Sample], longest: Sample) -> TrainBatch:
    """A micro-batch of ``chosen``, padded to the longest of all samples, so that one program serves all steps."""
    batch = make_batch([*chosen, longest], len(chosen) + 1, temperature=1.0)
    return jax.tree.map(lambda a: a[:, :-1] if a.ndim > 1 else a, batch)


def _make_step(learner: Learner, optimizer: optax.GradientTransformation, config: WarmStartConfig):
    warmup = max(config.max_steps // 10, 1)
    graphdef, layout = learner.graphdef, learner.layout

    def loss_fn(params: Any, batch: TrainBatch) -> Float[Array, ""]:
        model = nnx.merge(graphdef, params)
        part = jax.tree.map(lambda a: a[0], batch)
        logprobs, _ = response_logprobs(model, part)
        return -jnp.sum(logprobs * alg.token_weights(part.mask, "token_mean", alg.totals(part.mask)))

    def step_fn(params: Any, opt_state: Any, batch: TrainBatch, step: int):
        with layout.use():
            loss, gradients = jax.value_and_grad(loss_fn)(params, batch)
        norm = optax.global_norm(gradients)
        directions, moments = optimizer.update(clip_by_norm(gradients, norm, 1.0), opt_state, params)
        rate = config.learning_rate * jnp.minimum(step / warmup, 1.0)
        moved = jax.tree.map(lambda p, d: (p - rate * d).astype(p.dtype), params, directions)
        # A batch whose gradient is not finite changes nothing, as in RL.
        sound = jnp.isfinite(norm)
        kept = jax.tree.map(lambda new, old: jnp.where(sound, new, old), (moved, moments), (params, opt_state))
        return *kept, loss

    like = learner.state.params
    moments = layout.shardings("moments", jax.eval_shape(optimizer.init, like))
    out = (layout.shardings("params", like), moments, replicated(layout.mesh))
    return jax.jit(step_fn, donate_argnums=(0, 1), out_shardings=out)
