"""Tokenizers: characters round trip, save and load, chat templates, errors."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrft.config import ConfigError
from jaxrft.data import encode_text, load_tokenizer

ALPHABET = "0123456789+= \n\tab<>é\u0301\u2028🙂"


@pytest.fixture(scope="module")
def characters():
    return load_tokenizer("characters:" + ALPHABET)


@given(text=st.text(alphabet=ALPHABET))
@settings(max_examples=200, deadline=None)
def test_each_character_is_one_token_and_decoding_gives_the_text_back(characters, text):
    ids = characters(text)["input_ids"]
    assert ids == [2 + ALPHABET.index(c) for c in text]
    assert characters.decode(ids) == text
    assert characters.batch_decode([ids], skip_special_tokens=True) == [text]


def test_special_tokens_stand_before_the_alphabet_and_are_not_added(characters):
    assert (characters.pad_token_id, characters.eos_token_id) == (0, 1)
    assert len(characters) == len(ALPHABET) + 2
    assert characters("12")["input_ids"] == characters("12", add_special_tokens=False)["input_ids"]
    assert characters.decode([4, 1, 0], skip_special_tokens=True) == "2"


def test_a_saved_tokenizer_is_the_same(characters, tmp_path):
    characters.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "12 +  3=\na\u0301"
    assert loaded(text)["input_ids"] == characters(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (1, 0, len(characters))
    messages = [{"role": "system", "content": "1+"}, {"role": "user", "content": "2="}]
    assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "1+2="
    with pytest.raises(ConfigError, match="no token for 'z'"):
        encode_text(loaded, "1z", "answer")


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
def test_a_saved_tokenizer_is_the_same_beside_a_model(characters, tmp_path, family):
    """A folder with a model's config: the family's own tokenizer class would add special tokens of its own."""
    characters.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == characters.get_vocab()
    assert loaded.all_special_tokens == characters.all_special_tokens
    assert loaded("12+3=")["input_ids"] == characters("12+3=")["input_ids"]


def test_text_outside_the_alphabet_is_refused_by_name(characters):
    with pytest.raises(ConfigError, match=r"row 3: the tokenizer cannot write '1\*2\?': it has no token for '\*\?'"):
        encode_text(characters, "1*2?", "row 3")


def test_chat_template_is_text_or_a_file(tmp_path):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    file = tmp_path / "template.jinja"
    file.write_text(template)
    for given_template in (template, str(file)):
        tokenizer = load_tokenizer("characters:abc", given_template)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[user]a"
    with pytest.raises(ConfigError, match=r"data\.chat_template: got 'nowhere\.jinja'.*there is no file /"):
        load_tokenizer("characters:abc", "nowhere.jinja")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("characters:", "no character"),
        ("characters:abcab", "'ab' more than once"),
        ("./nowhere", r"model\.tokenizer: no folder /.*/nowhere$"),
        ("/no/where", "no folder /no/where$"),
        ("org/name", "'org/name': no such folder here, and the hub gave none"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(source, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(source)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"the folder {tmp_path} holds none") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_model_folder_without_a_tokenizer_is_named(tmp_path):
    """transformers would make an empty one of the config.json alone."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 20}')
    with pytest.raises(ConfigError, match=r"model\.tokenizer: .*holds none"):
        load_tokenizer(str(tmp_path))


def test_the_room_needs_neither_jax_nor_advice_about_torch(run_python):
    code = """
import sys
sys.modules["torch"] = None
import jaxrft.data, jaxrft.rewards
from jaxrft.data import load_rows, load_tokenizer, make_prompts, PromptOrder
from jaxrft.rewards import RewardSet, load_rewards
load_tokenizer("characters:ab")
assert not {"jax", "datasets", "math_verify"} & set(sys.modules)
"""
    done = run_python(code)
    assert done.stdout == ""
    assert "PyTorch" not in done.stderr
