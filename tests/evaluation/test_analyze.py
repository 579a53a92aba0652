"""The analysis of real runs: its numbers recomputed, each run against the model it started from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.data import encode
from mlx_posttrain.data.batches import collate
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.evaluation import analyze, likelihood
from mlx_posttrain.evaluation.findings.training import half_cosines
from mlx_posttrain.evaluation.suite import SuiteSection
from mlx_posttrain.losses.sft import token_logprobs
from mlx_posttrain.methods import sft
from mlx_posttrain.models.open import open_model

ENGINES = engines.available()
ROWS = [
    ("Say cat.", "cat"),
    ("What barks?", "A dog."),
    ("Where is the moon?", "Over the hill."),
    ("Count to 3.", "1, 2, 3"),
    ("Name a fruit.", "apples"),
    ("Who is home?", "The king and his cook."),
    ("Left or right?", "left"),
    ("Up?", "down!"),
]


def conversations() -> list[Conversation]:
    return [Conversation((Turn("user", q), Turn("assistant", a))) for q, a in ROWS]


@pytest.mark.parametrize("engine", ENGINES)
def test_gradient_products_are_those_of_gradients_over_all_rows(engine, random_gpt2):
    """Gradients of parts add up to that of all rows, and a part's gradient is that of its rows."""
    model, tokenizer, _ = open_model(random_gpt2, engine)
    rows, names = conversations(), ["question", "plain"]
    parts = [rows[:3], rows[3:4], rows[4:]]
    products = analyze.gradient_products(model, tokenizer, parts, names)
    assert products.shape == (2, 3, 2, 3)

    def gradient(name: str, which: list[Conversation]) -> np.ndarray:
        examples, report = encode.encode_all(which, tokenizer, templates=[name], max_length=64)
        found = model.gradient(sft.loss, [collate(examples, model.context)])
        return (
            np.concatenate([found[key].ravel() for key in sorted(found)]).astype(np.float64)
            * report.trained_tokens
        )

    a, b = (gradient(name, rows) for name in names)
    sums = products.sum((1, 3))
    assert sums == pytest.approx(np.array([[a @ a, a @ b], [b @ a, b @ b]]), rel=1e-3)
    assert products[0, 1, 1, 2] == pytest.approx(
        gradient("question", parts[1]) @ gradient("plain", parts[2]), rel=1e-3
    )
    every_part = np.ones((1, 3))
    assert half_cosines(products, every_part, every_part)[0, 1] == pytest.approx(
        a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-4
    )


def test_a_sample_of_the_coordinates_has_nearly_the_same_cosines(random_gpt2, monkeypatch):
    model, tokenizer, _ = open_model(random_gpt2, ENGINES[0])
    parts = [conversations()[:4], conversations()[4:]]
    every_part = np.ones((1, 2))
    full = half_cosines(
        analyze.gradient_products(model, tokenizer, parts, ["question", "plain"]), every_part, every_part
    )
    monkeypatch.setattr(analyze, "MAX_COORDINATES", 30_000)
    sampled = half_cosines(
        analyze.gradient_products(model, tokenizer, parts, ["question", "plain"]), every_part, every_part
    )
    assert sampled == pytest.approx(full, abs=0.05) and not np.array_equal(sampled, full)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory, random_gpt2) -> dict[str, str]:
    """A LoRA run that started from the embedded model and a full one from the random one."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "rows.jsonl"
    rows = [{"instruction": f"{q} ({i})", "output": a} for i in range(5) for q, a in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, model, more in (("lora", "tiny", ["adapter.rank=4"]), ("full", str(random_gpt2), [])):
        chosen = methods.load_recipe(
            "01_sft",
            [
                f"model={model}",
                f"engine={ENGINES[0]}",
                f"data.source={data}",
                "data.template=question",
                "data.max_length=64",
                "data.holdout=0",
                "train.steps=2",
                "train.lr=1e-3",
                "sample.count=0",
                f"output={folder / name}",
                *more,
            ],
        )
        methods.run(chosen)
    return {name: str(folder / name) for name in ("lora", "full")}


def test_training_rows_under_the_starting_model_are_scored_as_by_full_passes(two_runs, random_gpt2):
    model, tokenizer, _ = open_model(random_gpt2, ENGINES[0])
    loss = analyze._training_loss(model, tokenizer, two_runs["full"])
    rows = analyze._training_rows(two_runs["full"])
    assert len(loss.nll) == len(rows) == 40
    for row, nll, tokens in list(zip(rows, loss.nll, loss.tokens, strict=True))[:5]:
        example = encode.encode(row, tokenizer, template="question", max_length=64)
        ids, trained = np.array(example.tokens), np.array(example.trained)
        log_p = token_logprobs(model.full_logits(ids[None, :-1])[0].astype(np.float64), ids[1:])
        assert tokens == trained[1:].sum() and nll == pytest.approx(-log_p[trained[1:]].sum(), rel=1e-4)


def test_a_base_that_is_named_is_measured_once_however_its_path_is_written(
    two_runs, random_gpt2, tmp_path, monkeypatch
):
    monkeypatch.chdir(random_gpt2.parent)
    (tmp_path / "link").symlink_to(random_gpt2)
    run = two_runs["full"]
    for name in (str(random_gpt2), random_gpt2.name, f"./{random_gpt2.name}/", str(tmp_path / "link")):
        assert analyze.add_base([name, run], ["model", "run"]) == ([name, run], ["model", "run"])
    names, labels = analyze.add_base(["tiny", run], ["model", "run"])
    assert labels == ["model", "run", "base"] and Path(names[2]).resolve() == random_gpt2.resolve()


def test_every_run_is_compared_with_its_starting_model_and_its_folder_is_unchanged(
    two_runs, random_gpt2, monkeypatch
):
    monkeypatch.setattr(analyze, "GRADIENT_ROWS", 8)  # too few for gradients, which have their own test
    compared: dict[str, tuple[str, str]] = {}
    weight_changes = analyze.weight_changes
    monkeypatch.setattr(
        analyze,
        "weight_changes",
        lambda base, name: compared.setdefault(Path(name).name, (base, name)) and weight_changes(base, name),
    )
    before = {name: sorted(p.name for p in Path(path).iterdir()) for name, path in two_runs.items()}
    suite = SuiteSection(
        limit=2, max_tokens=4, families=["quotes"], text_limit=3, continuation=8, samples=0, phrasings=False
    )
    comparison, found = analyze.analyze(list(two_runs.values()), suite, ENGINES[0])
    assert [m.name for m in comparison.models] == ["base", "base of full", "lora", "full"]
    assert [comparison.baseline(m).name for m in comparison.models] == [
        "base",
        "base of full",
        "base",
        "base of full",
    ]
    assert compared["lora"][0] == "tiny" and Path(compared["full"][0]).resolve() == random_gpt2.resolve()
    by_question = {f.question: f for f in found}
    shift = by_question["Are the training data foreign to the base?"].stats
    for name, start in (("lora", "tiny"), ("full", random_gpt2)):
        model, tokenizer, _ = open_model(start, ENGINES[0])
        plain = likelihood.base_text_loss(model, tokenizer, likelihood.embedded_texts()[:3])
        assert shift["base_text"][name].mean == pytest.approx(np.exp(plain.mean), rel=1e-6)
    assert set(by_question["Did the weights move, and where?"].stats["mean"]) == {"lora", "full"}
    assert before == {name: sorted(p.name for p in Path(path).iterdir()) for name, path in two_runs.items()}
    assert not (Path(two_runs["lora"]) / "merged").exists()
