"""Tokenizers: of a folder, of the hub, or one token per character."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrft.config import ConfigError
from jaxrft.data.functions import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = "characters:"
# What transformers calls a tokenizer that is its tokenizer.json alone, in its versions 4 and 5.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# For a tokenizer of characters: what the messages say, one after the other.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def load_tokenizer(source: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """A ``transformers`` tokenizer.

    Args:
        source: a folder, a hub name, or ``characters:`` followed by an alphabet: one token for each of
            its characters after ``<pad>`` (0) and ``<eos>`` (1). Text with any other character is an
            error there; see :func:`encode_text`.
        chat_template: Jinja text, or a file that holds it. None keeps the tokenizer's own.

    Raises:
        ConfigError: there is no such folder, tokenizer or template file, or the alphabet is empty or
            has a character twice.
    """
    _import_transformers()
    if source.startswith(CHARACTERS):
        tokenizer = _character_tokenizer(source.removeprefix(CHARACTERS))
    else:
        tokenizer = _pretrained_tokenizer(source)
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    return tokenizer


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, what: str, *, special_tokens: bool = False) -> list[int]:
    """Tokens of a text.

    Args:
        tokenizer: any tokenizer of ``transformers``.
        text: what to encode.
        what: what the text is, for the error.
        special_tokens: also those that the tokenizer puts around a text.

    Raises:
        ConfigError: the tokenizer cannot write the text; names the characters it lacks.
    """
    try:
        return list(tokenizer(text, add_special_tokens=special_tokens)["input_ids"])
    except Exception as error:
        missing = "".join(sorted({c for c in text if not _writes(tokenizer, c)}))
        lacks = f"it has no token for {missing!r}" if missing else first_line(error)
        raise ConfigError(f"{what}: the tokenizer cannot write {text[:80]!r}: {lacks}") from error


def _writes(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    try:
        tokenizer(text, add_special_tokens=False)
    except Exception:
        return False
    return True


def _import_transformers() -> None:
    """Imports ``transformers`` without its advice to install torch, which the trainer does without."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import transformers  # noqa: F401
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _pretrained_tokenizer(source: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(source).expanduser()
    local = folder.is_dir()
    if not local and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ConfigError(f"model.tokenizer: no folder {folder.absolute()}")
    try:
        # Told a model's type, AutoTokenizer takes that family's class, with special tokens of its own, even for a
        # folder that says it is none of them.
        loader = PreTrainedTokenizerFast if local and _is_plain(folder) else AutoTokenizer
        tokenizer = loader.from_pretrained(str(folder) if local else source)
        # Of a folder with a config.json and no tokenizer, transformers makes an empty one.
        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
            raise ValueError("it would have no tokens")
        return tokenizer
    except Exception as error:
        place = f"the folder {folder.absolute()} holds none" if local else "no such folder here, and the hub gave none"
        raise ConfigError(f"model.tokenizer: got {source!r}: {place} ({first_line(error)})") from error


def _is_plain(folder: Path) -> bool:
    """Whether a folder says that its tokenizer is what its tokenizer.json holds, and nothing more."""
    config = folder / "tokenizer_config.json"
    if not (config.is_file() and (folder / "tokenizer.json").is_file()):
        return False
    return json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") in _PLAIN_CLASSES


def _character_tokenizer(alphabet: str) -> PreTrainedTokenizerBase:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    twice = sorted({c for c in alphabet if alphabet.count(c) > 1})
    if not alphabet or twice:
        got = f"{''.join(twice)!r} more than once" if twice else "no character"
        raise ConfigError(
            f"model.tokenizer: got an alphabet with {got}, takes each character once, as in characters:0123456789+="
        )
    # Without an unknown token: text that cannot be written is refused, never quietly changed.
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        chat_template=PLAIN_TEMPLATE,
    )


def _read_template(template: str) -> str:
    if "{" in template or "\n" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"data.chat_template: got {template!r}, takes Jinja text or a file; there is no file {path.absolute()}"
        )
    return path.read_text(encoding="utf-8")
