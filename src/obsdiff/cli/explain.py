"""What a parser's complaint means, in words for people who do not read Python types."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches
from importlib import import_module
from inspect import signature

WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text (a number or true as text needs quotes)",
    "list[int]": "a list of whole numbers, such as [0, -1]",
    "Sequence[float]": "a list of numbers, such as [0.5, 0.8]",
    "list[str]": "a list, such as ['a b', c]",
    "Sequence[str]": "a list, such as ['a b', c]",
    "list": "a list, such as [a, b]",
    "Sequence": "a list, such as [a, b]",
    "tuple": "a list, such as [0.9, 0.99]",
    "dict": "keys with values, such as {name: 0.5}",
    "Mapping": "keys with values, such as {name: 0.5}",
}
_KEY = re.compile(r'^(?P<indent>[ -]*)Parser key "(?P<key>[^"]+)":')


def explain(message: str, options: Collection[str], collections: Collection[str] = ()) -> str:
    """One line that says what was expected.

    Args:
        message: Of jsonargparse or argparse, of many lines perhaps.
        options: Names of all options, such as "calibration.steps".
        collections: Those whose values hold several values.
    """
    lines = str(message).splitlines()
    path, section = _innermost(lines)
    text = "\n".join(section)
    if found := re.search(r"unrecognized arguments: (.*)", text):
        return _unknown(found[1].split(), path, lines, options)
    if found := re.search(r"Group '(.+)' does not accept option '(.+)'", text):
        return _unknown([f"--{found[1]}.{found[2]}"], path, lines, options)
    if found := re.search(r"Option '(.+)' is not accepted", text):
        return _unknown([f"--{found[1]}"], path, lines, options)
    if found := re.search(r"required: (.*)", text):
        missing = [f"--{'.'.join([*path, name])}" for name in found[1].split(", ")]
        return f"give {' and '.join(missing)}"
    if found := re.search(r"argument (?:-\w/)?(--\S+): expected one argument", text):
        return f"{found[1]} needs a value"
    name = f"--{'.'.join(path)}"
    if found := re.search(r"Unable to load config ['\"](.*)['\"]", text):
        return f"{name} is {_shown(found[1])}; give keys with values, such as {{a: 1}}, or {name}.KEY VALUE"
    if path and re.search(r"dot import path|not a subclass|not correspond to", text):
        value = re.search(r"(?:Given value|path string|Import path):? (\S+)", text)
        return f"{name} is {_shown(value[1] if value else '?')}; give the full path of a class that fits"
    if found := re.search(r"(module \S+ has no attribute \S+|No module named \S+)", text):
        return f"{name}: {found[1]}"
    return _wrong_value(name, text, ".".join(path) in collections) if path else squeezed(message)


def squeezed(message: object) -> str:
    """One line out of many, not too long."""
    words = " ".join(str(message).split())
    return words if len(words) <= 300 else f"{words[:300]}..."


def nearest(name: str, names: Collection[str]) -> str:
    """``; did you mean ...?`` where a name comes close, else nothing."""
    if begun := [known for known in names if known.startswith(name)]:
        return f"; did you mean {begun[0]}?"
    leaf = {known.rsplit(".", 1)[-1]: known for known in sorted(names, key=len, reverse=True)}
    close = get_close_matches(name, names, 1, 0.75) or [leaf[n] for n in get_close_matches(name, leaf, 1, 0.8)]
    return f"; did you mean {close[0]}?" if close else ""


def _innermost(lines: list[str]) -> tuple[list[str], list[str]]:
    """The keys that lead to where the trouble is, and the lines about it."""
    path: list[str] = []
    indent, start = -1, 0
    for number, line in enumerate(lines):
        if (match := _KEY.match(line)) and len(match["indent"]) > indent:
            if match["key"] not in path[-1:]:
                path.append(match["key"])
            indent, start = len(match["indent"]), number
    section = [lines[start]] if lines else []
    for line in lines[start + 1 :]:
        if line.strip() and len(line) - len(line.lstrip(" ")) <= indent:
            break
        section.append(line)
    # configs of Lightning carry what a class is made of in init_args, which nobody has to write
    return [part for key in path for part in key.split(".") if part != "init_args"], section


def _unknown(words: list[str], path: list[str], lines: list[str], options: Collection[str]) -> str:
    named = [word for word in words if word.startswith("-")]
    if not named:
        return f"cannot place {_shown(words[0])}; every value needs the name of its option before it"
    own = named[0].lstrip("-").partition("=")[0]
    name = ".".join([*path, own])
    if path:
        hint = nearest(own.split(".")[0], _parameters(lines)).replace("mean ", f"mean {'.'.join(['--', *path])}.")
        return f"unknown option --{name}{hint.replace('--.', '--')}"
    return f"unknown option --{name}{nearest(name, options).replace('mean ', 'mean --')}"


def _parameters(lines: list[str]) -> list[str]:
    """What the innermost class that the complaint names takes."""
    named = re.findall(r"Problem with given class_path '([\w.]+)\.(\w+)'", "\n".join(lines))
    try:
        return list(signature(getattr(import_module(named[-1][0]), named[-1][1])).parameters)
    except (IndexError, ImportError, AttributeError, ValueError, TypeError):
        return []


def _wrong_value(name: str, text: str, several: bool) -> str:
    value = re.search(r"Given value: (.*)", text) or re.search(r"Got value: (.*)", text)
    kinds = re.search(r"Subtypes: \[(.*)\]", text) or re.search(r"Expected an? (<class '[^']+'>|[\w.]+\[.*?\])", text)
    if value is None or kinds is None:
        reason = text.split(":", 1)[-1]
        return f"{name}: {squeezed(reason)}"
    if literals := re.findall(r"Literal\[(.*?)\]", kinds[1]):
        choices = dict.fromkeys(word.strip(" '\"") for group in literals for word in group.split(","))
        return f"{name} is {_shown(value[1])}; give one of {', '.join(choices)}"
    plain = re.sub(r"<class '(?:[\w]+\.)*(\w+)'>|(?:[\w]+\.)+(\w+)", lambda m: m[1] or m[2], kinds[1])
    known = [kind for kind in re.findall(r"\w+(?:\[.*?\])?", plain) if kind != "NoneType"]
    words = dict.fromkeys(WORDS.get(kind) or WORDS.get(kind.split("[")[0]) or f"a {kind}" for kind in known)
    return f"{name} {'holds' if several else 'is'} {_shown(value[1])}; give {' or '.join(words)}"


def _shown(value: str) -> str:
    value = value.strip()
    quoted = value if value[:1] in "[{'\"" and value else f"'{value}'"
    return quoted if len(quoted) <= 60 else f"{quoted[:56]}...'"
