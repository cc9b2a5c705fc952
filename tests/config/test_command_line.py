"""``python -m jaxrft.train`` as a person meets it: what it prints, how it ends, what it does not load."""

import signal
import subprocess
import sys

import pytest

import jaxrft
from jaxrft import train
from jaxrft.config import ConfigError, RLConfig
from jaxrft.config.parse import parse

HEAVY = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax",
    "numpy",
    "transformers",
    "datasets",
    "torch",
    "tensorboardX",
    "wandb",
)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("learning_rate: 1e-5\n")
    return str(path)


@pytest.fixture
def ran(monkeypatch):
    """The configs that the trainer was called with, in its place."""
    configs: list[RLConfig] = []
    module = type(sys)("jaxrft.training.run")
    module.run = lambda config: configs.append(config) or 7
    monkeypatch.setitem(sys.modules, "jaxrft.training.run", module)
    monkeypatch.setattr("jaxrft.config.environment.apply", lambda parallel: configs.append(parallel))
    return configs


def test_the_task_chooses_what_runs(ran, config_file, monkeypatch):
    monkeypatch.setattr(train, "TASKS", {"rl": "elsewhere"})
    with pytest.raises(ModuleNotFoundError, match="elsewhere"):
        train.main([config_file, "task=rl"])
    assert train.main([config_file, "task=sft"]) == 2


def test_runs_the_parsed_config(ran, config_file):
    assert train.main([config_file, "rollout.max_slots=3"]) == 7
    config = parse([config_file, "rollout.max_slots=3"])
    assert ran == [config.parallel, config]  # The environment first.


@pytest.mark.parametrize(
    "arguments", [["max_slots=3"], ["rollout.max_slots=0"], ["--what"], ["epsilon=.1", "algorithm.clip_low=.1"]]
)
def test_mistakes_are_one_line(ran, config_file, capsys, arguments):
    assert train.main([config_file, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert ran == []


def test_mistakes_found_later_are_one_line(ran, config_file, capsys, monkeypatch):
    def fail(config):
        raise ConfigError("data.train: no such file")

    monkeypatch.setattr(sys.modules["jaxrft.training.run"], "run", fail)
    assert train.main([config_file]) == 2
    assert capsys.readouterr().err == "error: data.train: no such file\n"


def test_interrupted(ran, config_file, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["jaxrft.training.run"], "run", interrupt)
    assert train.main([config_file]) == 130


def test_no_arguments(capsys):
    assert train.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: python -m jaxrft.train CONFIG.yaml")


def test_version(capsys):
    assert train.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxrft {jaxrft.__version__}\n"


def test_print_config(ran, config_file, capsys, tmp_path):
    assert train.main([config_file, "--print-config", "seed=3"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert parse([str(printed)]) == parse([config_file, "seed=3"])
    assert ran == []


@pytest.mark.parametrize(
    "code",
    [
        "import jaxrft.config.parse, jaxrft.config.environment, jaxrft.config.help",
        "import jaxrft",
        "from jaxrft import RLConfig, ConfigError; RLConfig()",
        "import jaxrft.train; jaxrft.train.main(['--help'])",
        "import jaxrft.algorithms, jaxrft.data, jaxrft.models, jaxrft.parallel, jaxrft.rewards, jaxrft.rollout",
        "import jaxrft.tracking, jaxrft.training",
    ],
)
def test_loads_nothing_heavy(run_python, code):
    done = run_python(f"{code}\nimport sys\nprint('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])")
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_help_is_quick(run_python):
    """It loads its own modules, YAML and Python's, beside what this environment has every Python load."""

    code = (
        "import sys; there = set(sys.modules); from jaxrft.train import main; main(['--help'])\n"
        "print('loaded:', *{name.partition('.')[0] for name in sys.modules.keys() - there})"
    )
    printed, _, found = run_python(code).stdout.rpartition("loaded:")
    assert "rollout.max_slots = 64" in printed
    foreign = {name for name in found.split() if not name.startswith("_")} - sys.stdlib_module_names
    # The last is of YAML's parser in C, as is what begins with an underscore.
    assert foreign <= {"jaxrft", "yaml", "cython_runtime"}


def test_no_traceback_in_a_real_process(config_file):
    done = subprocess.run(
        [sys.executable, "-m", "jaxrft.train", config_file, "max_slots=1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: max_slots: no such field (did you mean rollout.max_slots?)\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--print-config"]])
def test_showing_leaves_signals_as_they_were(arguments, capsys):
    """A closed pipe is an error again afterwards, not the end of the process: tests, notebooks."""
    before = signal.getsignal(signal.SIGPIPE)
    train.main(arguments)
    assert signal.getsignal(signal.SIGPIPE) == before
    assert before != signal.SIG_DFL
