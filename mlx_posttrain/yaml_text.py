"""YAML that people write, within bounds: a short text can stand for more than a machine holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

#: Longest text in characters: PyYAML reads about 100,000 a second. MAX_OF_A_RUN: of what a run has written; a
#: pipeline writes 2,500 characters for each run of its grids.
MAX_CHARACTERS, MAX_OF_A_RUN = 200_000, 3_000_000
#: Most brackets within brackets: PyYAML's time for a bracket grows with the number around it.
MAX_DEPTH = 100


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for two kinds of numbers that nobody means: 010 is 10 here, not 8, and 1:30 a text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "").lower()
        return int(text, {"0b": 2, "0x": 16}.get(text.lstrip("+-")[:2], 10))

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level >= MAX_DEPTH:  # type: ignore[has-type]
            raise ValueError("it is nested too deeply")
        super().fetch_flow_collection_start(token_class)


_Loader.add_constructor(_NUMBERS[0], _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    _NUMBERS[0], re.compile(r"[-+]?(0[0-7_]*|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _NUMBERS[1],
    re.compile(
        r"([-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, most: int = MAX_CHARACTERS) -> Any:
    """Return the value of one YAML document of at most ``most`` characters and half as many values.

    What an alias repeats is counted each time.

    Raises yaml.YAMLError, for a key that is there twice too, and ValueError for a value that is out of range,
    an anchor that contains itself, and a text beyond the bounds.
    """
    if len(text) > most:
        raise ValueError(f"{len(text):,} characters, more than {most:,}")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > most // 2:
            raise ValueError(f"its aliases make more than {most // 2:,} values of it")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # what PyYAML's constructors raise for values such as !!bool 1 or !!int x
    except (KeyError, AttributeError, IndexError, TypeError, OverflowError):
        raise ValueError("a value is not what its tag says") from None
    finally:
        loader.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values that a node stands for; ``known`` has that of each node that was met."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError("an anchor contains itself")
        return known[id(node)]
    known[id(node)] = 0
    if isinstance(node, yaml.ScalarNode):
        # JSON is YAML, but PyYAML reads its \\ud83d\\ude00, one character, as two
        node.value = node.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    parts: list[Any] = list(node.value) if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        parts = [part for pair in parts for part in pair]
    known[id(node)] = count = 1 + sum(_values(part, known) for part in parts)
    return count


def _check_keys(node: yaml.MappingNode) -> None:
    """Raise a YAMLError, with its line, for a key that is there twice: the first would be lost."""
    met: dict[tuple[str, str], yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if (first := met.setdefault((key.tag, key.value), key)) is not key:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key.value!r:.80} is there twice, on line {first.start_mark.line + 1} too",
                problem_mark=key.start_mark,
            )


def with_spaces(value: Any) -> Any:
    """A value with ``{a:b}``, a key without a value to YAML, as the ``{a: b}`` that it means."""
    if isinstance(value, list):
        return [with_spaces(one) for one in value]
    if not isinstance(value, dict):
        return value
    found: dict[Any, Any] = {}
    for key, inner in value.items():
        name, colon, text = key.partition(":") if isinstance(key, str) else (key, "", "")
        if colon and inner is None and name and text:
            found[name] = text
        else:
            found[key] = with_spaces(inner)
    return found


class Written(dict[Any, Any]):
    """The mapping that a setting's ``text`` is as YAML, which may be meant as text: ``Q: {question}``."""

    def __init__(self, value: dict[Any, Any], text: str):
        super().__init__(value)
        self.text = text


def as_written(value: dict[Any, Any], changed: dict[Any, Any]) -> dict[Any, Any]:
    """``changed``, made of ``value``, which stays a :class:`Written` where that is one."""
    return Written(changed, value.text) if isinstance(value, Written) else changed


def flow(value: Any) -> str:
    """A value of plain texts and numbers on one line, without quotes, as a person types it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return "null" if value is None else str(value)


def unquoted(setting: str, words: Sequence[str]) -> str | None:
    """The setting that was meant where a shell took one with brackets apart; None where it is whole.

    At blanks: ``columns={a:`` and ``b}`` for ``columns={a: b}``. Of braces without blanks bash makes a word
    for each part: ``columns=a:b`` and ``columns=c:d``.
    """
    key, _, text = setting.partition("=")
    if text[:1] in ("{", "[") and _open(text):
        rest = list(words[list(words).index(setting) + 1 :])
        while rest and _open(text):
            text += " " + rest.pop(0)
        return f"{key}={text}" if not _open(text) else None
    alike = [word.partition("=")[2] for word in words if word.partition("=")[0] == key]
    if len(alike) > 1 and all(re.fullmatch(r"\w+:[^{}\[\]\s]+", one) for one in alike):
        return f"{key}={{{', '.join(one.replace(':', ': ', 1) for one in alike)}}}"
    return None


def _open(text: str) -> bool:
    return sum(text.count(one) for one in "{[") > sum(text.count(one) for one in "}]")
