"""Metrics, loggers, the console, completions and plots of a run."""

from jaxrft.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "CompileCounter": "jaxrft.tracking.timing",
        "Console": "jaxrft.tracking.console",
        "JsonLines": "jaxrft.tracking.loggers",
        "Logger": "jaxrft.tracking.loggers",
        "PhaseTimer": "jaxrft.tracking.timing",
        "TensorBoard": "jaxrft.tracking.tensorboard",
        "Tracker": "jaxrft.tracking.tracker",
        "WandB": "jaxrft.tracking.wandb",
        "learning_curve": "jaxrft.tracking.plots",
        "peak_memory_bytes": "jaxrft.tracking.timing",
        "read_completions": "jaxrft.tracking.completions",
        "read_metrics": "jaxrft.tracking.loggers",
    },
)
