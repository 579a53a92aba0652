"""The rules of IFEval, offline: whether an answer follows instructions that a program can check.

A row is one of google/IFEval: ``prompt``, ``instruction_id_list`` and ``kwargs``, one mapping per
instruction, in which the hub's rows have None for unused keys. Source: Zhou et al. 2023,
"Instruction-Following Evaluation for Large Language Models". The reference is google-research's
``instructions.py``. Every rule decides as the reference does, except where its docstring says otherwise and
in these points:

- language:response_language needs a language detector and is not judged: None. english_capital and
  english_lowercase check the case only.
- Sentences are split without nltk's trained Punkt model (``_sentences``), and words in capitals are found
  without its tokenizer (``_capital_word_frequency``).
- Keywords and markers are plain texts; the reference reads them as regular expressions.
- A missing key that an instruction needs is an error; the reference draws a random value. A 0 is 0 and not a
  missing value.
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
# Abbreviations whose period does not end a sentence: titles, words rarely at a sentence's end, initials.
_SHORT = re.compile(
    r"adm|al|capt|co|col|corp|dr|e\.g|ft|gen|gov|hon|i\.e|inc|jr|lt|ltd|maj|messrs|mr|mrs|ms|mt|prof|rev|sen|sgt|sr|st|vs"
    r"|[^\W\d_](\.[^\W\d_])*"
)
_OPENING, _CLOSING = "\"'([{*_\u201c\u2018", "\"')]}*_\u201d\u2019"


# Rules


def _compare(count: int, relation: str, bound: float) -> bool:
    if relation not in ("less than", "at least"):
        raise UserError(f"IFEval has no relation {relation!r}; accepted: less than, at least")
    return count < bound if relation == "less than" else count >= bound


def _existence(text: str, keywords: Sequence[str]) -> bool:
    """Every keyword occurs, possibly inside a word."""
    return all(word.lower() in text.lower() for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword occurs as often as asked, counted inside words too and without overlaps."""
    return _compare(text.lower().count(keyword.strip().lower()), relation, frequency)


def _forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    """No forbidden word occurs as a whole word.

    A word with punctuation at its ends ("C++") is found too; the reference never finds one.
    """
    return not any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words
    )


def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """The letter occurs as often as asked, in either case.

    A punctuation mark in place of a letter is counted as such; the reference draws a random letter instead.
    """
    return _compare(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(_sentences(text), relation, num_sentences)


def _sentences(text: str) -> int:
    """Return the number of sentences.

    A sentence ends in ., ! or ?, possibly followed by closing marks, before white space or the end of the
    text. A period after a title, an initial or an abbreviation does not end one, nor do dots before a
    lower-case letter. Text after the last end is one more sentence; line breaks end none, as in Punkt. Punkt
    has learnt more abbreviations than the list above, and which words begin sentences, so that it also ends
    one after "U.S." before such a word; here "U.S." ends one only at the end of the text.
    """
    words, count, open_end = text.split(), 0, False
    for word, after in zip(words, [*words[1:], ""], strict=False):
        bare = word.rstrip(_CLOSING)
        stem = bare.rstrip(".!?")
        marks = bare[len(stem) :]
        if not bare:
            continue  # a quotation mark on its own belongs to the text around it
        short = marks == "." and _SHORT.fullmatch(stem.lstrip(_OPENING).lower()) is not None
        trails = len(marks) > 1 and set(marks) == {"."} and after[:1].islower()
        open_end = not marks or bool(after and (short or trails))
        count += not open_end
    return count + open_end


def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """The text has exactly that many paragraphs, divided by ``***``.

    A divider may begin or end the text, and between any two there must be text.
    """
    parts = [part.strip() for part in text.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def _number_words(text: str, num_words: int, relation: str) -> bool:
    """The text has as many words as asked: "don't" and "well-known" are two each.

    A word is a run of letters, digits and underscores.
    """
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


def _nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """The text has exactly that many paragraphs, and the nth begins with the given word.

    Paragraphs are divided by empty lines; the word ends at its first punctuation mark. Blank paragraphs do
    not count, although nth_paragraph counts them, as in the reference.
    """
    parts = [part.strip() for part in text.split("\n\n")]
    filled = sum(map(bool, parts))
    if filled != num_paragraphs or not 1 <= nth_paragraph <= filled or not parts[int(nth_paragraph) - 1]:
        return False
    word = parts[int(nth_paragraph) - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _number_placeholders(text: str, num_placeholders: int) -> bool:
    """The text has at least that many ``[...]``, each on one line."""
    # \[.*?\] would look for the end from every "[" of a line that has none
    opened = (line.rpartition("]")[0] for line in text.split("\n"))
    return sum(len(re.findall(r"\[[^\]]*", line)) for line in opened) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    """The marker occurs anywhere; P.S. and P.P.S also with a space inside."""
    marker = postscript_marker.strip()
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker)
    return re.search(pattern or re.escape(marker.lower()), text.lower()) is not None


def _number_bullet_lists(text: str, num_bullets: int) -> bool:
    """The text has exactly that many lines that begin with ``-`` or one ``*``.

    A ``*`` alone on its line also takes the next line, as in the reference.
    """
    lines = [line.lstrip() for line in text.split("\n")]
    count = sum(line.startswith("-") for line in lines)
    following = iter(lines)
    for line in following:
        if line == "*":
            count += next(following, None) is not None
        else:
            count += line.startswith("*") and not line.startswith("**")
    return count == num_bullets


def _constrained_response(text: str) -> bool:
    """One of the three answers occurs anywhere in the text."""
    return any(option in text for option in _OPTIONS)


def _number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """The text has at least that many ``*...*`` or ``**...**``, each on one line and not blank.

    ``***...***`` counts twice, as in the reference.
    """
    parts = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(part.strip("*").strip()) for part in parts) >= num_highlights


def _multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """The section word with a number after it occurs at least that often, in the same case."""
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", text)) >= num_sections


def _json_format(text: str) -> bool:
    """The text is JSON, possibly a lone number or string, with or without a Markdown fence."""
    inside = re.sub(r"^```(json|Json|JSON)?", "", text.strip()).removesuffix("```").strip()
    try:
        json.loads(inside)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    """The text has a ``<<...>>`` on one line that is not blank."""
    # <<.+>> would look for the end from every "<<" of a line that has none
    inside = (line.partition("<<")[2].rpartition(">>")[0] for line in text.split("\n"))
    return any(title.lstrip("<").rstrip(">").strip() for title in inside)


def _two_responses(text: str) -> bool:
    """The text has two different responses, divided by six asterisks, which may also begin or end it."""
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    """The text begins with the request, in any case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end_checker(text: str, end_phrase: str) -> bool:
    """The text ends with the phrase, in any case; quotation marks around the text are ignored."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    """The text begins and ends with straight double quotation marks."""
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


def _capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """The text has as many words without a lower-case letter as asked.

    "I" and "U.S." count, a hyphenated word is one, and "I'M" is two, as in nltk's tokenizer. That tokenizer
    also splits "CANNOT" and six other contractions, and keeps punctuation that joins words ("A:B") by rules
    not repeated here.
    """
    split = re.sub(r"(?i)('(?:s|m|d|ll|re|ve)|n't)\b", r" \1", text)
    words = re.split(r"[\s\"\u201c\u201d\u00ab\u00bb;@#$%&?!()\[\]{}<>]+|--+|\.\.+|[,:](?!\d)", split)
    return _compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def _english_capital(text: str) -> bool:
    """The text has letters, and none in lower case.

    That it is English, which the reference checks with langdetect, is not judged.
    """
    return text.isupper()


def _english_lowercase(text: str) -> bool:
    """The text has letters, and no capitals.

    That it is English, which the reference checks with langdetect, is not judged.
    """
    return text.islower()


def _no_comma(text: str) -> bool:
    return "," not in text


# instruction -> (its rule, the kwargs that the rule takes after the text)
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


# Whole rows


def follows(
    instruction_id: str, kwargs: Mapping[str, Any] | None, text: str, prompt: str | None = None
) -> bool | None:
    """Return whether the text follows one instruction, or None if it cannot be judged (UNJUDGED).

    A blank text follows none. kwargs: the instruction's, possibly among others. prompt: the text that
    combination:repeat_prompt asks to repeat, if the kwargs lack it. Raises UserError for an unknown
    instruction, and for a key that is missing or has the wrong type.
    """
    if instruction_id in UNJUDGED:
        return None
    if instruction_id not in RULES:
        names = [*RULES, *UNJUDGED]
        raise UserError(f"IFEval has no instruction {instruction_id!r}{nearest(instruction_id, names)}")
    rule, keys = RULES[instruction_id]
    given = {"prompt_to_repeat": prompt} | {
        key: value for key, value in (kwargs or {}).items() if value is not None
    }
    for key, kind in keys.items():
        value = given.get(key)
        if not _has_type(value, kind):
            expected = {list: "a list of texts", int: "a number", str: "a text"}[kind]
            raise UserError(f"{instruction_id} needs {key!r}, {expected}, in its kwargs; found {value!r}")
    return bool(text.strip()) and rule(text, *(given[key] for key in keys))


def _has_type(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    # tables turn a column's whole numbers into floats if a row has no value
    return (
        isinstance(value, int | float) and not isinstance(value, bool)
        if kind is int
        else isinstance(value, kind)
    )


def strict(row: Mapping[str, Any], text: str) -> bool | None:
    """Return whether the text follows every instruction of the row that can be judged, or None without any.

    The reference also judges language:response_language, so rows with it are harder there. Raises UserError
    as ``follows`` does.
    """
    return _all(_followed(row, [text]))


def loose(row: Mapping[str, Any], text: str) -> bool | None:
    """Return the same as ``strict``, but judged loosely, as in the paper's loose accuracy.

    An instruction is also followed if the text follows it without its first line, its last line or both, and
    each of these four texts is also tried without asterisks. This forgives "Sure, here it is:" and Markdown,
    and in return accepts some wrong answers.
    """
    lines = text.split("\n")
    parts = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return _all(_followed(row, parts + [part.replace("*", "") for part in parts]))


def instruction_accuracy(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> tuple[float, float]:
    """Return the paper's two strict accuracies: (per prompt, per instruction).

    They are the share of prompts whose instructions are all followed, and the share of instructions followed.
    rows, texts: [R]. Range 0 to 1, ceiling 1. Instructions that cannot be judged are left out of both; nan
    where none is left. So prompts with language:response_language make the accuracies differ from published
    ones. Raises UserError as ``follows`` does.
    """
    followed = [_followed(row, [text]) for row, text in zip(rows, texts, strict=True)]
    prompts = [every for one in followed if (every := _all(one)) is not None]
    instructions = [one for row in followed for one in row if one is not None]
    return (
        sum(prompts) / len(prompts) if prompts else math.nan,
        sum(instructions) / len(instructions) if instructions else math.nan,
    )


def _followed(row: Mapping[str, Any], texts: Sequence[str]) -> list[bool | None]:
    """Return, for each instruction of the row, whether one of the texts follows it."""
    ids, kwargs = list(row["instruction_id_list"]), row.get("kwargs")
    kwargs = [{}] * len(ids) if kwargs is None else list(kwargs)
    if len(kwargs) != len(ids):
        raise UserError(
            f"an IFEval row has {len(ids)} instructions and {len(kwargs)} kwargs; it needs one "
            "mapping per instruction"
        )
    judged = [
        [follows(instruction_id, its_kwargs, text, row.get("prompt")) for text in texts]
        for instruction_id, its_kwargs in zip(ids, kwargs, strict=True)
    ]
    return [None if None in verdicts else any(verdicts) for verdicts in judged]


def _all(followed: Sequence[bool | None]) -> bool | None:
    judged = [one for one in followed if one is not None]
    return all(judged) if judged else None
