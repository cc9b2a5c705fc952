"""The package as a whole: dependencies, imports between rooms, lazy exports, tools that can fail."""

import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import jaxrft
from jaxrft.lazy import exports

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SERVER_SIDE = ROOT / "jaxrft" / "rollout" / "server_side"
ROOMS = sorted(path.parent.name for path in (ROOT / "jaxrft").glob("*/__init__.py"))


def test_no_torch_among_the_dependencies():
    """What ``pip install .`` brings, all the way down."""
    wanted, seen = [Requirement(text) for text in PROJECT["project"]["dependencies"]], set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            needs = requires(name) or []
        except PackageNotFoundError:
            pytest.skip(f"{name} is not installed, so what it needs is unknown")
        for text in needs:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in {"", *requirement.extras}):
                wanted.append(needed)
    names = {name for name, _ in seen}
    assert {"jax", "jaxlib", "flax", "transformers", "datasets", "sympy"} <= names
    assert not {name for name in names if name.startswith(("torch", "vllm", "nvidia", "tensorflow"))}


def test_extras():
    extras = PROJECT["project"]["optional-dependencies"]
    assert extras.keys() >= {"cuda", "vllm", "wandb", "tensorboard", "docs", "test"}
    assert not [name for name, needs in extras.items() if name not in ("test", "vllm") and "torch" in " ".join(needs)]
    assert jaxrft.__version__ == PROJECT["project"]["version"]


def test_imports_without_torch(run_python):
    """Every module, in a process where torch and the servers cannot be imported."""
    modules = [module.name for module in pkgutil.walk_packages(jaxrft.__path__, "jaxrft.")]
    assert {"jaxrft.train", "jaxrft.models.decoder", "jaxrft.config.parse"} <= set(modules)
    code = f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "torchaudio", "vllm", "sglang"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
# What runs inside a server knows its neighbours by their own names.
sys.path.append({str(SERVER_SIDE)!r})
for name in {modules!r}:
    importlib.import_module(name)
print(len([name for name in sys.modules if name.partition(".")[0] in ("torch", "vllm")]))
"""
    assert run_python(code).stdout.split()[-1] == "0"


@pytest.mark.parametrize("room", ROOMS)
def test_lazy_exports(room):
    """Each exists, and none hides a submodule of its name (which comes depends on what was imported first)."""
    package = importlib.import_module(f"jaxrft.{room}")
    assert package.__doc__
    for name in package.__all__:
        value = getattr(package, name)
        if isinstance(value, type(sys)):
            assert value.__name__ == f"jaxrft.{room}.{name}"
            assert not hasattr(value, name), f"{value.__name__}.{name} cannot be exported under its module's name"
        elif room != "config":
            assert not (Path(package.__path__[0]) / f"{name}.py").exists(), f"jaxrft.{room}.{name} is a module too"
    with pytest.raises((AttributeError, ImportError)):
        package.no_such_name  # noqa: B018


def test_lazy_errors():
    load, names, exported = exports(
        "jaxrft.config", {"ConfigError": "jaxrft.config.base", "base": "jaxrft.config.base"}
    )
    assert names() == exported == ["ConfigError", "base"]
    assert load("base").ConfigError is load("ConfigError")
    with pytest.raises(AttributeError, match="module 'jaxrft.config' has no attribute 'missing'"):
        load("missing")


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("config/base.py", "import numpy", "The config is read before JAX is imported"),
        ("config/base.py", "import jaxrft.data.records", "Imports run one way through the rooms"),
        ("models/spec.py", "import jaxrft.training.step", "Imports run one way through the rooms"),
        ("models/spec.py", "import jaxrft.data.records", "Imports run one way through the rooms"),
        ("new.py", "", "Imports run one way through the rooms"),
        ("algorithms/registry.py", "from jaxrft.config import RLConfig", "The algorithms are a library of their own"),
        ("data/load.py", "import torch", "No torch in the trainer"),
        (None, None, None),
    ],
)
def test_import_contracts(tmp_path, file, line, contract):
    """They hold for the package as it is, and break for each kind of wrong import."""
    shutil.copytree(ROOT / "jaxrft", tmp_path / "jaxrft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if file:
        with (tmp_path / "jaxrft" / file).open("a") as module:
            module.write(f"\n{line}\n")
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([lint, "--no-logo", "--no-cache"], cwd=tmp_path, capture_output=True, text=True, check=False)
    broken = re.findall(r"(.+) BROKEN", done.stdout)
    assert broken == ([contract] if contract else []), done.stdout + done.stderr
    assert done.returncode == (1 if contract else 0)


def test_run_python(run_python):
    code = "import jax; print(jax.device_count())"
    assert run_python(code, devices=8).stdout == "8\n"
    assert run_python("raise SystemExit(3)", check=False).returncode == 3
    with pytest.raises(AssertionError, match="exit code 3"):
        run_python("raise SystemExit(3)")
