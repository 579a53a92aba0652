"""Conversations to token ids, with a mark on every trained token.

EOS follows each answer. A special token written out in a row's text (``<|endoftext|>``) becomes that token,
as the tokenizer's users would expect. With tokenizers that begin every text with BOS (Llama), each row starts
with one BOS; GPT-2's does not, and rows get none. A row without a prompt then starts with one EOS, which is
not trained: it is what its first token is predicted from, and what generation from nothing starts with.

Prompt and answer are tokenised apart, each as it would be within the joint text (data/tokens.py). Where the
tokenizer would merge the end of a prompt with the beginning of its answer, it does not: an answer never
changes the ids of its prompt, because generation starts from exactly those ids.

The template "chat" differs: its rows have the ids of ``tokenizer.apply_chat_template``, token by token, up to
the end of the last answer. The rendered text is tokenised as one, a BOS stands where the template writes one
and nowhere else, and a token across a boundary belongs to the later side. So where a tokenizer merges the end
of the generation prompt with an answer, a row does not begin with the ids of its prompt, in Hugging Face's
libraries as here. The usual templates end the prompt in a special token or a newline, where nothing merges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from mlx_posttrain.data.templates import (
    Refused,
    Segment,
    TrainOn,
    begin_answer,
    check_name,
    choose,
    render,
    render_prompt,
)
from mlx_posttrain.data.thoughts import missing_part, split_thought
from mlx_posttrain.data.tokens import (
    Place,
    bos_ids,
    eos_id,
    start_ids,
    tokenise,
    tokenise_joint,
    tokenise_pieces,
)
from mlx_posttrain.data.types import Conversation, Example, Turn
from mlx_posttrain.errors import UserError

# Rows tokenised at a time: enough to keep the tokenizer's threads busy, few enough that the text is not held
# in memory twice.
CHUNK = 2048

Truncate = Literal["response", "drop"]


@dataclass(frozen=True)
class EncodingReport:
    """Counts of the rows that were kept, dropped and truncated, and of their tokens.

    ``total`` is kept + dropped_no_target + dropped_long + dropped_refused; a truncated row is also kept.
    ``refusal``: why the chat template refused the first row that it did. ``thoughtless``: kept rows of which
    the chat template leaves out a thought before an earlier answer.
    """

    total: int = 0
    kept: int = 0
    dropped_no_target: int = 0
    dropped_long: int = 0
    truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped_refused: int = 0
    refusal: str = ""
    thoughtless: int = 0

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped, by reason."""
        return {
            "no trained token": self.dropped_no_target,
            "too long": self.dropped_long,
            self.refusal or "refused by the chat template": self.dropped_refused,
        }

    def __str__(self) -> str:
        refused = f"; {self.dropped_refused:,} dropped: {self.refusal}" if self.dropped_refused else ""
        thoughtless = f"; {self.thoughtless:,} without earlier thoughts, which the chat template leaves out"
        thoughtless = thoughtless if self.thoughtless else ""
        return (
            f"{self.kept:,} of {self.total:,} rows kept ({self.dropped_no_target:,} without a trained token, "
            f"{self.dropped_long:,} too long, {self.truncated:,} truncated), {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} trained{refused}{thoughtless}"
        )


class Outcome(NamedTuple):
    """A row's Example, or why there is none.

    ``kind`` is "" (kept whole), "truncated", "long", "no_target" or "refused", with the ``reason`` for that.
    ``thoughtless``: whether the chat template leaves out the thought before an earlier answer.
    """

    example: Example | None
    kind: str = ""
    reason: str = ""
    thoughtless: bool = False


class _Encoded(NamedTuple):
    tokens: list[int]
    trained: list[bool]


def encode(
    conversation: Conversation,
    tokenizer: Any,
    *,
    template: str = "instruction",
    max_length: int,
    train_on: TrainOn = "completion",
    truncate: Truncate = "response",
) -> Example | None:
    """Return one conversation as an Example, or None if no trained token is left.

    The Example has at most ``max_length`` tokens. ``truncate`` "response" cuts off the end of a longer row,
    which then has no EOS, because the answer did not end there; "drop" returns None for it.
    """
    _check(max_length, truncate)
    encoded = _assemble(
        [render(conversation, template, tokenizer, train_on)], tokenizer, [_is_chat(conversation, template)]
    )[0]
    return _fit(encoded, max_length, truncate, conversation).example


def encode_all(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    *,
    templates: Sequence[str] = ("instruction",),
    max_length: int,
    train_on: TrainOn = "completion",
    seed: int = 0,
    truncate: Truncate = "response",
    needed: bool = True,
) -> tuple[list[Example], EncodingReport]:
    """Return the Examples of all rows, in order, and an EncodingReport of what was dropped or truncated.

    With several ``templates``, the row's text and ``seed`` decide which one a row gets. Raises UserError,
    with the row's number, for a row that the chat template would train in part only, and if no row is left
    and ``needed`` is True.
    """
    outcomes = encode_each(
        conversations,
        tokenizer,
        templates=templates,
        max_length=max_length,
        train_on=train_on,
        seed=seed,
        truncate=truncate,
    )
    examples = [o.example for o in outcomes if o.example is not None]
    kinds = Counter(o.kind for o in outcomes)
    report = EncodingReport(
        total=len(conversations),
        kept=len(examples),
        dropped_no_target=kinds["no_target"],
        dropped_long=kinds["long"],
        truncated=kinds["truncated"],
        tokens=sum(len(e.tokens) for e in examples),
        trained_tokens=sum(sum(e.trained) for e in examples),
        dropped_refused=kinds["refused"],
        refusal=next((o.reason for o in outcomes if o.kind == "refused"), ""),
        thoughtless=sum(o.thoughtless for o in outcomes if o.example is not None),
    )
    if needed and not examples:
        advice = f"raise the maximum length ({max_length}) or check the answers' column"
        if kinds["refused"]:
            advice = "choose another data.template"
        raise UserError(f"no row left to train on: {report}; {advice}")
    return examples, report


def encode_each(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    *,
    templates: Sequence[str] = ("instruction",),
    max_length: int,
    train_on: TrainOn = "completion",
    seed: int = 0,
    truncate: Truncate = "response",
) -> list[Outcome]:
    """Return what became of each row, in order; see :func:`encode_all`."""
    _check(max_length, truncate)
    for name in templates:
        check_name(name)
    if not templates:
        raise UserError("templates is empty: name at least one")
    outcomes: list[Outcome] = []
    for begin in range(0, len(conversations), CHUNK):
        chunk = conversations[begin : begin + CHUNK]
        names = [choose(templates, c.turns, seed) for c in chunk]
        rendered: list[list[Segment] | Refused] = []
        for number, (conversation, name) in enumerate(zip(chunk, names, strict=True), begin + 1):
            try:
                rendered.append(render(conversation, name, tokenizer, train_on))
            except Refused as error:
                rendered.append(error)
            except UserError as error:
                raise UserError(f"row {number} ({_excerpt(conversation.turns)}): {error}") from None
        rows = [row for row in rendered if not isinstance(row, Refused)]
        chat = [
            _is_chat(c, name)
            for c, name, row in zip(chunk, names, rendered, strict=True)
            if not isinstance(row, Refused)
        ]
        encoded = iter(_assemble(rows, tokenizer, chat))
        for conversation, row in zip(chunk, rendered, strict=True):
            if isinstance(row, Refused):
                outcomes.append(Outcome(None, "refused", str(row)))
                continue
            outcome = _fit(next(encoded), max_length, truncate, conversation)
            outcomes.append(outcome._replace(thoughtless=_lacks_a_thought(conversation, row)))
    return outcomes


def _lacks_a_thought(conversation: Conversation, row: Sequence[Segment]) -> bool:
    """Return whether the thought before an earlier answer is not in the row before its last answer."""
    thoughts = [split_thought(t.content)[0] for t in conversation.turns[:-1] if t.role == "assistant"]
    text = "".join(segment.text for segment in row[:-1]) if any(thoughts) else ""
    return any(missing_part(thought, text) for thought in thoughts)


def encode_prompts(
    prompts: Sequence[Sequence[Turn]],
    tokenizer: Any,
    template: str = "instruction",
    max_length: int | None = None,
    *,
    templated: bool = True,
    answer: str = "",
) -> list[list[int]]:
    """Return the prompt ids for the next answer to each list of turns.

    They equal the ids before that answer in a training row; of an empty prompt they are
    :func:`tokens.start_ids`. ``answer`` is the beginning of every answer, which the ids then include. Raises
    UserError, with the prompt's number, for one that does not end with a question, that the chat template
    refuses, or that is longer than ``max_length``.
    """
    found = try_prompts(prompts, tokenizer, template, templated=templated, answer=answer)
    rows: list[list[int]] = []
    for number, row in enumerate(found, 1):
        which = f"prompt {number} ({_excerpt(prompts[number - 1])})"
        if isinstance(row, UserError):
            raise UserError(f"{which}: {row}")
        if max_length is not None and len(row) > max_length:
            raise UserError(f"{which} has {len(row)} tokens, more than the {max_length} that fit; shorten it")
        rows.append(row)
    return rows


def try_prompts(
    prompts: Sequence[Sequence[Turn]],
    tokenizer: Any,
    template: str = "instruction",
    *,
    templated: bool = True,
    answer: str = "",
) -> list[list[int] | UserError]:
    """:func:`encode_prompts`, with the error that says why in place of a prompt that cannot be asked."""
    rendered: list[list[Segment] | Refused] = []
    for turns in prompts:
        try:
            rendered.append(render_prompt(turns, template, tokenizer, templated=templated))
        except Refused as error:
            rendered.append(error)
    rows = [row for row in rendered if not isinstance(row, Refused)]
    if answer:
        rows = [begin_answer(row, answer, template if templated else None) for row in rows]
    chat = templated and template == "chat"
    encoded = iter(_assemble(rows, tokenizer, [chat] * len(rows)))
    return [row if isinstance(row, Refused) else next(encoded).tokens for row in rendered]


def pack(texts: Iterable[str], tokenizer: Any, length: int, *, needed: bool = True) -> list[Example]:
    """Return documents joined, with EOS after each, and cut into Examples of exactly ``length`` tokens.

    All tokens but the first of each Example are trained. For pre-training and perplexity. Every document but
    the first follows an EOS, or its own BOS, as a text without a prompt does. A remainder shorter than one
    Example is not used. Raises UserError if there is no full Example and ``needed`` is True.
    """
    if length < 2:
        raise UserError(
            f"length {length}: an example needs at least 2 tokens, one as context and one to predict"
        )
    bos, eos = bos_ids(tokenizer), eos_id(tokenizer)
    parts: list[np.ndarray] = []
    texts = [text for text in texts if text.strip()]
    for begin in range(0, len(texts), CHUNK):
        for ids in tokenise(tokenizer, texts[begin : begin + CHUNK]):
            parts.append(np.array([*bos, *ids, eos], np.int32))
    stream = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    count = len(stream) // length
    if needed and not count:
        raise UserError(
            f"the texts have {len(stream)} tokens in all, too few for one example of {length}; "
            "add text or lower the length"
        )
    trained = (False, *[True] * (length - 1))
    return [Example(tuple(row), trained) for row in stream[: count * length].reshape(count, length).tolist()]


def _check(max_length: int, truncate: str) -> None:
    if max_length < 2:
        raise UserError(
            f"max_length {max_length}: a row needs at least 2 tokens, one as context and one to predict"
        )
    if truncate not in ("response", "drop"):
        raise UserError(f"truncate {truncate!r}: must be response or drop")


def _is_chat(conversation: Conversation, template: str) -> bool:
    """Return whether the tokenizer's chat template writes the row, BOS and all."""
    return conversation.templated and template == "chat"


def _assemble(rows: Sequence[Sequence[Segment]], tokenizer: Any, chat: Sequence[bool]) -> list[_Encoded]:
    """Return the token ids of each row's segments, joined.

    chat: whether a row is tokenised as one text, and without a BOS that it has not written in it.
    """
    eos, bos, start = eos_id(tokenizer), bos_ids(tokenizer), start_ids(tokenizer)
    joint = iter(
        tokenise_joint(
            tokenizer, [[s.text for s in row] for row, is_chat in zip(rows, chat, strict=True) if is_chat]
        )
    )
    apart = tokenise_pieces(
        tokenizer,
        [piece for row, is_chat in zip(rows, chat, strict=True) if not is_chat for piece in _pieces(row)],
    )
    encoded = []
    for row, is_chat in zip(rows, chat, strict=True):
        if is_chat:
            ids, owners = next(joint)
            tokens, trained = list(ids), [row[owner].trained for owner in owners]
            if row and row[-1].closes:
                tokens.append(eos)
                trained.append(row[-1].trained)
        else:
            tokens = list(bos if row and row[0].text and not row[0].closes else start)
            trained = [False] * len(tokens)
            for segment, piece in zip(row, _pieces(row), strict=True):
                ids = [*apart[piece], *([eos] if segment.closes else [])]
                tokens += ids
                trained += [segment.trained] * len(ids)
        if trained:
            trained[0] = False  # there is no context to predict the first token from
        encoded.append(_Encoded(tokens, trained))
    return encoded


def _pieces(row: Sequence[Segment]) -> list[tuple[str, Place]]:
    """Return each segment's text and what stands before it."""
    place: Place = "beginning"
    pieces: list[tuple[str, Place]] = []
    for segment in row:
        pieces.append((segment.text, place))
        if segment.closes:
            place = "end"
        elif segment.text:
            place = "text"
    return pieces


def _fit(encoded: _Encoded, max_length: int, truncate: Truncate, conversation: Conversation) -> Outcome:
    """Return the row's Example of at most ``max_length`` tokens, or why there is none."""
    tokens, trained = encoded
    if not any(trained):
        return Outcome(None, "no_target")
    long = len(tokens) > max_length
    if long and truncate == "drop":
        return Outcome(None, "long")
    if not any(trained[:max_length]):
        return Outcome(None, "no_target")
    example = Example(tuple(tokens[:max_length]), tuple(trained[:max_length]), conversation.extra)
    return Outcome(example, "truncated" if long else "")


def _excerpt(turns: Sequence[Turn]) -> str:
    """Return the first 40 characters of the last turn, quoted."""
    text = " ".join(turns[-1].content.split()) if turns else ""
    return repr(text[:40] + "..." if len(text) > 40 else text)
