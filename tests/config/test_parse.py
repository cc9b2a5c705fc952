"""YAML files, overrides, and what is said when they are wrong."""

import dataclasses
import random
import re
import typing

import pytest
import yaml

from jaxrft.config import ConfigError, RLConfig, Section
from jaxrft.config.hints import OTHER_NAMES, nearest
from jaxrft.config.parse import from_dict, known_keys, load_yaml, parse, to_dict, to_yaml
from jaxrft.config.yaml_text import dump, load_text

BASE = """\
learning_rate: 1e-5   # a number, though YAML 1.1 says text
model:
  scratch: {model_type: qwen2, hidden_size: 32}
  tokenizer: characters:0123
data:
rewards:
  functions: [exact_match, length]
  arguments:
    length: {target: 2, scale: 1.5}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(BASE)
    return str(path)


def error_of(arguments) -> str:
    with pytest.raises(ConfigError) as error:
        parse(arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_file(config_file):
    config = parse([config_file])
    assert config.learning_rate == 1e-5
    assert config.model.scratch == {"model_type": "qwen2", "hidden_size": 32}
    assert config.data == RLConfig().data  # An empty section.
    assert config.num_generations == RLConfig().num_generations


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("learning_rate=3e-4", "learning_rate", 3e-4),
        ("max_steps=1e3", "max_steps", 1000),
        ("rollout.max_slots=32", "rollout.max_slots", 32),
        ("eval_steps=null", "eval_steps", None),
        ("save_steps=", "save_steps", None),
        ("output_dir=a=b", "output_dir", "a=b"),
        ("report_to=[wandb, tensorboard]", "report_to", ["wandb", "tensorboard"]),
        ("report_to=wandb", "report_to", ["wandb"]),
        ("rollout.stop=[no, '3', \"\\n\"]", "rollout.stop", ["no", "3", "\n"]),
        ("rollout={max_slots: 7}", "rollout.max_slots", 7),
        ("model.scratch.hidden_size=64", "model.scratch", {"model_type": "qwen2", "hidden_size": 64}),
        ("model.scratch={model_type: llama}", "model.scratch", {"model_type": "llama"}),
        ("data.arguments.x=1", "data.arguments", {"x": 1}),
        ("data.arguments.a.b=[1]", "data.arguments", {"a": {"b": [1]}}),
        ("data.columns.prompt=question", "data.columns", {"prompt": "question"}),
        ("rewards.arguments.length.target=3", "rewards.arguments", {"length": {"target": 3, "scale": 1.5}}),
        ("rewards.arguments={}", "rewards.arguments", {}),
        ("model.tokenizer=characters:0123456789+=", "model.tokenizer", "characters:0123456789+="),
    ],
)
def test_override(config_file, override, path, value):
    found = parse([config_file, override])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win(config_file):
    config = parse([config_file, "rollout.max_slots=3", "rollout={decode_chunk: 2}", "rollout.max_slots=4"])
    assert (config.rollout.max_slots, config.rollout.decode_chunk) == (4, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_slots=3", "max_slots: no such field (did you mean rollout.max_slots?)"),
        ("rolout.max_slots=3", "rolout.max_slots: no such field (did you mean rollout.max_slots?)"),
        ("learning_rat=3", "learning_rat: no such field (did you mean learning_rate?)"),
        ("use_vllm=true", "use_vllm: no such field (did you mean rollout.engine?)"),
        (
            "rollout.temperature=2",
            "rollout.temperature: no such field (did you mean temperature or evaluation.temperature?)",
        ),
        ("qzx=1", "qzx: no such field (--help lists all)"),
        ("learning_rate.x=1", "learning_rate.x: no such field; learning_rate takes a number"),
        ("rollout.max_slots=0", "rollout.max_slots: got 0, takes an integer of at least 1"),
        ("rollout.max_slots=many", "rollout.max_slots: got 'many', takes an integer of at least 1"),
        ("evaluation.temperature=.nan", "evaluation.temperature: got nan, takes a number of at least 0"),
        ("eval_on_start=yes", "eval_on_start: got 'yes', takes true or false"),
        (
            "rollout=3",
            "rollout: got 3, takes a mapping of its fields (engine, max_slots, decode_chunk, quantization, ...)",
        ),
        ("model.path=x", "model.path: set with scratch; "),
        ("rollout.min_tokens=999", "rollout.min_tokens: got 999, takes at most max_completion_length (256)"),
        ("num_generations=3", "num_generations: got 3, which does not divide the 8 completions of a rollout"),
        ("model.scratch={a", "model.scratch={a: not valid YAML: "),
        ("data.arguments.x={a: 1, a: 2}", "data.arguments.x={a: 1, a: 2}: not valid YAML: a is given twice"),
        (
            "rewards.arguments.length.target.x=1",
            "rewards.arguments.length.target.x: rewards.arguments.length.target is 2",
        ),
        ("rewards.arguments.length=1", "rewards.arguments: got {'length': 1}, takes a mapping of names to mappings"),
        ("rollout..x=1", "rollout..x=1: the field's name is not complete"),
        ("=1", "=1: the field's name is not complete"),
        ("learning_rate", "learning_rate: takes the form key=value"),
        ("other.yaml", "other.yaml: takes the form key=value, such as learning_rate=1e-6; only one config file"),
        ("--learning-rate=1e-5", "--learning-rate=1e-5: write it without dashes: learning_rate=1e-5"),
    ],
)
def test_wrong_override(config_file, override, message):
    assert error_of([config_file, override]).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nmax_slots: 3\n", "a: no such field"),
        (
            "max_slots: 3\nrolout:\n  max_slots: 3\n",
            "max_slots: no such field (did you mean rollout.max_slots?); rolout: no",
        ),
        ("rollout:\n  max_slot: 3\n", "rollout.max_slot: no such field (did you mean rollout.max_slots?)"),
        ("rollout:\n  max_slots: 0\n", "rollout.max_slots: got 0, takes an integer of at least 1"),
        ("rollout: 3\n", "rollout: got 3, takes a mapping of its fields"),
        ("5: 3\n", "5: no such field"),
        (
            "seed: 1\nrollout:\n  max_slots: 1\n  max_slots: 2\n",
            "FILE, line 4: not valid YAML: max_slots is given twice",
        ),
        ("seed: 1\nseed: 2\n", "FILE, line 2: not valid YAML: seed is given twice"),
        ("seed: 1\n model: 3\n", "FILE, line 2: not valid YAML: mapping values are not allowed here"),
        ("seed: 1\nrollout:\n\tmax_slots: 3\n", "FILE, line 3: not valid YAML: found character '\\t'"),
        ("seed: [1\nmodel: 3", "FILE, line 2: not valid YAML: "),
        ("- seed", "FILE: holds a list, takes a mapping of fields to values, as in 'learning_rate: 1e-6'"),
        ("seed", "FILE: holds 'seed', takes a mapping"),
        ("seed: 1\x00", "FILE: not valid YAML: "),
        (b"\xff\xfe\x00", "FILE: not a text file (UTF-8)"),
    ],
)
def test_wrong_file(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert error_of([str(path)]).startswith(message.replace("FILE", str(path)))


def test_missing_file(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    looked = f"(looked for {tmp_path}/"
    assert error_of(["quickstrt.yaml"]).endswith(f"{looked}quickstrt.yaml); did you mean configs/quickstart.yaml?")
    assert error_of(["configs/quickstart.yml"]).endswith("; did you mean configs/quickstart.yaml?")
    assert error_of(["other.yaml"]) == f"other.yaml: no such config file {looked}other.yaml)"
    assert error_of(["configs"]) == "configs: is a folder; takes a YAML file"
    assert error_of(["seed=3"]) == "seed=3: the first argument takes a config file; overrides follow it"
    assert error_of([]) == "no config file given"
    assert load_yaml("configs/quickstart.yaml") == {}


def random_value(hint, random: random.Random):
    """Any value of a field's type, awkward ones preferred."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    texts = [
        "no",
        "1e-5",
        "null",
        "~",
        "true",
        " x ",
        "a: b",
        "a\nb: #c\n ",
        "é\u2028",
        "'\"\\",
        "",
        "2020-01-01",
        "<<",
        "- x",
    ]
    if hint is typing.Any:
        hint = random.choice([int, float, str, bool, type(None), list[str], dict[str, typing.Any]])
        return random_value(hint, random)
    if origin is typing.Literal:
        return random.choice(arguments)
    if origin is list:
        return [random_value(arguments[0], random) for _ in range(random.randrange(3))]
    if origin is dict:
        return {random_value(str, random): random_value(arguments[1], random) for _ in range(random.randrange(3))}
    if arguments:
        return random_value(random.choice(arguments), random)
    scalars = {
        int: random.randrange(1, 2**31),
        float: random.random() * 10 ** random.randrange(-9, 0),
        bool: random.random() < 0.5,
    }
    return random.choice(texts) if hint is str else scalars.get(hint)


def random_section(section: type[Section], random: random.Random) -> Section:
    hints = typing.get_type_hints(section)
    while True:
        chosen = {
            field.name: random_section(hints[field.name], random)
            if issubclass(hints[field.name] if isinstance(hints[field.name], type) else int, Section)
            else random_value(hints[field.name], random)
            for field in dataclasses.fields(section)
            if random.random() < 0.3
        }
        try:
            return section(**chosen)
        except ConfigError:  # Out of a field's range, or fields that cannot go together: draw again.
            continue


def test_round_trip(tmp_path):
    rng, path = random.Random(0), tmp_path / "config.yaml"
    for _ in range(60):
        config = random_section(RLConfig, rng)
        path.write_text(to_yaml(config), encoding="utf-8")
        assert parse([str(path)]) == config
        assert from_dict(to_dict(config)) == config
        assert set(to_dict(config)) == {field.name for field in dataclasses.fields(config)}


def test_to_dict_is_a_copy():
    config = from_dict({"data": {"arguments": {"x": [1]}}})
    to_dict(config)["data"]["arguments"]["x"].append(2)
    assert config.data.arguments == {"x": [1]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e-05", 1e-5),
        ("-.5", -0.5),
        ("3.", 3.0),
        (".inf", float("inf")),
        ("010", 10),
        ("0x1f", 31),
        ("1_000", "1_000"),
        ("no", "no"),
        ("On", "On"),
        ("true", True),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("a: &x {p: 1}\nb: {<<: *x, q: 2}", {"a": {"p": 1}, "b": {"p": 1, "q": 2}}),
        ("a: &x {p: 1}\nb: {<<: *x, p: 2}", {"a": {"p": 1}, "b": {"p": 2}}),
    ],
)
def test_scalars(text, value):
    loaded = load_text(text, "text")
    assert loaded == value
    assert type(loaded) is type(value)


def test_dumped_text_is_text_to_every_reader():
    texts = ["no", "1e-5", "1:30", "2024-01-01", "null", "0o7", "1_000", "=", "x\ny\n", "on", "0x1f", ".5"]
    assert load_text(dump(texts), "") == texts
    assert yaml.safe_load(dump(texts)) == texts


def test_hints_name_fields_that_exist():
    known = known_keys()
    assert set(OTHER_NAMES.values()) <= set(known)
    assert not set(OTHER_NAMES) & set(known)
    for name, ours in OTHER_NAMES.items():
        assert nearest(name, known)[0] == ours, name


def test_every_field_is_found_by_a_typing_error():
    """Two letters swapped in any field's name: the field itself is among those named."""
    known, rng = known_keys(), random.Random(0)
    for path in known:
        section, dot, name = path.rpartition(".")
        if len(name) < 5:
            continue
        at = rng.randrange(len(name) - 1)
        wrong = section + dot + name[:at] + name[at + 1] + name[at] + name[at + 2 :]
        assert wrong in known or path in nearest(wrong, known), wrong


def test_known_keys_are_all_fields():
    keys = set(known_keys())
    assert {"learning_rate", "rollout", "rollout.max_slots", "rollout.vllm.urls", "algorithm.kl_kind"} <= keys
    assert not [key for key in keys if not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+){0,2}", key)]
