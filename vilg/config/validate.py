"""A marked document against a pydantic model: every problem in our words, with its position and the nearest key."""

import json
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from vilg.config.problems import NotGiven
from vilg.config.marked import KeyPath, Marked, Place, did_you_mean, dotted, shown

Model = TypeVar("Model", bound=BaseModel)

# pydantic's error types in our words; the others keep pydantic's own sentence.
_MESSAGES = {
    "int_type": "should be an integer",
    "float_type": "should be a number",
    "string_type": "should be text",
    "bool_type": "should be true or false",
    "path_type": "should be a path",
    "tuple_type": "should be a list [..]",
    "model_type": "should be a section of keys",
    "model_attributes_type": "should be a section of keys",
    "finite_number": "should be a finite number",
}


class Partial:
    """Stand-in for a section with problems: its sound fields, and `NotGiven` for the others."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        if name not in self._values:
            raise NotGiven(name)
        return self._values[name]


def validate(marked: Marked, model: type[Model]) -> tuple[Model | None, list[tuple[Place, str]]]:
    """Check against the schema. Through JSON: pydantic's strict mode then takes lists as tuples and text as paths."""
    try:
        return model.model_validate_json(json.dumps(marked.value), strict=True), []
    except ValidationError as error:
        return None, [_schema_problem(model, marked, details) for details in error.errors()]


def _schema_problem(model: type[BaseModel], marked: Marked, details: ErrorDetails) -> tuple[Place, str]:
    path: KeyPath = details["loc"]
    kind = details["type"]
    key = dotted(path)
    place = marked.place(path)
    if kind == "extra_forbidden":
        return place, f"{key}: unknown key{_suggestion(model, path)}"
    if kind == "missing":
        return place, f"{key}: missing{_description(model, path)}"
    if kind == "too_long":
        message = f"should have {details['ctx']['max_length']} items"
    else:
        message = _MESSAGES.get(kind) or details["msg"].replace("Input should", "should")
    return place, f"{key}: {message}; found {shown(details['input'])}"


def _suggestion(model: type[BaseModel], path: KeyPath) -> str:
    """The nearest key of the same section, else a section that has such a key, else what the section offers."""
    around, wrong = path[:-1], str(path[-1])
    here = _section(model, around)
    valid = list(here.model_fields) if here else []
    near = did_you_mean(wrong, valid)
    if near:
        return near
    elsewhere = [dotted(p) for p in sorted(_all_keys(model, ()), key=len) if p[-1] == wrong]
    if elsewhere:
        return f"; did you mean '{elsewhere[0]}'?"
    return f"; valid here: {', '.join(valid)}" if valid else ""


def _description(model: type[BaseModel], path: KeyPath) -> str:
    section = _section(model, path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    return f" ({field.description})" if field and field.description else ""


def _section(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    section: type[BaseModel] | None = model
    for part in path:
        field = section.model_fields.get(str(part)) if section else None
        section = _model_of(field.annotation) if field else None
    return section


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section class of a field: `X` or `X | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        models = [m for a in typing.get_args(annotation) if (m := _model_of(a))]
        return models[0] if models else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _all_keys(section: type[BaseModel], around: KeyPath) -> Iterator[KeyPath]:
    for name, field in section.model_fields.items():
        yield (*around, name)
        inner = _model_of(field.annotation)
        if inner:
            yield from _all_keys(inner, (*around, name))


def partial(model: type[BaseModel], written: Any) -> Partial:
    """What is sound of a section, so that cross rules can be checked in the same run as the schema."""
    written = written if isinstance(written, dict) else {}
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = _model_of(field.annotation)
        if inner:
            values[name] = partial(inner, written.get(name, {}))
        elif name in written:
            adapter = TypeAdapter(Annotated[field.annotation, field])
            try:
                values[name] = adapter.validate_json(json.dumps(written[name]), strict=True)
            except ValidationError:
                continue  # reported by `validate`
        elif not field.is_required():
            values[name] = field.get_default()
    return Partial(values)
