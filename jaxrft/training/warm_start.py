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
from jaxrft.config import ConfigError, RLConfig
from jaxrft.data.order import PromptOrder
from jaxrft.data.records import Prompt
from jaxrft.data.tokenizers import encode_text
from jaxrft.parallel import replicated
from jaxrft.parallel.loss_scale import adjust
from jaxrft.tracking import Tracker
from jaxrft.training.batch import Sample, TrainBatch, make_batch
from jaxrft.training.forward import response_logprobs
from jaxrft.training.optimizer import clip_by_norm
from jaxrft.training.phases import Phases
from jaxrft.training.rollouts import evaluation_sampling
from jaxrft.training.state import TrainState, apply_gradients, delete, is_deleted, make_init, under

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
        init, like = make_init(learner.state.params, optimizer, learner.placement, learner.first_loss_scale)
        step_fn = _make_step(learner, optimizer, self.config, like)
        longest = max(samples, key=lambda s: len(s.prompt_ids) + len(s.response_ids))
        # One set of moments at a time: a large model has no room for more.
        delete(learner.state.opt_state)
        state = dataclasses.replace(learner.state, opt_state=())
        try:
            state = init(learner.state.params)
            self._look(state.params, 0, {})
            for step in range(1, settings.max_steps + 1):
                batch = _one_shape([samples[i] for i in order.indices(step - 1)], longest)
                state, loss = step_fn(state, batch)
                looks = step % settings.eval_steps == 0 or step == settings.max_steps
                if looks and self._look(state.params, step, {"loss": float(loss)}) >= settings.target_accuracy:
                    break
        finally:
            # A step that fails has taken its state along: then there is nothing to go on with.
            if not is_deleted(state.params):
                delete(state.opt_state)
                learner.reset(state.params)
                self.trainer.hand_over()

    def _look(self, params: Any, step: int, metrics: dict[str, float]) -> float:
        """Reports greedy accuracy on the held-out prompts; 0 without any."""
        self.check()
        accuracy = 0.0
        if self.trainer.eval_prompts is not None:
            self.trainer.give_weights(params, -1)
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


def _make_step(learner: Learner, optimizer: optax.GradientTransformation, config: RLConfig, like: TrainState):
    """A program for one supervised step; it donates the state, which is of the structure of ``like``."""
    settings, graphdef, placement = config.warm_start, learner.graphdef, learner.placement
    warmup = max(settings.max_steps // 10, 1)

    def loss_fn(params: Any, batch: TrainBatch, scale: Float[Array, ""]) -> Float[Array, ""]:
        part = jax.tree.map(lambda a: a[0], batch)
        logprobs, _ = response_logprobs(nnx.merge(graphdef, params), part)
        return -scale * jnp.sum(logprobs * alg.token_weights(part.mask, "token_mean", alg.totals(part.mask)))

    @under(placement.layout)
    def step_fn(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Float[Array, ""]]:
        loss, gradients = jax.value_and_grad(loss_fn)(state.params, batch, state.scale)
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32) / state.scale, gradients)
        norm = optax.global_norm(gradients)
        # A batch whose gradient is not finite changes nothing, as in RL.
        finite = jnp.isfinite(norm)
        rate = settings.learning_rate * jnp.minimum((state.step + 1) / warmup, 1.0)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        params, opt_state = apply_gradients(
            state, optimizer, clip_by_norm(gradients, norm, 1.0), rate, finite, placement, key
        )
        scale = state.loss_scale
        if scale is not None:
            scale = adjust(scale, finite, config.model.loss_scale_steps or 2000)
        moved = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1, loss_scale=scale)
        return moved, loss / state.scale

    out = (placement.shardings(like), replicated(placement.layout.mesh))
    return jax.jit(step_fn, donate_argnums=0, out_shardings=out)
