"""Rows of a dataset become prompts: columns, chat template, tokens, length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from jaxrft.config import ConfigError
from jaxrft.data.functions import first_line, nearest
from jaxrft.data.records import Prompt
from jaxrft.data.tokenizers import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
# What every reward is given beside the columns.
REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids")


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """The prompts of a dataset.

    Attributes:
        prompts: in the dataset's order.
        dropped: rows left out because their prompt is too long.
    """

    prompts: list[Prompt]
    dropped: int = 0


def make_prompts(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str],
    system_prompt: str | None = None,
    max_prompt_length: int,
    overlong: Literal["drop", "error"] = "drop",
    name: str = "train",
) -> PromptSet:
    """Reads a dataset's rows as prompts.

    A prompt that is a list of chat messages goes through the tokenizer's chat template, with the
    opening of the assistant's turn at its end. Text is fed as it is, unless there is a system prompt:
    then it is the user's message after it. Text gets the tokens that the tokenizer puts before one
    (such as a beginning-of-sequence token), never an end-of-sequence token; a template writes its own.

    Args:
        rows: the dataset; each row maps columns to values.
        tokenizer: writes the tokens, and holds the chat template.
        columns: our name of a column -> its name in the dataset. A mapped column goes by our name alone.
        system_prompt: put before every prompt.
        max_prompt_length: tokens of a prompt at most.
        overlong: leave longer prompts out and count them, or refuse them.
        name: ``train`` or ``eval``, for errors.

    Raises:
        ConfigError: no rows, a column that is not there, a prompt that is neither text nor messages or
            is empty, no chat template where one is needed, or no prompt that is short enough.
    """
    field = f"data.{name}"
    if len(rows) == 0:
        raise ConfigError(f"{field}: the dataset is empty")
    names = _column_names(rows, columns, field)
    prompts: list[Prompt] = []
    dropped = 0
    for index, row in enumerate(rows):
        values = {ours: row.get(theirs) for ours, theirs in names.items()}
        prompt = _make_prompt(index, values, tokenizer, system_prompt, f"{field}: row {index}")
        if len(prompt.token_ids) <= max_prompt_length:
            prompts.append(prompt)
        elif overlong == "drop":
            dropped += 1
        else:
            raise ConfigError(
                f"{field}: row {index}: the prompt has {len(prompt.token_ids)} tokens, max_prompt_length is "
                f"{max_prompt_length}; raise it or set data.overlong_prompts to drop"
            )
    if not prompts:
        raise ConfigError(
            f"{field}: all {dropped} prompts have more than max_prompt_length ({max_prompt_length}) tokens"
        )
    return PromptSet(prompts, dropped)


def _column_names(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], field: str) -> dict[str, str]:
    """Our name -> the dataset's, for every column."""
    there = getattr(rows, "column_names", None) or list(dict.fromkeys(key for row in rows for key in row))
    for ours, theirs in {"prompt": "prompt", **columns}.items():
        if theirs not in there:
            raise ConfigError(
                f"{field}: no column {theirs!r}; the dataset has {', '.join(map(str, there))}{nearest(theirs, there)}; "
                f"set data.columns, as in {{{ours}: name in the dataset}}"
            )
    mapped = set(columns.values())
    names = {key: key for key in there if key not in mapped} | dict(columns)
    for key in REWARD_ARGUMENTS:
        if key in names:
            raise ConfigError(
                f"{field}: a column is named {key!r}, as is an argument of every reward; set data.columns, "
                f"as in {{other_name: {names[key]}}}"
            )
    return names


def _make_prompt(
    index: int, values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, where: str
) -> Prompt:
    value = values.pop("prompt")
    if value is None or (isinstance(value, str | list) and not value) or (isinstance(value, str) and value.isspace()):
        raise ConfigError(f"{where}: the prompt is {'missing' if value is None else 'empty'}")
    if isinstance(value, str) and system_prompt is None:
        text = value
        token_ids = _encode_start(tokenizer, text, where)
    else:
        messages = _check_messages([{"role": "user", "content": value}] if isinstance(value, str) else value, where)
        text = apply_chat_template(tokenizer, _with_system(messages, system_prompt, where), where)
        token_ids = encode_text(tokenizer, text, where)
    if not token_ids:
        raise ConfigError(f"{where}: the prompt has no tokens")
    return Prompt(index=index, value=value, text=text, token_ids=token_ids, columns=values)


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str) -> str:
    """What the model reads of chat messages, up to the opening of the assistant's turn.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            f"{where}: chat messages need a chat template and the tokenizer has none; set data.chat_template"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        raise ConfigError(f"{where}: the chat template refused the messages: {first_line(error)}") from error


def _encode_start(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> list[int]:
    """Tokens of a text that goes on: without the end that some tokenizers put to it."""
    token_ids = encode_text(tokenizer, text, where, special_tokens=True)
    if token_ids[-1:] == [tokenizer.eos_token_id]:
        bare = encode_text(tokenizer, text, where)
        if token_ids[:-1][-len(bare) :] == bare:  # the end is the tokenizer's, not the text's own
            token_ids.pop()
    return token_ids


def _check_messages(value: Any, where: str) -> Messages:
    if not isinstance(value, list) or not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in value):
        raise ConfigError(
            f"{where}: the prompt is neither text nor a list of messages with role and content: {str(value)[:80]}"
        )
    if value[-1]["role"] == "assistant":
        raise ConfigError(f"{where}: the prompt ends with the assistant's message; it must end where the answer begins")
    return value


def _with_system(messages: Messages, system_prompt: str | None, where: str) -> Messages:
    if system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise ConfigError(f"{where}: the prompt has a system message of its own; remove data.system_prompt")
    return [{"role": "system", "content": system_prompt}, *messages]
