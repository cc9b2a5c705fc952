"""What a run sets before JAX starts: devices, memory, XLA's flags, the compilation cache.

JAX itself is not imported here. Where it has been imported already, as in a notebook, the
settings go to it directly; what can no longer take effect is refused.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from jaxrft.config.base import ConfigError
from jaxrft.config.rooms import ParallelConfig

DETERMINISTIC_FLAGS = "--xla_gpu_deterministic_ops=true"
# Programs that compile faster than this are not worth a file.
CACHED_COMPILE_SECONDS = 0.3


def apply(parallel: ParallelConfig) -> None:
    """Makes the settings of ``parallel`` hold for this process and those it starts.

    What the environment already says is kept where ``parallel`` leaves the default: a set
    ``JAX_COMPILATION_CACHE_DIR`` wins over the default folder.

    Raises:
        ConfigError: JAX has already started its devices, and a setting asks for something else.
    """
    jax = sys.modules.get("jax")
    started = _started()
    flags = [*parallel.xla_flags.split(), *([DETERMINISTIC_FLAGS] if parallel.deterministic else [])]
    for flag in flags:
        if not flag.startswith("--"):
            raise ConfigError(f"parallel.xla_flags: got {flag!r}, takes flags such as --xla_dump_to=folder")
    if flags:
        _add_flags(flags, "deterministic" if parallel.deterministic else "xla_flags", started)
    _set_level(parallel, jax)
    if parallel.memory_fraction is not None:
        _set_memory(parallel.memory_fraction, started)
    if parallel.virtual_devices is not None:
        _set_devices(parallel.virtual_devices, jax, started)
    _set_cache(parallel.compilation_cache, jax)


def _started() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def _too_late(name: str, value: object) -> ConfigError:
    return ConfigError(
        f"parallel.{name}: got {value}, but JAX has already started its devices; "
        "make the trainer before anything else uses JAX"
    )


def _add_flags(flags: list[str], name: str, started: bool) -> None:
    present = os.environ.get("XLA_FLAGS", "").split()
    missing = [flag for flag in flags if flag not in present]
    if missing and started:
        raise _too_late(name, " ".join(missing))
    # The last of two flags of one name counts.
    os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in present if flag not in flags), *flags])


def _set_level(parallel: ParallelConfig, jax: ModuleType | None) -> None:
    level, platforms = parallel.optimization_level, os.environ.get("JAX_PLATFORMS") or ""
    if level is None:
        several = parallel.data_devices * parallel.sequence * parallel.tensor > 1
        if not several or parallel.virtual_devices is not None or platforms.split(",")[0] == "cpu":
            return
        level = "O1"
        if "JAX_OPTIMIZATION_LEVEL" in os.environ:
            return
    os.environ["JAX_OPTIMIZATION_LEVEL"] = level
    if jax is not None:
        jax.config.update("jax_optimization_level", level)


def _set_memory(fraction: float, started: bool) -> None:
    if started and os.environ.get("XLA_CLIENT_MEM_FRACTION") != str(fraction):
        raise _too_late("memory_fraction", fraction)
    os.environ["XLA_CLIENT_MEM_FRACTION"] = str(fraction)
    os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # The old name; JAX refuses both together.


def _set_devices(count: int, jax: ModuleType | None, started: bool) -> None:
    platforms = os.environ.get("JAX_PLATFORMS") or "cpu"
    if platforms.split(",")[0] != "cpu":
        raise ConfigError(f"parallel.virtual_devices: makes CPU devices, but JAX_PLATFORMS is {platforms}; unset one")
    if jax is not None and started:
        if jax.default_backend() != "cpu" or jax.device_count() != count:
            raise _too_late("virtual_devices", count)
        return
    os.environ["JAX_PLATFORMS"], os.environ["JAX_NUM_CPU_DEVICES"] = "cpu", str(count)
    if jax is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)


def _set_cache(folder: str | None, jax: ModuleType | None) -> None:
    chosen = folder != ParallelConfig().compilation_cache
    present = os.environ.get("JAX_COMPILATION_CACHE_DIR") or (jax and jax.config.jax_compilation_cache_dir)
    if present and not chosen:
        return
    folder = _make_folder(folder, required=chosen) if folder else None
    settings: dict[str, object] = {"jax_enable_compilation_cache": folder is not None}
    if folder is not None:
        settings["jax_compilation_cache_dir"] = folder
        settings["jax_persistent_cache_min_compile_time_secs"] = CACHED_COMPILE_SECONDS
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        if jax is not None:
            jax.config.update(name, value)
    if jax is not None:  # It may have opened another folder by now.
        importlib.import_module("jax.experimental.compilation_cache.compilation_cache").reset_cache()


def _make_folder(folder: str, required: bool) -> str | None:
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if required:
            raise ConfigError(f"parallel.compilation_cache: {path} cannot be made ({error.strerror})") from None
        return None
    return str(path)
