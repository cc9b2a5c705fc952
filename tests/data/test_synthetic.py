"""Additions: right sums, all of them, and held out by value in both orders."""

import pytest

from jaxrft.config import ConfigError
from jaxrft.data import load_rows
from jaxrft.data.synthetic import addition, addition_test, addition_train


@pytest.mark.parametrize(("digits", "held_out", "seed"), [(1, 0.2, 0), (2, 0.1, 0), (2, 0.25, 7)])
def test_held_out_sums_are_in_neither_order_in_training(digits, held_out, seed):
    options = {"digits": digits, "held_out": held_out, "seed": seed}
    splits = {name: addition(name, **options) for name in ("train", "test")}
    for row in splits["train"] + splits["test"]:
        a, b = row["prompt"].removesuffix("=").split("+")
        assert (int(a), int(b)) == (row["a"], row["b"])
        assert (str(int(a)), str(int(b))) == (a, b), "no leading zeros, so a value has one text"
        assert row["answer"] == str(int(a) + int(b))
    train, test = ([(row["a"], row["b"]) for row in splits[name]] for name in ("train", "test"))
    every = [(a, b) for a in range(10**digits) for b in range(10**digits)]
    assert sorted(train + test) == every, "each ordered pair is in one split, once"
    train_set = set(train)
    assert not any((a, b) in train_set or (b, a) in train_set for a, b in test)
    unordered = len({tuple(sorted(pair)) for pair in test})
    assert unordered == round(held_out * 10**digits * (10**digits + 1) / 2)


def test_splits_are_deterministic_shuffled_and_differ_by_seed():
    assert addition("test") == addition_test() == addition_test(seed=0)
    assert addition_train(digits=1) == addition("train", digits=1)
    assert {r["prompt"] for r in addition_test(seed=1)} != {r["prompt"] for r in addition_test()}
    first = [row["a"] for row in addition_test()[:100]]
    assert 35 < sum(first) / 100 < 65, "the first rows are a fair sample"


def test_it_loads_by_name():
    rows = load_rows("jaxrft.data.synthetic:addition_test", split="test", arguments={"digits": 1}, limit=3)
    assert rows == addition_test(digits=1)[:3]
    with pytest.raises(ConfigError, match="got 'digit', takes digits, held_out, seed; did you mean digits"):
        load_rows("jaxrft.data.synthetic:addition_test", split="test", arguments={"digit": 1})


@pytest.mark.parametrize("wrong", [{"split": "dev"}, {"digits": 4}, {"held_out": 0.0}, {"held_out": 1.0}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match="addition: got"):
        addition(**{"split": "train", **wrong})
