"""Builds what a trainer is made of, from a config or from what the caller brings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxrft import algorithms as alg
from jaxrft import data, models, rewards
from jaxrft.config import ConfigError, RLConfig
from jaxrft.config.rl import RECIPE_FIELDS
from jaxrft.data.functions import first_line, load_function, names_function
from jaxrft.data.prompts import PromptSet
from jaxrft.models.decoder import Decoder
from jaxrft.models.spec import DecoderSpec
from jaxrft.models.stack import Remat
from jaxrft.parallel import Layout, make_mesh
from jaxrft.rollout import Engine, NativeEngine
from jaxrft.training.recipe_checks import check_recipe


def build_tokenizer(config: RLConfig, model: str | Path | Decoder | None, given: Any) -> Any:
    """The tokenizer given, the one the config names, or the model's own."""
    if given is not None:
        return given
    source = config.model.tokenizer or (model if isinstance(model, str | Path) else config.model.path)
    if source is None:
        raise ConfigError("model.tokenizer: got None; a model given as a module needs tokenizer=... or model.tokenizer")
    return data.load_tokenizer(str(source), config.data.chat_template)


def build_layout(config: RLConfig) -> Layout:
    """Mesh and strategy.

    Raises:
        ConfigError: there are fewer devices.
    """
    sizes = config.parallel
    try:
        mesh = make_mesh(sizes.replica, sizes.fsdp, sizes.sequence, sizes.tensor)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Layout(mesh, sizes.chosen_strategy)


def model_spec(config: RLConfig, model: str | Path | Decoder | None, tokenizer: Any) -> DecoderSpec:
    """What the model will be, before it is loaded; it must have room for the tokens and their number.

    Raises:
        ConfigError: it has not, its heads cannot be divided among the devices, or there is no such model.
    """
    spec = model.spec if isinstance(model, Decoder) else _read_spec(config, model, tokenizer)
    if len(tokenizer) > spec.vocab_size:
        raise ConfigError(
            f"model.tokenizer: it has {len(tokenizer)} tokens, the model's vocabulary {spec.vocab_size}; "
            "use the model's own tokenizer"
        )
    longest = config.max_prompt_length + config.max_completion_length
    if longest > spec.max_positions:
        raise ConfigError(
            f"max_completion_length: prompts of {config.max_prompt_length} tokens (max_prompt_length) and completions "
            f"of {config.max_completion_length} are longer than the {spec.max_positions} that the model is made "
            "for (max_position_embeddings); lower one of them"
        )
    _check_divides(config, spec)
    return spec


def _read_spec(config: RLConfig, model: str | Path | None, tokenizer: Any) -> DecoderSpec:
    source = model if model is not None else config.model.path
    if source is None:
        return models.spec_from_config(_described(config, tokenizer))
    try:
        return models.spec_of(str(source))
    except ConfigError as error:
        raise ConfigError(f"model.path: {error}") from error


def build_model(
    config: RLConfig, model: str | Path | Decoder | None, tokenizer: Any, layout: Layout | None, remat: str = "none"
) -> Decoder:
    """The module given, or one loaded or made as the config says.

    Args:
        layout: where its parameters lie; None: on the default device.
        remat: policy, as planned.
    """
    built = model if isinstance(model, Decoder) else _make_model(config, model, tokenizer, layout)
    built.remat = Remat(remat, tuple(config.memory.remat_names))
    built.scan_layers = config.memory.scan_layers
    built.attention = config.model.attention
    return built


def _make_model(config: RLConfig, model: str | Path | None, tokenizer: Any, layout: Layout | None) -> Decoder:
    source = model if model is not None else config.model.path
    options: dict[str, Any] = {"dtype": config.model.dtype, "param_dtype": config.model.param_dtype, "layout": layout}
    if source is None:
        return models.from_config(_described(config, tokenizer), seed=config.seed, **options)
    try:
        return models.load(str(source), **options)
    except ConfigError as error:
        raise ConfigError(f"model.path: {error}") from error


def _described(config: RLConfig, tokenizer: Any) -> dict[str, Any]:
    """The config.json of a model made from scratch."""
    if config.model.scratch is None:
        raise ConfigError("model.path: got None; name a folder or hub model, or describe one in model.scratch")
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {"vocab_size": len(tokenizer), **special, **config.model.scratch}


def _check_divides(config: RLConfig, spec: DecoderSpec) -> None:
    """Refuses devices among which the model's heads cannot be divided: each would compute all of them.

    Raises:
        ConfigError: such devices are asked for.
    """
    tensor = config.parallel.tensor
    for what, size in {"attention heads": spec.num_heads, "feed-forward channels": spec.intermediate_size}.items():
        if size % tensor:
            fitting = [n for n in range(tensor, 0, -1) if spec.num_heads % n == 0 and spec.intermediate_size % n == 0]
            raise ConfigError(
                f"parallel.tensor: got {tensor}, which does not divide the model's {size} {what}; takes {fitting[0]}"
            )


def build_prompts(config: RLConfig, dataset: Any, tokenizer: Any, name: str) -> PromptSet | None:
    """Prompts of the dataset given or of the one that ``data.<name>`` names; None where there is neither."""
    settings = config.data
    source = dataset if dataset is not None else getattr(settings, name)
    if source is None:
        return None
    split, limit = {
        "train": (settings.train_split, settings.max_train_samples),
        "eval": (settings.eval_split, settings.max_eval_samples),
    }[name]
    if settings.arguments and not any(
        isinstance(s, str) and names_function(s) for s in (settings.train, settings.eval)
    ):
        raise ConfigError("data.arguments: set, but neither data.train nor data.eval is a function that takes them")
    rows = data.load_rows(source, split=split, arguments=settings.arguments, limit=limit, name=f"data.{name}")
    return data.make_prompts(
        rows,
        tokenizer,
        columns=settings.columns,
        system_prompt=settings.system_prompt,
        max_prompt_length=config.max_prompt_length,
        overlong=settings.overlong_prompts,
        name=name,
    )


def build_rewards(config: RLConfig, functions: Sequence[Callable] | Callable | None) -> rewards.RewardSet:
    """The rewards given, or those the config names."""
    if functions is None:
        settings = config.rewards
        if not settings.functions:
            raise ConfigError("rewards.functions: got none; name at least one, such as exact_match or file.py:function")
        functions = rewards.load_rewards(settings.functions, settings.arguments, settings.timeout)
    functions = list(functions) if isinstance(functions, Sequence) else [functions]
    if config.reward_weights is not None and len(config.reward_weights) != len(functions):
        raise ConfigError(f"reward_weights: got {len(config.reward_weights)} weights for {len(functions)} rewards")
    return rewards.RewardSet(functions, config.reward_weights, config.rewards.on_error)


def build_recipe(config: RLConfig) -> alg.Recipe:
    """The named recipe, or one's own, with the config's changes."""
    name = config.algorithm.recipe
    recipe = _own_recipe(name) if names_function(name) else _explained(config, lambda: alg.recipe(name))
    changes = {"constant_length": config.max_completion_length, **config.algorithm_overrides}
    recipe = _explained(config, lambda: recipe.with_overrides(changes))
    check_recipe(config, recipe)
    return recipe


def _own_recipe(name: str) -> alg.Recipe:
    function = load_function(name, "algorithm.recipe")
    try:
        recipe = function()
    except Exception as error:
        raise ConfigError(f"algorithm.recipe: {name} raised {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(recipe, alg.Recipe):
        raise ConfigError(f"algorithm.recipe: {name} returned {type(recipe).__name__}, takes a Recipe")
    return recipe


def _explained(config: RLConfig, build: Callable[[], alg.Recipe]) -> alg.Recipe:
    try:
        return build()
    except ValueError as error:
        field, colon, rest = str(error).partition(":")
        # Named as the user named it.
        given = [top for top, nested in RECIPE_FIELDS.items() if nested == field and getattr(config, top) is not None]
        raise ConfigError(f"{given[0] if given else f'algorithm.{field}'}{colon}{rest}") from error


def build_engine(config: RLConfig, model: Decoder, tokenizer: Any, folder: Path) -> Engine:
    """The engine, with room for the longest prompt and completion.

    Args:
        config: of the run.
        model: whose completions are wanted.
        tokenizer: the model's.
        folder: of the run; servers that are started log there.

    Raises:
        ConfigError: a server cannot be started.
        EngineError: a server does not answer.
    """
    if config.rollout.engine == "vllm":
        from jaxrft.rollout.vllm.launch import engine_from

        return engine_from(config, model, tokenizer, folder / "logs", partial(print, flush=True))
    return NativeEngine(
        model,
        tokenizer,
        max_slots=config.rollout.max_slots,
        max_length=config.max_prompt_length + config.max_completion_length,
        decode_chunk=config.rollout.decode_chunk,
        max_prompt_length=config.max_prompt_length,
        quantization=config.rollout.quantization,
    )
