"""Prompts: loading rows, tokenizers and chat templates, and the order in which prompts are trained on."""

from jaxrft.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Prompt": "jaxrft.data.records",
        "PromptOrder": "jaxrft.data.order",
        "PromptSet": "jaxrft.data.prompts",
        "bucket_length": "jaxrft.data.batching",
        "halvings": "jaxrft.data.batching",
        "encode_text": "jaxrft.data.tokenizers",
        "load_function": "jaxrft.data.functions",
        "load_rows": "jaxrft.data.load",
        "load_tokenizer": "jaxrft.data.tokenizers",
        "make_prompts": "jaxrft.data.prompts",
        "synthetic": "jaxrft.data.synthetic",
    },
)
