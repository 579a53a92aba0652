"""A finished run describes itself (metrics, template, base), and a failed start leaves nothing behind."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_posttrain import engines, load, methods
from mlx_posttrain.errors import UserError
from mlx_posttrain.generation.model import template_for
from mlx_posttrain.models.open import open_model

ENGINE = engines.available()[0]
TOKENS = np.arange(3, 40)[None]


def run(model, rows, output, *more: str) -> dict:
    overrides = [
        f"model={model}",
        f"data.source={rows}",
        f"output={output}",
        f"engine={ENGINE}",
        "train.steps=4",
        "sample.count=0",
        *more,
    ]
    chosen = methods.load_recipe("01_sft", overrides)
    return methods.run(chosen)


def test_an_adapter_on_an_adapter_opens_on_the_merged_base(random_gpt2, rows_file, tmp_path):
    run(random_gpt2, rows_file, tmp_path / "a", "adapter.rank=4", "train.lr=5e-2", "train.select=last")
    run(tmp_path / "a", rows_file, tmp_path / "b", "adapter.rank=4", "train.lr=1e-9", "train.select=last")
    first, second, base = (
        open_model(m, ENGINE)[0].full_logits(TOKENS) for m in (tmp_path / "a", tmp_path / "b", random_gpt2)
    )
    assert np.abs(first - base).max() > 1e-2
    assert np.abs(first - second).max() < 1e-3


def test_the_result_describes_the_weights_in_final(random_gpt2, rows_file, tmp_path, capfd):
    """A learning rate that ruins the model: the best weights are the initial ones, and all records agree."""
    result = run(random_gpt2, rows_file, tmp_path / "run", "train.lr=1.0", "train.eval_every=1")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [r["eval/loss"] for r in records if "eval/loss" in r]
    assert min(evaluations) == evaluations[0] < evaluations[-1]
    assert result["loss"] == evaluations[0] and result["step"] == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["loss"] == evaluations[0]
    assert "before training" in capfd.readouterr().err


def test_rows_trained_without_a_template_are_prompted_without_one(random_gpt2, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"Repeat {i}:", "completion": f" {i}"}) + "\n" for i in range(12))
    )
    run(random_gpt2, rows, tmp_path / "run")
    model, tokenizer, source = open_model(tmp_path / "run", ENGINE)
    assert template_for(source, tokenizer, None)[1] is False
    (answer,) = load(str(tmp_path / "run"), ENGINE).answers(["Repeat 3:"], max_tokens=4)
    (direct,) = model.generate(
        [tokenizer.encode("Repeat 3:", add_special_tokens=False)], max_tokens=4, stop=tokenizer.eos_token_id
    )
    assert answer["answer"] == tokenizer.decode(direct.tokens).strip()


def test_a_failed_start_leaves_your_folder_alone(random_gpt2, tmp_path):
    (tmp_path / "mine").mkdir()
    real = tmp_path / "elsewhere"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    for output in ("new", "link"):
        with pytest.raises(UserError, match=r"nothing\.jsonl"):
            run(random_gpt2, "nothing.jsonl", tmp_path / output)
    assert not (tmp_path / "new").exists() and real.is_dir() and not any(real.iterdir())


def test_a_runs_own_recipe_can_be_run_again(random_gpt2, rows_file, tmp_path):
    run(random_gpt2, rows_file, tmp_path / "run", "data.template=plain")
    again = methods.load_recipe(str(tmp_path / "run" / "recipe.yaml"), ["output=elsewhere"])
    assert again.data.template == "plain" and again.output == "elsewhere"


def test_a_mistyped_path_does_not_run_a_shipped_recipe():
    with pytest.raises(UserError, match="not a file"):
        methods.load_recipe("some/folder/01_sft.yaml")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["dtype=bfloat16"], "float32"),
        (["adapter.rank=2", "adapter.dropout=0.1", "train.gradient_checkpointing=true"], "exclude"),
        (["adapter.kind=dora", "adapter.quantize=3"], "2, 4 or 8"),
        (["train.lr=.inf"], "train.lr"),
        (["data.pack=true"], "data.pack"),
        (["data.families=[quotes]"], "data.families"),
    ],
)
def test_what_cannot_be_is_refused(settings, words, random_gpt2, rows_file, tmp_path):
    with pytest.raises(UserError, match=words):
        run(random_gpt2, rows_file, tmp_path / "run", *settings)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(random_gpt2, rows_file, tmp_path):
    import shutil

    from mlx_posttrain.methods.pretrain import PretrainSection, make_model

    other = tmp_path / "model"
    make_model(
        other,
        ["a few words only, again and again"] * 3,
        PretrainSection(vocab_size=300, layers=1, heads=2, width=64, context=64),
        0,
    )
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        shutil.copy(random_gpt2 / name, other / name)
    with pytest.raises(UserError, match="do not belong together"):
        run(other, rows_file, tmp_path / "run")
