"""Datasets: files, folders, saved datasets, functions; and one clear line for what cannot be loaded."""

import json
import socket

import pytest

from jaxrft.config import ConfigError
from jaxrft.data import load_rows

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(5)]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path_factory):
    def refuse(*_):
        raise AssertionError("touched the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path, rows):
    """A file of rows, by its suffix."""
    import pandas

    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
        case ".csv":
            pandas.DataFrame(rows).to_csv(path, index=False)
        case ".parquet":
            pandas.DataFrame(rows).to_parquet(path)
    return path


def load(source, split="train", **options):
    return [dict(row) for row in load_rows(source, split=split, **options)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_file_gives_its_rows(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", ROWS)
    assert load(str(path)) == load(path, split="whatever") == ROWS
    assert load(str(path), limit=2) == ROWS[:2]
    assert load(str(path), limit=99) == ROWS


def test_csv_has_numbers_and_only_empty_fields_are_none(tmp_path):
    path = write(
        tmp_path / "data.csv", [{"prompt": "a", "answer": "None", "n": 1}, {"prompt": "NA", "answer": "", "n": 2}]
    )
    assert load(path) == [{"prompt": "a", "answer": "None", "n": 1}, {"prompt": "NA", "answer": None, "n": 2}]


def test_jsonl_stays_as_it_is_written(tmp_path):
    rows = [
        {"prompt": "a\u2028b é", "answer": 1},
        {"prompt": [{"role": "user", "content": "x"}], "answer": "2", "more": None},
    ]
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\ufeff" + lines[0] + "\r\n\n  " + lines[1], encoding="utf-8")
    assert load(path) == rows
    assert load(write(tmp_path / "lines.jsonl", rows).rename(tmp_path / "lines.json")) == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_folder_is_read_by_split(tmp_path, suffix):
    write(tmp_path / "data" / f"train-00000-of-00002{suffix}", ROWS[:2])
    write(tmp_path / "data" / f"train-00001-of-00002{suffix}", ROWS[2:3])
    write(tmp_path / "data" / f"test{suffix}", ROWS[3:])
    write(tmp_path / "data" / "hard" / f"hard{suffix}", ROWS[4:])
    write(tmp_path / ".hidden" / f"train{suffix}", ROWS)
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert load(tmp_path, "test") == ROWS[3:]
    assert load(tmp_path, "hard") == ROWS[4:]
    assert load(tmp_path / "data" / "hard", "train") == ROWS[4:], "files that name no split are train"
    (tmp_path / "data" / "hard" / f"hard{suffix}").unlink()
    assert load(str(tmp_path), "train") == ROWS[:3]
    with pytest.raises(ConfigError, match=r"no split 'validation', it has test, train; set data\.train_split"):
        load(tmp_path, "validation")


def test_a_missing_test_split_is_never_the_training_split(tmp_path):
    write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match="no split 'test', it has train"):
        load(tmp_path, "test")


def test_saved_datasets(tmp_path):
    import datasets

    train, test = datasets.Dataset.from_list(ROWS[:3]), datasets.Dataset.from_list(ROWS[3:])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    assert load(tmp_path / "one", "test") == ROWS[:3], "saved without splits"
    assert load(tmp_path / "both", "test") == ROWS[3:]
    with pytest.raises(ConfigError, match="no split 'dev', it has train, test"):
        load(tmp_path / "both", "dev")


def test_a_folder_with_a_dataset_card_is_read_as_the_card_says(tmp_path):
    write(tmp_path / "main" / "a.jsonl", ROWS[:2])
    write(tmp_path / "other" / "b.jsonl", ROWS[2:])
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: main\n  default: true\n  data_files:\n"
        "  - split: train\n    path: main/*\n- config_name: other\n  data_files: other/*\n---\n"
    )
    assert load(tmp_path) == ROWS[:2]


def test_functions_of_modules_and_files(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(
        "import dataclasses\nCALLS = []\n\n@dataclasses.dataclass\nclass Table:\n    prompt: str\n\n"
        "def rows(count=2):\n    CALLS.append(count)\n"
        "    return [dataclasses.asdict(Table(f'{len(CALLS)}:{i}')) for i in range(count)]\n\nnumber = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load("my_data:rows", arguments={"count": 3}) == [{"prompt": f"1:{i}"} for i in range(3)]
    assert load("my_data.py:rows") == [{"prompt": "1:0"}, {"prompt": "1:1"}], "the file is a module of its own"
    assert load(f"{tmp_path}/my_data.py:rows", limit=1) == [{"prompt": "2:0"}], "and one for all its names"
    for source, message in {
        "my_data:row": r"data: my_data has no function 'row'; did you mean rows\?",
        "my_data:number": "my_data:number is int, which cannot be called",
        "my_dat:rows": "no module 'my_dat'; it must be installed or stand in the working directory",
        "nowhere.py:rows": f"data: no file {tmp_path}/nowhere.py",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load(source)
    with pytest.raises(ConfigError, match=r"my_data:rows: got 'counts', takes count; did you mean count\?"):
        load("my_data:rows", arguments={"counts": 1})


@pytest.mark.parametrize("text", ["1 +", "import no_such_package", "raise RuntimeError('first\\nsecond')"])
def test_a_file_that_does_not_import_says_why(tmp_path, text):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(
        ConfigError, match=r"importing .*broken\.py raised (SyntaxError|ModuleNotFound|RuntimeError: first$)"
    ):
        load(f"{tmp_path}/broken.py:rows")


def test_rows_and_datasets_pass_through():
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    assert load_rows(dataset, split="train") is dataset
    assert load_rows(ROWS, split="train") is ROWS
    assert load(dataset, limit=2) == load(ROWS, limit=2) == ROWS[:2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": 1}\n\n{"prompt": 2,}\n', r"bad\.jsonl, line 3: .*\(column 14\)"),
        ('{"prompt": 1}\n{"prompt": ', r"bad\.jsonl, line 2: "),
        ('{"prompt": 1}\n[1]\n', r"bad\.jsonl, line 2: got list, takes an object"),
        ("\n \n", r"bad\.jsonl: the dataset is empty"),
        (b'{"prompt": "\xff"}', r"bad\.jsonl: not UTF-8 text"),
    ],
)
def test_malformed_jsonl_names_the_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        load(path, name="data.train")
    assert str(caught.value).startswith(f"data.train: {path}")
    assert "\n" not in str(caught.value)


def test_malformed_json_names_the_line(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('[\n{"prompt": 1},\n{"prompt": 2\n]')
    with pytest.raises(ConfigError, match=r"bad\.json, line 4: "):
        load(path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match=r"bad\.json, item 0: got int"):
        load(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "no file or folder {tmp}/nowhere.jsonl"),
        ("./nowhere", "no file or folder {tmp}/nowhere"),
        ("a/b/c", "no file or folder {tmp}/a/b/c"),
        ("nowhere", "got 'nowhere', which is no file or folder here; takes a .jsonl, .json, .parquet, .csv file"),
        ("notes.txt", "notes.txt has the suffix '.txt', takes .jsonl, .json, .parquet, .csv"),
        ("broken.parquet", "broken.parquet cannot be read: "),
        ("empty", "the folder empty holds no .jsonl"),
        ("mixed", "mixed mixes .csv, .jsonl files"),
        ("org/name:main", "no file or folder 'org/name' here, and as a hub name: "),
        ([], "data: the dataset is empty"),
        (["text"], "a row is str, takes a dict"),
        ({"train": ROWS, "test": ROWS}, r"got several splits \(train, test\)"),
        (iter(ROWS), "got list_iterator, takes a list of rows"),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "mixed" / "a.csv", ROWS)
    write(tmp_path / "mixed" / "b.jsonl", ROWS)
    with pytest.raises(ConfigError, match=message.format(tmp=tmp_path)) as caught:
        load(source)
    assert "\n" not in str(caught.value)
