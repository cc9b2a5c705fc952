"""Rewards by rule against their formulas, and what an adversary might write."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrft.config import ConfigError
from jaxrft.rewards import exact_match, format_boxed, format_tags, length


def chat(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_exact_match():
    texts, answers = ["46", " 46\n", "46.", "", "46", "x"], ["46", "46", "46", "46", 46, None]
    assert exact_match()(completions=texts, answer=answers) == [1, 1, 0, 0, 1, None]
    assert exact_match()(completions=chat(*texts), answer=answers, prompts=None) == [1, 1, 0, 0, 1, None]
    assert exact_match(strip=False)(completions=texts, answer=answers) == [1, 0, 0, 0, 1, None]
    assert exact_match()(completions=["46", "46.5", "nan"], answer=[46.0, 46.5, float("nan")]) == [1, 1, 1]


def test_exact_match_of_what_a_pattern_finds_last():
    texts = ["<a>1</a><a>46</a>", "<a>46</a><a>1</a>", "46", "<a>\n46 </a>"]
    assert exact_match(extract=r"<a>(.*?)</a>")(completions=texts, answer=["46"] * 4) == [1, 0, 0, 1]
    assert exact_match(extract=r"\d+")(completions=["1 then 46!", "46 then 1"], answer=["46"] * 2) == [1, 0]
    with pytest.raises(ConfigError, match=r"exact_match\.extract: '\(' is no regular expression"):
        exact_match(extract="(")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("\n<think>\na < b\n</think> \n <answer></answer> ", 1),
        ("x<think>a</think><answer>b</answer>", 0),
        ("<think>a</think>x<answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>x", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("<think>a<answer></think>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a</think><answer>b", 0),
        ("</think>a<think><answer>b</answer>", 0),
        ("a</think><answer>b</answer>", 0),
        ("", 0),
    ],
)
def test_format_tags(text, score):
    assert format_tags()(completions=[text]) == [score]
    assert format_tags()(completions=chat(text)) == [score]


def test_format_tags_where_the_prompt_has_opened_the_first():
    texts = [
        "a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer>",
        "a</think>",
        "</think><answer>b</answer>x",
    ]
    assert format_tags(prompt_opens=True)(completions=texts) == [1, 0, 0, 0]


MARKS = ["<a>", "</a>", "<b>", "</b>"]


@given(
    marks=st.one_of(st.just(MARKS), st.permutations(MARKS), st.lists(st.sampled_from(MARKS), min_size=3, max_size=5)),
    gaps=st.lists(st.sampled_from(["", " ", "\n", "x", "<c>"]), min_size=6, max_size=6),
)
@settings(max_examples=300)
def test_format_tags_is_the_same_as_a_pattern(marks, gaps):
    text = "".join(part for pair in zip(gaps, [*marks, "", "", ""]) for part in pair)
    inside = r"((?!</?[ab]>)[\s\S])*"
    pattern = rf"\s*<a>{inside}</a>\s*<b>{inside}</b>\s*"
    assert format_tags(tags=["a", "b"])(completions=[text]) == [float(re.fullmatch(pattern, text) is not None)]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (r"so \boxed{46}", 1),
        (r"\boxed{\frac{1}{2}} and \boxed {3}", 2),
        (r"\boxed{\boxed{1} + \boxed{2}}", 1),
        (r"\boxed{\left\{ x \right.}", 1),
        (r"\boxed{ \boxed{2}", 1),
        (r"{ \boxed{2} }} \boxed{3", 1),
        (r"\boxed{", 0),
        (r"\boxed{}", 0),
        (r"\boxed{ }", 0),
        (r"\boxed{\}", 0),
        (r"\boxed46", 0),
        (r"\\boxed{46}", 0),
        ("boxed{46}", 0),
        ("", 0),
    ],
)
def test_format_boxed(text, count):
    assert format_boxed()(completions=[text]) == [float(count >= 1)]
    assert format_boxed(single=True)(completions=chat(text)) == [float(count == 1)]


def test_length_towards_a_target():
    reward = length(target=4)(completion_ids=[[0] * n for n in (0, 1, 4, 5, 6, 8, 100)], completions=None)
    assert reward == [0, 0.25, 1, 0.75, 0.5, 0, 0]


def test_length_penalty():
    reward = length(maximum=10, buffer=4)(completion_ids=[[0] * n for n in (0, 6, 7, 8, 10, 11, 100)])
    assert reward == [0, 0, -0.25, -0.5, -1, -1, -1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "takes either target, or maximum and buffer"),
        ({"target": 3, "maximum": 4, "buffer": 1}, "takes either"),
        ({"target": 3, "buffer": 1}, "takes either"),
        ({"maximum": 4}, "takes either"),
        ({"target": 0}, r"length\.target: got 0, takes at least 1"),
        ({"maximum": 4, "buffer": 5}, r"length\.buffer: got 5, takes 1 to maximum \(4\)"),
    ],
)
def test_length_options(options, message):
    with pytest.raises(ConfigError, match=message):
        length(**options)


@pytest.mark.parametrize("tags", ["think", [], ["a", "a"]])
def test_tags_must_differ(tags):
    with pytest.raises(ConfigError, match=r"format_tags\.tags: got"):
        format_tags(tags=tags)


def test_long_texts_take_linear_time():
    hostile = ["\\boxed{" * 100_000, "{" * 700_000, "<think>" * 100_000, "\\boxed{" * 50_000 + "1" + "}" * 50_000]
    start = time.perf_counter()
    for reward in (format_boxed(), format_tags()):
        reward(completions=hostile)
    assert time.perf_counter() - start < 10
