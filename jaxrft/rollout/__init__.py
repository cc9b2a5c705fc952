"""Engines that generate completions."""

from jaxrft.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Completion": "jaxrft.rollout.records",
        "Engine": "jaxrft.rollout.engine",
        "EngineError": "jaxrft.rollout.errors",
        "NativeEngine": "jaxrft.rollout.native",
        "Request": "jaxrft.rollout.records",
        "SamplingParams": "jaxrft.rollout.records",
        "VLLMEngine": "jaxrft.rollout.vllm.engine",
    },
)
