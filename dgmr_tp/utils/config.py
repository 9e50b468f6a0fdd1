"""Base class of the configuration sections, and values that must be names in a registry."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, field_validator
from pydantic_core import CoreSchema, core_schema

from dgmr_tp.utils.sources import is_url


class Config(BaseModel):
    """An immutable configuration section. Unknown keys are errors, and attribute docstrings describe the keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():
            raise ValueError("the value is empty; give one, or leave the key out")
        return value


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


class DataPath:
    """Annotation of a key whose value is a path that a run reads: ``Annotated[str | None, DataPath()]``.

    Args:
        urls: accept URLs of shards too.
    """

    def __init__(self, urls: bool = False) -> None:
        self.urls = urls

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        check: Callable[[str | None], str | None] = self._check
        return core_schema.no_info_after_validator_function(check, handler(source))

    def _check(self, path: str | None) -> str | None:
        if path is None:
            return None
        if path.strip() and not self.urls and is_url(path):
            raise ValueError("a URL of shards is not read here; give files on disk")
        return os.path.expanduser(path)


def data_paths(config: BaseModel, prefix: str = "") -> dict[str, str]:
    """Return the values of all keys annotated with :class:`DataPath`, by dotted key, nested sections included."""
    paths: dict[str, str] = {}
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            paths |= data_paths(value, f"{key}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                paths |= data_paths(item, f"{key}.{index}.") if isinstance(item, BaseModel) else {}
        elif value and any(isinstance(mark, DataPath) for mark in field.metadata):
            paths[key] = value
    return paths
