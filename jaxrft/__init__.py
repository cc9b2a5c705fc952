"""jaxrft: reinforcement fine-tuning of language models in JAX and Flax.

Names are loaded when they are first used, so that ``import jaxrft`` does not load JAX:
a run sets its devices and memory before that.
"""

from jaxrft.lazy import exports

__version__ = "0.1.0"

_rooms = ("algorithms", "config", "data", "models", "parallel", "rewards", "rollout", "tracking", "training")
__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "RLConfig": "jaxrft.config",
        "ConfigError": "jaxrft.config",
        "RLTrainer": "jaxrft.training",
        **{room: f"jaxrft.{room}" for room in _rooms},
    },
)
