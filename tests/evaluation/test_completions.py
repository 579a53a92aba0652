"""Answers and continuations of a table, where every token is known, and of a tiny random GPT-2."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_posttrain.data import encode, tasks
from mlx_posttrain.data.types import Conversation, Preference, Turn
from mlx_posttrain.engines import decoding
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import completions, likelihood
from mlx_posttrain.ops import ops

CONTEXT = 64


class Table:
    """A bigram model: row i of the table holds the log-probabilities of the token after token i.

    ``calls`` records the arguments of ``generate``.
    """

    def __init__(self, vocabulary: int, context: int | None = CONTEXT, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.table = (
            ops(np.zeros(1)).log_softmax(rng.normal(0, 2, (vocabulary, vocabulary))).astype(np.float32)
        )
        self.context = context
        self.calls: list[dict[str, Any]] = []

    def generate(self, prompts: list[list[int]], **settings: Any) -> list[Any]:
        self.calls.append({"prompts": prompts, **settings})
        settings = {"temperature": 0.0, "top_p": 1.0, "samples": 1, "seed": 0} | settings
        return decoding.decode(Decoder(self.table), prompts, context=self.context, **settings)


class Decoder:
    ahead, leave_at = False, 0.0

    def __init__(self, table: np.ndarray):
        self.table = table

    def prefill(self, prompts: list[list[int]], samples: int) -> np.ndarray:
        return np.repeat(self.table[[p[-1] for p in prompts]], samples, axis=0)

    def advance(self, tokens: np.ndarray) -> np.ndarray:
        return self.table[tokens]

    def keep(self, rows: np.ndarray, array: np.ndarray) -> np.ndarray:
        return array[rows]

    def pick(
        self, logits: np.ndarray, uniforms: np.ndarray, temperature: float, top_p: float
    ) -> tuple[np.ndarray, Any]:
        picked = decoding.pick(logits, uniforms[:, None], temperature, top_p)
        return picked[0], picked

    def read(self, picked: Any) -> tuple[np.ndarray, np.ndarray]:
        return picked


def path(table: Table, token: int, steps: int) -> list[int]:
    """The greedy continuation, by hand."""
    found = []
    for _ in range(steps):
        token = int(table.table[token].argmax())
        found.append(token)
    return found


# answers


def chat(question: str, answer: str = "Yes.") -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer)))


def test_answers_are_in_the_order_of_the_rows_whatever_the_batches(tokenizer):
    table = Table(len(tokenizer))
    rows = [
        chat(q) for q in ("the cat and the dog " * 3, "a", "hens and corn", "the sun", "rain on the roof")
    ]
    found = completions.generate_answers(table, tokenizer, rows, template="plain", max_tokens=5, batch=2)
    assert [len(call["prompts"]) for call in table.calls] == [2, 2, 1]
    lengths = [len(p) for call in table.calls for p in call["prompts"]]
    assert lengths == sorted(lengths)
    eos = encode.eos_id(tokenizer)
    for row, answer in zip(rows, found, strict=True):
        (ids,) = encode.encode_prompts([row.turns[:-1]], tokenizer, "plain")
        expected = path(table, ids[-1], 5)
        stopped = eos in expected
        expected = expected[: expected.index(eos)] if stopped else expected
        assert (answer.tokens, answer.stopped) == (expected, stopped)
        assert answer.text == tokenizer.decode(expected).strip()


def test_samples_keep_their_row_and_batches_do_not_share_random_numbers(tokenizer):
    table = Table(len(tokenizer))
    rows = [chat("the dog")] * 4  # equal prompts: only the random numbers differ
    found = completions.generate_answers(
        table, tokenizer, rows, template="plain", max_tokens=8, temperature=1.0, samples=2, batch=4, seed=3
    )
    assert len(found) == 8 and [len(call["prompts"]) for call in table.calls] == [2, 2]
    assert len({tuple(a.tokens) for a in found}) == 8
    again = completions.generate_answers(
        table, tokenizer, rows, template="plain", max_tokens=8, temperature=1.0, samples=2, batch=4, seed=3
    )
    other = completions.generate_answers(
        table, tokenizer, rows, template="plain", max_tokens=8, temperature=1.0, samples=2, batch=4, seed=4
    )
    assert found == again != other


def test_rows_of_any_format_are_answered(tokenizer):
    table = Table(len(tokenizer))
    rows = [
        {"instruction": "Name the opposite of hot.", "output": "cold"},
        {"instruction": "Sort.", "input": "b a", "output": "a b"},
    ]
    completions.generate_answers(table, tokenizer, rows, template="plain", max_tokens=2)
    texts = sorted(tokenizer.decode(p) for p in table.calls[-1]["prompts"])
    assert texts == [
        "Instruction: Name the opposite of hot.\n\nResponse:",
        "Instruction: Sort.\n\nb a\n\nResponse:",
    ]
    untemplated = Conversation((Turn("user", "The cat"), Turn("assistant", " sat")), templated=False)
    pair = Preference((Turn("user", "Who?"),), "Me.", "You.")
    open_end = Conversation((Turn("user", "Where?"),))
    completions.generate_answers(
        table, tokenizer, [pair, untemplated, open_end], template="question", max_tokens=2
    )
    texts = {tokenizer.decode(p) for p in table.calls[-1]["prompts"]}
    assert texts == {"The cat", "Question: Who?\n\nAnswer:", "Question: Where?\n\nAnswer:"}


def test_rows_without_a_question_are_errors(tokenizer):
    table = Table(len(tokenizer))
    with pytest.raises(UserError, match=r"1 cannot be used as questions .*empty answer"):
        completions.generate_answers(
            table,
            tokenizer,
            [{"question": "a?", "answer": ""}, {"question": "b?", "answer": "b"}],
            template="plain",
            max_tokens=2,
        )
    with pytest.raises(UserError, match="no prompt"):
        completions.generate_answers(
            table, tokenizer, [{"text": "The cat sat."}], template="plain", max_tokens=2
        )
    with pytest.raises(UserError, match="more than the 63 that fit"):
        completions.generate_answers(table, tokenizer, [chat("corn " * 80)], template="plain", max_tokens=2)
    with pytest.raises(ValueError, match="batch 0"):
        completions.generate_answers(table, tokenizer, [chat("a")], template="plain", max_tokens=2, batch=0)
    assert completions.generate_answers(table, tokenizer, [], template="plain", max_tokens=2) == []


def test_task_accuracy_uses_the_checker():
    rows = tasks.load("valid", limit=6)
    right = [completions.Answer(row["output"], [], True) for row in rows]
    assert completions.task_accuracy(rows, right).tolist() == [1.0] * 6
    assert completions.task_accuracy(rows, ["zzz"] * 6).tolist() == [0.0] * 6
    mixed = [a for row in rows for a in (row["output"], "zzz")]  # two samples of each row
    assert completions.task_accuracy(rows, mixed).reshape(6, 2).mean(1).tolist() == [0.5] * 6
    kept = [Conversation((), extra={"checker": row["checker"]}) for row in rows]
    assert completions.task_accuracy(kept, right).tolist() == [1.0] * 6
    assert completions.task_accuracy([], []).tolist() == []
    for count in (5, 7, 0):
        with pytest.raises(ValueError, match=f"{count} answers to 6 rows"):
            completions.task_accuracy(rows, ["zzz"] * count)
    with pytest.raises(UserError, match="kind of checker"):
        completions.task_accuracy([{"instruction": "a"}], ["b"])


# continuations


def test_repetition_is_that_of_equally_long_continuations_without_an_end_of_text(tokenizer):
    """A model that would end every text at once is not one that repeats itself, so the end is forbidden."""
    table = Table(len(tokenizer))
    eos = encode.eos_id(tokenizer)
    table.table[:, eos] = 0.0  # most likely after anything
    found = completions.generate_continuations(table, tokenizer, ["a cat", "on the"], max_tokens=12)
    table.table[:, eos] = -50.0
    assert found == [path(table, tokenizer(text)["input_ids"][-1], 12) for text in ("a cat", "on the")]
    table.table[:, eos] = 0.0
    rep = completions.greedy_repetition(table, tokenizer, ["a cat", "on the"], max_tokens=12, batch=1)
    assert rep.tolist() == [1 - len({tuple(tokens[i : i + 4]) for i in range(9)}) / 9 for tokens in found]
    sampled = completions.generate_continuations(
        table, tokenizer, ["a cat"], max_tokens=5, temperature=1.0, samples=3
    )
    assert [len(tokens) for tokens in sampled] == [5] * 3 and len({tuple(tokens) for tokens in sampled}) == 3
    assert all(eos not in tokens for tokens in [*found, *sampled])


def test_continuations_must_all_fit(tokenizer):
    table = Table(len(tokenizer))
    exact = tokenizer.decode([tokenizer("a")["input_ids"][0]] * 24)
    assert len(completions.generate_continuations(table, tokenizer, [exact], max_tokens=40)[0]) == 40
    with pytest.raises(UserError, match="more than the 24 that fit"):
        completions.generate_continuations(table, tokenizer, [exact + "a"], max_tokens=40)
    with pytest.raises(UserError, match="leaves no room"):
        completions.generate_continuations(table, tokenizer, ["a"], max_tokens=CONTEXT)


def test_texts_are_split_between_words():
    texts = ["One two,  three four", "One two three", "One", " a b c  d\n"]
    assert completions.split_texts(texts, words=3) == [("One two,  three", " four"), (" a b c", "  d\n")]
    embedded = likelihood.embedded_texts()
    assert [opening + rest for opening, rest in completions.split_texts(embedded)] == embedded


# both engines


def test_answers_on_an_engine_equal_those_of_one_prompt_at_a_time(model, tokenizer, texts):
    rows = [chat(q) for q in ("Hens?", "Where did the cat sit?", "Rain?")]
    together = completions.generate_answers(model, tokenizer, rows, template="plain", max_tokens=6)
    alone = [
        completions.generate_answers(model, tokenizer, [row], template="plain", max_tokens=6)[0]
        for row in rows
    ]
    assert together == alone
    rep = completions.greedy_repetition(model, tokenizer, texts, max_tokens=10)
    assert rep.shape == (3,) and np.all((rep >= 0) & (rep <= 1 - 1 / 7))


def test_answers_without_a_cache_are_a_walk_from_token_to_token(model, tokenizer):
    """Each token is the most likely one after the last token alone; with the cache the answers differ."""
    rows = [chat(q) for q in ("Hens?", "Where did the cat sit?", "Rain?")]
    found = completions.generate_without_cache(model, tokenizer, rows, template="plain", max_tokens=8)
    prompts = encode.encode_prompts(
        [row.turns[:-1] if row.turns[-1].role == "assistant" else row.turns for row in rows],
        tokenizer,
        "plain",
    )
    eos = encode.eos_id(tokenizer)
    for prompt, tokens in zip(prompts, found, strict=True):
        last, expected = prompt[-1], []
        while len(expected) < 8:
            last = int(model.full_logits(np.array([[last]]))[0, 0].argmax())
            if last == eos:
                break
            expected.append(last)
        assert tokens == expected
    assert found != [
        a.tokens for a in completions.generate_answers(model, tokenizer, rows, template="plain", max_tokens=8)
    ]


def test_a_row_without_a_cache_ends_at_eos(tokenizer):
    table = Table(len(tokenizer))
    table.full_logits = lambda tokens: table.table[tokens]  # type: ignore[attr-defined]
    eos = encode.eos_id(tokenizer)
    (prompt,) = encode.encode_prompts([chat("Hens?").turns[:1]], tokenizer, "plain")
    first = path(table, prompt[-1], 2)
    table.table[first[1]] = np.where(np.arange(len(tokenizer)) == eos, 0.0, -50.0)
    found = completions.generate_without_cache(
        table, tokenizer, [chat("Hens?")], template="plain", max_tokens=8
    )
    assert found == [first]
