"""The vLLM engine: servers of their own, fed through shared memory."""

from jaxrft.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "ServerOptions": "jaxrft.rollout.vllm.options",
        "ServerProcess": "jaxrft.rollout.vllm.process",
        "VLLMEngine": "jaxrft.rollout.vllm.engine",
    },
)
