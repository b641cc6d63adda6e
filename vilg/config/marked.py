"""YAML and JSON read with the position of every key and value, so that an error can say file:line:column.

Scalars follow YAML 1.2's core schema, not PyYAML's YAML 1.1: `1e-3` is a float, `no` and `12:30` are strings.
"""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vilg.errors import UserError

KeyPath = tuple[str | int, ...]

_SCALARS = (  # (tag, pattern, first characters)
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class _CoreLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}


class _CoreDumper(yaml.SafeDumper):
    """Quotes what `_CoreLoader` would read as something else than a string."""

    yaml_implicit_resolvers: dict = {}


for _tag, _pattern, _first in _SCALARS:
    for _class in (_CoreLoader, _CoreDumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


@dataclass(frozen=True, order=True)
class Place:
    """Where something stands: a file with line and column (both from 1), or a flag of the command line (line 0)."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass
class Marked:
    """A document: its value in plain Python, the places of its keys, and the problems found while reading."""

    source: str
    value: Any = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[tuple[Place, str]] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place:
        """The place of a key, or of the nearest section around it that is written down."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, Place(self.source, 1, 1))


def read_file(path: str | Path, *, what: str) -> Marked:
    """Read a YAML file, or a JSON file if its name ends so.

    `what` names its kind in errors ("recipe"). Raises UserError if the file is missing, is no text, or its syntax is
    wrong; problems inside it (duplicate keys) are collected in the result.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist{did_you_mean(path.name, _siblings(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from None
    return read_json(text, str(path)) if path.suffix == ".json" else read_yaml(text, str(path))


def read_yaml(text: str, source: str) -> Marked:
    """Read one YAML document. Raises UserError with the position if its syntax is wrong."""
    marked = Marked(source)
    try:
        loader = _CoreLoader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(source, mark.line + 1, mark.column + 1)
        raise UserError(f"{place}: this is not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:  # characters that no YAML may hold
        raise UserError(f"{source}: this is not YAML: {' '.join(str(error).split())}") from None
    if node is not None:
        marked.value = _plain(loader, node, (), marked, ())
    return marked


def read_json(text: str, source: str) -> Marked:
    """Read one JSON document. Raises UserError with the position if its syntax is wrong."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{Place(source, error.lineno, error.colno)}: this is not JSON: {error.msg}") from None
    # YAML holds JSON but for tabs between tokens; inside JSON strings a tab cannot stand, so columns stay right.
    marked = read_yaml(text.replace("\t", " "), source)
    marked.value = value
    return marked


def read_value(text: str) -> Any:
    """A scalar, list or mapping as it would be read inside a recipe. Raises UserError if its syntax is wrong."""
    marked = read_yaml(text, "value")
    if marked.problems:
        raise UserError("; ".join(message for _, message in marked.problems))
    return marked.value


def write_yaml(value: Any) -> str:
    """YAML that `read_yaml` reads back as the same value."""
    return yaml.dump(value, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=100)


def did_you_mean(wrong: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the valid name most like the wrong one, or nothing if none is like it."""
    near = difflib.get_close_matches(wrong, list(valid), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def shown(value: Any) -> str:
    """A value as a message shows it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def dotted(path: KeyPath) -> str:
    """`("tokens", "grid", 1)` as `tokens.grid[1]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _plain(loader: _CoreLoader, node: yaml.Node, path: KeyPath, marked: Marked, around: tuple[yaml.Node, ...]) -> Any:
    """The node's value in plain Python; notes the places of all keys on the way."""
    place = Place(marked.source, node.start_mark.line + 1, node.start_mark.column + 1)
    marked.places.setdefault(path, place)
    if node in around:
        marked.problems.append((place, f"{dotted(path)}: an alias (*name) inside the value it stands for"))
        return None
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*path, i), marked, (*around, node)) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, path, marked, (*around, node))
    return _scalar(loader, node, path, place, marked)


def _mapping(loader, node: yaml.MappingNode, path: KeyPath, marked: Marked, around: tuple[yaml.Node, ...]) -> dict:
    values: dict = {}
    for key_node, value_node in node.value:
        key_place = Place(marked.source, key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        key = key_node.value
        if not isinstance(key, str):
            marked.problems.append((key_place, f"{dotted(path) or 'top level'}: a key must be a word"))
            continue
        here = (*path, key)
        if key in values:
            first = marked.places[here]
            marked.problems.append(
                (key_place, f"{dotted(here)}: given twice (first in line {first.line}); keep one of the two")
            )
            continue
        marked.places[here] = key_place
        values[key] = _plain(loader, value_node, here, marked, around)
    return values


def _scalar(loader, node: yaml.ScalarNode, path: KeyPath, place: Place, marked: Marked) -> Any:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    text = node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "str":
        return text
    try:
        if kind == "int":
            return int(text.replace("_", ""))
        if kind == "float":
            return loader.construct_yaml_float(node)
    except ValueError:  # an explicit tag on something else: !!int abc
        pass
    marked.problems.append((place, f"{dotted(path)}: {node.tag} {text!r} is not read here; write a plain value"))
    return None


def _siblings(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
