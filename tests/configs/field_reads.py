"""Which fields of the schema the product reads, found by following types through its source.

A plain search for `.width` would find any width; this follows what holds a section: parameters and fields by
their annotations, names by what they are assigned, attributes of our own classes across modules.

    read_fields(ROOT, ("engine", "configs/deepspeed.py"))      # {("Optim", "lr"), ("Config", "optim"), ...}
"""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Literal, TypeAlias, get_args, get_origin

import configs
from configs.section import Section

_HOMES = tuple(import_module(f"configs.{module.name}") for module in iter_modules(configs.__path__))
SECTIONS = {
    name: kind
    for home in _HOMES
    for name, kind in vars(home).items()
    if isinstance(kind, type) and issubclass(kind, Section) and kind.__name__ == name  # not under a second name
}
Kind: TypeAlias = str  # "configs.schema.Views", or "data.loader.BatchLoader" for a class of ours
Names: TypeAlias = dict[str, Kind]
_ROUNDS = 4  # times over the source: each carries kinds one assignment further
_SCHEMA = "configs.schema"  # every section goes by this module, wherever it is defined


def all_fields() -> set[tuple[str, str]]:
    """(section, field) of the whole schema, each under the section that declares it; less the fields that have one
    value: they tell sections apart, and the schema itself reads them."""
    return {
        (name, field)
        for name, kind in SECTIONS.items()
        for field, info in kind.model_fields.items()
        if field in vars(kind)["__annotations__"] and not _has_one_value(info.annotation)
    }


def read_fields(root: Path, places: tuple[str, ...]) -> set[tuple[str, str]]:
    """(section, field) of every setting that the source in these folders and files reads."""
    files = [
        path
        for place in places
        for path in ([root / place] if place.endswith(".py") else sorted((root / place).rglob("*.py")))
    ]
    modules = {".".join(path.relative_to(root).with_suffix("").parts): ast.parse(path.read_text()) for path in files}
    members = _schema_members()
    found: set[tuple[str, str]] = set()
    for _ in range(_ROUNDS):
        for module, tree in modules.items():
            _Reader(module, tree, members, found).visit(tree)
    return found


def _schema_members() -> dict[Kind, Names]:
    """What a section's attributes hold: Config.views is a Views."""
    members: dict[Kind, Names] = {}
    name_of: dict[object, str] = {kind: name for name, kind in SECTIONS.items()}
    for name, section in SECTIONS.items():
        kinds = {field: _section_in(info.annotation) for field, info in section.model_fields.items()}
        members[f"{_SCHEMA}.{name}"] = {
            field: f"{_SCHEMA}.{name_of[kind]}" for field, kind in kinds.items() if kind in name_of
        }
    return members


def _has_one_value(annotation: object) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def _section_in(annotation: object) -> object:
    """Of `Section | None` the section."""
    return next((kind for kind in get_args(annotation) if kind in SECTIONS.values()), annotation)


class _Reader(ast.NodeVisitor):
    """One pass over one module; learns `members` of classes and adds to `found`."""

    def __init__(self, module: str, tree: ast.Module, members: dict[Kind, Names], found: set[tuple[str, str]]) -> None:
        self.members, self.found = members, found
        self.classes: Names = dict(_class_names(module, tree))
        self.scopes: list[Names] = [{}]
        self.strings: list[set[str]] = [set()]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        own = self.classes[node.name]
        fields = self.members.setdefault(own, {})
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                self._bind(fields, line.target.id, self._annotated(line.annotation))
            elif isinstance(line, ast.FunctionDef) and line.decorator_list:  # a property
                self._bind(fields, line.name, self._annotated(line.returns))
        self._inside(node, {"self": own})

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        names: Names = {}
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            self._bind(names, argument.arg, self._annotated(argument.annotation))
        self.strings.append(
            {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        )
        self._inside(node, names, rounds=2)  # a name may be used above the line that binds it, in a loop
        self.strings.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assign(target, node.value)
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._assign(node.target, node.value)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self._mark(self._kind(node.value), node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """getattr(views, key): key is one of the strings of the function."""
        if isinstance(node.func, ast.Name) and node.func.id == "getattr":
            named = node.args[1]
            keys = [named.value] if isinstance(named, ast.Constant) else self.strings[-1]
            for key in keys:
                self._mark(self._kind(node.args[0]), str(key))
        self.generic_visit(node)

    def _inside(self, node: ast.ClassDef | ast.FunctionDef, names: Names, rounds: int = 1) -> None:
        self.scopes.append(names)
        for _ in range(rounds):
            self.generic_visit(node)
        self.scopes.pop()

    def _mark(self, kind: Kind | None, field: str) -> None:
        module, _, section = (kind or "").rpartition(".")
        if module == _SCHEMA and field in SECTIONS[section].model_fields:
            self.found |= {(kind.__name__, field) for kind in SECTIONS[section].__mro__ if field in _declared(kind)}

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one_target, one_value in zip(target.elts, value.elts, strict=False):
                self._assign(one_target, one_value)
        elif isinstance(target, ast.Name):
            self._bind(self.scopes[-1], target.id, self._kind(value))
        elif isinstance(target, ast.Attribute) and (owner := self._kind(target.value)):
            self._bind(self.members.setdefault(owner, {}), target.attr, self._kind(value))

    def _bind(self, names: Names, name: str, kind: Kind | None) -> None:
        if kind is not None:
            names[name] = kind

    def _kind(self, node: ast.expr) -> Kind | None:
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
        if isinstance(node, ast.Attribute):
            return self.members.get(self._kind(node.value) or "", {}).get(node.attr)
        if isinstance(node, ast.IfExp):
            return self._kind(node.body) or self._kind(node.orelse)
        return self._annotated(node.func) if isinstance(node, ast.Call) else None

    def _annotated(self, node: ast.expr | None) -> Kind | None:
        """The class an annotation or a constructor names; of `X | None` it is X."""
        if isinstance(node, ast.BinOp):
            return self._annotated(node.left) or self._annotated(node.right)
        return self.classes.get(node.id) if isinstance(node, ast.Name) else None


def _declared(kind: type) -> Container[str]:
    annotations: Container[str] = vars(kind).get("__annotations__", ())
    return annotations


def _class_names(module: str, tree: ast.Module) -> Iterator[tuple[str, Kind]]:
    """What a class is called here -> which it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, f"{module}.{node.name}"
        elif isinstance(node, ast.ImportFrom) and node.module:
            home = _SCHEMA if node.module in ("configs", *(part.__name__ for part in _HOMES)) else node.module
            for alias in node.names:
                if home != _SCHEMA or alias.name in SECTIONS:
                    yield alias.asname or alias.name, f"{home}.{alias.name}"
