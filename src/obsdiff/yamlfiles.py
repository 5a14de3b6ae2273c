"""YAML as people mean it: the core schema of YAML 1.2, where ``2:4`` is text and ``no`` is a word.

YAML 1.1 reads ``2:4`` as a number in base 60, ``010`` as 8, ``no`` as false, and ``1e-3`` as text; here every file and
every value of a command line goes by one loader, and a key that is given twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from obsdiff.errors import UserError
from obsdiff.paths import user_path

_NULL, _BOOL, _INT, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "merge"))


class CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain scalars of YAML 1.2's core schema, and no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """As the safe loader does, but a key that stands there twice is an error."""
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE:
                if key_node.value in seen:
                    twice = f"the key {key_node.value!r} stands there twice"
                    raise yaml.MarkedYAMLError(problem=twice, problem_mark=key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _text(loader: CoreLoader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise yaml.MarkedYAMLError(problem="half a character", problem_mark=node.start_mark)
    return text


def _integer(loader: CoreLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


CoreLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    (_NULL, r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    (_BOOL, r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    (_INT, r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        _FLOAT,
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    (_MERGE, r"^(?:<<)$", ["<"]),  # of 1.1, and widely used
):
    CoreLoader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
CoreLoader.add_constructor(_INT, _integer)
CoreLoader.add_constructor("tag:yaml.org,2002:str", _text)


def load_yaml(text: str) -> Any:
    """What a YAML document says.

    Raises:
        yaml.YAMLError: It is none, is nested too deeply, or holds a number that is too long.
    """
    try:
        return yaml.load(text, Loader=CoreLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, TypeError) as error:  # numbers and dates that Python refuses; keys that cannot be hashed
        raise yaml.YAMLError(str(error)) from None


def read_yaml(path: str | Path, what: str) -> dict[str, Any]:
    """The mapping in a file that is supposed to be ``what``.

    Raises:
        UserError: The file cannot be read, or holds something else.
    """
    try:
        text = user_path(path, what).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not {_article(what)}: it is no UTF-8 text") from None
    try:
        content = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not {_article(what)}: {_short(error)}") from None
    if not isinstance(content, dict) or not content:
        found = {type(None): "empty", dict: "empty", list: "a list"}.get(type(content), f"just {str(content)[:40]!r}")
        raise UserError(f"{path} is not {_article(what)}: it is {found}, not keys with values")
    if odd := [key for key in content if not isinstance(key, str)]:
        raise UserError(f"{path} is not {_article(what)}: its key {odd[0]!r} is not text")
    return content


@cache
def use_core_schema() -> None:
    """Let jsonargparse, and with it Lightning's command line, read YAML by :func:`load_yaml`.

    Text for a numeric option (``--seed 2:4``) goes by another loader of jsonargparse's, which has no public name; it
    keeps yes, no, on and off for switches, and loses base 60.
    """
    from jsonargparse import _loaders_dumpers, set_loader

    set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    resolvers = _loaders_dumpers.get_yaml_default_loader().yaml_implicit_resolvers
    for first, known in resolvers.items():
        resolvers[first] = [(tag, _no_base_60(found) if tag in (_INT, _FLOAT) else found) for tag, found in known]


def _no_base_60(pattern: re.Pattern[str]) -> re.Pattern[str]:
    return re.compile(rf"(?![-+]?[0-9_]+:)(?:{pattern.pattern})", pattern.flags)


def _article(what: str) -> str:
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


def _short(error: yaml.YAMLError) -> str:
    """One line: what is wrong, and where."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return " ".join(f"{problem}{'' if mark is None else f' (line {mark.line + 1})'}".split())[:200]
