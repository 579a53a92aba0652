"""What a shipped recipe says about its own rows does not hold for the rows that a user names."""

import pytest

from mlx_posttrain import config, methods
from mlx_posttrain.errors import UserError
from mlx_posttrain.pipeline import stage_recipes
from tests.helpers import write_jsonl

OWN = {
    "limit": None,
    "holdout": 0.1,
    "config": None,
    "format": "auto",
    "eval_split": None,
    "split": "train",
    "shuffle": False,
    "system": None,
}


def data_of(name, *overrides):
    return methods.load_recipe(name, list(overrides)).data.model_dump()


@pytest.fixture
def rows(tmp_path):
    return str(write_jsonl(tmp_path / "mine.jsonl", [{"prompt": "a", "completion": "b"}]))


@pytest.mark.parametrize(
    "name", ["01_sft", "03_lora", "07_reward", "07_ppo", "08_distill", "09_orca", "10_grpo", "10_countdown"]
)
def test_a_users_file_is_taken_whole_and_for_what_it_is(name, rows):
    shipped, mine = data_of(name), data_of(name, f"data.source={rows}")
    assert {key: mine[key] for key in OWN} == OWN
    # what a recipe says of its method stays
    kept = [key for key in mine if key not in (*OWN, "source")]
    assert {key: mine[key] for key in kept} == {key: shipped[key] for key in kept}


def test_what_is_left_behind_is_said_in_one_line(rows, capsys):
    data_of("03_lora", f"data.source={rows}")
    assert capsys.readouterr().err == (
        "03_lora: data.limit=200, data.shuffle=True, data.holdout=20 belong to yahma/alpaca-cleaned and are "
        f"not used for {rows}, of which 10% of the rows are held out (data.holdout=0.1)\n"
    )
    data_of("03_lora", f"data.source={rows}", "data.holdout=3")
    assert "of which 3 of the rows are held out (data.holdout=3)\n" in capsys.readouterr().err
    data_of("03_lora")
    data_of("03_lora", "data.source=yahma/alpaca-cleaned")
    assert capsys.readouterr().err == ""


def test_a_system_prompt_is_that_of_the_recipes_own_rows_or_of_the_user(rows, capsys):
    shipped = [name for name, path in config.shipped().items() if "\n  system: " in path.read_text()]
    assert shipped == ["08_distill", "10_dapo", "10_grpo", "10_rloo"]
    for name in shipped:
        assert data_of(name)["system"]
        assert data_of(name, f"data.source={rows}")["system"] is None
    assert "data.system='Think step by step, and end with the fi…' belong to" in capsys.readouterr().err
    assert data_of("10_grpo", f"data.source={rows}", "data.system=Be brief.")["system"] == "Be brief."


def test_it_is_said_only_once_the_recipe_is_right(rows, tmp_path, capsys):
    with pytest.raises(UserError, match=r"unknown key 'train\.lrr'"):
        data_of("03_lora", f"data.source={rows}", "train.lrr=1")
    path = tmp_path / "pipeline.yaml"
    stage = f"{{recipe: 03_lora, set: {{data.source: {rows}"
    path.write_text(f"method: pipeline\nstages:\n  a: {stage}}}}}\n  b: {stage}, train.lrr: 1}}}}\n")
    with pytest.raises(UserError, match=r"stage b.*unknown key 'train\.lrr'"):
        methods.load_recipe(str(path))
    assert capsys.readouterr().err == ""
    path.write_text(path.read_text().replace(", train.lrr: 1", ""))
    methods.load_recipe(str(path))
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(": data.limit=200")[0] for line in told] == [
        "stage a (03_lora)",
        "stage b (03_lora)",
    ]


def test_what_a_user_sets_holds(rows):
    mine = data_of("10_grpo", f"data.source={rows}", "data.limit=7", "data.format=gsm8k", "data.holdout=3")
    assert (mine["limit"], mine["format"], mine["holdout"], mine["config"]) == (7, "gsm8k", 3, None)
    assert mine["shuffle"] is False and data_of("03_lora", f"data.source={rows}", "data.limit=7")["shuffle"]
    assert data_of("03_lora", "data.source=yahma/alpaca-cleaned")["limit"] == 200
    assert data_of("06_kl_sft", f"data.source={rows}")["clean"]["keep"] is None
    assert data_of("06_kl_sft")["clean"]["keep"] == 3000


def test_generated_rows_have_no_number_of_their_own():
    mine = data_of("03_lora", "data.source=embedded/tasks")
    assert (mine["limit"], mine["holdout"]) == (200, 20)
    assert data_of("10_grpo", "data.source=embedded/tasks")["config"] is None
    assert data_of("07_reward", "data.source=embedded/preferences")["eval_split"] is None


def test_a_recipe_for_texts_to_come_is_about_any_source(rows):
    assert data_of("00_pretrain_tiny", f"data.source={rows}")["format"] == "text"


def test_a_users_own_recipe_is_the_users(rows, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: sft\ndata: {source: embedded/qa, limit: 5, holdout: 2}\n")
    assert data_of(str(path), f"data.source={rows}")["limit"] == 5


def test_stages_of_a_pipeline(rows, tmp_path):
    stages = stage_recipes(
        methods.load_recipe("07_rlhf", [f"sft.data.source={rows}", f"reward.data.source={rows}"])
    )
    assert {key: getattr(stages["sft"].data, key) for key in OWN} == OWN
    assert {key: getattr(stages["reward"].data, key) for key in OWN} == OWN
    assert stages["ppo"].data.eval_split == "test"
    # the shipped pipeline itself: its stages say what they mean
    assert stage_recipes(methods.load_recipe("07_rlhf"))["sft"].data.holdout == 4

    path = tmp_path / "pipeline.yaml"
    path.write_text(
        "method: pipeline\nstages:\n"
        f"  a: {{recipe: 03_lora, set: {{data.source: {rows}, data.holdout: 1}}}}\n  b: {{recipe: 03_lora}}\n"
    )
    stages = stage_recipes(methods.load_recipe(str(path)))
    assert (stages["a"].data.limit, stages["a"].data.holdout) == (None, 1)
    assert stages["b"].data.limit == 200
