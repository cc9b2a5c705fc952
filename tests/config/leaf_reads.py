"""Finds where code reads the fields of config classes, from its syntax trees.

A field counts as read where it is an attribute of something known to be of its class: a parameter
or variable annotated with the class, ``self.config`` and the like, a section of either, or a name
that was given one of these. A property of a config class counts as what it reads itself.
"""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterable, Mapping

from jaxrft.config import Section

Leaf = tuple[str, str]  # Class, field.


def leaves(root: type[Section]) -> dict[Leaf, str]:
    """Every field that is no section -> its full path."""
    found = {}

    def walk(section: type[Section], path: str) -> None:
        for name, hint in typing.get_type_hints(section).items():
            if isinstance(hint, type) and issubclass(hint, Section):
                walk(hint, f"{path}{name}.")
            else:
                found[section.__name__, name] = path + name

    walk(root, "")
    return found


def sections(root: type[Section]) -> dict[str, type[Section]]:
    """The class and those nested in it, by name."""
    classes = {root.__name__: root}
    for hint in typing.get_type_hints(root).values():
        if isinstance(hint, type) and issubclass(hint, Section):
            classes |= sections(hint)
    return classes


def reads(sources: Iterable[str], root: type[Section], properties: Mapping[str, set[Leaf]]) -> set[Leaf]:
    """The leaves that some of the source texts read.

    Args:
        sources: Python modules.
        root: the config class; ``anything.config`` is taken to be of it, but for ``jax.config``.
        properties: names of the classes' properties -> leaves that each reads.
    """
    found: set[Leaf] = set()
    dynamic: set[str] = set()
    texts: set[str] = set()
    for source in sources:
        reader = _Reader(sections(root), root, properties)
        reader.visit(ast.parse(source))
        reader.visit(ast.parse(source))  # Attributes of self are known only after the first pass.
        found |= reader.found
        dynamic |= reader.dynamic
        texts |= reader.texts
    # getattr(section, name): the names are somewhere as text.
    return found | {leaf for leaf in leaves(root) if leaf[0] in dynamic and leaf[1] in texts}


def properties(source: str, root: type[Section], names: Iterable[str]) -> dict[str, set[Leaf]]:
    """The leaves that each property of a config class reads, through other properties too.

    Args:
        source: the module that defines the class.
        root: the class.
        names: fields that ``getattr(self, name)`` may mean there.
    """
    (definition,) = [
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == root.__name__
    ]
    bodies = {
        node.name: node
        for node in definition.body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "property" for d in node.decorator_list)
    }
    found: dict[str, set[Leaf]] = {name: set() for name in bodies}
    for _ in bodies:  # As often as properties can stand in a chain.
        for name, body in bodies.items():
            reader = _Reader(sections(root), root, found)
            reader.variables[0]["self"] = root.__name__
            reader.visit(body)
            if root.__name__ in reader.dynamic:
                reader.found |= {(root.__name__, field) for field in names}
            found[name] = found[name] | reader.found | {leaf for leaf in leaves(root) if leaf[0] in reader.listed}
    return found


class _Reader(ast.NodeVisitor):
    def __init__(self, classes: dict[str, type[Section]], root: type[Section], properties: Mapping[str, set[Leaf]]):
        self.classes, self.root, self.properties = classes, root, properties
        self.fields = {name: {field.name for field in dataclasses.fields(cls)} for name, cls in classes.items()}
        self.found: set[Leaf] = set()
        self.dynamic: set[str] = set()
        self.listed: set[str] = set()  # Classes in dataclasses.fields(...).
        self.texts: set[str] = set()
        self.variables: list[dict[str, str]] = [{}]
        self.attributes: dict[str, str] = {}

    def kind(self, node: ast.AST) -> str | None:
        """Name of the config class that an expression is of."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.variables) if node.id in scope), None)
        if isinstance(node, ast.BoolOp):
            return next(filter(None, map(self.kind, node.values)), None)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            made = self.root.__name__ if node.func.id == "parse" else node.func.id
            return made if made in self.classes else None
        if not isinstance(node, ast.Attribute):
            return None
        owner = self.kind(node.value)
        if owner is not None:
            hint = typing.get_type_hints(self.classes[owner]).get(node.attr)
            return hint.__name__ if isinstance(hint, type) and hint.__name__ in self.classes else None
        if isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in self.attributes:
            return self.attributes[node.attr]
        is_ours = node.attr == "config" and not (isinstance(node.value, ast.Name) and node.value.id == "jax")
        return self.root.__name__ if is_ours else None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.kind(node.value)
        if owner is not None and isinstance(node.ctx, ast.Load):
            if node.attr in self.fields[owner]:
                self.found.add((owner, node.attr))
            else:
                self.found |= self.properties.get(node.attr, set())
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and (owner := self.kind(node.args[0])):
            self.dynamic.add(owner)
        if ast.unparse(node.func) == "dataclasses.fields" and (owner := self.kind(node.args[0])):
            self.listed.add(owner)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.texts.add(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        scope = {argument.arg: self.annotated(argument.annotation) for argument in arguments}
        self.variables.append({name: kind for name, kind in scope.items() if kind})
        self.generic_visit(node)
        self.variables.pop()

    def annotated(self, annotation: ast.AST | None) -> str | None:
        """The config class that an annotation names, also as ``X | None``."""
        names = {part.id for part in ast.walk(annotation) if isinstance(part, ast.Name)} if annotation else set()
        return next(iter(names & self.classes.keys()), None)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for name, value in zip(target.elts, node.value.elts):
                    self.bind(name, self.kind(value))
            else:
                self.bind(target, self.kind(node.value))
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.bind(node.target, self.annotated(node.annotation))
        self.generic_visit(node)

    def bind(self, target: ast.AST, kind: str | None) -> None:
        if isinstance(target, ast.Name):
            self.variables[-1].pop(target.id, None)
            if kind:
                self.variables[-1][target.id] = kind
        elif (
            isinstance(target, ast.Attribute)
            and isinstance(target.value, ast.Name)
            and target.value.id == "self"
            and kind
        ):
            self.attributes[target.attr] = kind
