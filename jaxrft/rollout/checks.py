"""What an engine refuses before it starts: each in one line that says which request, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from jaxrft.config.base import ConfigError
from jaxrft.rollout.records import Request, SamplingParams

# What an engine may let go of, and take back.
TAGS = ("weights", "kv_cache")


def check_sleep_level(level: int) -> None:
    """Refuses levels of sleep that there are not.

    Raises:
        ConfigError: it is not 1 or 2.
    """
    if level not in (1, 2):
        raise ConfigError(f"level: got {level!r}, takes 1 (caches) or 2 (caches and weights)")


def tags_to_wake(tags: Sequence[str] | None) -> tuple[str, ...]:
    """The tags given, or all.

    Raises:
        ConfigError: there is no such tag.
    """
    unknown = set(tags or ()) - set(TAGS)
    if unknown:
        raise ConfigError(f"tags: got {sorted(unknown)}, takes {' and '.join(TAGS)}")
    return TAGS if tags is None else tuple(tags)


def check_requests(requests: Sequence[Request], *, max_length: int, vocab_size: int) -> None:
    """Refuses prompts that leave no room for a token, and tokens that the model does not know.

    Raises:
        ConfigError: names the request by its place in the list.
    """
    for place, request in enumerate(requests):
        length = len(request.prompt_ids)
        if length >= max_length:
            raise ConfigError(
                f"request {place}: its prompt has {length} tokens, this engine takes at most {max_length - 1}: "
                "shorten the prompt, or make the engine with a larger max_length"
            )
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab_size:
            bad = next(token for token in request.prompt_ids if not 0 <= token < vocab_size)
            raise ConfigError(
                f"request {place}: its prompt holds token {bad}, the model has tokens 0 to {vocab_size - 1}: "
                "use the model's own tokenizer"
            )


def check_stops(sampling: SamplingParams, stop_ids: Sequence[int], *, vocab_size: int, has_tokenizer: bool) -> None:
    """Refuses stop texts that nothing can read, and stop tokens that the model does not have.

    Raises:
        ConfigError: says which.
    """
    if sampling.stop and not has_tokenizer:
        raise ConfigError("stop: texts need an engine with a tokenizer: pass tokenizer=, or use stop_token_ids")
    bad = [token for token in stop_ids if not 0 <= token < vocab_size]
    if bad:
        raise ConfigError(f"stop token {bad[0]}: the model has tokens 0 to {vocab_size - 1}: use its own tokenizer's")
    if sampling.min_tokens > 0 and len(stop_ids) == vocab_size:
        raise ConfigError("min_tokens: every token of the model is a stop token, so that none could be drawn")
