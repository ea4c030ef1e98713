"""YAML that remembers its lines, so that every mistake in a spec can be pointed at.

Enters: a YAML file. Leaves: plain values, and a line for each key path.
Refuses: duplicate keys, syntax errors, tags that build objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fmops.errors import FmopsError, SpecMistake, SpecMistakes, nearest

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class YamlDocument:
    """Values of a YAML file, and the line of each key path."""

    path: Path
    value: Any
    lines: dict[Location, int]

    def line(self, location: Location) -> int:
        """The line of a key, or of the nearest key around it."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 1)

    def refused(self, error: ValidationError, model: type[BaseModel]) -> FmopsError:
        """Every mistake of a document that is no `model`, a line each."""
        problems: list[str] = []
        for item in error.errors(include_url=False):
            cause = item.get("ctx", {}).get("error")
            if isinstance(cause, SpecMistakes):
                problems += [self.point(mistake) for mistake in cause.mistakes]
            else:
                problems.append(self._explain(item, model))
        return FmopsError("\n".join(dict.fromkeys(problems)))

    def point(self, mistake: SpecMistake) -> str:
        """A mistake in how parts go together, with its place in front."""
        return f"{self._place(mistake.at)}: {mistake}"

    def _place(self, location: Location) -> str:
        return f"{shown(self.path)}:{self.line(location)}"

    def _explain(self, error: Mapping[str, Any], model: type[BaseModel]) -> str:
        """One validation error as `file:line: what is wrong, with the nearest valid name`."""
        inner = ("function-", "tuple[", "[key]")
        location: Location = tuple(part for part in error["loc"] if not str(part).startswith(inner))
        where = self._place(location)
        name = ".".join(str(part) for part in location)
        if error["type"] == "extra_forbidden":
            known = _fields_at(model, location[:-1])
            key = str(location[-1])
            inside = f" in {'.'.join(map(str, location[:-1]))}" if location[:-1] else ""
            return f"{where}: unknown key {key!r}{inside}.{nearest(key, known)} Known: {', '.join(known)}."
        if error["type"] == "missing":
            return f"{where}: {name} is missing."
        message = str(error["msg"]).removeprefix("Value error, ")
        if not name:
            return f"{where}: {message}."
        if error["type"] == "value_error":
            return f"{where}: {name}: {message}."
        wanted = _WANTED.get(error["type"]) or message.replace("Input should be", "must be")
        if error["type"] == "string_pattern_mismatch":
            field = _field_at(model, location)
            wanted = f"does not fit: {((field and field.description) or message).rstrip('.')}"
        choices = error.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ").split(", ")
        hint = nearest(str(error["input"]), choices) if error["type"] == "literal_error" else ""
        if error["type"] == "string_type":
            hint = " YAML reads it otherwise than as text: put it into quotes."
        return f"{where}: {name} {wanted}, got {_as_yaml(error['input'])}.{hint}"


_WANTED = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "tuple_type": "must be a list",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}
"""What a key wants, in the words of somebody who writes YAML."""


class _Loader(yaml.SafeLoader):
    """YAML's plain values; `1e9` and `3e-5` are numbers, as they are everywhere but in YAML 1.1."""


_Loader.yaml_implicit_resolvers = {key: list(found) for key, found in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+"), list("-+0123456789"))


def shown(path: Path) -> str:
    """A path as short as it can be from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _as_yaml(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def parse_yaml(path: Path) -> YamlDocument:
    """Read one YAML mapping.

    Raises:
        FmopsError: syntax error, duplicate key or a document that is no mapping, with its line.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise FmopsError(f"{shown(path)}:{line}: not valid YAML: {error.problem}.") from None
    except yaml.reader.ReaderError as error:
        raise FmopsError(
            f"{shown(path)}: the character {error.character!r} at place {error.position} is not allowed. Remove it."
        ) from None
    except OSError as error:
        raise FmopsError(f"{shown(path)} cannot be read ({error.strerror}). Give yourself the right to.") from None
    except UnicodeDecodeError as error:
        raise FmopsError(f"{shown(path)}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    if not isinstance(root, yaml.MappingNode):
        raise FmopsError(
            f"{shown(path)}:1: a spec is a mapping of keys to values. `fmops init` writes one to start from."
        )
    lines: dict[Location, int] = {}
    _index(root, (), lines, path, above=frozenset())
    loader = _Loader("")
    try:
        value = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise FmopsError(f"{shown(path)}:{line}: {error.problem}. A spec holds plain values only.") from None
    except ValueError as error:
        # PyYAML makes dates of whatever looks like one, and does not say where.
        raise FmopsError(f"{shown(path)}: {error}, in a value that looks like a date. Put it into quotes.") from None
    return YamlDocument(path=path, value=value, lines=lines)


def _index(
    node: yaml.Node, at: Location, lines: dict[Location, int], path: Path, *, above: frozenset[int]
) -> None:  # fmt: skip
    lines.setdefault(at, node.start_mark.line + 1)
    if id(node) in above:
        raise FmopsError(f"{shown(path)}:{node.start_mark.line + 1}: an alias holds itself. Write the value out.")
    above |= {id(node)}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise FmopsError(f"{shown(path)}:{key.start_mark.line + 1}: a key must be a plain word.")
            location = (*at, key.value)
            if location in lines:
                raise FmopsError(
                    f"{shown(path)}:{key.start_mark.line + 1}: key {key.value!r} stands twice; "
                    f"first on line {lines[location]}. Keep one."
                )
            lines[location] = key.start_mark.line + 1
            _index(value, location, lines, path, above=above)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _index(item, (*at, number), lines, path, above=above)


def _fields_at(model: type[BaseModel], location: Location) -> list[str]:
    """Names of the fields of the model that lies at `location`."""
    current = _model_at(model, location)
    return sorted(current.model_fields) if current else []


def _field_at(model: type[BaseModel], location: Location) -> FieldInfo | None:
    current = _model_at(model, location[:-1])
    return current.model_fields.get(str(location[-1])) if current else None


def _model_at(model: type[BaseModel], location: Location) -> type[BaseModel] | None:
    current: type[BaseModel] | None = model
    value_type: Any = None
    for part in location:
        if current is not None and str(part) in current.model_fields:
            value_type = current.model_fields[str(part)].annotation
        elif value_type is not None:
            value_type = get_args(value_type)[-1]
        current = _model_in(value_type)
    return current


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if getattr(annotation, "__origin__", None) is dict:
        return None
    found = [_model_in(part) for part in get_args(annotation)]
    return next((model for model in found if model), None)
