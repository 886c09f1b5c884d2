"""Load a YAML preset with dotted overrides, validate it, write it, fingerprint it.

    load_config("configs/demo.yaml", ["optim.steps=10", "batch.clip=32"])      # a pre-training run
    load_run("runs/demo/config.yaml")                                          # of the kind in its `kind`

YAML 1.1 has traps: `on` is true, `1e-3` is a string, 010 is eight, 1:30 is ninety, a key given twice has its last
value. Here a word is a string, a number is a number, and a duplicate key is an error.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from configs.decoder_gan import DecoderGan
from configs.generator import GeneratorConfig
from configs.run import RunConfig
from configs.schema import Config
from configs.section import UserError, drop_added_later_defaults

R = TypeVar("R", bound=RunConfig)
RUN_KINDS: dict[str, type[RunConfig]] = {"pretraining": Config, "decoder_gan": DecoderGan, "generator": GeneratorConfig}

# Replacements for pydantic messages that speak of Python types.
_RULES = {
    "tuple_type": "input should be a list",
    "model_type": "input should be a section of keys",
    "model_attributes_type": "input should be a section of keys",
}
_ESCAPED_HASH = "\ue023"  # replaces # while an override is parsed; a private-use character, so in no path
# A path that begins with a YAML indicator: a star, a brace group or range with more behind it, a percent sign, an at.
_PATTERN = re.compile(r"([*%@]|\{[^\s:{}]*\}(?=.))[^\s\"']*")
_MERGE = "tag:yaml.org,2002:merge"
# What an unquoted scalar may be besides a string: (tag, pattern, characters such a scalar can begin with).
_SCALARS = (
    ("bool", r"^(true|false)$", "tf"),
    ("null", r"^(~|null|)$", ["~", "n", ""]),
    ("int", r"^[-+]?(0|[1-9][0-9_]*)$", "-+0123456789"),
    ("float", r"^[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$", "-+0123456789."),
    ("merge", r"^<<$", "<"),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader that resolves the scalars above only and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node in (key for key, _ in node.value if key.tag != _MERGE):
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"line {line} gives {key} a second time: a key has one value; remove one")
            seen.append(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string which this or any YAML 1.1 reader would read as something else."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the pre-training preset at `path`, apply `key.sub=value` overrides in order, validate.

    Raises UserError (value, rule, remedy) for an unreadable file, a bad override, an unknown key, a wrong value, or
    another kind of run.
    """
    run = load_run(path, overrides)
    if not isinstance(run, Config):
        raise UserError(f"{path} is of kind {run.kind}: this command takes a pre-training run; name one")
    return run


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run of any kind, as load_config does; without `kind` it is a pre-training run."""
    tree = _read(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    kind = tree.get("kind", "pretraining")
    if not isinstance(kind, str) or kind not in RUN_KINDS:
        raise UserError(f"{path}: kind={kind!r} is not one of {', '.join(RUN_KINDS)}; choose one")
    return validate(tree, str(path), RUN_KINDS[kind])


def validate(tree: dict[str, Any], source: str, kind: type[R] = Config) -> R:  # type: ignore[assignment]
    """Validate nested dictionaries as a config of class `kind`; every error of pydantic goes into one UserError."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_error_message(item, kind) for item in error.errors())) from None


def to_yaml(config: RunConfig) -> str:
    """Write the config as YAML with all defaults; `load_run` reads it back to an equal one."""
    tree = config.model_dump(mode="json")
    tree |= {key: tree.pop(key) for key in ("optim", "health", "system", "profile")}  # the kind's own sections first
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def fingerprint(config: RunConfig) -> str:
    """Hash, as 16 hex digits, of all that changes results: the config without its name, `system` and `profile`.

    A file with a digest counts by its digest, not its path (RunConfig.unhashed_paths, RunConfig.digest_keys); an
    AddedLater setting (configs/section.py) counts only if it is not at its default.
    """
    science = _science_tree(config)
    drop_added_later_defaults(config, science)
    for path, digest in config.digest_keys.items():
        if _get_value(science, digest) is not None:
            section, leaf = _parent_section(science, path)
            del section[leaf]
    return hashlib.sha256(json.dumps(science, sort_keys=True).encode()).hexdigest()[:16]


def science_changes(old: RunConfig, changed: RunConfig) -> list[str]:
    """List the science settings in which two configs differ, as `key: old -> changed`.

    Files are compared by their digests, or by their paths where one of the configs has no digest.
    """
    if old.kind != changed.kind:
        return [f"kind: {old.kind} -> {changed.kind}"]
    flat_old, flat_changed = _flatten(_science_tree(old)), _flatten(_science_tree(changed))
    files = {digest: path for path, digest in old.digest_keys.items()}
    for digest, path in files.items():
        uncompared = digest if None in (flat_old[digest], flat_changed[digest]) else path
        del flat_old[uncompared], flat_changed[uncompared]
    keys = dict.fromkeys((*flat_old, *flat_changed))  # a section that may be None has keys on one side only
    pairs = {key: (flat_old.get(key), flat_changed.get(key)) for key in keys}
    changes = {key: f"{key}: {before} -> {after}" for key, (before, after) in pairs.items() if before != after}
    for digest in files.keys() & changes.keys():
        path = files[digest]
        changes[digest] += f" ({path}={_get_value(changed.model_dump(), path)} holds another file)"
    return list(changes.values())


def one_line(text: object) -> str:
    """Collapse a message of several lines into one."""
    return " ".join(str(text).split())


def _science_tree(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(
        mode="json", exclude={"system": True, "profile": True, "name": True, **config.unhashed_paths}
    )


def _parent_section(tree: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the section that holds a dotted key, and the last part of the key."""
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree[parent]
    return tree, leaf


def _get_value(tree: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key; None without one."""
    section, leaf = _parent_section(tree, key)
    return section.get(leaf)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        presets = ", ".join(sorted(p.stem for p in Path(__file__).parent.glob("*.yaml")))
        raise UserError(
            f"--config {path} cannot be read ({error.strerror}); the presets in configs/ are {presets}"
        ) from None
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8, or a number of thousands of digits
        raise UserError(f"--config {path} is not valid YAML: {_yaml_problem(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--config {path} holds {_describe_value(tree)}, not keys and values")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} has no value: write key.sub=value, for example optim.steps=100")
    if any("\ud800" <= letter <= "\udfff" for letter in override):  # bytes that Python could not decode
        raise UserError(
            f"override {override!r} is not readable in this process's encoding ({sys.getfilesystemencoding()}): "
            "letters beyond ASCII need UTF-8; unset PYTHONUTF8=0, or choose a UTF-8 locale (export LC_ALL=C.UTF-8)"
        )
    *parents, leaf = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:  # absent, or a section without a line below it
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {parent} holds {_describe_value(tree)}, not keys")
    try:
        # Overrides have no comments: `data.train=my data #1/x.tar` names one file.
        tree[leaf] = _replace_in_texts(_parse_value(text.replace("#", _ESCAPED_HASH)), _ESCAPED_HASH, "#")
    except (yaml.YAMLError, ValueError) as error:  # UserError, or a number of thousands of digits
        raise UserError(
            f"override {override!r}: {text!r} is not a YAML value "
            f"({_yaml_problem(error).replace(_ESCAPED_HASH, '#')}); a text with YAML signs in it needs quotes"
        ) from None


def _parse_value(text: str) -> Any:
    """Parse an override's value as YAML; a pattern such as `*.tar` or `{00..99}.tar`, which is no YAML, is kept as
    text. Raises YAMLError, ValueError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        if _PATTERN.fullmatch(text):
            return text
        raise


def _replace_in_texts(value: Any, old: str, new: str) -> Any:
    """Replace a character in all strings of a nested value."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, list):
        return [_replace_in_texts(item, old, new) for item in value]
    if isinstance(value, dict):
        return {_replace_in_texts(key, old, new): _replace_in_texts(item, old, new) for key, item in value.items()}
    return value


def _yaml_problem(error: Exception) -> str:
    """Describe a YAML error as "line 3, column 7: problem"."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return one_line(error)


def _describe_value(value: object) -> str:
    """Name a YAML value for an error: nothing, a list, keys, 'a word', 3."""
    return {type(None): "nothing", list: "a list", dict: "keys"}.get(type(value), repr(value))


def _error_message(item: Any, kind: type[RunConfig]) -> str:
    path, section_kind = _key_path(item["loc"], kind)
    key = ".".join(path)
    if item["type"] == "extra_forbidden" and section_kind and key in _dotted_keys(kind):
        return f"{key} does not belong to {section_kind}: remove it, or change the latter"
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}{_suggest(path, kind)}"
    if item["type"] == "union_tag_invalid":
        name, tag, kinds = (str(item["ctx"][of]).strip("'") for of in ("discriminator", "tag", "expected_tags"))
        return f"{key}.{name}={tag!r}: input should be one of {kinds.replace(chr(39), '')}"
    if item["type"] == "missing":
        return f"{key} is missing and has no default"
    if item["type"] == "value_error":
        return f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    rule = _RULES.get(item["type"], f"{item['msg'][0].lower()}{item['msg'][1:]}")
    return f"{key}={item['input']!r}: {rule}"


def _key_path(loc: tuple[str | int, ...], kind: type[RunConfig]) -> tuple[list[str], str | None]:
    """Convert pydantic's location to the keys in the YAML, and the discriminator of a section of several kinds.

    pydantic puts the kind in between: generator.diffusion.heads -> [generator, heads], "generator.model=diffusion".
    """
    path = [str(part) for part in loc]
    field = kind.model_fields.get(path[0]) if len(path) > 1 else None
    if field is None or field.discriminator is None:
        return path, None
    return [path[0], *path[2:]], f"{path[0]}.{field.discriminator}={path[1]}"


def _suggest(path: list[str], kind: type[RunConfig]) -> str:
    """Return ", did you mean X?" with the nearest key of the same section, else of the whole schema; "" without one."""
    known = _dotted_keys(kind)
    key = ".".join(path)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [k for k in known if k.split(".")[-1] == path[-1]][:1]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def _dotted_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, or a section or None
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += _dotted_keys(kind, f"{prefix}{name}.")
    return keys


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
