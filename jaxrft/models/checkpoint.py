"""Hugging Face checkpoints in and out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrft.config import ConfigError
from jaxrft.models.abstract import abstract_decoder
from jaxrft.models.decoder import Decoder
from jaxrft.models.families import family_for, family_of
from jaxrft.models.hf_config import complete
from jaxrft.models.hub import checkpoint_folder
from jaxrft.models.loading import fill
from jaxrft.models.names import HARMLESS_EXTRAS, Tensor, tensors_of
from jaxrft.models.names import Path as ParameterPath
from jaxrft.models.spec import DecoderSpec
from jaxrft.models.weight_files import FLOAT_TYPES, WeightFiles, write_json, write_weights
from jaxrft.parallel import Layout

COMPUTE_TYPES = ("float32", "bfloat16", "float16")
PARAM_TYPES = ("float32", "bfloat16")
FILE_TYPES = ("float32", "bfloat16", "float16")
SHARD_BYTES = 5 * 10**9


def load(
    path_or_hub_name: str | os.PathLike[str],
    dtype: str = "float32",
    layout: Layout | None = None,
    *,
    param_dtype: str = "float32",
) -> Decoder:
    """A model with the weights of a Hugging Face checkpoint.

    Args:
        path_or_hub_name: a folder with config.json and safetensors, or a name on the hub, which is
            looked for in the local cache before it is fetched.
        dtype: type that activations are computed in.
        layout: where the parameters are placed; None takes the default device.
        param_dtype: type that parameters are kept in.

    Raises:
        ConfigError: no such checkpoint, a family or option we do not have, damaged files, or tensors
            that are missing, misnamed or misshapen, each named.
    """
    folder = checkpoint_folder(path_or_hub_name)
    fields = _read_json(folder / "config.json")
    family = family_of(fields)
    spec, compute_type = family.spec(complete(fields)), _compute_type(dtype)
    kept = _float_type("param_dtype", param_dtype, PARAM_TYPES)
    model = abstract_decoder(spec, compute_type)
    model.hf_config = json.dumps(fields)
    if (folder / "generation_config.json").is_file():
        model.generation_config = json.dumps(_read_json(folder / "generation_config.json"))
    with WeightFiles(folder) as files:
        tensors = tensor_table(model)
        _check_tensors(model, tensors, files, folder)
        fill(model, tensors, files, layout, kept)
    return model


def spec_of(path_or_hub_name: str | os.PathLike[str]) -> DecoderSpec:
    """The shape of a Hugging Face checkpoint's model; its weights are not read.

    Raises:
        ConfigError: as :func:`load` for the config.
    """
    return _spec(_read_json(checkpoint_folder(path_or_hub_name) / "config.json"))


def spec_from_config(hf_config: dict[str, Any]) -> DecoderSpec:
    """The shape of the model that :func:`from_config` would make.

    Raises:
        ConfigError: as there.
    """
    return _spec(hf_config, strict=True)


def _spec(fields: dict[str, Any], strict: bool = False) -> DecoderSpec:
    return family_of(fields).spec(complete(fields, strict=strict))


def from_config(
    hf_config: dict[str, Any],
    *,
    dtype: str = "float32",
    seed: int = 0,
    layout: Layout | None = None,
    param_dtype: str = "float32",
) -> Decoder:
    """A model made from scratch.

    Args:
        hf_config: fields of a config.json with its ``model_type``; others default as in transformers.
        dtype: type that activations are computed in.
        seed: of the random parameters: normal with ``initializer_range``, biases 0, norms 1.
        layout: where the parameters are placed; None takes the default device.
        param_dtype: type that parameters are kept in.

    Raises:
        ConfigError: a family, a field or a value that we do not have.
    """
    spec = spec_from_config(hf_config)
    if hf_config.get("attention_dropout"):
        raise ConfigError(f"attention_dropout: got {hf_config['attention_dropout']}, takes 0: there is no dropout here")
    # Not jitted as a whole: one program that draws every parameter takes seconds to compile.
    model = Decoder(spec, dtype=_compute_type(dtype), rngs=nnx.Rngs(seed))
    model.hf_config = json.dumps(hf_config)
    kept = _float_type("param_dtype", param_dtype, PARAM_TYPES)
    params = jax.tree.map(lambda p: p.astype(kept), nnx.state(model))
    nnx.update(model, params if layout is None else jax.device_put(params, layout.shardings("params", params)))
    return model


def save(
    model: Decoder,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    dtype: str | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that ``transformers`` and inference servers load.

    Args:
        model: what to export. Fields of the config.json it came from are kept.
        folder: made if needed; an export that is there is replaced.
        tokenizer: saved beside the weights, if given.
        dtype: type of the file, ``float32``, ``bfloat16`` or ``float16``; None is float32, which loses nothing.
        shard_bytes: weights above this are split into several files.

    Raises:
        ConfigError: a dtype we do not write, or a model that no family can describe.
        OSError: the folder cannot be written.
    """
    dtype = dtype or "float32"
    if dtype not in FILE_TYPES:
        raise ConfigError(f"dtype: got {dtype!r}, takes one of {', '.join(FILE_TYPES)}")
    config = {**export_config(model), "dtype": dtype, "torch_dtype": dtype}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
    write_weights(folder, named_tensors(model), dtype, shard_bytes)
    write_json(folder / "config.json", config)
    if model.generation_config:
        write_json(folder / "generation_config.json", json.loads(model.generation_config))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def export_config(model: Decoder) -> dict[str, Any]:
    """The config.json of a model: the fields it came with, and what its spec says."""
    kept = json.loads(model.hf_config) if model.hf_config else {}
    family = family_of(kept) if kept else family_for(model.spec)
    return {**kept, **family.config(model.spec)}


def tensor_table(model: Decoder) -> dict[ParameterPath, Tensor]:
    """The Hugging Face name of each parameter, layer by layer; the model may be abstract."""
    family = family_of(json.loads(model.hf_config)) if model.hf_config else family_for(model.spec)
    return tensors_of(dict(nnx.to_flat_state(nnx.state(model, nnx.Param))), family.names)


def named_tensors(model: Decoder) -> Iterator[tuple[Tensor, jax.Array]]:
    """Every parameter with its Hugging Face name, in the module's layout (``transposed`` says if files turn it)."""
    values = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for path, tensor in tensor_table(model).items():
        yield tensor, values[path][...]


def _compute_type(dtype: str) -> jnp.dtype:
    return _float_type("dtype", dtype, COMPUTE_TYPES)


def _float_type(name: str, dtype: str, known: tuple[str, ...]) -> jnp.dtype:
    if dtype not in known:
        raise ConfigError(f"{name}: got {dtype!r}, takes one of {', '.join(known)}")
    return jnp.dtype(dtype)


def _check_tensors(model: Decoder, tensors: dict[ParameterPath, Tensor], files: WeightFiles, folder: Path) -> None:
    """Raises ConfigError with every tensor that is missing, unexpected, misshapen or of a type we do not read."""
    state = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    wanted = {
        tensor.name: state[path].shape[::-1] if tensor.transposed else state[path].shape
        for path, tensor in tensors.items()
    }
    extra = {name for name in files.names() - set(wanted) if not HARMLESS_EXTRAS.fullmatch(name)}
    problems = [f"{name} is missing" for name in wanted if name not in files.names()]
    if model.spec.tie_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        if not files.same("lm_head.weight", "model.embed_tokens.weight"):
            problems.append("lm_head.weight differs from model.embed_tokens.weight, though tie_word_embeddings is true")
    problems += [f"{name} is unexpected" for name in sorted(extra)]
    for name in sorted(set(wanted) & files.names()):
        stored = files.stored(name)
        if stored.shape != wanted[name]:
            problems.append(f"{name} has shape {list(stored.shape)} instead of {list(wanted[name])}")
        if stored.type not in FLOAT_TYPES:
            problems.append(f"{name} has type {stored.type}, takes {', '.join(FLOAT_TYPES)}")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ConfigError(f"{folder}: the weights do not fit config.json: {'; '.join(problems[:10])}{more}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {type(value).__name__} instead of an object with fields")
    return value
