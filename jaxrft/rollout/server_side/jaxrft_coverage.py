"""Whether a set of tensors would fill a model, found without moving a byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Coverage:
    """Runs a model's own ``load_weights`` on tensors without memory and watches what they would be copied to.

    Args:
        model: on torch's meta device.
    """

    def __init__(self, model: Any):
        self._model = model

    def examine(self, dtype: str, tensors: list[tuple[str, list[int]]]) -> dict[str, Any]:
        """What would happen to each tensor and each parameter.

        Args:
            dtype: of all tensors.
            tensors: their names and shapes.

        Returns:
            ``problems``, a line each, none where every parameter would be filled by tensors of its own type; and
            ``taken``, how many elements of each tensor this worker takes, which may be a part of them.
        """
        import torch

        copies, kind = _watch(), getattr(torch, dtype)
        taken: list[int] = []

        def offered() -> Iterator[tuple[str, Any]]:
            for name, shape in tensors:
                before = copies.elements
                yield name, torch.empty(shape, dtype=kind, device="meta")
                taken.append(copies.elements - before)

        try:
            with torch.no_grad(), copies:
                self._model.load_weights(offered())
        except Exception as error:
            name, shape = tensors[min(len(taken), len(tensors) - 1)]
            detail = (str(error).strip().splitlines() or [""])[0][:200]
            return {
                "problems": [f"{name} of shape {shape} does not fit ({type(error).__name__}: {detail})"],
                "taken": taken,
            }
        problems = [line for name, p in self._model.named_parameters() if (line := _lack(name, p, copies, kind))]
        return {"problems": problems, "taken": taken}


def _lack(name: str, parameter: Any, copies: Any, kind: Any) -> str | None:
    filled = copies.filled(parameter)
    if filled == 0:
        return f"{name} would not be filled"
    if filled < parameter.numel():
        return f"{name} would be filled by {filled} of its {parameter.numel()} elements"
    if parameter.dtype != kind:
        return f"{name} has type {str(parameter.dtype).removeprefix('torch.')}, gets {str(kind).removeprefix('torch.')}"
    return None


def _watch() -> Any:
    """A mode that skips what writes to tensors and remembers how much of each storage would be written."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    writes = (torch.ops.aten.copy_.default, torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)

    class Watch(TorchDispatchMode):
        elements = 0

        def __init__(self) -> None:
            super().__init__()
            self._written: dict[int, int] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in writes:
                target = args[0]
                if func is writes[0] and args[1].numel() != target.numel():
                    raise ValueError(f"the server wants shape {list(target.shape)}")
                key = target.untyped_storage()._cdata
                self._written[key] = self._written.get(key, 0) + target.numel()
                if func is writes[0]:
                    self.elements += target.numel()
                return target
            return func(*args, **(kwargs or {}))

        def filled(self, parameter: Any) -> int:
            return self._written.get(parameter.untyped_storage()._cdata, 0)

    return Watch()
