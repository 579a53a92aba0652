"""Filters for the rows worth imitating: length, completeness, boilerplate, language, duplicates.

They are the filters commonly used to clean instruction data (Alpaca-cleaned; LIMA, Zhou et al. 2023), each a
function of one row that can be read and tested alone. ``clean`` applies them and then draws a fixed number of
rows. They are heuristics: look at the counts of dropped rows that ``clean`` returns.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mlx_posttrain.data.templates import stable_hash
from mlx_posttrain.data.types import Conversation
from mlx_posttrain.errors import UserError

PERMUTATIONS = 128  # of a MinHash
RECALL = 0.98  # share of the pairs just as similar as the threshold that become candidates
SHINGLE = 5  # words

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_LIST_ITEM = re.compile(r"\s*(?:[-*•–+]\s|\(?\w{1,3}[.)]\s|#|[\w ]{1,30}:\s)")
_CODE = re.compile(
    r"```|[;{}]\s*$|</?\w+[^<>]*>"
    r"|^\s*(?:def |class |import |from \w+ import|#include|public |function |const |let |var "
    r"|return\b|SELECT\b)",
    re.MULTILINE,
)
_URL = re.compile(r"(?:https?://|www\.)\S+")
# A number or a closing mark ends an answer as well as a full stop does.
_ENDS = tuple(".!?…:;。！？\"'”’»)]}>`*_~|=%$€£°0123456789")
# The end of a letter: a greeting, a name or a tag follows its last full stop.
_SIGNED = re.compile(
    r"\b(?:sincerely|regards|yours|faithfully|truly|love|wishes|luck|respect|thanks|cheers|admiration|anticipation)\b|^\s*(?:[-–—~#]|p\.?s\b)",
    re.IGNORECASE,
)
_LAST_SENTENCE = re.compile(r"[^.!?…\n]*$")


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that need a following word: an answer that stops at one was cut off, however short it is.
_OPEN_WORDS = _set(
    "a an the and or but nor of with from into as than because if which whose while his "
    "their our your my very every"
)

_AI = (
    r"(?:ai|artificial intelligence|(?:large )?language)(?:[- ](?:based|powered))?(?: language)?(?: "
    r"model| assistant| chatbot| system)?"
)
_CANNOT = r"(?:can(?:not|['’]t| not)|(?:am|['’]m) (?:unable|not able))"
_BOILERPLATE = re.compile(
    "|".join(
        (
            rf"\bas an? {_AI}(?:,| I\b)",  # but not "as an AI judge, ...", which plays a role
            r"\bas an? (?:large )?(?:ai )?language model\b|\bI(?: am|['’]m) (?:just |only )?an? (?:large "
            r")?(?:ai )?(?:language )?model\b",
            r"\bI(?: am|['’]m) ChatGPT\b|\b(?:trained|developed|created|made) by OpenAI\b|\bmy "
            r"(?:knowledge|training) (?:cut-?off|data)\b",
            r"<no ?input>|<no ?output>|\[insert ",
        )
    ),
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"^\W*(?:"
    + "|".join(
        (
            rf"I(?: am|['’]m) (?:very |so |really )?sorry\b.{{0,40}}?\b(?:I )?{_CANNOT}\b",
            rf"(?:sorry|unfortunately),? (?:but )?I {_CANNOT}\b",
            rf"I {_CANNOT} (?:to )?(?:assist|help|provide|fulfill?|comply|complete|generate|answer|do "
            r"that)\b",
            r"(?:not enough information|no input (?:was )?(?:provided|given)|n/?a\W*$|nooutput|none\W*$)",
        )
    )
    + ")",
    re.IGNORECASE | re.DOTALL,
)

# The commonest words of each language, without ambiguous ones: those that are English words too (Italian
# "come", Dutch "is"), and for English "I".
STOPWORDS: dict[str, frozenset[str]] = {
    "en": _set(
        "the of and to is are was were that it for with this you be have from they which your can not by "
        "will what there in on at as a "
        "an or but if he she his her we our my their has had would who how when its"
    ),
    "de": _set(
        "der das und ist nicht ein eine mit dem von zu auf für sich auch werden sind oder wird ich "
        "sie wie einen einer"
    ),
    "fr": _set(
        "le les et est une du dans que qui pas avec sont vous je nous ce cette ou aux être il elle "
        "plus leur ses par"
    ),
    "es": _set(
        "el los las y es una del por con para que se lo como más pero sus su está este esta muy en un al"
    ),
    "it": _set(
        "il di che è la una con sono della del si le gli alla nel anche più questo un dei delle da ha"
    ),
    "pt": _set("os é um uma da não com para em que na por mais dos das se são você ao ou foi pelo seu sua"),
    "nl": _set(
        "de het een en van dat niet te zijn voor met er aan ook naar bij om wordt deze werd heeft hij ze"
    ),
}
MIN_LANGUAGE_WORDS = 8  # fewer words do not tell the language


def words(text: str, lower: bool = True) -> list[str]:
    """Return the words of ``text``, by default in lower case; an apostrophe does not divide a word."""
    return _WORD.findall(text.lower() if lower else text)


def is_cut_off(answer: str) -> bool:
    """Return whether an answer seems to stop in the middle.

    It does if a code block is still open, if it ends in a comma, a hyphen or a word that needs a following
    word, or if it is prose of a dozen words or more and its last line has no closing mark. Lists, verse, code
    and signed letters may end without one.
    """
    text = answer.rstrip()
    if not text:
        return False
    if text.count("```") % 2:
        return True
    if text.endswith(("```", *_ENDS)):
        return False
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1]
    if _CODE.search(text):
        return False
    if text[-1] in ",-–—(/&":
        return True
    tokens = words(last)
    length = len(words(text))
    if length >= 3 and tokens and tokens[-1] in _OPEN_WORDS:
        return True
    if not text[-1].isalpha() or length < 12 or _LIST_ITEM.match(last):
        return False
    tail = _LAST_SENTENCE.search(text).group()  # type: ignore[union-attr]
    names = words(tail, lower=False)
    if len(names) <= 8 and _SIGNED.search(tail):
        return False
    if tail == last and len(names) <= 4 and all(word[0].isupper() for word in names):
        return False  # a name on a line of its own
    if text[-1].lower() == text[-1].upper():  # a script without case, whose full stops are not in _ENDS
        return False
    if len(lines) > 1 and sum(line.rstrip().endswith(_ENDS) for line in lines[:-1]) * 2 <= len(lines) - 1:
        return False  # the other lines have no closing mark either: verse or a plain list
    return last.count(",") * 4 < len(tokens)  # every fourth word followed by a comma: an enumeration


def is_boilerplate(answer: str) -> bool:
    """Return whether an answer is worthless as text to imitate.

    It is if it mentions being a language model, refuses, is a placeholder, or contains only URLs.
    """
    return bool(_BOILERPLATE.search(answer) or _REFUSAL.search(answer) or not words(_URL.sub("", answer)))


def is_language(text: str, language: str = "en") -> bool:
    """Return False if ``text`` is clearly not in ``language`` (a key of ``STOPWORDS``).

    Clearly means: more than a fifth of its letters are not Latin, or, with eight words or more, another
    language's commonest words occur at least three times and more often than this one's. Short texts, names,
    numbers and code are inconclusive and pass.
    """
    letters = [c for c in text if c.isalpha()]
    # Latin with all its extensions ends at U+024F.
    if sum(ord(c) >= 0x250 for c in letters) * 5 > len(letters):
        return False
    tokens = words(text)
    if len(tokens) < MIN_LANGUAGE_WORDS:
        return True
    hits = {name: sum(word in common for word in tokens) for name, common in STOPWORDS.items()}
    this = hits.pop(language)
    other = max(hits.values())
    return other < 3 or this >= other


def normalised(text: str) -> str:
    """Return ``text`` without differences of case, punctuation and white space.

    Rows whose normalised texts are equal are exact duplicates.
    """
    return " ".join(words(text))


def shingles(text: str) -> set[bytes]:
    """Return all runs of ``SHINGLE`` words in ``text``, or all words of a shorter text as one."""
    tokens = words(text)
    return {
        " ".join(tokens[i : i + SHINGLE]).encode("utf-8", "surrogatepass")
        for i in range(max(1, len(tokens) - SHINGLE + 1))
    }


def near_duplicates(texts: Sequence[str], threshold: float = 0.7, seed: int = 0) -> Iterator[bool]:
    """Yield, for each text, whether it is a near duplicate of an earlier text that was kept.

    A near duplicate has a Jaccard similarity of shingles of at least ``threshold``. MinHash with
    locality-sensitive hashing (Broder 1997; datasketch) finds candidates without comparing all pairs: at
    least RECALL of those at the threshold, and nearly all above it. Where the share of equal hash values, an
    estimate of the similarity, is not 4 standard errors below the threshold, the exact similarity decides.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=PERMUTATIONS, params=bands(threshold))
    kept: dict[int, set[bytes]] = {}
    # datasketch needs a seed above 0
    empty = MinHash(num_perm=PERMUTATIONS, seed=seed + 1, hashfunc=zlib.crc32)
    hashes = np.empty((len(texts), PERMUTATIONS), empty.hashvalues.dtype)
    least = threshold - 4 * math.sqrt(threshold * (1 - threshold) / PERMUTATIONS)
    for number, text in enumerate(texts):
        current = shingles(text)
        sketch = empty.copy()
        sketch.update_batch(current)
        hashes[number] = sketch.hashvalues
        candidates = np.array(index.query(sketch), np.int64)
        likely = candidates[(hashes[candidates] == hashes[number]).mean(1) >= least]
        duplicate = any(_jaccard(current, kept[other]) >= threshold for other in likely.tolist())
        if not duplicate:
            index.insert(number, sketch, check_duplication=False)
            kept[number] = current
        yield duplicate


def bands(threshold: float) -> tuple[int, int]:
    """(b bands, r rows in each) of a MinHash, of which two texts are candidates if any band is equal.

    Two texts of similarity s are candidates with probability 1 - (1 - s^r)^b (Leskovec et al. 2014, "Mining
    of Massive Datasets", section 3.4.2). r is the largest with which that is at least RECALL at the
    threshold, since fewer pairs below it are then compared in vain; from .03 down it is 1, and the
    probability less.
    """
    rows = max(
        (
            r
            for r in range(1, PERMUTATIONS // 2 + 1)
            if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= RECALL
        ),
        default=1,
    )
    return PERMUTATIONS // rows, rows


def _jaccard(a: set[bytes], b: set[bytes]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def clean(
    conversations: Sequence[Conversation],
    *,
    min_words: int = 3,
    max_words: int = 400,
    complete: bool = True,
    boilerplate: bool = True,
    language: str | None = "en",
    exact: bool = True,
    near: float | None = 0.7,
    keep: int | None = 3000,
    seed: int = 0,
) -> tuple[list[Conversation], dict[str, int]]:
    """Return the rows that pass every filter, and how many rows each filter dropped.

    Rows keep their order; the filters are listed in the order they are applied. ``min_words`` and
    ``max_words`` bound the last answer; ``complete``, ``boilerplate`` and ``exact`` switch their filters;
    ``language`` and ``near`` (the similarity of near duplicates) switch theirs off with None; ``keep`` rows
    are drawn by ``seed``. Of several duplicates the first stays. Raises UserError for a setting out of range
    or if no row is left.
    """
    _check(min_words, max_words, language, near, keep)
    tests: list[tuple[str, Callable[[str, str], bool]]] = [
        ("too short", lambda prompt, answer: len(words(answer)) < min_words),
        ("too long", lambda prompt, answer: len(words(answer)) > max_words),
    ]
    if complete:
        tests.append(("cut off", lambda prompt, answer: is_cut_off(answer)))
    if boilerplate:
        tests.append(
            ("boilerplate", lambda prompt, answer: is_boilerplate(answer) or "<noinput>" in prompt.lower())
        )
    if language:
        tests.append(
            (
                f"not {language}",
                lambda prompt, answer: not (is_language(answer, language) and is_language(prompt, language)),
            )
        )

    drops = {name: 0 for name, _ in tests}
    kept: list[tuple[Conversation, str]] = []
    for conversation in conversations:
        prompt, answer = _split(conversation)
        failed = next((name for name, test in tests if test(prompt, answer)), None)
        if failed:
            drops[failed] += 1
        else:
            kept.append((conversation, f"{prompt}\n{answer}"))
    if exact:
        kept, drops["duplicate"] = _without(kept, _repeats([text for _, text in kept]))
    if near is not None:
        kept, drops["near duplicate"] = _without(
            kept, near_duplicates([text for _, text in kept], near, seed)
        )
    if keep is not None:
        drops["over the number kept"] = max(0, len(kept) - keep)
        kept = _draw(kept, keep, seed)
    if not kept:
        raise UserError(
            "no row is left after cleaning "
            f"({', '.join(f'{name}: {n}' for name, n in drops.items() if n)}); loosen a filter"
        )
    return [conversation for conversation, _ in kept], drops


def _check(
    min_words: int, max_words: int, language: str | None, near: float | None, keep: int | None
) -> None:
    if not 0 <= min_words <= max_words:
        raise UserError(f"quality: min_words {min_words} and max_words {max_words} leave no length to keep")
    if language and language not in STOPWORDS:
        raise UserError(
            f"quality: unknown language {language!r} (there are {', '.join(STOPWORDS)}, or null for any)"
        )
    if near is not None and not 0 < near <= 1:
        raise UserError(f"quality: near {near} must be above 0 and at most 1 (or null)")
    if keep is not None and keep < 1:
        raise UserError(f"quality: keep {keep} must be at least 1 (or null for all)")


def _split(conversation: Conversation) -> tuple[str, str]:
    """Return (text of all turns before the last, last answer)."""
    return "\n".join(turn.content for turn in conversation.turns[:-1]), conversation.turns[-1].content


def _repeats(texts: Sequence[str]) -> Iterator[bool]:
    """Yield, for each text, whether its normalised form occurred before."""
    earlier: set[str] = set()
    for text in texts:
        key = normalised(text)
        yield key in earlier
        earlier.add(key)


def _without(
    rows: list[tuple[Conversation, str]], drop: Iterator[bool]
) -> tuple[list[tuple[Conversation, str]], int]:
    kept = [row for row, is_dropped in zip(rows, drop, strict=True) if not is_dropped]
    return kept, len(rows) - len(kept)


def _draw(rows: list[tuple[Conversation, str]], keep: int, seed: int) -> list[tuple[Conversation, str]]:
    """Return ``keep`` rows in their order, drawn by each row's own text.

    So a few more rows in the source hardly change the draw.
    """
    if len(rows) <= keep:
        return rows
    ranked = sorted(range(len(rows)), key=lambda i: (stable_hash(rows[i][1], seed), i))
    return [rows[i] for i in sorted(ranked[:keep])]
