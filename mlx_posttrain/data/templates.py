"""The text around a conversation's turns, as segments that are trained or not.

Each segment is tokenised on its own, so what stands at the boundary between prompt and answer is decided here
once: a newline belongs to the prompt, a space belongs to the answer. GPT-2's byte-pair encoding writes a word
and the space before it as one token (" Paris"), so a prompt that ended in a space would be followed by tokens
that hardly occur in ordinary text. For the formats whose mark ends in a colon the first token of an answer
therefore carries a space; whoever decodes an answer strips it.

An answer is closed by EOS (``Segment.closes``), also in the history of a longer conversation, where it need
not be trained: the tokens of a conversation do not depend on what is trained, and a model that is asked a
second time sees what it saw in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mlx_posttrain.data.sources import nearest
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.errors import UserError

TrainOn = Literal["completion", "assistant", "all"]


class Segment(NamedTuple):
    """A piece of text that is tokenised by itself; ``closes`` says that EOS follows, trained if the segment
    is.
    """

    text: str
    trained: bool
    closes: bool = False


@dataclass(frozen=True)
class Template:
    """How each turn is written; ``lead`` is the white space with which every answer begins, ``after`` what
    follows its EOS.
    """

    user: str
    assistant: str
    lead: str = ""
    system: str = "{content}\n\n"
    after: str = "\n\n"
    opening: str = ""  # before the first turn


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)

# In chatml EOS takes the place of the last <|im_end|>: GPT-2 has no such token, and an answer needs one end,
# not two.
TEMPLATES: dict[str, Template] = {
    "instruction": Template("### Instruction:\n{content}\n\n", "### Response:\n"),
    "plain": Template("Instruction: {content}\n\n", "Response:", lead=" "),
    "chatml": Template(
        "<|im_start|>user\n{content}<|im_end|>\n",
        "<|im_start|>assistant\n",
        system="<|im_start|>system\n{content}<|im_end|>\n",
        after="\n",
    ),
    "question": Template("Question: {content}\n\n", "Answer:", lead=" "),
    "dialogue": Template("User: {content}\n\n", "Assistant:", lead=" "),
    "alpaca": Template("### Instruction:\n{content}\n\n", "### Response:\n", opening=_ALPACA),
    "none": Template("{content}", "", lead=" ", after="\n"),
}
# the formats of multi-template instruction tuning
FIVE = ("instruction", "plain", "chatml", "question", "dialogue")
NAMES = (*TEMPLATES, "chat")


def check_name(template: str) -> str:
    """Return ``template`` if it is one; UserError names the nearest."""
    if template not in NAMES:
        raise UserError(
            f"unknown template {template!r}{nearest(template, list(NAMES))} (there are {', '.join(NAMES)})"
        )
    return template


def choose(templates: Sequence[str], key: object, seed: int) -> str:
    """Return the template of the row that ``key`` (its turns, say) identifies.

    It depends on the key and the seed alone: neither the order of the rows nor how many there are moves a row
    to another template.
    """
    if len(templates) == 1:
        return templates[0]
    return templates[stable_hash(key, seed) % len(templates)]


def stable_hash(key: object, seed: int) -> int:
    """Return 64 bits that depend on ``ascii(key)`` and ``seed`` only, the same on every machine and in every
    process.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{key!a}".encode(), digest_size=8).digest(), "big")


def render(
    conversation: Conversation,
    template: str = "instruction",
    tokenizer: Any = None,
    train_on: TrainOn = "completion",
) -> list[Segment]:
    """Return the conversation, which ends with an answer, as segments.

    ``train_on`` "completion" trains the last answer, "assistant" every answer, "all" everything. ``template``
    "chat" is the tokenizer's own chat template, "none" adds nothing. A conversation that is not ``templated``
    keeps its text exactly. Raises UserError for an unknown template, or a chat template that does not write a
    prompt the same way with and without its answer.
    """
    if train_on not in ("completion", "assistant", "all"):
        raise UserError(f"train_on {train_on!r}: must be completion, assistant or all")
    turns = conversation.turns
    if not turns or turns[-1].role != "assistant":
        raise UserError("a conversation to train on must end with an assistant turn")
    if conversation.templated and check_name(template) == "chat":
        segments = _chat(turns, tokenizer, asking=False, strict=train_on == "assistant")
    else:
        segments = _filled(turns, TEMPLATES[template] if conversation.templated else None, asking=False)
    # it would train a bare EOS, to say nothing: such a row has no target
    if not turns[-1].content.strip():
        return [s._replace(trained=False) for s in segments]
    last = len(segments) - 1
    wanted = {
        "all": lambda i, s: True,
        "assistant": lambda i, s: s.trained,
        "completion": lambda i, s: i == last,
    }[train_on]
    return [s._replace(trained=wanted(i, s)) for i, s in enumerate(segments)]


def render_prompt(
    turns: Sequence[Turn], template: str = "instruction", tokenizer: Any = None, *, templated: bool = True
) -> list[Segment]:
    """Return the untrained segments that ask for the next answer: exactly those before the answer in
    ``render``.
    """
    turns = tuple(turns)
    if not turns or turns[-1].role == "assistant":
        raise UserError("a prompt must end with a user turn")
    if templated and check_name(template) == "chat":
        segments = _chat(turns, tokenizer, asking=True, strict=False)
    else:
        segments = _filled(turns, TEMPLATES[template] if templated else None, asking=True)
    return [s._replace(trained=False) for s in segments]


_EXACT = Template("{content}", "", system="{content}", after="")


def _filled(turns: Sequence[Turn], template: Template | None, asking: bool) -> list[Segment]:
    """Return segments with every answer marked as trained; ``template`` None writes the turns exactly as they
    stand.
    """
    form = template or _EXACT
    segments: list[Segment] = []
    pending = form.opening
    for role, content in turns:
        if template:
            content = content.strip()
        if role == "assistant":
            segments += _unless_empty(pending + form.assistant)
            segments.append(Segment(form.lead + content, bool(content), closes=True))
            pending = form.after
        elif role in ("user", "system"):
            pending += (form.user if role == "user" else form.system).replace("{content}", content)
        else:
            raise UserError(f"unknown role {role!r} (there are system, user, assistant)")
    if asking:
        segments += _unless_empty(pending + form.assistant)
    return segments


def _unless_empty(text: str) -> list[Segment]:
    return [Segment(text, False)] if text else []


def _chat(turns: Sequence[Turn], tokenizer: Any, asking: bool, strict: bool) -> list[Segment]:
    """Return segments by rendering the chat template up to and after each answer; the difference is what the
    answer is.

    Some templates rewrite earlier answers (drop their thoughts) once another turn follows. Then the history
    is one untrained segment, or with ``strict`` a UserError, because those answers cannot be trained as they
    will be seen.
    """
    eos = tokenizer.eos_token if tokenizer is not None else None
    segments: list[Segment] = []
    done = ""  # the text that the segments cover
    ends = [i for i, turn in enumerate(turns) if turn.role == "assistant"] + ([len(turns)] if asking else [])
    for end in ends:
        prompt = _apply(tokenizer, turns[:end], asking=True)
        if not prompt.startswith(done):
            if strict:
                raise UserError(
                    "the chat template rewrites earlier answers, which train_on assistant would "
                    "train; use completion"
                )
            segments, done = [], ""
        segments.append(Segment(prompt[len(done) :], False))
        done = prompt
        if end == len(turns):
            break
        whole = _apply(tokenizer, turns[: end + 1], asking=False)
        if not whole.startswith(prompt):
            raise UserError(
                "the tokenizer's chat template writes a prompt differently once it is answered "
                f"({_difference(prompt, whole)}); "
                f"choose another template ({', '.join(TEMPLATES)})"
            )
        answer = whole[len(prompt) :]
        cut = answer.rfind(eos) if eos else -1
        # what follows the template's own EOS (often a newline) belongs to the next prompt
        if eos and cut >= 0:
            answer = answer[: cut + len(eos)]
        # Where the template ends a turn by a mark of its own, EOS still has to end the last answer, or
        # generation would not stop.
        segments.append(
            Segment(answer, bool(turns[end].content.strip()), closes=cut < 0 and end == len(turns) - 1)
        )
        done = prompt + answer
    return segments


def _apply(tokenizer: Any, turns: Sequence[Turn], asking: bool) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            "template chat: this tokenizer has no chat template; choose another template "
            f"({', '.join(TEMPLATES)})"
        )
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking)
    # jinja2.TemplateError and what templates raise themselves (no system role, roles must alternate)
    except Exception as e:
        raise UserError(
            f"the tokenizer's chat template refuses the turns {[turn.role for turn in turns]}: {e}"
        ) from e


def _difference(prompt: str, whole: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
        min(len(prompt), len(whole)),
    )
    return f"{prompt[at : at + 20]!r} became {whole[at : at + 20]!r}"
