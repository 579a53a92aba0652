"""Whether an answer follows instructions that a program can check: the rules of IFEval, offline.

A row is one of google/IFEval: ``prompt``, ``instruction_id_list`` and ``kwargs``, one mapping per
instruction, in which the hub's rows hold None for unused keys. Source: Zhou et al. 2023,
"Instruction-Following Evaluation for Large Language Models". The reference is google-research's
``instructions.py``; every rule decides as it does except where its docstring or one of these says otherwise:

- language:response_language needs a language detector and is not judged: None. english_capital and
  english_lowercase look at the case only.
- Sentences are found without nltk's trained Punkt model (``_sentences``), words in capitals without its
  tokenizer (``_capital_word_frequency``).
- Keywords and markers are plain texts, where the reference reads them as regular expressions.
- A key that an instruction needs and lacks is an error, where the reference draws a random value; 0 is 0, and
  no missing value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_posttrain.data.sources import nearest
from mlx_posttrain.errors import UserError

UNJUDGED = frozenset({"language:response_language"})

_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
# What a period after it does not end a sentence: titles, what is rarely a sentence's last word, initials.
_SHORT = re.compile(
    r"adm|al|capt|co|col|corp|dr|e\.g|ft|gen|gov|hon|i\.e|inc|jr|lt|ltd|maj|messrs|mr|mrs|ms|mt|prof|rev|sen|sgt|sr|st|vs"
    r"|[^\W\d_](\.[^\W\d_])*"
)
_OPENING, _CLOSING = "\"'([{*_\u201c\u2018", "\"')]}*_\u201d\u2019"


# the rules


def _holds(count: int, relation: str, wanted: float) -> bool:
    if relation not in ("less than", "at least"):
        raise UserError(f"IFEval knows no relation {relation!r}; accepted: less than, at least")
    return count < wanted if relation == "less than" else count >= wanted


def _existence(text: str, keywords: Sequence[str]) -> bool:
    """Each of them, inside of words too."""
    return all(word.lower() in text.lower() for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    """Counted inside of words too, without overlaps."""
    return _holds(text.lower().count(keyword.strip().lower()), relation, frequency)


def _forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    """None of them as a whole word. A word with marks at its ends ("C++") counts as whole too, which the
    reference never finds.
    """
    return not any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words
    )


def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """Either case. A mark in place of a letter is counted as it is, where the reference draws a random
    letter.
    """
    return _holds(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _holds(_sentences(text), relation, num_sentences)


def _sentences(text: str) -> int:
    """Number of sentences, which end in ., ! or ?, closing marks included, before white space or the end.

    A period after a title, an initial or a short form does not end one, nor do dots before a small letter.
    The rest of the text is one more; line breaks end none, as in Punkt. Punkt has learnt more short forms
    than the list above, and which words open sentences, so that it also ends one after "U.S." where such a
    word follows; here "U.S." never ends one before the end of the text.
    """
    words, count, open_end = text.split(), 0, False
    for word, after in zip(words, [*words[1:], ""], strict=False):
        whole = word.rstrip(_CLOSING)
        stem = whole.rstrip(".!?")
        marks = whole[len(stem) :]
        if not whole:
            continue  # a quotation mark that stands apart belongs to what is around it
        short = marks == "." and _SHORT.fullmatch(stem.lstrip(_OPENING).lower()) is not None
        trails = len(marks) > 1 and set(marks) == {"."} and after[:1].islower()
        open_end = not marks or bool(after and (short or trails))
        count += not open_end
    return count + open_end


def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Exactly so many between dividers ``***``; a divider may begin or end the text, and there is something
    between any two.
    """
    parts = [part.strip() for part in text.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def _number_words(text: str, num_words: int, relation: str) -> bool:
    """Runs of letters, digits and underscores: "don't" and "well-known" are two each."""
    return _holds(len(re.findall(r"\w+", text)), relation, num_words)


def _nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs between empty lines, and the first word of one of them, up to its first
    mark.

    Blank ones do not count as paragraphs, and yet nth_paragraph counts them, as in the reference.
    """
    parts = [part.strip() for part in text.split("\n\n")]
    filled = sum(map(bool, parts))
    if filled != num_paragraphs or not 1 <= nth_paragraph <= filled or not parts[int(nth_paragraph) - 1]:
        return False
    word = parts[int(nth_paragraph) - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _number_placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many ``[...]``, each on one line."""
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    """The marker anywhere; P.S. and P.P.S also with a space inside."""
    marker = postscript_marker.strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker)
    return re.search(known or re.escape(marker.lower()), text.lower()) is not None


def _number_bullet_lists(text: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with ``-`` or one ``*``. A ``*`` alone on its line takes in the next
    line, as in the reference.
    """
    stars = re.findall(r"^\s*\*[^*].*", text, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-", text, re.MULTILINE)) == num_bullets


def _constrained_response(text: str) -> bool:
    """One of the three answers anywhere, and whatever else."""
    return any(option in text for option in _OPTIONS)


def _number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """At least so many ``*...*`` or ``**...**``, each on one line and not blank. ``***...***`` counts twice,
    as in the reference.
    """
    found = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(part.strip("*").strip()) for part in found) >= num_highlights


def _multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many of the word with a number after it, in the same case."""
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", text)) >= num_sections


def _json_format(text: str) -> bool:
    """JSON, a number or string alone too, in a Markdown fence or without one."""
    inside = re.sub(r"^```(json|Json|JSON)?", "", text.strip()).removesuffix("```").strip()
    try:
        json.loads(inside)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    """``<<...>>`` on one line, not blank."""
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str) -> bool:
    """Two that differ, between six asterisks, which may also begin or end the text."""
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    """The request first, in any case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end_checker(text: str, end_phrase: str) -> bool:
    """The phrase last, in any case; quotation marks around the whole do not count."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    """Straight double quotation marks first and last."""
    whole = text.strip()
    return len(whole) > 1 and whole[0] == whole[-1] == '"'


def _capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """Words without a small letter: "I" and "U.S." count, a hyphenated word is one, and "I'M" is two, as in
    nltk's tokenizer.

    That one also takes apart "CANNOT" and six other contractions, and keeps marks that join words ("A:B") by
    rules not repeated here.
    """
    split = re.sub(r"(?i)('(?:s|m|d|ll|re|ve)|n't)\b", r" \1", text)
    words = re.split(r"[\s\"\u201c\u201d\u00ab\u00bb;@#$%&?!()\[\]{}<>]+|--+|\.\.+|[,:](?!\d)", split)
    return _holds(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def _english_capital(text: str) -> bool:
    """No small letter, and some letter. That it is English, which the reference asks of langdetect, is not
    judged.
    """
    return text.isupper()


def _english_lowercase(text: str) -> bool:
    """No capital, and some letter. That it is English, which the reference asks of langdetect, is not
    judged.
    """
    return text.islower()


def _no_comma(text: str) -> bool:
    return "," not in text


# An instruction's rule and the kwargs that it takes after the text.
RULES: dict[str, tuple[Callable[..., bool], dict[str, type]]] = {
    "keywords:existence": (_existence, {"keywords": list}),
    "keywords:frequency": (_frequency, {"keyword": str, "frequency": int, "relation": str}),
    "keywords:forbidden_words": (_forbidden_words, {"forbidden_words": list}),
    "keywords:letter_frequency": (
        _letter_frequency,
        {"letter": str, "let_frequency": int, "let_relation": str},
    ),
    "length_constraints:number_sentences": (_number_sentences, {"num_sentences": int, "relation": str}),
    "length_constraints:number_paragraphs": (_number_paragraphs, {"num_paragraphs": int}),
    "length_constraints:number_words": (_number_words, {"num_words": int, "relation": str}),
    "length_constraints:nth_paragraph_first_word": (
        _nth_paragraph_first_word,
        {"num_paragraphs": int, "nth_paragraph": int, "first_word": str},
    ),
    "detectable_content:number_placeholders": (_number_placeholders, {"num_placeholders": int}),
    "detectable_content:postscript": (_postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": (_number_bullet_lists, {"num_bullets": int}),
    "detectable_format:constrained_response": (_constrained_response, {}),
    "detectable_format:number_highlighted_sections": (_number_highlighted_sections, {"num_highlights": int}),
    "detectable_format:multiple_sections": (
        _multiple_sections,
        {"section_spliter": str, "num_sections": int},
    ),
    "detectable_format:json_format": (_json_format, {}),
    "detectable_format:title": (_title, {}),
    "combination:two_responses": (_two_responses, {}),
    "combination:repeat_prompt": (_repeat_prompt, {"prompt_to_repeat": str}),
    "startend:end_checker": (_end_checker, {"end_phrase": str}),
    "startend:quotation": (_quotation, {}),
    "change_case:capital_word_frequency": (
        _capital_word_frequency,
        {"capital_frequency": int, "capital_relation": str},
    ),
    "change_case:english_capital": (_english_capital, {}),
    "change_case:english_lowercase": (_english_lowercase, {}),
    "punctuation:no_comma": (_no_comma, {}),
}


# asking them


def follows(
    instruction_id: str, kwargs: Mapping[str, Any] | None, text: str, prompt: str | None = None
) -> bool | None:
    """Whether the text follows one instruction; None for one that cannot be judged offline (UNJUDGED). A
    blank text follows none.

    kwargs: the instruction's own, whatever else is in them. prompt: what combination:repeat_prompt asks to
    repeat if the kwargs lack it. Raises UserError for an unknown instruction, and where a key is missing or
    of another type than it should be.
    """
    if instruction_id in UNJUDGED:
        return None
    if instruction_id not in RULES:
        known = [*RULES, *UNJUDGED]
        raise UserError(f"IFEval knows no instruction {instruction_id!r}{nearest(instruction_id, known)}")
    rule, keys = RULES[instruction_id]
    given = {"prompt_to_repeat": prompt} | {
        key: value for key, value in (kwargs or {}).items() if value is not None
    }
    for key, kind in keys.items():
        value = given.get(key)
        if not _is(value, kind):
            wanted = {list: "a list of texts", int: "a number", str: "a text"}[kind]
            raise UserError(f"{instruction_id} needs {key!r}, {wanted}, in its kwargs; found {value!r}")
    return bool(text.strip()) and rule(text, *(given[key] for key in keys))


def _is(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    # tables turn whole numbers into floats where another row has none
    return (
        isinstance(value, int | float) and not isinstance(value, bool)
        if kind is int
        else isinstance(value, kind)
    )


def strict(row: Mapping[str, Any], text: str) -> bool | None:
    """Whether the text follows every instruction of the row that can be judged; None where none can.

    The reference also judges language:response_language, so that a row with it is harder there. Raises
    UserError as ``follows``.
    """
    return _all(_followed(row, [text]))


def loose(row: Mapping[str, Any], text: str) -> bool | None:
    """As ``strict``, but an instruction is also followed if the text follows it once first line, last line or
    both are taken off.

    Each of the four is tried without asterisks too: the paper's loose accuracy, which forgives "Sure, here it
    is:" and Markdown, and for that also accepts some wrong answers.
    """
    lines = text.split("\n")
    parts = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return _all(_followed(row, parts + [part.replace("*", "") for part in parts]))


def instruction_accuracy(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> tuple[float, float]:
    """Shares of prompts of which every instruction is followed, and of instructions followed: the paper's two
    strict accuracies.

    rows, texts: [R]. Range 0 to 1, ceiling 1. What cannot be judged is left out of both, nan where nothing is
    left; hence prompts with language:response_language make these figures differ from published ones. Raises
    UserError as ``follows``.
    """
    followed = [_followed(row, [text]) for row, text in zip(rows, texts, strict=True)]
    prompts = [every for one in followed if (every := _all(one)) is not None]
    each = [one for row in followed for one in row if one is not None]
    return (sum(prompts) / len(prompts) if prompts else math.nan, sum(each) / len(each) if each else math.nan)


def _followed(row: Mapping[str, Any], texts: Sequence[str]) -> list[bool | None]:
    """Per instruction of the row whether one of the texts follows it."""
    ids, kwargs = list(row["instruction_id_list"]), row.get("kwargs")
    kwargs = [{}] * len(ids) if kwargs is None else list(kwargs)
    if len(kwargs) != len(ids):
        raise UserError(
            f"an IFEval row has {len(ids)} instructions and {len(kwargs)} kwargs; it needs one "
            "mapping per instruction"
        )
    judged = [
        [follows(one, own, text, row.get("prompt")) for text in texts]
        for one, own in zip(ids, kwargs, strict=True)
    ]
    return [None if None in found else any(found) for found in judged]


def _all(followed: Sequence[bool | None]) -> bool | None:
    judged = [one for one in followed if one is not None]
    return all(judged) if judged else None
