"""The text around a conversation's turns, as segments that are trained or not.

Prompt and answer are tokenised apart, so the white space at the boundary between prompt and answer is decided
here, once: a newline belongs to the prompt, a space to the answer. GPT-2's byte-pair encoding writes a word
and the space before it as one token (" Paris"), so a prompt that ended in a space would be followed by tokens
that hardly occur in ordinary text. In the templates whose answer mark ends in a colon, the first token of an
answer therefore carries a space, which must be stripped from a decoded answer.

EOS follows every answer (``Segment.closes``), also in the history of a longer conversation, where it need not
be trained. So the tokens of a conversation do not depend on what is trained, and in a second turn the model
sees what it saw in training.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mlx_posttrain.data.rendering import bounded
from mlx_posttrain.data.sources import nearest
from mlx_posttrain.data.thoughts import missing_part, split_thought
from mlx_posttrain.data.tokens import stop_ids
from mlx_posttrain.data.types import THINK, Conversation, Turn
from mlx_posttrain.errors import UserError

TrainOn = Literal["completion", "assistant", "all"]


class Refused(UserError):
    """A row that a template cannot write, which says nothing about other rows."""


class Segment(NamedTuple):
    """A piece of text, all of it trained or none.

    ``closes``: EOS follows, and is trained if the segment is.
    """

    text: str
    trained: bool
    closes: bool = False


class Marks(NamedTuple):
    """What is trained: the answers at these places among the turns, and whether all other text is too."""

    answers: frozenset[int]
    rest: bool = False


@dataclass(frozen=True)
class Template:
    """The text of each turn.

    ``lead`` is the white space before every answer, ``after`` what follows its EOS, ``opening`` what precedes
    the first turn.
    """

    user: str
    assistant: str
    lead: str = ""
    system: str = "{content}\n\n"
    after: str = "\n\n"
    opening: str = ""


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)

# In chatml, EOS takes the place of <|im_end|> after an answer: GPT-2 has no such token, and an answer needs
# one end mark, not two.
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
# The templates of multi-template instruction tuning.
FIVE = ("instruction", "plain", "chatml", "question", "dialogue")
NAMES = (*TEMPLATES, "chat")


def check_name(template: str) -> str:
    """Return ``template`` if it exists. Raises UserError with the nearest name otherwise."""
    if template not in NAMES and re.search(r"[\s{}]", template):
        raise UserError(
            f"{template!r} is no template's name (there are {', '.join(NAMES)}); in a recipe, wording of "
            "your own is 'data.prompt=\"Q: {question}\\nA: \"', with columns of the file in braces, and "
            "'data.columns={completion: answer}'"
        )
    if template not in NAMES:
        raise UserError(
            f"unknown template {template!r}{nearest(template, list(NAMES))} (there are {', '.join(NAMES)})"
        )
    return template


def choose(templates: Sequence[str], key: object, seed: int) -> str:
    """Return the template of the row that ``key`` (for example its turns) identifies.

    It depends on the key and the seed alone, not on the order or the number of rows.
    """
    if len(templates) == 1:
        return templates[0]
    return templates[stable_hash(key, seed) % len(templates)]


def stable_hash(key: object, seed: int) -> int:
    """Return a 64-bit hash of ``ascii(key)`` and ``seed``, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{key!a}".encode(), digest_size=8).digest(), "big")


def render(
    conversation: Conversation,
    template: str = "instruction",
    tokenizer: Any = None,
    train_on: TrainOn = "completion",
) -> list[Segment]:
    """Return the segments of a conversation that ends with an answer.

    ``train_on`` "completion" trains the last answer, "assistant" every answer, "all" everything, but never an
    answer that is not ``trained``. ``template`` "chat" is the tokenizer's own chat template, "none" adds
    nothing. A conversation that is not ``templated`` keeps its text exactly. Raises Refused for turns that
    the chat template does not take, and UserError for an unknown template, or for a chat template that writes
    a prompt differently with and without its answer, or leaves out part of an answer that is trained.
    """
    if train_on not in ("completion", "assistant", "all"):
        raise UserError(f"train_on {train_on!r}: must be completion, assistant or all")
    turns = conversation.turns
    if not turns or turns[-1].role != "assistant":
        raise UserError("a conversation to train on must end with an assistant turn")
    marks = _marks(turns, train_on)
    if conversation.templated and check_name(template) == "chat":
        return _render_chat(turns, tokenizer, marks, add_prompt=False, strict=train_on == "assistant")
    used = TEMPLATES[template] if conversation.templated else None
    return _render_turns(turns, used, marks, add_prompt=False)


def _marks(turns: Sequence[Turn], train_on: TrainOn) -> Marks:
    last = len(turns) - 1
    # An empty answer would train the model to answer with EOS alone: such a row has no target.
    if not turns[last].content.strip():
        return Marks(frozenset())
    first, everything = last if train_on == "completion" else 0, train_on == "all"
    answers = [i for i in range(first, len(turns)) if turns[i].role == "assistant" and turns[i].trained]
    return Marks(frozenset(i for i in answers if everything or turns[i].content.strip()), everything)


def render_prompt(
    turns: Sequence[Turn], template: str = "instruction", tokenizer: Any = None, *, templated: bool = True
) -> list[Segment]:
    """Return the prompt for the next answer: the segments before that answer in ``render``, untrained.

    Raises Refused for turns that do not end with a question, or that the chat template does not take.
    """
    turns = tuple(turns)
    if not turns or turns[-1].role == "assistant":
        raise Refused("a prompt must end with a user turn")
    if templated and check_name(template) == "chat":
        return _render_chat(turns, tokenizer, Marks(frozenset()), add_prompt=True, strict=False)
    return _render_turns(
        turns, TEMPLATES[template] if templated else None, Marks(frozenset()), add_prompt=True
    )


def begin_answer(prompt: list[Segment], answer: str, template: str | None) -> list[Segment]:
    """Return the prompt with the beginning of its answer, as far as ``answer`` goes.

    template: that of the prompt, None where there is none.
    """
    lead = TEMPLATES[template].lead if template in TEMPLATES else ""
    return [*(prompt or [Segment("", False)]), Segment(lead + answer, False)]


EXACT = Template("{content}", "", system="{content}", after="")


def _render_turns(
    turns: Sequence[Turn], template: Template | None, marks: Marks, add_prompt: bool
) -> list[Segment]:
    """Return the segments of the turns.

    ``template`` None keeps the text of the turns exactly; ``add_prompt`` adds the mark before a next answer.
    """
    used = template or EXACT
    segments: list[Segment] = []
    pending = used.opening
    for place, turn in enumerate(turns):
        content = turn.content.strip() if template else turn.content
        if turn.role == "assistant":
            segments += _prompt_segments(pending + used.assistant, marks)
            segments.append(Segment(used.lead + content, place in marks.answers, closes=True))
            pending = used.after
        elif turn.role in ("user", "system"):
            pending += (used.user if turn.role == "user" else used.system).replace("{content}", content)
        else:
            raise UserError(f"unknown role {turn.role!r} (there are system, user, assistant)")
    if add_prompt:
        segments += _prompt_segments(pending + used.assistant, marks)
    return segments


def _prompt_segments(text: str, marks: Marks) -> list[Segment]:
    return [Segment(text, marks.rest)] if text else []


def _render_chat(
    turns: Sequence[Turn], tokenizer: Any, marks: Marks, add_prompt: bool, strict: bool
) -> list[Segment]:
    """Return the segments that the tokenizer's chat template gives.

    The template is rendered up to and after each answer; the difference is the answer's text. Some templates
    rewrite earlier answers (drop their thoughts) once another turn follows. Then the history is one segment,
    in which no answer is trained by itself, or, with ``strict``, a UserError if one of them should be: it
    cannot be trained in the form in which the model will see it.
    """
    segments: list[Segment] = []
    covered = ""  # the text of the segments so far
    ends = [i for i, turn in enumerate(turns) if turn.role == "assistant"] + (
        [len(turns)] if add_prompt else []
    )
    for end in ends:
        prompt = _chat_prompt(tokenizer, turns, end)
        if not prompt.startswith(covered):
            if strict and any(place in marks.answers for place in range(end)):
                raise UserError(
                    "the chat template rewrites earlier answers, which train_on assistant would "
                    "train; use completion"
                )
            segments, covered = [], ""
        segments.append(Segment(prompt[len(covered) :], marks.rest))
        covered = prompt
        if end == len(turns):
            break
        answered = _apply_chat_template(tokenizer, turns[: end + 1], add_generation_prompt=False)
        if not answered.startswith(prompt):
            raise UserError(
                "the tokenizer's chat template writes a prompt differently once it is answered "
                f"({_difference(prompt, answered)}); "
                f"choose another template ({', '.join(TEMPLATES)})"
            )
        answer = answered[len(prompt) :]
        # What follows the turn's own end (often a newline) belongs to the next prompt.
        length = _own_end(answer, split_thought(turns[end].content)[1], tokenizer)
        # Where the template ends a turn with a mark that stops no generation, EOS must still follow the last
        # answer.
        closes = length is None and end == len(turns) - 1
        answer = answer[:length]
        trained = end in marks.answers
        # a prompt may open the thought that its answer continues
        opened = THINK if prompt.rstrip().endswith(THINK) else ""
        if trained and (missing := missing_part(turns[end].content, opened + answer)):
            raise UserError(
                f"the tokenizer's chat template leaves out {_excerpt(missing)} of an answer that is trained; "
                f"choose another template ({', '.join(TEMPLATES)})"
            )
        segments.append(Segment(answer, trained, closes))
        covered = prompt + answer
    return segments


def _chat_prompt(tokenizer: Any, turns: Sequence[Turn], end: int) -> str:
    """Return the rendered text before turn ``end``, with the mark of an answer."""
    if end:
        return _apply_chat_template(tokenizer, turns[:end], add_generation_prompt=True)
    # No turns at all cannot be rendered: what stands before an answer that begins is seen around it.
    whole = _apply_chat_template(tokenizer, turns[:1], add_generation_prompt=False)
    return whole[: max(0, whole.find(turns[0].content.strip()))]


def _own_end(answer: str, content: str, tokenizer: Any) -> int | None:
    """Return where in a rendered answer the turn's own end of text ends; None if it has none.

    An end of text within the answer's content is not its end.
    """
    content = content.strip()
    marks = [mark for i in stop_ids(tokenizer) if (mark := tokenizer.convert_ids_to_tokens(i))]
    if content not in answer:  # the template rewrote it
        whole = answer.rstrip()
        return len(whole) if whole.endswith(tuple(marks)) else None
    begin = answer.find(content) + len(content)
    ends = [(at, at + len(mark)) for mark in marks if (at := answer.find(mark, begin)) >= 0]
    return min(ends)[1] if ends else None


def _apply_chat_template(tokenizer: Any, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            "template chat: this tokenizer has no chat template; choose another template "
            f"({', '.join(TEMPLATES)})"
        )
    messages = [_message(turn, _thought_key(str(tokenizer.chat_template))) for turn in turns]

    def rendered() -> str:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    try:
        return bounded(rendered)
    except UserError:
        raise
    # jinja2.TemplateError, and errors that templates raise themselves (no system role, roles must alternate)
    except Exception as e:
        roles, reason = [turn.role for turn in turns[:8]], " ".join(str(e).split())[:200]
        raise Refused(f"the tokenizer's chat template refuses the turns {roles}: {reason}") from e


def _message(turn: Turn, thought_key: str | None) -> dict[str, str]:
    """Return a turn as chat templates read it, its thought under a key of its own if they read one."""
    thought, answer = split_thought(turn.content)
    if thought_key and thought and turn.role == "assistant":
        return {"role": turn.role, "content": answer, thought_key: thought}
    return {"role": turn.role, "content": turn.content}


def _thought_key(template: str) -> str | None:
    """Return the key under which a chat template reads a message's thought, None if it reads none."""
    keys = ("reasoning_content", "thinking")  # Qwen, DeepSeek, GLM; gpt-oss
    return next((key for key in keys if re.search(rf"\.{key}\b|['\"]{key}['\"]", template)), None)


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return repr(text[:40] + "..." if len(text) > 40 else text)


def _difference(before: str, after: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
        min(len(before), len(after)),
    )
    return f"{before[at : at + 20]!r} became {after[at : at + 20]!r}"
