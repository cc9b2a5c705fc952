"""Lazy exports of a package: a name's module is imported when the name is first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def exports(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Returns ``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    Args:
        package: the package's name.
        modules: exported name -> module that defines it. A name mapped to the package's
            submodule of that name is the submodule; an object in it cannot have the same name,
            because Python itself sets a package's attribute when a submodule is imported.
    """

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(modules[name])
        return module if modules[name] == f"{package}.{name}" else getattr(module, name)

    return load, lambda: sorted(modules), sorted(modules)
