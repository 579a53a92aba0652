"""What a run says when it ends, and a resume when it begins."""

from __future__ import annotations

import shlex
import shutil

import pytest

from mlx_posttrain import methods
from mlx_posttrain.models.next_steps import _ppo, next_steps
from tests.helpers import cli

SMALL = [
    *("data.limit=16", "data.eval_limit=4", "train.batch_size=4", "train.save_every=1"),
    *("train.eval_every=2", "sample.count=0"),
]


def named(folder):
    return [
        f"mlx-posttrain chat {folder}",
        f"mlx-posttrain eval {folder}",
        f"mlx-posttrain export {folder} --to peft",
    ]


def test_a_run_says_what_comes_next_and_a_resume_where_it_begins(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli("run", "demo_lora", *SMALL, "train.steps=2", "output=my runs/one") == 0
    said = capfd.readouterr()
    folder = shlex.quote("my runs/one")
    assert "next:\n" + "\n".join(f"  {line}" for line in named(folder)) in said.err
    assert said.out.strip().endswith("my runs/one")
    shutil.rmtree("my runs/one/final")
    shutil.rmtree("my runs/one/checkpoints/step-000002")
    assert cli("run", "--resume", "my runs/one") == 0
    assert "resuming at step 1 of 2\n" in capfd.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert next_steps(tmp_path / "my runs" / "one") == named(shlex.quote(f"{tmp_path}/my runs/one"))
    for line in named(folder):
        assert shlex.split(line)[2] == "my runs/one"


def test_the_ppo_after_a_reward_model_reads_its_rows_as_it_did():
    data = {
        "source": "a/pairs",
        "config": "en",
        "split": "train_prefs",
        "eval_split": "2024",
        "format": "hh",
        "system": 'Be kind: always.\n# And "brief".',
        "template": "plain",
    }
    typed = shlex.split(_ppo({"model": "tiny", "data": data}, "runs/one, two"))
    recipe = methods.load_recipe(typed[2], typed[3:])
    assert {key: getattr(recipe.data, key) for key in data} == data
    assert [entry.model for entry in recipe.reward] == ["runs/one, two"] and recipe.model == "tiny"


def test_a_reward_model_is_for_ppo_and_a_pipeline_for_its_page(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    small = [setting for setting in SMALL if not setting.startswith("train.eval_every")]
    assert cli("run", "demo_reward", *small, "model=tiny", "train.steps=1", "output=reward") == 0
    first, second = next_steps(tmp_path / "reward")
    assert first == (
        "mlx-posttrain run 07_ppo model=tiny 'reward=[{model: reward}]' data.source=embedded/preferences "
        "data.template=question"
    )
    assert second.endswith("--to hf")
    assert cli("validate", *shlex.split(first)[2:], "rollout.max_tokens=24", "output=ppo") == 0
    assert "learned in" not in capfd.readouterr().err
    other = [*shlex.split(first)[2:-1], "data.template=plain", "rollout.max_tokens=24", "output=ppo"]
    assert cli("validate", *other) == 0
    assert (
        "reward learned in the prompt format 'question', and this recipe's is plain: data.template=question "
        "stays in it" in capfd.readouterr().err
    )
    # in one of several templates it stays in what it learned
    file = tmp_path / "reward" / "recipe.yaml"
    file.write_text(file.read_text().replace("template: question", "template: [question, plain]"))
    assert cli("validate", *other) == 0
    assert cli("validate", *other, "data.template=dialogue") == 0
    assert capfd.readouterr().err.count("learned in") == 1
    (tmp_path / "all" / "page" / "final").mkdir(parents=True)
    (tmp_path / "all" / "page" / "final" / "report.html").touch()
    shutil.copytree("reward", "all/reward")
    (tmp_path / "all" / "recipe.yaml").write_text("method: pipeline\nstages: {reward: {}, page: {}}\n")
    assert next_steps(tmp_path / "all") == ["open all/page/final/report.html"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/data/me/my-data/rows.jsonl", "rows.jsonl"),
        (
            "run 03_lora data.source=/a/b/rows.csv output=/a/runs/x",
            "run 03_lora data.source=rows.csv output=x",
        ),
        ("reward=[{function: /a/b/rewards.py:brief}]", "reward=[{function: rewards.py:brief}]"),
        ("~/models/mine/", "mine"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("runs/one and/or https://a.b/c/d", "runs/one and/or https://a.b/c/d"),
        ({"a": ["/x/y", 1, None]}, {"a": ["y", 1, None]}),
    ],
)
def test_cards_have_no_absolute_paths(given, shown):
    from mlx_posttrain.models.card import portable

    assert portable(given) == shown
