"""Functions that a config names: ``package.module:function`` or ``file.py:function``."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxrft.config import ConfigError


def names_function(source: str) -> bool:
    """Whether a text has the form of a function's name; it need not exist."""
    place, colon, name = source.rpartition(":")
    dotted = all(part.isidentifier() for part in place.split("."))
    return bool(colon) and name.isidentifier() and (dotted or place.endswith(".py"))


def load_function(source: str, field: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` or ``file.py:function`` names.

    Args:
        source: the name. A relative file is looked for from the working directory.
        field: the config field it comes from, for errors.

    Raises:
        ConfigError: the text is no such name; the file, module or function does not exist; the
            import failed; or what it names cannot be called.
    """
    if not names_function(source):
        raise ConfigError(f"{field}: got {source!r}, takes package.module:function or file.py:function")
    place, _, name = source.rpartition(":")
    module = _load_file(place, field) if place.endswith(".py") else _load_module(place, field)
    if not hasattr(module, name):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{field}: {place} has no function {name!r}{nearest(name, callables)}")
    function = getattr(module, name)
    if not callable(function):
        raise ConfigError(f"{field}: {source} is {type(function).__name__}, which cannot be called")
    return function


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], field: str) -> None:
    """Refuses keyword arguments that a function does not take, naming those it takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-in functions have no signature
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for name in arguments:
        if name not in known:
            raise ConfigError(
                f"{field}: got {name!r}, takes {', '.join(known) or 'no arguments'}{nearest(name, known)}"
            )


def nearest(name: str, known: list[str]) -> str:
    """End of an error message: what was probably meant, or nothing."""
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _load_module(name: str, field: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"{field}: no module {error.name!r}; it must be installed or stand in the working directory"
            ) from error
        raise _failed_import(name, field, error) from error
    except Exception as error:
        raise _failed_import(name, field, error) from error


class _Uncached(importlib.machinery.SourceFileLoader):
    """Reads the file as it is now: compiled files know its time by the second and its size alone."""

    def path_stats(self, path: str) -> Mapping[str, Any]:
        raise OSError("no compiled file is used, or written")


def _load_file(place: str, field: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"{field}: no file {path}")
    # One module for all functions of a file, and a new one when the file has changed.
    version = f"{path}:{path.stat().st_mtime_ns}"
    name = f"_jaxrft_{path.stem}_{hashlib.sha256(version.encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_Uncached(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed_import(place, field, error) from error
    return module


def _failed_import(place: str, field: str, error: Exception) -> ConfigError:
    return ConfigError(f"{field}: importing {place} raised {type(error).__name__}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """First line of an exception's message that says anything."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
