"""The device that torch is to use beside JAX."""

from __future__ import annotations


def torch_device(platform: str) -> str:
    """``cpu`` or ``cuda``: where torch does the same as JAX on ``platform``.

    Raises:
        RuntimeError: JAX has a GPU and torch has none: a comparison would be of a GPU with a CPU.
    """
    import torch

    if platform == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"torch {torch.__version__} sees no GPU, where jaxrft has one: install it for CUDA, or leave this side out"
        )
    return "cuda"
