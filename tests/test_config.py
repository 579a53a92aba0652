"""A key that a recipe does not have is answered with the one here: of another tool's name, or the nearest."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mlx_posttrain import config, key_names, methods, runs
from mlx_posttrain.cli import app
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation.suite import SuiteSection
from mlx_posttrain.pipeline.recipe import merged

EVERY_METHOD = {
    name: [key for key, _, _ in config.describe(methods.get(name).Recipe)] for name in methods.METHODS
}


@pytest.mark.parametrize(
    ("recipe", "theirs", "ours"),
    [
        # transformers and TRL
        ("01_sft", "learning_rate", "train.lr"),
        ("01_sft", "per_device_train_batch_size", "train.batch_size"),
        ("01_sft", "gradient_accumulation_steps", "train.grad_accumulation"),
        ("01_sft", "num_train_epochs", "train.epochs"),
        ("01_sft", "max_steps", "train.steps"),
        ("01_sft", "max_grad_norm", "train.max_grad_norm"),
        ("01_sft", "lr_scheduler_type", "train.schedule"),
        ("01_sft", "warmup_ratio", "train.warmup"),
        ("01_sft", "output_dir", "output"),
        ("01_sft", "model_name_or_path", "model"),
        ("01_sft", "dataset_name", "data.source"),
        ("01_sft", "max_seq_length", "data.max_length"),
        ("01_sft", "report_to", "log"),
        ("07_reward", "center_rewards_coefficient", "reward.centering"),
        ("07_ppo", "num_ppo_epochs", "ppo.epochs"),
        ("07_ppo", "cliprange_value", "ppo.clip_range_value"),
        ("07_ppo", "kl_coef", "kl.beta"),
        ("07_ppo", "response_length", "rollout.max_tokens"),
        # PEFT, axolotl, mlx-lm
        ("03_lora", "lora_r", "adapter.rank"),
        ("03_lora", "lora_alpha", "adapter.alpha"),
        ("03_lora", "lora_dropout", "adapter.dropout"),
        ("03_lora", "load_in_4bit", "adapter.quantize"),
        ("03_lora", "use_dora", "adapter.kind"),
        ("01_sft", "iters", "train.steps"),
        ("01_sft", "micro_batch_size", "train.batch_size"),
        ("01_sft", "grad_checkpoint", "train.gradient_checkpointing"),
        # the same in the section where it is looked for
        ("01_sft", "train.learning_rate", "train.lr"),
        ("01_sft", "data.max_seq_length", "data.max_length"),
        ("03_lora", "adapter.r", "adapter.rank"),
        ("03_lora", "adapter.target_modules", "adapter.targets"),
        # what they were called here once; of two sections the one that was written
        ("01_sft", "train.clip", "train.max_grad_norm"),
        ("07_ppo", "train.clip", "train.max_grad_norm"),
        ("07_ppo", "ppo.clip", "ppo.clip_range"),
        ("07_ppo", "ppo.value_clip", "ppo.clip_range_value"),
        ("01_sft", "train.accumulate", "train.grad_accumulation"),
        ("07_reward", "reward.centring", "reward.centering"),
        # a key of ours in the wrong place, and a mistyped one
        ("01_sft", "lr", "train.lr"),
        ("01_sft", "max_length", "data.max_length"),
        ("01_sft", "train.batchsize", "train.batch_size"),
    ],
)
def test_another_name_is_answered_with_ours(recipe, theirs, ours):
    with pytest.raises(UserError) as caught:
        methods.load_recipe(recipe, ["adapter={}" if recipe == "03_lora" else "seed=0", f"{theirs}=1"])
    assert str(caught.value) == f"{recipe}.yaml: unknown key '{theirs}'; did you mean '{ours}'?"


@pytest.mark.parametrize(
    ("method", "theirs"), [("sft", "cliprange"), ("pretrain", "lora_r"), ("reward", "kl_coef")]
)
def test_a_key_that_the_method_lacks_is_not_offered(method, theirs):
    keys = EVERY_METHOD[method]
    offered = [ours for ours, names in key_names.OTHER_NAMES.items() if theirs in names.split()]
    assert offered and not set(offered) & set(keys)
    raw = {"method": method, "data": {"source": "x"}, theirs: 1}
    with pytest.raises(UserError) as caught:
        methods.parse_recipe(raw, "r.yaml")
    assert f"unknown key '{theirs}'" in str(caught.value)
    assert not any(f"'{ours}'" in str(caught.value) for ours in offered)


def test_every_name_that_is_offered_is_one():
    known = {key for keys in EVERY_METHOD.values() for key in keys}
    assert set(key_names.OTHER_NAMES) <= known and set(key_names.RENAMED.values()) <= known
    assert not set(key_names.RENAMED) & known


def test_a_run_with_former_names_is_read(tmp_path):
    """Of its own keys and, in a pipeline, of its stages'."""
    old = {"method": "ppo", "train": {"clip": 0.5, "accumulate": 4}, "ppo": {"clip": 0.1, "value_clip": None}}
    new = {
        "method": "ppo",
        "train": {"max_grad_norm": 0.5, "grad_accumulation": 4},
        "ppo": {"clip_range": 0.1, "clip_range_value": None},
    }
    stages = {"ppo": {"recipe": old, "set": {"train.clip": 1.0, "reward": {"centring": 0.01}}}}
    found = {"ppo": {"recipe": new, "set": {"train.max_grad_norm": 1.0, "reward": {"centering": 0.01}}}}
    for number, (before, after) in enumerate(
        ((old, new), ({"method": "pipeline", "stages": stages}, {"method": "pipeline", "stages": found}))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "recipe.yaml").write_text(yaml.safe_dump(before))
        assert runs.reopen(folder)[1] == after


@pytest.mark.parametrize("of", [*methods.METHODS, "suite"])
def test_keys_fit_80_columns_and_are_yaml(of):
    lines = CliRunner().invoke(app, ["keys", of], env={"COLUMNS": "80"}).stdout.splitlines()
    assert len(lines) > 8 and max(map(len, lines)) <= 80
    found = {}
    for line in lines:
        if not line.startswith(" "):
            key, _, value = line.partition(":")
            found[key] = yaml.safe_load(value)
    section = SuiteSection if of == "suite" else methods.get(of).Recipe
    assert list(found) == [key for key, _, _ in config.describe(section)]
    if of == "sft":
        assert found["train.lr"] == 2e-5 and found["data.limit"] is None and found["data.shuffle"] is False
        assert found["adapter"] is None and found["data.columns"] == {} and found["model"] == "tiny"


def test_recipes_fit_80_columns():
    lines = CliRunner().invoke(app, ["recipes"], env={"COLUMNS": "80"}).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if not line.startswith(" ")} == set(config.shipped())


def test_an_entry_of_a_list_is_named_by_its_number():
    raw = {"data": {"sources": [{"weight": 1.0}, {"weight": 2.0, "columns": {"a": "b"}}]}}
    found = config.override(raw, {"data.sources.1.weight": 3.0, "data.sources.0.columns.text": "t"})
    assert found == {
        "data": {
            "sources": [{"weight": 1.0, "columns": {"text": "t"}}, {"weight": 3.0, "columns": {"a": "b"}}]
        }
    }
    assert config.override(raw, {"data.sources.0": {"weight": 5}})["data"]["sources"][0] == {"weight": 5}
    assert merged(raw, {"data": {"sources": {"1": {"weight": 3.0}}}})["data"]["sources"] == [
        {"weight": 1.0},
        {"weight": 3.0, "columns": {"a": "b"}},
    ]
    assert merged([1, 2], {"2": 3}) == {"2": 3}  # what the recipe's class then refuses
    for key in ("data.sources.2.weight", "data.sources.last.weight", "data.sources.-1"):
        with pytest.raises(UserError, match=f"'{key}': a list of 2 has no entry"):
            config.override(raw, {key: 1})
    with pytest.raises(UserError, match="'weight' is a value, not a section"):
        config.override(raw, {"data.sources.0.weight.x": 1})


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("data.prompt=From {city}: {ask}", "From {city}: {ask}"),
        ("data.prompt=Q: {ask}\nA: ", "Q: {ask}\nA: "),
        ("data.template=Q: a", "Q: a"),
        ("data.system={ask}", "{ask}"),
        ('data.prompt="Q: {ask}\\nA: "', "Q: {ask}\nA: "),
    ],
)
def test_a_colon_in_a_setting_that_takes_text_makes_no_mapping(setting, text):
    recipe = methods.load_recipe("01_sft", [setting])
    key = setting.partition("=")[0].split(".")[1]
    assert getattr(recipe.data, key) == text


def test_a_colon_in_a_setting_of_a_lists_entry_makes_no_mapping():
    given = ["data.source=null", "data.sources=[{source: a.jsonl}, {source: b.jsonl}]"]
    recipe = methods.load_recipe("01_sft", [*given, "data.sources.1.prompt=Q: {ask}"])
    assert [one.prompt for one in recipe.data.sources] == [None, "Q: {ask}"]


def test_a_text_that_looks_like_a_number_stays_text_in_quotes():
    recipe = methods.load_recipe("01_sft", ["data.system='1e5'", 'data.config="2024"', "train.lr=1e-5"])
    assert (recipe.data.system, recipe.data.config, recipe.train.lr) == ("1e5", "2024", 1e-5)


def test_a_text_in_a_list_stays_text():
    recipe = methods.load_recipe("01_sft", ["sample.prompts=['1e5', '2e4']", "data.special_tokens=['3e1']"])
    assert recipe.sample.prompts == ["1e5", "2e4"] and recipe.data.special_tokens == ["3e1"]


def test_a_setting_that_takes_a_mapping_stays_one():
    recipe = methods.load_recipe("01_sft", ["data.columns=question: ask", "train={steps: 3, lr: 1e-3}"])
    assert recipe.data.columns == {"question": "ask"} and type(recipe.data.columns) is dict
    assert recipe.train.steps == 3 and recipe.train.lr == 1e-3
    with pytest.raises(UserError, match=r"'train\.lr': must be a number, not \{'a': 'b'\}$"):
        methods.load_recipe("01_sft", ["train.lr=a: b"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.template=5", "'data.template': must be text or a list, not 5"),
        ("data.template=[plain, 5]", "'data.template': must be text, not ['plain', 5]; "),
        (
            "data.columns={a: {b: c}}",
            "'data.columns.a': must be text, not {'b': 'c'}; a text with a colon or",
        ),
        ("adapter.targets=5", "'adapter.targets': must be a list or text, not 5"),
    ],
)
def test_the_error_of_a_key_with_several_types_names_the_key(setting, message):
    with pytest.raises(UserError) as raised:
        methods.load_recipe("03_lora", [setting])
    assert message in str(raised.value)
    assert ".str" not in str(raised.value) and "list[str]" not in str(raised.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("reward=runs/rm", "'reward': must be a list, not 'runs/rm'; write 'reward=[{model: runs/rm}]'"),
        ("reward={model: runs/rm}", "write 'reward=[{model: runs/rm}]'"),
        ("data.sources=a.jsonl", "not 'a.jsonl'; write 'data.sources=[{source: a.jsonl}]'"),
        ("reward.model=runs/rm", "no entry 'model'; they are numbered from 0, as reward.0.model=..."),
        ("reward.args.k", "no entry 'args'; they are numbered from 0, as reward.0.args.k=..."),
        ("reward.7.model=runs/rm", "no entry '7'; they are numbered from 0"),
        ("log=wandb", "'log': must be a list, not 'wandb'"),
        ("reward=json", "write 'reward=[{function: json}]'"),
        (
            "reward=[length]",
            "'reward.0': must be a mapping of keys to values, not 'length'; write {function: length}",
        ),
        ("reward=length,format", "'reward': must be a list, not 'length,format'"),
        ("reward=mine.py:f", "write 'reward=[{function: mine.py:f}]'"),
        ("sample.prompts.a.b=3", "'sample.prompts'"),
    ],
)
def test_a_setting_of_a_list_shows_how_an_entry_is_written(setting, message):
    with pytest.raises(UserError) as raised:
        methods.load_recipe("10_grpo", [setting if "=" in setting else f"{setting}=1"])
    assert message in str(raised.value)
    assert "0.7" not in str(raised.value)


def test_a_path_back_from_behind_a_link_stays_that_path(tmp_path, monkeypatch):
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "real" / "rows.jsonl").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "sub")
    monkeypatch.chdir(tmp_path)
    kept = config.absolute_paths({"source": "link/../rows.jsonl", "model": "real/../real"})
    assert Path(kept["source"]).samefile(tmp_path / "real" / "rows.jsonl")
    assert kept["model"] == str(tmp_path / "real")
