"""Checks of the first update: a run whose numbers are wrong stops before it has trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrft.config import AuditConfig
from jaxrft.data.records import Prompt
from jaxrft.rollout.records import Completion

_CAUSES = {
    "engine": (
        "the engine samples at another temperature, holds stale or other weights, or the mask does not lie over "
        "the response"
    ),
    "ratio": "old log-probabilities belong to other parameters, another temperature, or other tokens",
    "reference": "the reference is not the model that training started from",
    "text": "the text handed to the rewards is not what the model wrote: prompt glued to it, or tokens cut off",
}

# By whether the largest deviation counts.
_WORDS = {True: "largest", False: "mean"}
_QUANTIZED_CAUSE = (
    "8 bits are too few for this model (rollout.quantization=none generates without, audit.logprob_tolerance moves the "
    "bound), "
)
# Mean gap that weights in 8 bits may make, in nats. They made 0.018 to 0.048 in the quick start, of 0.8 million
# parameters; of a larger model it has not been measured.
QUANTIZED_TOLERANCE = 0.1


class AuditError(RuntimeError):
    """The numbers of the first update contradict each other; nothing was trained."""


class Audit:
    """The checks, with the tolerances of a dtype.

    Args:
        config: tolerances set by the user.
        dtype: ``float32`` or ``bfloat16``; float32 is held to the largest deviation, bfloat16 to the mean.
        quantization: of the engine's weights. With any, its log-probabilities are held to the mean, with a tolerance
            that lets the quantisation's own error through; what the trainer alone computes is held as without.
    """

    def __init__(self, config: AuditConfig, dtype: str, quantization: str = "none"):
        self._exact = dtype == "float32"
        self._quantized = quantization != "none"
        self._engine_exact = self._exact and not self._quantized
        self.word = _WORDS[self._engine_exact]
        self.ratio_tolerance = config.ratio_tolerance or (1e-5 if self._exact else 1e-2)
        engine = 1e-4 if self._engine_exact else QUANTIZED_TOLERANCE if self._quantized else 5e-2
        self.logprob_tolerance = config.logprob_tolerance or engine

    @property
    def ratio_bounds(self) -> np.ndarray:
        """Bounds of the mean and the largest |ratio - 1| before the first update, float32 [2]."""
        return np.array([self.ratio_tolerance, self.ratio_tolerance if self._exact else np.inf], np.float32)

    def check_engine(
        self, completions: Sequence[Completion], scored: np.ndarray, mask: np.ndarray, trained: Sequence[bool]
    ) -> float:
        """Compares the engine's log-probabilities with the trainer's at the places that are trained.

        Args:
            completions: as the engine returned them.
            scored: the trainer's log-probabilities, [samples, response].
            mask: of the tokens that are trained, [samples, response].
            trained: which completions count at all.

        Returns:
            The deviation: largest in float32, mean in bfloat16 and with quantisation.
        """
        gaps = []
        for completion, row, places, counts in zip(completions, scored, mask > 0, trained):
            if not counts:
                continue
            if places.sum() != len(completion.token_ids):
                self._fail(
                    "engine",
                    f"{int(places.sum())} tokens are trained where the engine sampled {len(completion.token_ids)}",
                )
            gaps.append(np.abs(row[places] - completion.logprobs))
        message = "log-probabilities of engine and trainer differ"
        return self._bound("engine", message, gaps, self.logprob_tolerance, self._engine_exact)

    def check_reference(self, reference: np.ndarray, scored: np.ndarray, mask: np.ndarray) -> float:
        """Before the first update the reference is the policy."""
        gaps = [np.abs(reference - scored)[mask > 0]]
        return self._bound(
            "reference", "log-probabilities of policy and reference differ", gaps, self.ratio_tolerance, self._exact
        )

    def check_ratio(self, mean: float, largest: float) -> float:
        """|ratio - 1| of the first update, as the step measured it."""
        value = largest if self._exact else mean
        message = "|ratio - 1| before the first update is"
        return self._bound("ratio", message, [np.array([value])], self.ratio_tolerance, self._exact)

    def check_texts(
        self, tokenizer: Any, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]
    ) -> None:
        """What the rewards saw is what stands behind the prompt when both are decoded together."""
        for prompt, completion, text in zip(prompts, completions, texts):
            before = tokenizer.decode(prompt.token_ids, skip_special_tokens=True)
            both = tokenizer.decode([*prompt.token_ids, *completion.token_ids], skip_special_tokens=True)
            # Decoders may trim or join at the border; white space is not what goes wrong here.
            if "".join(both.split()) != "".join((before + text).split()):
                self._fail("text", f"the model wrote {both[len(before) :]!r}, the rewards saw {text!r}")

    def gap(self, deviations: np.ndarray) -> float:
        """What is held against ``logprob_tolerance``: the largest of some deviations, or their mean."""
        return _reduced(deviations, self._engine_exact)

    def _bound(self, cause: str, message: str, gaps: Sequence[np.ndarray], tolerance: float, exact: bool) -> float:
        value = _reduced(np.concatenate([np.ravel(g) for g in gaps]) if gaps else np.zeros(1), exact)
        if not value <= tolerance:
            self._fail(cause, f"{message}: {_WORDS[exact]} {value:.3g}, tolerance {tolerance:.3g}")
        return value

    def _fail(self, cause: str, message: str) -> None:
        likely = (_QUANTIZED_CAUSE if self._quantized and cause == "engine" else "") + _CAUSES[cause]
        raise AuditError(
            f"audit: {message}. Likely causes: {likely}. Nothing was trained. (audit.enabled=false trains regardless.)"
        )


def _reduced(deviations: np.ndarray, exact: bool) -> float:
    if not deviations.size:
        return 0.0
    return float(np.max(deviations) if exact else np.mean(deviations))
