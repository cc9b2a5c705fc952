"""Policy objectives: one typed description of them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import get_args

from jaxrft.algorithms import covariance, sequence_losses, surrogates, trust_region
from jaxrft.algorithms.choices import require_choice, require_range
from jaxrft.algorithms.corrections import Correction, CorrectionLevel
from jaxrft.algorithms.divergence import KLKind
from jaxrft.algorithms.levels import LEVELS, Level
from jaxrft.algorithms.reductions import Reduction
from jaxrft.algorithms.selection import EntropyScope
from jaxrft.algorithms.surrogates import Surrogate

_BOUNDS = ("clip_low", "clip_high")

SURROGATES: dict[str, Surrogate] = {
    "clip": Surrogate(
        loss=surrogates.clip,
        levels=("token", "sequence", "sequence_token", "geometric"),
        fields=(*_BOUNDS, "dual_clip", "ratio_cap"),
    ),
    "cispo": Surrogate(loss=surrogates.cispo, levels=("token", "sequence"), fields=_BOUNDS),
    "cpgd": Surrogate(loss=surrogates.cpgd, fields=(*_BOUNDS, "dual_clip", "drift_coef", "drift_clip")),
    "reinforce": Surrogate(loss=surrogates.reinforce),
    "sapo": Surrogate(
        loss=surrogates.sapo,
        levels=("token", "sequence", "sequence_token"),
        fields=("sapo_positive", "sapo_negative"),
    ),
    "clip_cov": Surrogate(
        loss=covariance.clip_cov, fields=(*_BOUNDS, "dual_clip", "ratio_cap", "cov_share", "cov_low", "cov_high")
    ),
    "kl_cov": Surrogate(loss=covariance.kl_cov, fields=("cov_share", "cov_coef")),
    "dppo_tv": Surrogate(loss=trust_region.dppo_tv, fields=_BOUNDS),
    "dppo_kl": Surrogate(loss=trust_region.dppo_kl, fields=_BOUNDS),
    "dro": Surrogate(loss=trust_region.dro, fields=("dro_coef",)),
    "luspo": Surrogate(loss=sequence_losses.luspo, levels=("sequence",), fields=(*_BOUNDS, "dual_clip", "ratio_cap")),
    "vespo": Surrogate(loss=sequence_losses.vespo, levels=("sequence",), fields=("vespo_positive", "vespo_negative")),
    "gvpo": Surrogate(loss=sequence_losses.gvpo, levels=("sequence",), fields=("gvpo_coef",), grouped=True),
}
"""What ``PolicyObjective.objective`` names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """A policy objective as data; hashable, so that it can be a static argument of a jitted function.

    Attributes:
        objective: ``clip`` (PPO, GRPO, DAPO, GSPO, GMPO), ``cispo``, ``cpgd``, ``reinforce``, ``sapo``, ``clip_cov``,
            ``kl_cov``, ``dppo_tv``, ``dppo_kl``, ``dro``, ``luspo``, ``vespo``, ``gvpo``, or one that was registered;
            the functions in :data:`SURROGATES` give formulas and papers.
        level: whose ratio is taken. ``token``; ``sequence``: all tokens of a response share the exponential of its
            mean log-ratio (GSPO, arXiv:2507.18071); ``sequence_token``: the same value, with each token's own
            gradient (GSPO-token); ``geometric``: the same of tokens that were clipped first (GMPO, arXiv:2507.20673).
            Objectives of whole responses (luspo, vespo, gvpo) have ``sequence`` alone.
        clip_low, clip_high: ratios are clipped to [1 - clip_low, 1 + clip_high]; the log-ratio to [-clip_low,
            clip_high] at the level ``geometric``, to the logarithms of the former by ``cpgd``. They bound changes of
            probability (``dppo_tv``) or a divergence (``dppo_kl``). clip_high None: clip_low.
        dual_clip: for negative advantages the loss is at most this many times |advantage|
            (arXiv:1912.09729); None: no bound.
        ratio_cap: bound of the ratio where it is not clipped, above 1 + clip_high; None: no bound.
        drift_coef: weight of cpgd's drift towards the old policy, as its authors' code has it.
        drift_clip: that drift's slope in the log-probability, the ratio less 1, is at most this.
        sapo_positive, sapo_negative: sharpness of sapo's gate for advantages above 0, and for all others.
        cov_share: share of the batch's tokens that clip_cov and kl_cov choose.
        cov_low, cov_high: clip_cov chooses between these covariances.
        cov_coef: weight of kl_cov's |log-ratio|.
        dro_coef: weight of dro's half squared log-ratio.
        gvpo_coef: scale of gvpo's implied rewards.
        vespo_positive, vespo_negative: shape (k, l) of vespo's weight for advantages from 0 on, and below.
        entropy_share: only this share of the tokens, those of highest entropy, has a loss; None: all. The reduction
            counts all of them.
        entropy_scope: the share is taken of the ``batch``, or of each ``sequence``.
        correction: of the engine's log-probabilities to the trainer's: ``none``, ``truncate`` or ``mask``; see
            :func:`~jaxrft.algorithms.corrections.correction_weights`.
        correction_level: ``token``, ``sequence`` or ``geometric``.
        correction_low, correction_high: between which the ratio is taken as it is.
        sequence_mask: rows that have drifted further than this from their sampler teach nothing by negative
            advantages; see :func:`~jaxrft.algorithms.corrections.sequences_on_policy`. None: all do.
        reduction: see :func:`~jaxrft.algorithms.reductions.token_weights`.
        constant_length: divisor of the reduction ``constant``.
        kl_coef: weight of the KL to the reference; 0 needs no reference.
        kl_kind: its estimator, see :func:`~jaxrft.algorithms.divergence.kl`.
        kl_weighted: the estimate is multiplied by the token's ratio, through which the gradient flows as well: so it
            is unbiased, in value and gradient, for samples of the old policy (DeepSeek-V3.2, arXiv:2512.02556). For
            k1 and k3; those with a plus have a gradient of their own.

    Raises:
        ValueError: a name that is not known, or a number out of the range of its field. Fields that the objective does
            not read may have any value here; :meth:`Recipe.with_overrides` refuses them.
    """

    objective: str = "clip"
    level: Level = "token"
    clip_low: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    ratio_cap: float | None = None
    drift_coef: float = 0.01
    drift_clip: float = 2.0
    sapo_positive: float = 1.0
    sapo_negative: float = 1.05
    cov_share: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    cov_coef: float = 1.0
    dro_coef: float = 0.1
    gvpo_coef: float = 0.1
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    vespo_negative: tuple[float, float] = (3.0, 2.0)
    entropy_share: float | None = None
    entropy_scope: EntropyScope = "batch"
    correction: Correction = "none"
    correction_level: CorrectionLevel = "token"
    correction_low: float = 0.0
    correction_high: float = 2.0
    sequence_mask: float | None = None
    reduction: Reduction = "token_mean"
    constant_length: int | None = None
    kl_coef: float = 0.0
    kl_kind: KLKind = "k3"
    kl_weighted: bool = False

    def __post_init__(self) -> None:
        names: dict[str, Iterable[str]] = {
            "objective": SURROGATES,
            "level": LEVELS,
            "entropy_scope": get_args(EntropyScope),
            "correction": get_args(Correction),
            "correction_level": get_args(CorrectionLevel),
            "reduction": get_args(Reduction),
            "kl_kind": get_args(KLKind),
        }
        for field, choices in names.items():
            require_choice(field, getattr(self, field), choices)
        for field in ("vespo_positive", "vespo_negative"):
            object.__setattr__(self, field, _pair(field, getattr(self, field)))
        _check_ranges(self)
        _check_kl(self)
        _check_level(self)

    @property
    def upper(self) -> float:
        """``clip_high``, or ``clip_low`` where it is None."""
        return self.clip_low if self.clip_high is None else self.clip_high

    @property
    def selects(self) -> bool:
        """Whether the loss of a token depends on which others are in the batch."""
        return self.entropy_share is not None or self.objective in ("clip_cov", "kl_cov")

    @property
    def reads(self) -> frozenset[str]:
        """Of the fields that only some objectives read, those that this one does."""
        fields = frozenset(SURROGATES[self.objective].fields)
        return fields - {"dual_clip", "ratio_cap"} if self.level == "geometric" else fields

    @property
    def grouped(self) -> bool:
        """Whether the samples of a group are compared, and must be in one (micro-)batch."""
        return SURROGATES[self.objective].grouped


# Least value of each number, and the largest where there is one.
_RANGES: dict[str, tuple[float, ...]] = {
    "clip_low": (0,),
    "clip_high": (0,),
    "dual_clip": (1,),
    "ratio_cap": (1,),
    "drift_coef": (0,),
    "drift_clip": (0,),
    "cov_share": (0, 1),
    "cov_coef": (0,),
    "dro_coef": (0,),
    "gvpo_coef": (0,),
    "entropy_share": (0, 1),
    "correction_low": (0,),
    "correction_high": (0,),
    "sequence_mask": (0,),
    "constant_length": (1,),
    "kl_coef": (0,),
}
_POSITIVE = ("sapo_positive", "sapo_negative")

# Fields that only some objectives read; the others belong to all.
SPECIFIC = tuple(sorted({field for surrogate in SURROGATES.values() for field in surrogate.fields}))


def _pair(field: str, value: object) -> tuple[float, float]:
    values = tuple(value) if isinstance(value, Iterable) else ()
    if len(values) != 2 or not all(isinstance(v, int | float) and v >= 0 for v in values):
        raise ValueError(f"{field}: got {value!r}, takes two numbers of at least 0")
    return values


def _check_ranges(objective: PolicyObjective) -> None:
    for field, limits in _RANGES.items():
        require_range(field, getattr(objective, field), *limits)
    for field in _POSITIVE:
        if not getattr(objective, field) > 0:
            raise ValueError(f"{field}: got {getattr(objective, field)!r}, takes a number above 0")
    if objective.correction_low > objective.correction_high:
        raise ValueError(
            f"correction_low: got {objective.correction_low}, takes at most correction_high "
            f"({objective.correction_high})"
        )
    if objective.ratio_cap is not None and objective.ratio_cap <= 1 + objective.upper:
        raise ValueError(f"ratio_cap: got {objective.ratio_cap}, takes more than 1 + clip_high ({1 + objective.upper})")


def _check_kl(objective: PolicyObjective) -> None:
    if objective.kl_weighted and objective.kl_kind.endswith("+"):
        raise ValueError(f"kl_kind: got {objective.kl_kind!r}, takes one without a plus with kl_weighted")


def _check_level(objective: PolicyObjective) -> None:
    """Fills in a level of which there is one alone."""
    name, levels = objective.objective, SURROGATES[objective.objective].levels
    if objective.level not in levels:
        if objective.level != "token":
            raise ValueError(f"level: got {objective.level!r}, takes {' or '.join(levels)} with {name}")
        object.__setattr__(objective, "level", levels[0])


def unread(objective: PolicyObjective, field: str) -> str | None:
    """Why a field changes nothing in this objective; None where it does."""
    if field in SPECIFIC and field not in objective.reads:
        reader = "the level geometric" if field in SURROGATES[objective.objective].fields else objective.objective
        return f"got {getattr(objective, field)!r}, which {reader} does not read; remove it"
    owners = {
        "entropy_scope": ("entropy_share", objective.entropy_share is not None),
        "correction_level": ("correction", objective.correction != "none"),
        "correction_low": ("correction", objective.correction != "none"),
        "correction_high": ("correction", objective.correction != "none"),
        "kl_weighted": ("kl_coef", objective.kl_coef > 0),
        "kl_kind": ("kl_coef", objective.kl_coef > 0),
    }
    owner, on = owners.get(field, ("", True))
    return None if on else f"set without {owner}, to which it belongs; remove it or set {owner}"
