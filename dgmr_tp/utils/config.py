"""Base class of the configuration sections, and values that must be names in a registry."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationInfo, field_validator
from pydantic_core import CoreSchema, core_schema

from dgmr_tp.utils.sources import is_url


class Config(BaseModel):
    """An immutable configuration section. Attribute docstrings describe the keys.

    Unknown keys, empty texts, numbers that are not finite, ``true`` or ``false`` for a number, and lists that name a
    value twice are errors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_value(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if _mentions(annotation, lambda part: isinstance(part, type) and issubclass(part, BaseModel)):
            return value  # a section checks its own values
        values = _scalars(value)
        if any(isinstance(item, str) and not item.strip() for item in values):
            raise ValueError("the value is empty; give one, or leave the key out")
        if any(isinstance(item, bool) for item in values) and _mentions(annotation, _is_number):
            raise ValueError("true and false are not numbers")
        if isinstance(value, list) and (repeated := [item for item in value if value.count(item) > 1]):
            raise ValueError(f"{repeated[0]} is given twice")
        return value


def _scalars(value: Any) -> list[Any]:
    """Return all values inside lists and mappings."""
    if isinstance(value, Mapping):
        return [scalar for item in value.values() for scalar in _scalars(item)]
    if isinstance(value, list | tuple):
        return [scalar for item in value for scalar in _scalars(item)]
    return [value]


def _mentions(annotation: Any, matches: Callable[[Any], bool]) -> bool:
    """Return whether an annotation such as ``float | list[float]``, or a part of it, matches."""
    return matches(annotation) or any(_mentions(part, matches) for part in get_args(annotation))


def _is_number(annotation: Any) -> bool:
    return annotation is int or annotation is float or type(annotation) in (int, float)  # the latter in a Literal


class NameIn:
    """Annotation of a string that must be a key of ``registry``, such as ``Annotated[str, NameIn(CRITERIA)]``.

    The registry is read at validation, so that entries added later are valid too. The docs generator lists
    :attr:`registry`.
    """

    def __init__(self, registry: Mapping[str, object]) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        check: Callable[[str], str] = self._check
        return core_schema.no_info_after_validator_function(check, handler(source))

    def _check(self, name: str) -> str:
        if name not in self.registry:
            raise ValueError(f"unknown name; use one of {', '.join(self.registry)}")
        return name


def expand_home(path: Any) -> Any:
    """Return a path with ``~`` or ``~user`` at its start replaced by the home directory. Other values stay."""
    return os.path.expanduser(path) if isinstance(path, str) else path


class DataPath:
    """Annotation of a key whose value is a path that a run reads: ``Annotated[str | None, DataPath()]``.

    ``~`` at its start is the home directory.

    Args:
        kind: ``file`` or ``directory`` if it must be one of them; ``any`` otherwise.
        urls: accept URLs of shards too.
    """

    def __init__(self, kind: Literal["file", "directory", "any"] = "any", *, urls: bool = False) -> None:
        self.kind = kind
        self.urls = urls

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        check: Callable[[str | None], str | None] = self._check
        return core_schema.no_info_after_validator_function(check, handler(source))

    def _check(self, path: str | None) -> str | None:
        if path and not self.urls and is_url(path):
            raise ValueError("a URL of shards is not read here; give files on disk")
        return expand_home(path)


class KeyedPath(NamedTuple):
    """A value of a key annotated with :class:`DataPath`."""

    path: str
    kind: Literal["file", "directory", "any"]


def data_paths(config: BaseModel, prefix: str = "") -> dict[str, KeyedPath]:
    """Return the values of all keys annotated with :class:`DataPath`, by dotted key, nested sections included."""
    paths: dict[str, KeyedPath] = {}
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            paths |= data_paths(value, f"{key}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                paths |= data_paths(item, f"{key}.{index}.") if isinstance(item, BaseModel) else {}
        elif value and (marks := [mark for mark in field.metadata if isinstance(mark, DataPath)]):
            paths[key] = KeyedPath(value, marks[0].kind)
    return paths
