"""Flax modules, and Hugging Face weights in and out."""

from jaxrft.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Decoder": "jaxrft.models.decoder",
        "DecoderSpec": "jaxrft.models.spec",
        "supported_families": "jaxrft.models.families",
        "load": "jaxrft.models.checkpoint",
        "from_config": "jaxrft.models.checkpoint",
        "ScalarModel": "jaxrft.models.scalar",
        "save": "jaxrft.models.checkpoint",
        "spec_from_config": "jaxrft.models.checkpoint",
        "spec_of": "jaxrft.models.checkpoint",
        "token_logprobs": "jaxrft.models.logprobs",
    },
)
