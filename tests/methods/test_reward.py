"""A reward model as a user trains it: it learns what is planted, says so, resumes exactly, and scores alike
in transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.data import pairs
from mlx_posttrain.data.read import read_preferences
from mlx_posttrain.data.split import split_rows
from mlx_posttrain.data.types import Example, Pair, Preference
from mlx_posttrain.engines.base import initial_head
from mlx_posttrain.errors import UserError
from mlx_posttrain.methods import reward
from mlx_posttrain.models.export import export
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.tokenizer import pad_id
from mlx_posttrain.rewards.scorer import score_rows
from mlx_posttrain.runs import Run
from tests.helpers import read_jsonl, records, write_jsonl

ENGINES = engines.available()


@pytest.fixture(scope="module")
def kind_rows(tmp_path_factory) -> Path:
    """Pairs in which the answer that has "moon" before "hill" is preferred: an order, which no bag of words
    can see.
    """
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "king", "apples", "gold"]
    rows = []
    for i in range(240):
        a, b = rng.choice(words, 2)
        sides = f"{a} moon {b} hill", f"{a} hill {b} moon"
        rows.append({"prompt": f"Say {i % 60}.", "chosen": sides[0], "rejected": sides[1]})
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def load(model, rows, output, *overrides: str):
    return methods.load_recipe(
        "07_reward",
        [
            f"model={model}",
            f"data.source={rows}",
            "data.eval_split=null",
            "data.limit=null",
            "data.holdout=40",
            "data.template=question",
            "data.max_length=48",
            f"output={output}",
            "train.batch_size=8",
            "train.grad_accumulation=1",
            "train.lr=2e-3",
            "train.steps=6",
            *overrides,
        ],
    )


def losses(folder: Path) -> list[dict]:
    return [r for r in records(folder) if "lr" in r]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_order_of_words_is_learned_and_reported(engine, random_gpt2, kind_rows, tmp_path):
    result = methods.run(
        load(random_gpt2, kind_rows, tmp_path / "run", f"engine={engine}", "train.steps=120")
    )
    assert result["accuracy"] > 0.9
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["bag_of_words"][0] == pytest.approx(0.5, abs=0.15)
    assert report["over_bag_of_words"][1] > 0.2  # the lower end of the paired interval
    assert report["mean_training_loss"] < np.log(2)
    with pytest.raises(UserError, match="scores texts and writes none"):
        open_model(tmp_path / "run", engine)
    with pytest.raises(UserError, match="cannot learn to write"):
        methods.run(
            methods.load_recipe(
                "01_sft", [f"model={tmp_path / 'run'}", f"output={tmp_path / 'sft'}", f"engine={engine}"]
            )
        )
    with pytest.raises(UserError, match="no reward model"):
        open_model(random_gpt2, engine, scores=True)


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs both engines")
@pytest.mark.parametrize(
    "more",
    [[], ["adapter.rank=4", "reward.centering=0.01"], ["data.columns={margin: margin}"]],
    ids=["full", "lora", "margins"],
)
def test_engines_agree_and_the_export_scores_alike(more, random_gpt2, kind_rows, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    wide = write_jsonl(tmp_path / "margins.jsonl", ({**row, "margin": 3.0} for row in read_jsonl(kind_rows)))
    for engine in ENGINES:
        methods.run(
            load(
                random_gpt2,
                wide if "margin" in str(more) else kind_rows,
                tmp_path / engine,
                f"engine={engine}",
                *more,
            )
        )
    curves = [[r["nll"] for r in losses(tmp_path / e)] for e in ENGINES]
    # at a difference of 0 the loss is log(1 + e^3) = 3.05, not ln 2
    assert (curves[0][0] > 2) is ("margin" in str(more))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    done = export(tmp_path / ENGINES[0], tmp_path / "hf", "hf", merged=more[:1] == ["adapter.rank=4"])
    net, info = AutoModelForSequenceClassification.from_pretrained(done["path"], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(done["path"])
    texts = [
        "Question: Say 3.\n\nAnswer: cat moon dog hill",
        "Question: Say 4.\n\nAnswer: gold",
        "The moon and the hill and the moon.",
    ]
    rows = [tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in texts]
    import torch

    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        theirs = net.eval()(**batch).logits[:, 0].numpy()
    for name in (tmp_path / ENGINES[0], tmp_path / "hf"):  # the run, and a classifier from elsewhere
        for engine in ENGINES:
            model, own, _ = open_model(name, engine, scores=True)
            assert np.abs(score_rows(model, rows, pad_id(model.config, own)) - theirs).max() < 1e-4
    if more[:1] == ["adapter.rank=4"]:
        from peft import PeftModel

        export(tmp_path / ENGINES[0], tmp_path / "peft", "peft")
        base = AutoModelForSequenceClassification.from_pretrained(
            random_gpt2, num_labels=1, pad_token_id=tokenizer.eos_token_id
        )
        with torch.no_grad():
            adapted = PeftModel.from_pretrained(base, tmp_path / "peft").eval()(**batch).logits[:, 0].numpy()
        assert np.abs(adapted - theirs).max() < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("more", [[], ["adapter.rank=4", "adapter.dropout=0.1"]], ids=["full", "lora"])
def test_resumes_to_the_same_figures(engine, more, random_gpt2, kind_rows, tmp_path):
    args = (
        random_gpt2,
        kind_rows,
        tmp_path / "run",
        f"engine={engine}",
        "train.save_every=3",
        "train.eval_every=3",
        "train.keep=9",
        *more,
    )
    methods.run(load(*args))
    run = Run(tmp_path / "run")
    wanted = losses(run.folder)
    shutil.rmtree(run.final)
    shutil.rmtree(run.checkpoints / "step-000006")
    methods.run(load(*args), resume=True)
    assert losses(run.folder) == wanted and len(wanted) == 6


def test_ppo_takes_a_lora_reward_model_and_its_critic(random_gpt2, kind_rows, tmp_path):
    methods.run(load(random_gpt2, kind_rows, tmp_path / "rm", "adapter.rank=4"))
    chosen = methods.load_recipe(
        "07_ppo",
        [
            f"model={random_gpt2}",
            f"reward=[{{model: {json.dumps(str(tmp_path / 'rm'))}}}]",
            f"data.source={kind_rows}",
            "data.eval_split=null",
            "data.limit=40",
            "data.template=question",
            "data.max_length=40",
            "data.eval_limit=8",
            f"output={tmp_path / 'ppo'}",
            "rollout.prompts=8",
            "rollout.max_tokens=8",
            "train.batch_size=8",
            "train.grad_accumulation=1",
            "train.steps=2",
            "judge=[{function: checker}]",
        ],
    )
    result = methods.run(chosen)
    first = next(r for r in Run(tmp_path / "ppo").metrics() if "episode" in r)
    # Scores are counted in standard deviations of the reference's, around its mean.
    assert abs(first["objective/scores"]) < 1.5 and 0.2 < first["objective/scores_std"] < 3
    assert np.isfinite(result["score"])


def test_loss_on_the_batch_is_the_formula(random_gpt2):
    engine = engines.get(ENGINES[0])
    model = engine.load(random_gpt2)
    model.add_head(initial_head(64, 1))
    row = Preference((), "a", "b")
    a, b, c = (5, 6, 7, 0), (5, 6, 8, 9, 0), (5, 6, 10, 0)
    x, y, z = (Example(tokens, (False, False) + (True,) * (len(tokens) - 2)) for tokens in (a, b, c))
    batch = pairs.PairCollator(0, None, score=True)([Pair(x, y, 0, row, 0.3), Pair(z, y, 0, row)], {})
    s = dict(zip("abc", score_rows(model, [a, b, c], 0), strict=True))
    wanted = np.log1p(np.exp(-(s["a"] - s["b"] - 0.3))) + np.log1p(np.exp(-(s["c"] - s["b"])))
    centred = (s["a"] + s["b"]) ** 2 + (s["c"] + s["b"]) ** 2
    found = model.evaluate(reward.pair_loss(0.01), [batch])
    assert found["nll"] == pytest.approx(wanted / 2, rel=1e-5)
    assert found["loss"] == pytest.approx(wanted / 2 + 0.01 * centred / 2, rel=1e-5)
    assert found["accuracy"] == np.mean([s["a"] > s["b"], s["c"] > s["b"]])


def test_helpful_base_rows_are_read(shared, tmp_path):
    """Raw HH-RLHF dialogues, as the hub has them."""
    rows = shared / "data" / "preference" / "hh-helpful-base.jsonl"
    result = methods.run(
        load(
            "tiny",
            rows,
            tmp_path / "run",
            "data.limit=60",
            "data.template=dialogue",
            "data.max_length=256",
            "data.holdout=10",
            "train.steps=2",
        )
    )
    assert 0 <= result["accuracy"] <= 1


@pytest.mark.parametrize(
    "override, said",
    [
        ("data.pack=true", "means nothing for pairs"),
        ("data.template=[question, plain]", "one name"),
        ("sample.prompts=[a]", "sample.prompts means nothing for pairs"),
    ],
)
def test_recipes_that_cannot_be(override, said, random_gpt2, kind_rows, tmp_path):
    with pytest.raises(UserError, match=said):
        load(random_gpt2, kind_rows, tmp_path / "run", override)


def test_rows_that_are_no_pairs(random_gpt2, rows_file, tmp_path):
    with pytest.raises(UserError, match="learns from pairs"):
        methods.run(load(random_gpt2, rows_file, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_file_named_after_the_recipes_held_out_split_does_not_serve_both(random_gpt2, tmp_path):
    rows = [{"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": "no"} for i in range(8)]
    source = write_jsonl(tmp_path / "pairs-test.jsonl", rows)
    given = [f"model={random_gpt2}", f"data.source={source}", f"output={tmp_path / 'run'}"]
    data = methods.load_recipe("07_reward", [*given, "data.eval_split=test"]).data
    sides = [{row.prompt for row in side} for side in split_rows(data, 0, read_preferences)]
    assert all(sides) and sides[0].isdisjoint(sides[1])
