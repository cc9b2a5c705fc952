"""Trainers, and what they are made of."""

from jaxrft.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "AuditError": "jaxrft.training.audit",
        "Interrupted": "jaxrft.training.interrupts",
        "RLTrainer": "jaxrft.training.trainer",
    },
)
