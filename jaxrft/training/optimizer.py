"""AdamW, its schedule and gradient clipping."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxrft.config import RLConfig


def schedule(config: RLConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by optimizer step, counted from 0: the first step of a warm-up has rate 0.

    The courses are those of ``transformers``' schedulers of the same names.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    decay_steps = max(total_steps - warmup, 1)
    peak = config.learning_rate

    def course(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / decay_steps, 0.0, 1.0)
        after = {
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
            "constant": jnp.ones_like(progress),
            "constant_with_warmup": jnp.ones_like(progress),
        }[config.lr_scheduler_type]
        return peak * jnp.where(step < warmup, step / max(warmup, 1), after)

    return course


def adamw(config: RLConfig) -> optax.GradientTransformation:
    """AdamW's direction without the learning rate (arXiv:1711.05101); weight decay on matrices only."""
    return optax.chain(
        optax.scale_by_adam(b1=config.adam_beta1, b2=config.adam_beta2, eps=config.adam_epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
    )


def is_matrix(params: Any) -> Any:
    """Which parameters are decayed: those of two and more dimensions, not biases and norms."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def clip_by_norm(gradients: Any, norm: Float[Array, ""], limit: float) -> Any:
    """Gradients scaled so that their global norm is at most ``limit``; 0 does not clip."""
    if limit == 0:
        return gradients
    scale = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale, gradients)
