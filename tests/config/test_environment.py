"""What a run sets before JAX starts, and what is refused once it has."""

import json
import os

import pytest

from jaxrft.config import ConfigError, ParallelConfig
from jaxrft.config.environment import CACHED_COMPILE_SECONDS, apply

NAMES = [
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_COMPILATION_CACHE",
    "JAX_NUM_CPU_DEVICES",
    "JAX_OPTIMIZATION_LEVEL",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "JAX_PLATFORMS",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
]


@pytest.fixture
def without_jax(monkeypatch, tmp_path):
    """An empty environment, as a new process has it before it imports JAX."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name in ("jax", "jax._src.xla_bridge"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    for name in NAMES:  # apply() set these behind monkeypatch's back.
        os.environ.pop(name, None)


def test_defaults(without_jax, tmp_path):
    apply(ParallelConfig())
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / ".cache/jaxrft/xla"),
        "JAX_ENABLE_COMPILATION_CACHE": "True",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(CACHED_COMPILE_SECONDS),
    }
    assert (tmp_path / ".cache/jaxrft/xla").is_dir()


@pytest.mark.parametrize(
    ("values", "platforms", "present", "expected"),
    [
        ({}, None, None, None),
        ({"optimization_level": "O2"}, None, "O3", "O2"),
        ({"fsdp": 2}, None, None, "O1"),
        ({"tensor": 2}, None, "O0", "O0"),
        ({"fsdp": 2}, "cpu", None, None),
        ({"fsdp": 2, "virtual_devices": 2}, None, None, None),
    ],
)
def test_optimization_level(without_jax, monkeypatch, values, platforms, present, expected):
    """Several GPUs hide their messages; what is set wins."""
    for name, value in (("JAX_PLATFORMS", platforms), ("JAX_OPTIMIZATION_LEVEL", present)):
        if value is not None:
            monkeypatch.setenv(name, value)
    apply(ParallelConfig(**values))
    assert os.environ.get("JAX_OPTIMIZATION_LEVEL") == expected


def test_memory_fraction(without_jax, monkeypatch):
    """Also where the old name of the variable is set: JAX refuses to see both."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    apply(ParallelConfig(memory_fraction=0.5))
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.5"
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ


def test_xla_flags_are_appended(without_jax, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_b=2")
    apply(ParallelConfig(xla_flags="--xla_c=3  --xla_a=4", deterministic=True))
    assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_b=2 --xla_c=3 --xla_a=4 --xla_gpu_deterministic_ops=true"
    apply(ParallelConfig(xla_flags="--xla_c=3"))
    assert os.environ["XLA_FLAGS"].split().count("--xla_c=3") == 1


def test_xla_flags_that_are_none(without_jax):
    with pytest.raises(ConfigError, match=r"parallel.xla_flags: got 'xla_c=3', takes flags such as"):
        apply(ParallelConfig(xla_flags="xla_c=3"))


def test_virtual_devices(without_jax, monkeypatch):
    apply(ParallelConfig(virtual_devices=8))
    assert (os.environ["JAX_PLATFORMS"], os.environ["JAX_NUM_CPU_DEVICES"]) == ("cpu", "8")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    with pytest.raises(ConfigError, match="parallel.virtual_devices: makes CPU devices, but JAX_PLATFORMS is cuda,cpu"):
        apply(ParallelConfig(virtual_devices=8))


def test_compilation_cache(without_jax, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/of/the/environment")
    apply(ParallelConfig())
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/of/the/environment"
    apply(ParallelConfig(compilation_cache=str(tmp_path / "chosen")))
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "chosen")
    apply(ParallelConfig(compilation_cache=None))
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "False"


def test_compilation_cache_that_cannot_be_made(without_jax, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=r"parallel.compilation_cache: .*file/x cannot be made"):
        apply(ParallelConfig(compilation_cache=str(file / "x")))
    monkeypatch.setenv("HOME", str(file))  # The default is not worth stopping for.
    apply(ParallelConfig())
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


EFFECT = """
import json, os, sys
from jaxrft.config import ParallelConfig, environment
{before}
environment.apply(ParallelConfig({settings}))
import jax
jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(3))
print(json.dumps({{
    "devices": jax.device_count(), "platform": jax.default_backend(),
    "cached": os.path.isdir("cache") and len(os.listdir("cache")), "enabled": jax.config.jax_enable_compilation_cache,
}}))
"""
FRESH = {"JAX_NUM_CPU_DEVICES": None, "XLA_FLAGS": None, "JAX_COMPILATION_CACHE_DIR": None, "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize("before", ["", "import jax", "import jax; jax.jit(lambda x: x - 1)(1.0)"])
def test_effect_in_a_new_process(run_python, tmp_path, monkeypatch, before):
    """Devices and the cache, before JAX is imported, after, and after its start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxrft.config.environment.CACHED_COMPILE_SECONDS", 0)
    settings = "compilation_cache='cache'" + ("" if "jit" in before else ", virtual_devices=3")
    code = "import jaxrft.config.environment as e; e.CACHED_COMPILE_SECONDS = 0" + EFFECT
    done = run_python(code.format(before=before, settings=settings), **FRESH)
    found = json.loads(done.stdout)
    assert found["devices"] == (1 if "jit" in before else 3)
    assert found["platform"] == "cpu"
    assert found["cached"] > 0
    assert found["enabled"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "virtual_devices=3",
            "parallel.virtual_devices: got 3, but JAX has already started its devices; make the trainer",
        ),
        ("deterministic=True", "parallel.deterministic: got --xla_gpu_deterministic_ops=true, but JAX has already"),
        ("xla_flags='--xla_dump_to=x'", "parallel.xla_flags: got --xla_dump_to=x, but JAX has already started"),
        ("memory_fraction=0.5", "parallel.memory_fraction: got 0.5, but JAX has already started"),
    ],
)
def test_too_late(run_python, settings, message):
    code = EFFECT.format(before="import jax; jax.devices()", settings=settings)
    done = run_python(code, check=False, **FRESH)
    assert done.returncode == 1
    assert f"ConfigError: {message}" in done.stderr


def test_again_is_not_too_late(run_python):
    """A second trainer in one process asks for what the first has already set."""
    settings = "virtual_devices=3, deterministic=True, memory_fraction=0.5, compilation_cache=None"
    before = f"apply = environment.apply; apply(ParallelConfig({settings})); import jax; jax.devices()"
    found = json.loads(run_python(EFFECT.format(before=before, settings=settings), **FRESH).stdout)
    assert found == {"devices": 3, "platform": "cpu", "cached": False, "enabled": False}


def test_another_cache_in_one_process(run_python, tmp_path):
    """JAX keeps the first folder that it has written to open."""
    code = f"""
import os
from jaxrft.config import ParallelConfig, environment
import jax
environment.CACHED_COMPILE_SECONDS = 0
for name in ("first", "second"):
    environment.apply(ParallelConfig(compilation_cache={str(tmp_path)!r} + "/" + name))
    jax.jit(lambda x: x * len(name) + 1)(jax.numpy.ones(3))
    print(len(os.listdir({str(tmp_path)!r} + "/" + name)) > 0)
"""
    assert run_python(code, **FRESH).stdout.split() == ["True", "True"]
