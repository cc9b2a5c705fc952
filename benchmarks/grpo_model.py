"""Writes the model that all sides of benchmarks/grpo_step.py start from: random weights, and words as tokens."""

from __future__ import annotations

from pathlib import Path

import grpo_case
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from turns import order


def main() -> None:
    wanted = order()
    write(grpo_case.read(wanted["case"]), Path(wanted["folder"]))


def write(case: grpo_case.Case, folder: Path) -> None:
    """A folder in Hugging Face format."""
    from transformers import PreTrainedTokenizerFast

    from jaxrft.models import from_config, save

    save(from_config(case.model, seed=0), folder)
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(case.vocabulary)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


if __name__ == "__main__":
    main()
