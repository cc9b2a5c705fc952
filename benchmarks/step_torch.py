"""The other side of benchmarks/train_step.py: the same optimizer step by torch and transformers.

transformers' model with SDPA attention, torch.optim.AdamW (fused), float32 parameters, under bfloat16 autocast where
the step is in bfloat16. It runs the very rows that the JAX side runs, and projects the same tokens: those that predict
a response. Eager, as trainers run it by default. Packed rows go to torch's flash attention for segments where it is to
be had and gives what SDPA gives under a mask; else they are masked.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from step_varlen import NAME, Varlen, segment_lengths

from jaxrft.training.batch import TrainBatch

# Of log-probabilities in 16 bits by two ways of attention.
VARLEN_TOLERANCE = 0.25


class TorchStep:
    """One optimizer step at each call.

    Args:
        model: one of transformers'.
        batch: as ``Learner.prepare`` gives it, on one device.
        dtype: that of the computation.
        checkpointing: whether each layer's activations are computed again in the backward pass.
        clip: range of the ratio below and above 1.
        update: whether the parameters change; else only log-probabilities are computed.

    Attributes:
        attention: what attends, and why not what would be faster.
    """

    def __init__(
        self, model: Any, batch: TrainBatch, *, dtype: str, checkpointing: bool, learning_rate: float,
        max_grad_norm: float, clip: float, temperature: float = 1.0, update: bool = True,
    ):  # fmt: skip
        import torch

        self.torch, self.model, self.device = torch, model.train(), next(model.parameters()).device
        self.max_grad_norm, self.clip, self.temperature = max_grad_norm, clip, temperature
        self.checkpointing, self.update = checkpointing, update
        self.autocast = contextlib.nullcontext()
        if dtype != "float32":
            self.autocast = torch.autocast(self.device.type, dtype=getattr(torch, dtype))
        if checkpointing and update:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
        self.parts = self._parts(batch)
        self.samples = sum(int((part["mask"].sum(1) > 0).sum()) for part in self.parts)
        self.varlen: Varlen | None = None
        self.attention = "sdpa"
        if self.device.type == "cuda" and dtype != "float32" and batch.segment_ids is not None:
            self._use_varlen(getattr(torch, dtype))

    def __call__(self) -> tuple[float, float]:
        """Loss and the gradient's norm, before clipping; without an update, the log-probabilities' sum twice."""
        total = 0.0
        if not self.update:
            with self.torch.no_grad():
                total = float(sum((self._logprobs(part) * part["mask"]).sum() for part in self.parts))
            return total, total
        for part in self.parts:
            loss = self._loss(part)
            loss.backward()
            total = total + loss.detach()
        norm = self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total), float(norm)  # Reading them waits for the device.

    def _use_varlen(self, dtype: Any) -> None:
        part = self.parts[0]
        try:
            with self.torch.no_grad():
                expected = self._logprobs(part) * part["mask"]
                self.varlen = Varlen(dtype)
                self.model.set_attn_implementation(NAME)
                gap = float((self._logprobs(part) * part["mask"] - expected).abs().max())
            if not gap <= VARLEN_TOLERANCE:
                raise ValueError(f"log-probabilities differ by {gap}")
            self.attention = f"varlen (gap to a mask {gap:.2g})"
            for part in self.parts:
                part["attention"] = None
        except Exception as error:
            self.varlen = None
            self.model.set_attn_implementation("sdpa")
            self.attention = f"sdpa with a mask; varlen: {type(error).__name__}: {error}"[:300]

    def _logprobs(self, part: dict[str, Any]) -> Any:
        """Of each response token of a micro-batch [samples, response]."""
        torch = self.torch
        attention = part["attention"]
        if self.varlen is not None:
            attention = None
            self.varlen.use(part["lengths"], self.device)
        with self.autocast:
            hidden = self.model.model(
                part["tokens"], attention_mask=attention, position_ids=part["positions"], use_cache=False
            ).last_hidden_state
            logits = self.model.lm_head(hidden.flatten(0, 1)[part["picks"]])
        logprobs = torch.log_softmax(logits.float() / self.temperature, -1)
        return logprobs.gather(-1, part["targets"][:, None])[:, 0][part["sources"]]

    def _loss(self, part: dict[str, Any]) -> Any:
        torch, logprobs = self.torch, self._logprobs(part)
        ratio = torch.exp(logprobs - logprobs.detach())
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        losses = -torch.minimum(ratio * part["advantages"], clipped * part["advantages"]) * part["mask"]
        return (losses.sum(1) / part["mask"].sum(1).clamp(min=1)).sum() / self.samples

    def _parts(self, batch: TrainBatch) -> list[dict[str, Any]]:
        """Micro-batches that hold anything, as tensors."""
        arrays = {name: np.asarray(value) for name, value in vars(batch).items() if value is not None}
        count = int(arrays["used"].sum()) if "used" in arrays else len(arrays["tokens"])
        arrays.pop("used", None)
        return [self._part({name: a[number] for name, a in arrays.items()}) for number in range(count)]

    def _part(self, part: dict[str, np.ndarray]) -> dict[str, Any]:
        rows, time = part["tokens"].shape
        flat = part["places"] + time * np.arange(rows)[:, None]
        # Only places that a response token takes its log-probability from.
        used = np.unique(part["sources"][part["sources"] >= 0])
        number = np.zeros(flat.size, np.int64)
        number[used] = np.arange(len(used))
        sources = np.where(part["sources"] >= 0, number[part["sources"]], 0)
        picks = flat.ravel()[used]
        found = {
            "tokens": part["tokens"].astype(np.int64),
            "picks": picks,
            "targets": part["tokens"].ravel()[picks + 1].astype(np.int64),
            "sources": sources,
            "advantages": part["advantages"],
            "mask": part["mask"],
        }
        tensors = {name: self.torch.tensor(np.asarray(a)).to(self.device) for name, a in found.items()}
        # Padding stands behind all valid tokens: the causal mask, which SDPA has its fastest kernels for, hides it.
        tensors |= {"attention": None, "positions": None}
        if "segment_ids" in part:
            segments = part["segment_ids"]
            mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(time, dtype=bool)
            starts = np.diff(segments, axis=1, prepend=-1) != 0
            index = np.broadcast_to(np.arange(time), segments.shape)
            positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
            tensors["attention"] = self.torch.tensor(mask[:, None]).to(self.device)
            tensors["positions"] = self.torch.tensor(positions).to(self.device)
            tensors["lengths"] = segment_lengths(segments)
        return tensors


def make_model(fields: dict[str, Any], device: str, threads: int) -> Any:
    """A model of transformers' with random float32 weights; None without torch.

    Args:
        fields: of its config.json.
        device: ``cpu`` or ``cuda``.
        threads: of torch on a CPU.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        return None
    torch.set_num_threads(threads)
    config = AutoConfig.for_model(**fields, bos_token_id=None, eos_token_id=None)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def peak_bytes() -> int | None:
    """Of torch's tensors on the GPU; None on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
