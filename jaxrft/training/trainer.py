"""The trainer of reinforcement fine-tuning, as its users see it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxrft import models
from jaxrft.config import ConfigError, RLConfig, environment
from jaxrft.data.order import PromptOrder
from jaxrft.models.decoder import Decoder
from jaxrft.models.spec import DecoderSpec
from jaxrft.rollout.errors import EngineError
from jaxrft.tracking.console import Console
from jaxrft.tracking.timing import PhaseTimer
from jaxrft.training import parts
from jaxrft.training.collector import Collector
from jaxrft.training.folder import RunFolder
from jaxrft.training.learner import Learner
from jaxrft.training.metrics import evaluation_metrics
from jaxrft.training.parity import compare
from jaxrft.training.phases import Phases
from jaxrft.training.plan import Plan, check_plan, make_plan, usable_bytes
from jaxrft.training.rollouts import RolloutBatch, evaluation_sampling
from jaxrft.training.state import is_deleted


class RLTrainer:
    """Reinforcement fine-tuning of a model by GRPO or one of its relatives.

    What is not given is taken from the config.

    Args:
        model: a folder, a hub name, or a module (which then needs ``tokenizer``). A module's parameters are
            trained in place: it holds the trained ones at the end, and one trainer at a time may have it.
        config: all settings.
        reward_funcs: one or several functions ``(prompts, completions, **columns) -> list[float | None]``.
        train_dataset: rows with a column ``prompt``: a ``datasets.Dataset``, a list of dicts, or a path.
        eval_dataset: the same, held out.
        tokenizer: a ``transformers`` tokenizer.

    Raises:
        ConfigError: something is missing, or does not fit; nothing has been written then but a server's log.
        EngineError: a server does not answer.
    """

    def __init__(
        self,
        model: str | Path | Decoder | None = None,
        config: RLConfig | None = None,
        reward_funcs: Sequence[Callable] | Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
    ):
        self.config = config or RLConfig()
        environment.apply(self.config.parallel)
        self.folder = RunFolder(self.config.output_dir)
        self.recipe = parts.build_recipe(self.config)
        self.rewards = parts.build_rewards(self.config, reward_funcs)
        self.tokenizer = parts.build_tokenizer(self.config, model, tokenizer)
        self.train_prompts = parts.build_prompts(self.config, train_dataset, self.tokenizer, "train")
        self.eval_prompts = parts.build_prompts(self.config, eval_dataset, self.tokenizer, "eval")
        for prompts in (self.train_prompts, self.eval_prompts):
            if prompts is not None:
                self.rewards.check(prompts.prompts[0].columns)
        self.order = self._make_order()
        self.layout = parts.build_layout(self.config)
        spec = parts.model_spec(self.config, model, self.tokenizer)
        self.plan = self._make_plan(spec)
        self.model = parts.build_model(self.config, model, self.tokenizer, self.layout, self.plan.remat)
        self.learner = Learner(self.config, self.recipe, self.model, self.layout, self.total_steps)
        self.learner.publish()
        self.engine = parts.build_engine(self.config, self.model, self.tokenizer, self.folder.path)
        self.collector = Collector(self.engine, self.tokenizer, self.rewards, self.config.rewards.overlap)

    def train(self) -> dict[str, float]:
        """Runs, or continues, the training that the config describes.

        Returns:
            The last metrics, with those of the final evaluation.

        Raises:
            ConfigError: the run's folder is taken, or there are no training prompts.
            Interrupted: Ctrl-C or SIGTERM; the run is saved and can be continued.
            AuditError: the numbers of the first update contradict each other.
        """
        from jaxrft.training.loop import TrainingRun

        try:
            with TrainingRun(self) as run:
                return run.execute()
        finally:
            # A step that failed may have taken the arrays along: then its error is what the caller is told.
            if not is_deleted(self.learner.state.params):
                self.learner.publish()
                stale = self.engine.version != self.learner.step
                if self.engine.keeps_params or self.engine.sleeps or stale:
                    # Where the engine is what failed, likewise.
                    with contextlib.suppress(EngineError):
                        self.hand_over()

    def evaluate(self) -> dict[str, float]:
        """Answers every held-out prompt once (``num_generations_eval`` times) and scores the answers.

        Training state is not touched.

        Returns:
            Metrics with the prefix ``eval/``.

        Raises:
            ConfigError: there are no held-out prompts.
        """
        phases = Phases(Console(self.config.tracking.progress), PhaseTimer())
        return evaluation_metrics(self.answer_held_out(phases))

    def answer_held_out(self, phases: Phases) -> RolloutBatch:
        """The answers and scores behind :meth:`evaluate`."""
        if self.eval_prompts is None:
            raise ConfigError("data.eval: got None; name the held-out prompts, or give eval_dataset=...")
        if self.engine.version != self.learner.step:
            self.hand_over()
        sampling = evaluation_sampling(self.config)
        # Evaluation draws from seeds of its own, the same at every step.
        return self.collector.collect(
            self.eval_prompts.prompts, self.config.num_generations_eval, sampling, 0, phases, phase="evaluation"
        )

    def check_parity(self) -> float:
        """Sends fixed prompts through engine and trainer and compares the log-probabilities.

        Returns:
            The gap: largest in float32, mean in bfloat16 and float16, and where the engine's weights are quantised.

        Raises:
            ParityError: it is above ``audit.logprob_tolerance``.
        """
        return compare(self)

    def save_model(self, folder: str | Path | None = None) -> Path:
        """Writes model and tokenizer in Hugging Face format; None: to ``final`` in the run's folder."""
        target = Path(folder) if folder is not None else self.folder.final
        self.learner.publish()
        models.save(self.model, target, tokenizer=self.tokenizer)
        return target

    def hand_over(self) -> None:
        """Gives the engine and the module the arrays that now hold the policy: those they had were donated."""
        self.learner.publish()
        self.give_weights(self.learner.state.params, self.learner.step)

    def give_weights(self, params: Any, version: int) -> None:
        """Lets the engine generate from parameters as they are sharded for training."""
        params = self.learner.for_rollout(params) if self.engine.keeps_params else params
        # Caches come back last: while weights arrive, their memory is free.
        self.engine.wake(["weights"])
        self.engine.update_weights(params, version)
        self.engine.wake()

    def take_back(self) -> None:
        """Before an update: an engine with a copy of the parameters lets go of it, so that training has its memory."""
        copies = self.learner.copies_for_rollout if self.engine.keeps_params else self.engine.sleeps
        if copies:
            self.engine.sleep(level=2)

    def close(self) -> None:
        """Ends the engine and what the rewards keep running; the trainer cannot be used after."""
        self.collector.close()
        self.rewards.close()
        self.engine.close()
        self.learner.close()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.config.max_steps > 0 or self.order is None:
            return max(self.config.max_steps, 1)
        # Rounded first: 0.07 epochs of 100 rollouts are 7, not the 7.000000000000001 of binary fractions.
        rollouts = math.ceil(round(self.config.num_train_epochs * self.order.rollouts_per_epoch, 9))
        return rollouts * self.config.updates_per_rollout

    def _make_plan(self, spec: DecoderSpec) -> Plan:
        """The memory plan, shown and checked before anything is loaded."""
        device = self.layout.mesh.devices.flat[0]
        plan = make_plan(
            self.config,
            spec,
            self.layout,
            reference=self.recipe.policy.kl_coef > 0,
            limit=usable_bytes(self.config, device),
            group=self.config.num_generations if self.recipe.policy.grouped else 1,
            held_out=len(self.eval_prompts.prompts) if self.eval_prompts is not None else 0,
            greedy=self.recipe.advantage.baseline == "greedy",
        )
        print(plan, flush=True)
        check_plan(plan)
        return plan

    def _make_order(self) -> PromptOrder | None:
        if self.train_prompts is None:
            return None
        count, batch = len(self.train_prompts.prompts), self.config.rollout_prompts
        return PromptOrder(count, batch, seed=self.config.seed, shuffle=self.config.shuffle_dataset)
