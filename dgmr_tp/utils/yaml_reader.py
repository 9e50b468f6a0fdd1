"""Read YAML strictly: scalars by the core schema of YAML 1.2, no tags, no duplicate keys, no recursion.

PyYAML implements YAML 1.1, in which ``yes`` is a boolean, ``1:30`` is 90 and ``010`` is 8. It also lets a second key
replace the first.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

TAG_PREFIX = "tag:yaml.org,2002:"
CORE_SCHEMA = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "merge": r"<<",
}
"""Regular expressions of plain scalars by tag. Every other plain scalar is a string."""
TAGS = {f"{TAG_PREFIX}{name}" for name in (*CORE_SCHEMA, "str", "seq", "map")}
INT = f"{TAG_PREFIX}int"
KEY_TAGS = (f"{TAG_PREFIX}str", INT, f"{TAG_PREFIX}merge")
"""Tags of keys. Integers are keys of mappings such as ``layers``."""
MAX_DEPTH = 100
"""Maximum number of collections inside each other."""
MAX_VALUES = 100_000
"""Maximum number of values after all aliases are replaced by what they refer to."""


class RefusedYAMLError(yaml.MarkedYAMLError):
    """Valid YAML that a recipe must not use."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012


class Dumper(yaml.SafeDumper):
    """Dumper that quotes every string which YAML 1.1 or 1.2 would read as something else."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return _to_int(str(loader.construct_scalar(node)))


for _name, _pattern in CORE_SCHEMA.items():
    for _cls in (_Loader, Dumper):
        _cls.add_implicit_resolver(f"{TAG_PREFIX}{_name}", re.compile(f"(?:{_pattern})$"), None)
_Loader.add_constructor(INT, _construct_int)


def compose_yaml(text: str) -> yaml.Node | None:
    """Return the root node of a document, checked; None if it is empty.

    Raises:
        RefusedYAMLError: it has a tag or a duplicate key, or is recursive or too large.
        yaml.YAMLError: the text is not YAML.
    """
    try:
        node = yaml.compose(text, _Loader)
        if node is not None:
            _check(node, (), {})
    except RecursionError as error:
        raise RefusedYAMLError(problem=f"collections are nested deeper than {MAX_DEPTH}") from error
    return node


def parse_yaml(text: str) -> Any:
    """Return the content of a document. The errors are those of :func:`compose_yaml`."""
    compose_yaml(text)
    try:
        return yaml.load(text, _Loader)
    except ValueError as error:  # an explicit tag such as !!int on a text, or thousands of digits
        raise RefusedYAMLError(problem=str(error)) from error


def _check(node: yaml.Node, ancestors: tuple[int, ...], sizes: dict[int, int]) -> int:
    """Return the number of values at and below a node, with aliases replaced by what they refer to."""
    if id(node) in ancestors:
        raise _refusal(node, "an alias refers to the collection that contains it")
    if id(node) in sizes:
        return sizes[id(node)]
    if len(ancestors) > MAX_DEPTH:
        raise _refusal(node, f"collections are nested deeper than {MAX_DEPTH}")
    if node.tag not in TAGS:
        raise _refusal(node, f"the tag {node.tag.replace(TAG_PREFIX, '!!')} is not allowed")
    children = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [value for _, value in node.value]
    size = 1 + sum(_check(child, (*ancestors, id(node)), sizes) for child in children)
    if size > MAX_VALUES:
        raise _refusal(node, f"its aliases stand for more than {MAX_VALUES:,} values")
    sizes[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    first_lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.tag not in KEY_TAGS:
            name = f" {key.value}" if isinstance(key, yaml.ScalarNode) else ""
            raise _refusal(key, f"the key{name} is not a name")
        name = str(_to_int(key.value)) if key.tag == INT else key.value
        if name in first_lines:
            raise _refusal(key, f"the key {name} is given twice, first in line {first_lines[name]}")
        first_lines[name] = key.start_mark.line + 1


def _to_int(text: str) -> int:
    return int(text, 0 if text.startswith(("0o", "0x")) else 10)


def _refusal(node: yaml.Node, problem: str) -> RefusedYAMLError:
    return RefusedYAMLError(problem=problem, problem_mark=node.start_mark)
