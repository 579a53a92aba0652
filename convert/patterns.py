"""Keys of PEFT's rank_pattern and alpha_pattern: names of layers and simple patterns of them.

Any regular expression may be there, and some take for ever on a name that they do not match. The ones that
are read are parts of layer names, a few of them repeated, and lists of alternatives.
Source: `peft/utils/other.py`, get_pattern_key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: Longest path of a layer, half that of a pattern: what a pattern takes grows with a power of the path.
LONGEST_PATH = 128
_CLASS = r"\\[dw]|\[(?:0-9|\w+)\]"
_ONE, _SOME = rf"(?:[\w\-]|\\?\.|{_CLASS})", rf"(?:\.|{_CLASS})[*+]"
_PATTERN = re.compile(rf"\^?(?:{_SOME}|{_ONE}|\((?:\?:)?(?:{_SOME}|{_ONE}|\|)+\)|\|)+\$?")
_MOST_REPEATED, _MOST_LISTS = 3, 2
#: For a message.
ALLOWED = (
    f"a pattern is a layer's name, with at most {_MOST_REPEATED} of .* and \\d+, {_MOST_LISTS} lists (a|b), "
    "^ and $"
)


def is_pattern(text: str) -> bool:
    """Return whether a key is a layer's name or a pattern that takes little time on any other."""
    if len(text) > 2 * LONGEST_PATH or not _PATTERN.fullmatch(text):
        return False
    return len(re.findall(_SOME, text)) <= _MOST_REPEATED and text.count("(") <= _MOST_LISTS


def by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of the path."""
    return next(
        (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", path)),
        default,
    )
