"""Measures over a model made of a table, where every number is known, and over a tiny random GPT-2 on both
engines.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.data import encode, tasks
from mlx_posttrain.data.batches import Batch, collate
from mlx_posttrain.data.types import Conversation, Example, Preference, Turn
from mlx_posttrain.engines import decoding
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluate import measure
from mlx_posttrain.evaluate.metrics import bootstrap, perplexity
from mlx_posttrain.methods.pretrain import PretrainSection, make_model
from mlx_posttrain.models.tokenizer import load_tokenizer
from mlx_posttrain.ops import ops

CONTEXT = 64
SAID = [
    "The cat sat on the mat, and the dog lay by the door.",
    "Rain fell on the roof all night. In the morning the sun came out.",
    "Anna gave the hens some corn; then she went to school.",
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of 2 layers and 32 wide, with weights large enough that contexts matter."""
    from safetensors.numpy import load_file, save_file

    target = tmp_path_factory.mktemp("gpt2")
    make_model(
        target, SAID, PretrainSection(vocab_size=320, layers=2, heads=2, width=32, context=CONTEXT), seed=0
    )
    weights = {k: v * 8 if v.ndim > 1 else v for k, v in load_file(target / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


@pytest.fixture(params=["mlx", "torch"])
def model(request: pytest.FixtureRequest, folder: Path) -> Any:
    if request.param not in engines.available():
        pytest.skip(f"{request.param} is not installed")
    return engines.get(request.param).load(folder)


class Table:
    """A bigram model: row i of the table holds the log-probabilities of what follows token i. Remembers what
    it was asked.
    """

    def __init__(self, vocabulary: int, context: int | None = CONTEXT, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.table = (
            ops(np.zeros(1)).log_softmax(rng.normal(0, 2, (vocabulary, vocabulary))).astype(np.float32)
        )
        self.context = context
        self.batches: list[Batch] = []
        self.calls: list[dict[str, Any]] = []

    def token_logprobs(self, batches: list[Batch]) -> list[np.ndarray]:
        self.batches += batches
        values = [self.table[b.tokens.reshape(-1)[b.index], b.target] for b in batches]
        # What a padded position holds is nobody's business, so let it be the worst.
        return [
            np.where(b.weight > 0, v, -np.inf).astype(np.float32)
            for b, v in zip(batches, values, strict=True)
        ]

    def generate(self, prompts: list[list[int]], **settings: Any) -> list[Any]:
        self.calls.append({"prompts": prompts, **settings})
        settings = {"temperature": 0.0, "top_p": 1.0, "samples": 1, "seed": 0} | settings
        return decoding.decode(Decoder(self.table), prompts, context=self.context, **settings)


class Decoder:
    def __init__(self, table: np.ndarray):
        self.table = table

    def prefill(self, prompts: list[list[int]], samples: int) -> np.ndarray:
        return np.repeat(self.table[[p[-1] for p in prompts]], samples, axis=0)

    def advance(self, tokens: np.ndarray) -> np.ndarray:
        return self.table[tokens]

    def keep(self, rows: np.ndarray) -> None:
        pass

    def pick(
        self, logits: np.ndarray, uniforms: np.ndarray, temperature: float, top_p: float
    ) -> tuple[np.ndarray, np.ndarray]:
        return decoding.pick(logits, uniforms[:, None], temperature, top_p)


class Counting(Table):
    """Gives every token a negative log-likelihood equal to the number of inputs the model saw for it."""

    def token_logprobs(self, batches: list[Batch]) -> list[np.ndarray]:
        return [-(b.index % b.tokens.shape[1] + 1).astype(np.float32) for b in batches]


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


def test_answers_come_back_in_the_rows_order_whatever_the_batches(tokenizer):
    table = Table(len(tokenizer))
    rows = [
        chat(q) for q in ("the cat and the dog " * 3, "a", "hens and corn", "the sun", "rain on the roof")
    ]
    found = measure.answers(table, tokenizer, rows, template="plain", max_tokens=5, batch=2)
    assert [len(call["prompts"]) for call in table.calls] == [2, 2, 1]
    lengths = [len(p) for call in table.calls for p in call["prompts"]]
    assert lengths == sorted(lengths)
    eos = encode.eos_id(tokenizer)
    for row, answer in zip(rows, found, strict=True):
        (ids,) = encode.encode_prompts([row.turns[:-1]], tokenizer, "plain")
        wanted = path(table, ids[-1], 5)
        stopped = eos in wanted
        wanted = wanted[: wanted.index(eos)] if stopped else wanted
        assert (answer.tokens, answer.stopped) == (wanted, stopped)
        assert answer.text == tokenizer.decode(wanted).strip()


def test_samples_keep_their_row_and_batches_do_not_share_random_numbers(tokenizer):
    table = Table(len(tokenizer))
    rows = [chat("the dog")] * 4  # equal prompts: only the random numbers differ
    found = measure.answers(
        table, tokenizer, rows, template="plain", max_tokens=8, temperature=1.0, samples=2, batch=4, seed=3
    )
    assert len(found) == 8 and [len(call["prompts"]) for call in table.calls] == [2, 2]
    assert len({tuple(a.tokens) for a in found}) == 8
    again = measure.answers(
        table, tokenizer, rows, template="plain", max_tokens=8, temperature=1.0, samples=2, batch=4, seed=3
    )
    other = measure.answers(
        table, tokenizer, rows, template="plain", max_tokens=8, temperature=1.0, samples=2, batch=4, seed=4
    )
    assert found == again != other


def test_rows_of_any_format_are_asked_for_their_answer(tokenizer):
    table = Table(len(tokenizer))
    asked = [
        {"instruction": "Name the opposite of hot.", "output": "cold"},
        {"instruction": "Sort.", "input": "b a", "output": "a b"},
    ]
    measure.answers(table, tokenizer, asked, template="plain", max_tokens=2)
    texts = sorted(tokenizer.decode(p) for p in table.calls[-1]["prompts"])
    assert texts == [
        "Instruction: Name the opposite of hot.\n\nResponse:",
        "Instruction: Sort.\n\nb a\n\nResponse:",
    ]
    stands = Conversation((Turn("user", "The cat"), Turn("assistant", " sat")), templated=False)
    pair = Preference((Turn("user", "Who?"),), "Me.", "You.")
    open_end = Conversation((Turn("user", "Where?"),))
    measure.answers(table, tokenizer, [pair, stands, open_end], template="question", max_tokens=2)
    texts = {tokenizer.decode(p) for p in table.calls[-1]["prompts"]}
    assert texts == {"The cat", "Question: Who?\n\nAnswer:", "Question: Where?\n\nAnswer:"}


def test_rows_that_cannot_be_asked_are_errors(tokenizer):
    table = Table(len(tokenizer))
    with pytest.raises(UserError, match=r"1 cannot be asked .*empty answer"):
        measure.answers(
            table,
            tokenizer,
            [{"question": "a?", "answer": ""}, {"question": "b?", "answer": "b"}],
            template="plain",
            max_tokens=2,
        )
    with pytest.raises(UserError, match="no prompt"):
        measure.answers(table, tokenizer, [{"text": "The cat sat."}], template="plain", max_tokens=2)
    with pytest.raises(UserError, match="more than the 63 that fit"):
        measure.answers(table, tokenizer, [chat("corn " * 80)], template="plain", max_tokens=2)
    with pytest.raises(ValueError, match="batch 0"):
        measure.answers(table, tokenizer, [chat("a")], template="plain", max_tokens=2, batch=0)
    assert measure.answers(table, tokenizer, [], template="plain", max_tokens=2) == []


def test_task_accuracy_asks_the_checker():
    rows = tasks.load("valid", limit=6)
    right = [measure.Answer(row["output"], [], True) for row in rows]
    assert measure.task_accuracy(rows, right).tolist() == [1.0] * 6
    assert measure.task_accuracy(rows, ["zzz"] * 6).tolist() == [0.0] * 6
    mixed = [a for row in rows for a in (row["output"], "zzz")]  # two samples of each row
    assert measure.task_accuracy(rows, mixed).reshape(6, 2).mean(1).tolist() == [0.5] * 6
    kept = [Conversation((), extra={"checker": row["checker"]}) for row in rows]
    assert measure.task_accuracy(kept, right).tolist() == [1.0] * 6
    assert measure.task_accuracy([], []).tolist() == []
    for count in (5, 7, 0):
        with pytest.raises(ValueError, match=f"{count} answers to 6 rows"):
            measure.task_accuracy(rows, ["zzz"] * count)
    with pytest.raises(UserError, match="kind of checker"):
        measure.task_accuracy([{"instruction": "a"}], ["b"])


# likelihood


def test_response_loss_counts_the_trained_tokens_of_each_row():
    table = Table(10)
    examples = [
        Example((1, 2, 3, 4), (False, False, True, True)),
        Example((5, 6), (False, False)),  # nothing to score
        Example((7, *[8] * 40, 9), (False, *[True] * 41)),
        Example((3,), (True,)),  # a first token is never predicted
    ]
    nll, tokens = loss = measure.response_loss(table, examples, batch=2)
    log_p = table.table.astype(np.float64)
    assert tokens.tolist() == [2, 0, 41, 0]
    np.testing.assert_allclose(
        nll, [-log_p[2, 3] - log_p[3, 4], 0, -log_p[7, 8] - 39 * log_p[8, 8] - log_p[8, 9], 0], rtol=1e-6
    )
    assert math.isnan(loss.per_token[1]) and loss.per_token[0] == nll[0] / 2
    assert loss.mean == pytest.approx(nll.sum() / 43) == bootstrap(loss.per_token, weights=tokens).mean
    assert math.isnan(measure.response_loss(table, []).mean)


def test_long_rows_make_smaller_batches():
    table = Table(10, context=None)
    measure.response_loss(table, [Example((1,) * 1025, (True,) * 1025)] * 5, batch=32)
    assert [b.tokens.shape for b in table.batches] == [(2, 1024), (2, 1024), (1, 1024)]


def test_a_row_beyond_the_context_is_an_error():
    # its last token is no input
    measure.response_loss(Table(10), [Example((1,) * (CONTEXT + 1), (True,) * (CONTEXT + 1))])
    with pytest.raises(UserError, match="a row of 65 tokens does not fit"):
        measure.response_loss(Table(10), [Example((1,) * (CONTEXT + 2), (True,) * (CONTEXT + 2))])


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 10, 37])
@pytest.mark.parametrize("window, stride", [(4, 4), (4, 2), (4, 1), (1, 1), (5, 3), (64, 64), (64, 7)])
def test_windows_score_every_token_exactly_once(length, window, stride):
    scored = []
    for i, (begin, end, fresh) in enumerate(measure.windows(length, window, stride)):
        assert begin == i * stride and 0 < fresh <= end - begin <= window
        first = end - fresh  # the first input whose prediction counts
        assert i == 0 or first - begin >= window - stride
        assert i == 0 or fresh <= stride
        scored += range(first, end)
    assert scored == list(range(length))


def test_windows_by_hand():
    assert measure.windows(10, 4, 4) == [(0, 4, 4), (4, 8, 4), (8, 10, 2)]
    assert measure.windows(10, 4, 2) == [(0, 4, 4), (2, 6, 2), (4, 8, 2), (6, 10, 2)]
    assert measure.windows(3, 4, 2) == [(0, 3, 3)]


def test_base_text_loss_sees_the_context_that_the_protocol_states(tokenizer):
    text = "zqxzqxzqxz"  # no merge of the tokenizer
    assert len(tokenizer(text)["input_ids"]) == 10
    counting = Counting(len(tokenizer))

    def seen(**settings: int) -> float:
        nll, tokens = measure.base_text_loss(counting, tokenizer, [text], **settings)
        assert tokens.tolist() == [10]
        return nll[0]

    assert seen() == 55  # 1 + 2 + ... + 10: one window, the start token in sight
    assert seen(window=4) == seen(window=4, stride=4) == 10 + 10 + 3
    assert seen(window=4, stride=2) == 10 + 3 * (3 + 4)
    assert seen(window=4, stride=1) == 10 + 6 * 4
    assert seen(window=1) == 10


def test_base_text_loss_equals_the_sum_over_the_document(tokenizer):
    table = Table(len(tokenizer))
    texts = [SAID[0], "", SAID[1] * 6, SAID[2]]
    eos = encode.eos_id(tokenizer)
    wanted, counts = [], []
    for text in texts:
        ids = [eos, *tokenizer(text)["input_ids"]]
        wanted.append(-sum(float(table.table[a, b]) for a, b in pairwise(ids)))
        counts.append(len(ids) - 1)
    assert max(counts) > CONTEXT
    # A bigram model needs one token of context only, so every window and stride must give the same.
    for settings in (
        {},
        {"window": 7},
        {"window": 20, "stride": 3},
        {"window": CONTEXT, "stride": 1, "batch": 3},
    ):
        loss = measure.base_text_loss(table, tokenizer, texts, **settings)
        np.testing.assert_allclose(loss.nll, wanted, rtol=1e-5)
        assert loss.tokens.tolist() == counts
    assert perplexity(*loss) == pytest.approx(math.exp(sum(wanted) / sum(counts)))
    assert measure.base_text_loss(table, tokenizer, []).nll.shape == (0,)
    assert max(b.tokens.shape[1] for b in table.batches) <= CONTEXT


def test_losses_by_window_are_the_texts_in_parts(model, tokenizer):
    whole = measure.base_text_loss(model, tokenizer, [SAID[1] * 6], window=20, stride=8)
    parts = measure.base_text_loss(model, tokenizer, [SAID[1] * 6], window=20, stride=8, by_window=True)
    assert parts.tokens.tolist() == [w.fresh for w in measure.windows(int(whole.tokens[0]), 20, 8)]
    assert parts.nll.sum() == pytest.approx(whole.nll[0]) and parts.mean == pytest.approx(whole.mean)
    kl = measure.base_text_kl(model, model, tokenizer, [SAID[1] * 6], window=20, stride=8, by_window=True)
    assert kl.tokens.tolist() == parts.tokens.tolist()


@pytest.mark.parametrize(
    "settings", [{"window": CONTEXT + 1}, {"window": 0}, {"window": 8, "stride": 9}, {"stride": 0}]
)
def test_windows_that_cannot_be_are_errors(tokenizer, settings):
    with pytest.raises(UserError, match="must lie between 1 and"):
        measure.base_text_loss(Table(len(tokenizer)), tokenizer, SAID, **settings)


# continuations


def test_repetition_is_that_of_equally_long_continuations_without_an_end_of_text(tokenizer):
    """A model that would end every text and then say the same is not one that repeats itself: the end is
    forbidden, the rest is its own.
    """
    table = Table(len(tokenizer))
    eos = encode.eos_id(tokenizer)
    table.table[:, eos] = 0.0  # most likely after anything
    found = measure.continuations(table, tokenizer, ["a cat", "on the"], max_tokens=12)
    table.table[:, eos] = -50.0
    assert found == [path(table, tokenizer(text)["input_ids"][-1], 12) for text in ("a cat", "on the")]
    table.table[:, eos] = 0.0
    rep = measure.repetition(table, tokenizer, ["a cat", "on the"], max_tokens=12, batch=1)
    assert rep.tolist() == [1 - len({tuple(tokens[i : i + 4]) for i in range(9)}) / 9 for tokens in found]
    sampled = measure.continuations(table, tokenizer, ["a cat"], max_tokens=5, temperature=1.0, samples=3)
    assert [len(tokens) for tokens in sampled] == [5] * 3 and len({tuple(tokens) for tokens in sampled}) == 3
    assert all(eos not in tokens for tokens in [*found, *sampled])


def test_continuations_must_all_fit(tokenizer):
    table = Table(len(tokenizer))
    exact = tokenizer.decode([tokenizer("a")["input_ids"][0]] * 24)
    assert len(measure.continuations(table, tokenizer, [exact], max_tokens=40)[0]) == 40
    with pytest.raises(UserError, match="more than the 24 that fit"):
        measure.continuations(table, tokenizer, [exact + "a"], max_tokens=40)
    with pytest.raises(UserError, match="leaves no room"):
        measure.continuations(table, tokenizer, ["a"], max_tokens=CONTEXT)


def test_openings_cut_between_words():
    assert measure.openings(["One two,  three four", "One two three", "One"], words=3) == ["One two,  three"]
    assert all(
        text.startswith(start)
        for text, start in zip(measure.base_text(), measure.openings(measure.base_text()), strict=True)
    )


def test_base_text_is_plain_prose():
    texts = measure.base_text()
    assert len(texts) == len(set(texts)) == 40
    lengths = [len(text.split()) for text in texts]
    assert all(80 <= n <= 140 for n in lengths) and 4000 <= sum(lengths) <= 5000
    assert len({text[:12] for text in texts}) == 40
    for text in texts:
        assert text.isascii() and "\n" not in text and text == text.strip()
        assert not any(
            mark in text for mark in ("###", "Instruction", "Response", "Question:", "Answer:", "User:")
        )


# both engines


@cache
def transformers_model(folder: Path) -> Any:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def transformers_logprobs(folder: Path, tokens: list[int]) -> np.ndarray:
    """[T, V] log-probabilities of what follows each token."""
    net = transformers_model(folder)
    import torch

    with torch.no_grad():
        return net(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()


def test_token_logprobs_equal_transformers(model, folder, tokenizer):
    rows = [tokenizer(text)["input_ids"] for text in SAID]
    examples = [Example(tuple(ids), tuple(i % 3 > 0 for i in range(len(ids)))) for ids in rows]
    batches = [collate(examples[:2], CONTEXT), collate(examples[2:], CONTEXT)]
    model.net.train()
    found = model.token_logprobs(batches)
    assert not model.net.training
    for batch, values in zip(batches, found, strict=True):
        assert (
            isinstance(values, np.ndarray)
            and values.dtype == np.float32
            and values.shape == batch.weight.shape
        )
        assert np.isfinite(values).all()
    for number, (ids, example) in enumerate(zip(rows, examples, strict=True)):
        batch, values, row = (batches[0], found[0], number) if number < 2 else (batches[1], found[1], 0)
        log_p = transformers_logprobs(folder, ids)
        wanted = [log_p[i - 1, ids[i]] for i in range(1, len(ids)) if example.trained[i]]
        np.testing.assert_allclose(values[(batch.row == row) & (batch.weight > 0)], wanted, atol=2e-5)


def test_the_engines_agree(folder):
    if len(engines.available()) < 2:
        pytest.skip("needs both engines")
    rng = np.random.default_rng(0)
    examples = [Example(tuple(rng.integers(1, 300, n).tolist()), (True,) * n) for n in (5, 20, 64)]
    batch = collate(examples, CONTEXT)
    ours, theirs = (engines.get(name).load(folder).token_logprobs([batch])[0] for name in ("mlx", "torch"))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_losses_on_an_engine_equal_one_pass_of_transformers(model, folder, tokenizer):
    eos = encode.eos_id(tokenizer)
    loss = measure.base_text_loss(model, tokenizer, SAID)
    for text, nll, tokens in zip(SAID, *loss, strict=True):
        ids = [eos, *tokenizer(text)["input_ids"]]
        log_p = transformers_logprobs(folder, ids)
        assert tokens == len(ids) - 1
        assert nll == pytest.approx(-sum(log_p[i, ids[i + 1]] for i in range(tokens)), abs=1e-3)
    examples = [
        encode.encode(chat(text, "Yes."), tokenizer, max_length=CONTEXT)
        for text in ("Hens?", "Rain on the roof?")
    ]
    loss = measure.response_loss(model, examples)
    from mlx_posttrain.methods import sft

    together = model.evaluate(sft.loss, [collate(examples, CONTEXT)])["nll"]
    assert loss.mean == pytest.approx(together, abs=1e-5)


def test_sliding_windows_on_an_engine_equal_a_pass_per_window(model, folder, tokenizer):
    """A text longer than the context, in windows as long as the context: the last target of a window is no
    input.
    """
    text = SAID[1] * 6
    ids = [encode.eos_id(tokenizer), *tokenizer(text)["input_ids"]]
    assert len(ids) > 2 * CONTEXT
    wanted = 0.0
    for begin, end, fresh in measure.windows(len(ids) - 1, CONTEXT, 40):
        log_p = transformers_logprobs(folder, ids[begin:end])
        wanted -= sum(log_p[i - begin, ids[i + 1]] for i in range(end - fresh, end))
    nll, tokens = measure.base_text_loss(model, tokenizer, [text], window=CONTEXT, stride=40)
    assert tokens.tolist() == [len(ids) - 1]
    assert nll[0] == pytest.approx(wanted, abs=2e-3)


def test_answers_on_an_engine_are_those_of_one_prompt_at_a_time(model, tokenizer):
    rows = [chat(q) for q in ("Hens?", "Where did the cat sit?", "Rain?")]
    together = measure.answers(model, tokenizer, rows, template="plain", max_tokens=6)
    alone = [measure.answers(model, tokenizer, [row], template="plain", max_tokens=6)[0] for row in rows]
    assert together == alone
    rep = measure.repetition(model, tokenizer, SAID, max_tokens=10)
    assert rep.shape == (3,) and np.all((rep >= 0) & (rep <= 1 - 1 / 7))


def test_answers_without_a_cache_are_a_walk_from_token_to_token(model, tokenizer):
    """Each answer follows the map "most likely after this one token"; with the cache the same model writes
    something else.
    """
    rows = [chat(q) for q in ("Hens?", "Where did the cat sit?", "Rain?")]
    found = measure.answers_without_cache(model, tokenizer, rows, template="plain", max_tokens=8)
    prompts = encode.encode_prompts(
        [row.turns[:-1] if row.turns[-1].role == "assistant" else row.turns for row in rows],
        tokenizer,
        "plain",
    )
    eos = encode.eos_id(tokenizer)
    for prompt, tokens in zip(prompts, found, strict=True):
        last, wanted = prompt[-1], []
        while len(wanted) < 8:
            last = int(model.full_logits(np.array([[last]]))[0, 0].argmax())
            if last == eos:
                break
            wanted.append(last)
        assert tokens == wanted
    assert found != [
        a.tokens for a in measure.answers(model, tokenizer, rows, template="plain", max_tokens=8)
    ]


def test_a_row_without_a_cache_ends_at_eos(tokenizer):
    table = Table(len(tokenizer))
    table.full_logits = lambda tokens: table.table[tokens]  # type: ignore[attr-defined]
    eos = encode.eos_id(tokenizer)
    (prompt,) = encode.encode_prompts([chat("Hens?").turns[:1]], tokenizer, "plain")
    first = path(table, prompt[-1], 2)
    table.table[first[1]] = np.where(np.arange(len(tokenizer)) == eos, 0.0, -50.0)
    found = measure.answers_without_cache(table, tokenizer, [chat("Hens?")], template="plain", max_tokens=8)
    assert found == [first]
