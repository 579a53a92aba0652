"""Parsers of rows with one answer, or none: a row with the format's columns becomes a conversation.

See :class:`mlx_posttrain.data.cells.Format` for what a parser takes and raises.
"""

from __future__ import annotations

import re
from string import ascii_uppercase

from mlx_posttrain.data import messages
from mlx_posttrain.data.cells import Dropped, Row, content, filled, first, peek, reads, require, text
from mlx_posttrain.data.messages import EARLIER, SYSTEM_COLUMNS
from mlx_posttrain.data.thoughts import from_marks, split_thought, with_thought
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.errors import UserError

NO_INPUT = {"<noinput>", "<no input>", "noinput", "no input", "n/a"}
INPUTS = ("input", "context")  # what an instruction is about
ANSWERS = ("output", "response")
QUESTIONS = ("question", "problem", "query", "prompt")
REASONING = (
    QUESTIONS,
    ("thinking", "deepseek_reasoning", "reasoning"),
    ("answer", "deepseek_solution", "solution"),
)
CHAT = ("messages", "conversations", "conversation")
#: What OpenR1 says of each of a row's generations.
JUDGEMENTS = ("correctness_math_verify", "correctness_llama", "correctness")


@reads(
    "alpaca",
    ("instruction",),
    ANSWERS,
    may=(*INPUTS, *EARLIER),
    example={"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
)
def _alpaca(row: Row, where: str) -> Conversation:
    """Alpaca, Dolly: an instruction, optionally what it is about, and the answer."""
    asked = first(row, INPUTS)
    return _answered(row, where, instruction(row, asked, where), first(row, ANSWERS), "instruction", asked)


def instruction(row: Row, asked: str, where: str) -> str:
    """An instruction, with what it is about below it."""
    question, about = (content(text(row, name, where)) for name in ("instruction", asked))
    return "\n\n".join(part for part in (question, "" if about.lower() in NO_INPUT else about) if part)


@reads(
    "input_output",
    ("input", "inputs"),
    ("output", "targets", "target"),
    may=("definition", *EARLIER),
    example={"input": "2 + 3", "output": "5"},
)
def _input_output(row: Row, where: str) -> Conversation:
    """An input and its output; of Super-NaturalInstructions below the task's definition."""
    asked, answer = first(row, ("input", "inputs")), first(row, ("output", "targets", "target"))
    parts = [content(text(row, name, where)) for name in ("definition", asked)]
    question = "\n\n".join(filter(None, parts)) if parts[1] else ""
    return _answered(row, where, question, answer, asked, "definition")


@reads(
    "text_code",
    ("text",),
    ("code",),
    ("test_list",),
    may=EARLIER,
    example={
        "text": "Write a function f that adds two numbers.",
        "code": "def f(a, b):\n    return a + b",
        "test_list": ["assert f(2, 3) == 5"],
    },
)
def _text_code(row: Row, where: str) -> Conversation:
    """MBPP: what a function shall do, its code, and tests for checkers."""
    row.get("test_list")
    return _answered(row, where, content(text(row, "text", where)), "code", "text")


@reads(
    "question_answer",
    ("question", "query"),
    ("answer", "response", "reference_answer"),
    may=("solution", "choices", *EARLIER),
    example={"question": "What is 2 + 3?", "answer": "5"},
)
def _question_answer(row: Row, where: str) -> Conversation:
    """A question and its answer, or whole solution; an answer that numbers ``choices``, from 0, is a letter.

    Checkers and reward functions see the short answer too. With a column ``response`` alone, as in OpenOrca
    and MetaMathQA, that is the answer.
    """
    question, answer = (
        first(row, ("question", "query")),
        first(row, ("answer", "response", "reference_answer")),
    )
    asked = content(text(row, question, where))
    if asked and answer == "answer" and (chosen := _letter(row)):
        asked += "".join(f"\n{letter}. {choice}" for letter, choice in zip(ascii_uppercase, row["choices"]))
        turns = (*messages.earlier(row, where, asked), Turn("assistant", chosen))
        return Conversation(turns, extra=messages.rest(row, question) | {"answer": chosen})
    if filled(peek(row, "solution")):  # LIMO
        answer = "solution"
    turns = _answered(row, where, asked, answer, question).turns
    return Conversation(turns, extra=messages.rest(row, question))


def _letter(row: Row) -> str | None:
    """The letter of an answer that is the number of one of the row's ``choices``, as in MMLU; else None."""
    number, choices = peek(row, "answer"), peek(row, "choices")
    if not isinstance(number, int) or isinstance(number, bool) or not isinstance(choices, list):
        return None
    if not 0 <= number < len(choices) <= len(ascii_uppercase) or not all(isinstance(c, str) for c in choices):
        raise Dropped("an answer that numbers none of the choices")
    row.get("answer")
    return ascii_uppercase[number]


@reads(
    "problem_solution",
    ("problem",),
    ("solution", "answer"),
    may=EARLIER,
    example={"problem": "What is 2 + 3?", "solution": "2 + 3 = 5, so the answer is 5.", "answer": "5"},
)
def _problem_solution(row: Row, where: str) -> Conversation:
    """MATH, NuminaMath: a problem and its whole solution; a short answer is for checkers."""
    answer = first(row, ("solution", "answer"))
    found = _answered(row, where, content(text(row, "problem", where)), answer, "problem")
    return Conversation(found.turns, extra=messages.rest(row, "problem"))


def _answered(row: Row, where: str, question: str, answer: str, *used: str) -> Conversation:
    require(question, "an empty prompt")
    said = require(from_marks(content(text(row, answer, where))), "an empty answer")
    turns = (*messages.earlier(row, where, question), Turn("assistant", said))
    return Conversation(turns, extra=messages.rest(row, answer, *used))


@reads(
    "prompt_completion",
    ("prompt",),
    ("completion", "response"),
    may=EARLIER,
    example={"prompt": "The capital of France is", "completion": " Paris."},
)
def _prompt_completion(row: Row, where: str) -> Conversation:
    """A text and how it goes on, kept exactly; two lists of messages; or, as ``response``, a prompt's answer.

    An empty prompt is allowed where a text goes on; the completion is then a text without a beginning.
    """
    answer = first(row, ("completion", "response"))
    if messages.as_list(peek(row, "prompt")) is not None:  # TRL's conversational form
        if messages.as_list(peek(row, answer)) is not None:
            last = messages.turns(row.get(answer), answer, where)
        else:
            last = (Turn("assistant", text(row, answer, where)),)
        turns = messages.until_answer(messages.asked(row, "prompt", where) + last)
        return Conversation(turns, extra=messages.rest(row, "prompt", answer))
    if answer == "response":  # GPT4All, Glaive
        return _answered(row, where, content(text(row, "prompt", where)), answer, "prompt")
    prompt, completion = text(row, "prompt", where), require(text(row, answer, where), "an empty answer")
    return Conversation(
        (Turn("user", prompt), Turn("assistant", completion)),
        templated=False,
        extra=messages.rest(row, "prompt", answer),
    )


@reads(
    "messages",
    CHAT,
    may=SYSTEM_COLUMNS,
    example={
        "conversations": [{"from": "human", "value": "What is 2 + 3?"}, {"from": "gpt", "value": "5"}],
        "system": "Be brief.",
    },
)
def _chat(row: Row, where: str) -> Conversation:
    """OpenAI's messages, ShareGPT's conversations, OpenThoughts and Stratos, whose marks become a thought."""
    name = first(row, CHAT)
    if peek(row, name) is None:
        raise Dropped("no messages")
    turns = messages.after_system(row, messages.turns(row[name], name, where))
    return Conversation(messages.until_answer(turns), extra=messages.rest(row, name))


@reads(
    "role_content",
    messages.ROLE_KEYS,
    messages.CONTENT_KEYS,
    may=SYSTEM_COLUMNS,
    example={"from": ["human", "gpt"], "value": ["What is 2 + 3?", "5"]},
)
def _parallel(row: Row, where: str) -> Conversation:
    """A conversation as two lists, of who speaks and of what is said."""
    names = [first(row, keys) for keys in (messages.ROLE_KEYS, messages.CONTENT_KEYS)]
    roles, texts = (row.get(name) for name in names)
    if not (isinstance(roles, list) and isinstance(texts, list)):
        raise UserError(
            f"{where}: each row is one message; give each conversation a row, with its messages as a list in "
            "the column 'messages'"
        )
    if len(roles) != len(texts):
        raise Dropped("lists of roles and texts of different length")
    said = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    turns = messages.after_system(row, messages.turns(said, names[1], where))
    return Conversation(messages.until_answer(turns), extra=messages.rest(row, *names))


@reads("text", ("text",), example={"text": "Once upon a time there was a fox."})
def _plain_text(row: Row, where: str) -> Conversation:
    """A text without a question, kept exactly."""
    whole = require(text(row, "text", where), "an empty text")
    return Conversation((Turn("assistant", whole),), templated=False, extra=messages.rest(row, "text"))


@reads(
    "reasoning",
    *REASONING,
    may=EARLIER,
    example={"question": "What is 2 + 3?", "thinking": "Two and three more.", "answer": "5"},
)
def _reasoning(row: Row, where: str) -> Conversation:
    """A question, a thought and the answer that it leads to, written as DeepSeek-R1 does.

    The answer also stays in ``extra``, under its own name.
    """
    question, trace, answer = (first(row, names) for names in REASONING)
    asked = require(content(text(row, question, where)), "an empty prompt")
    thought = require(content(text(row, trace, where)), "an empty trace")
    said = split_thought(require(content(text(row, answer, where)), "an empty answer"))[1]
    return _with_trace(row, where, asked, thought, said, question, trace)


@reads(
    "generations",
    QUESTIONS,
    ("generations",),
    may=(*JUDGEMENTS, "is_reasoning_complete", *EARLIER),
    example={
        "problem": "What is 2 + 3?",
        "generations": ["<think>\nHm.\n</think>\n6", "<think>\nTwo and three more.\n</think>\n5"],
        "correctness_math_verify": [False, True],
        "answer": "5",
    },
)
def _generations(row: Row, where: str) -> Conversation:
    """OpenR1: a problem and several answers, of which the first that is right and whole is taken."""
    question, answers = first(row, QUESTIONS), row.get("generations")
    if not isinstance(answers, list):
        raise UserError(f"{where}: column 'generations' must be a list of texts")
    good = [True] * len(answers)
    for names in (JUDGEMENTS, ("is_reasoning_complete",)):
        marks = [mark for name in names if isinstance(mark := row.get(name), list) and mark]
        if marks:  # any judge will do
            good = [
                so_far and any(mark[i : i + 1] == [True] for mark in marks) for i, so_far in enumerate(good)
            ]
    for number, answer in enumerate(answers):
        said = from_marks(content(text({"generations": answer}, "generations", where)))
        if good[number] and said:
            asked = require(content(text(row, question, where)), "an empty prompt")
            turns = (*messages.earlier(row, where, asked), Turn("assistant", said))
            return Conversation(turns, extra=messages.rest(row, question, "generations"))
    raise Dropped("no generation that is right and whole" if answers else "an empty answer")


@reads(
    "gsm8k",
    ("question",),
    ("answer",),
    may=EARLIER,
    detected=False,
    example={"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
)
def _gsm8k(row: Row, where: str) -> Conversation:
    """GSM8K: the steps before ``####`` become a thought, without calculator marks such as ``<<2+3=5>>``."""
    steps, mark, answer = text(row, "answer", where).rpartition("####")
    if not mark:
        raise Dropped("no #### before the answer")
    steps = require(content(re.sub(r"<<[^<>]*>>", "", steps)), "an empty trace")
    question = require(content(text(row, "question", where)), "an empty prompt")
    said = require(content(answer), "an empty answer")
    return _with_trace(row, where, question, steps, said, "question")


def _with_trace(row: Row, where: str, question: str, trace: str, answer: str, *used: str) -> Conversation:
    turns = (*messages.earlier(row, where, question), Turn("assistant", with_thought(trace, answer)))
    return Conversation(turns, extra=messages.rest(row, *used) | {"answer": answer})


@reads("prompt", ("prompt",), may=("reward_model", *EARLIER), example={"prompt": "Tell a story about a fox."})
def _prompt_alone(row: Row, where: str) -> Conversation:
    """A prompt to be answered by reinforcement learning: text, or messages that end with the user's."""
    turns = messages.asked(row, "prompt", where)
    if not turns or turns[-1].role == "assistant":
        raise Dropped("a prompt that ends with an answer")
    require(turns[-1].content, "an empty prompt")
    extra, checked = messages.rest(row, "prompt"), row.get("reward_model")
    if not filled(extra.get("answer")) and isinstance(checked, dict) and filled(checked.get("ground_truth")):
        extra["answer"] = checked["ground_truth"]  # verl
    return Conversation(turns, extra=extra)
