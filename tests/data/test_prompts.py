"""Rows become prompts: templates, special tokens, columns, lengths, errors."""

import pytest

from jaxrft.config import ConfigError
from jaxrft.data import load_tokenizer, make_prompts

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["<pad>", "<s>", "</s>", "<end>", "<|user|>", "<|system|>", "<|assistant|>", "be", "kind", "one", "two", " "]


@pytest.fixture(scope="module")
def words():
    """A tokenizer that puts <s> before a text and </s> behind it, as some do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = ["<end>", "<|user|>", "<|system|>", "<|assistant|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special,
        chat_template=CHATML,
    )


@pytest.fixture(scope="module")
def bare():
    tokenizer = load_tokenizer("characters:0123456789+= ")
    tokenizer.chat_template = None
    return tokenizer


def ids(*tokens):
    return [WORDS.index(token) for token in tokens]


def one(rows, tokenizer, **options):
    defaults = {"columns": {}, "system_prompt": None, "max_prompt_length": 100}
    (prompt,) = make_prompts(rows, tokenizer, **{**defaults, **options}).prompts
    return prompt


def test_text_is_fed_as_it_is_with_the_start_token_and_no_end(words):
    prompt = one([{"prompt": "one two", "answer": "2"}], words)
    assert prompt.text == prompt.value == "one two"
    assert prompt.token_ids == ids("<s>", "one", " ", "two")
    assert prompt.columns == {"answer": "2"}


def test_an_end_token_that_the_text_itself_writes_stays(words):
    assert one([{"prompt": "one </s>"}], words).token_ids == ids("<s>", "one", " ", "</s>")


def test_messages_go_through_the_template_without_further_special_tokens(words):
    messages = [{"role": "user", "content": "one"}]
    prompt = one([{"prompt": messages}], words)
    assert prompt.value == messages
    assert prompt.text == "<|user|>one<end><|assistant|>"
    assert prompt.token_ids == ids("<|user|>", "one", "<end>", "<|assistant|>")


def test_a_system_prompt_goes_first_and_makes_text_a_users_message(words):
    for value in ("one", [{"role": "user", "content": "one"}]):
        prompt = one([{"prompt": value}], words, system_prompt="be kind")
        assert prompt.text == "<|system|>be kind<end><|user|>one<end><|assistant|>"
        assert prompt.value == value
        assert prompt.token_ids[:4] == ids("<|system|>", "be", " ", "kind")
    own = [{"role": "system", "content": "be"}, {"role": "user", "content": "one"}]
    with pytest.raises(ConfigError, match=r"row 0: .*system message of its own"):
        one([{"prompt": own}], words, system_prompt="be kind")


def test_without_a_template_text_works_and_messages_say_what_to_set(bare):
    assert one([{"prompt": "1+1="}], bare).token_ids == bare("1+1=")["input_ids"]
    for rows, system in (([{"prompt": [{"role": "user", "content": "1"}]}], None), ([{"prompt": "1"}], "2")):
        with pytest.raises(ConfigError, match=r"data\.train: row 0: .*set data\.chat_template"):
            one(rows, bare, system_prompt=system)


def test_columns_are_renamed_and_the_rest_handed_on(bare):
    rows = [{"question": "1+1=", "solution": 2, "answer": "old", "level": None, "prompt": "unused"}, {"question": "2="}]
    made = make_prompts(rows, bare, columns={"prompt": "question", "answer": "solution"}, max_prompt_length=9)
    assert [p.value for p in made.prompts] == ["1+1=", "2="]
    assert [p.columns for p in made.prompts] == [{"answer": 2, "level": None}, {"answer": None, "level": None}]


def test_rows_may_be_a_dataset(bare):
    import datasets

    made = make_prompts(
        datasets.Dataset.from_list([{"q": "1"}, {"q": "2"}]), bare, columns={"prompt": "q"}, max_prompt_length=9
    )
    assert [(p.index, p.value, p.columns) for p in made.prompts] == [(0, "1", {}), (1, "2", {})]


def test_long_prompts_are_dropped_and_counted_or_refused(bare):
    rows = [{"prompt": "1" * n} for n in (3, 5, 4, 6, 1)]
    made = make_prompts(rows, bare, columns={}, max_prompt_length=4)
    assert [(p.index, len(p.token_ids)) for p in made.prompts] == [(0, 3), (2, 4), (4, 1)]
    assert made.dropped == 2
    with pytest.raises(ConfigError, match=r"data\.eval: row 1: the prompt has 5 tokens, max_prompt_length is 4"):
        make_prompts(rows, bare, columns={}, max_prompt_length=4, overlong="error", name="eval")
    with pytest.raises(ConfigError, match=r"all 5 prompts have more than max_prompt_length \(0\)"):
        make_prompts(rows, bare, columns={}, max_prompt_length=0)


USER = {"role": "user", "content": "1"}


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], {}, r"data\.train: the dataset is empty"),
        (
            [{"promt": "1", "x": 1}],
            {},
            r"no column 'prompt'; the dataset has promt, x; did you mean promt\?; set data\.columns",
        ),
        ([{"prompt": "1"}], {"answer": "solution"}, "no column 'solution'; the dataset has prompt; .*{answer: "),
        ([{"prompt": "1", "completions": 1}], {}, r"'completions'.*set data\.columns, as in {other_name: completions}"),
        ([{"prompt": "1"}, {"prompt": None}], {}, "row 1: the prompt is missing"),
        ([{"prompt": "1"}, {"prompt": " \n"}], {}, "row 1: the prompt is empty"),
        ([{"prompt": []}], {}, "row 0: the prompt is empty"),
        ([{"prompt": 5}], {}, "row 0: the prompt is neither text nor a list of messages"),
        ([{"prompt": ["1"]}], {}, "row 0: the prompt is neither text nor a list of messages"),
        (
            [{"prompt": [USER, {"role": "assistant", "content": "2"}]}],
            {},
            "row 0: the prompt ends with the assistant's",
        ),
        ([{"prompt": "1"}, {"prompt": "1x"}], {}, "row 1: the tokenizer cannot write '1x': it has no token for 'x'"),
    ],
)
def test_bad_rows_are_named(bare, rows, columns, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_prompts(rows, bare, columns=columns, max_prompt_length=9)
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_is_quoted(words):
    tokenizer = load_tokenizer("characters:1", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="row 0: the chat template refused the messages: roles must alternate"):
        one([{"prompt": [USER]}], tokenizer)
