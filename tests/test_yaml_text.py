"""YAML within bounds: what a text stands for, values out of range, and what a recipe says of them."""

from __future__ import annotations

import time

import pytest
import yaml

from mlx_posttrain import config, methods
from mlx_posttrain.errors import UserError
from mlx_posttrain.yaml_text import MAX_CHARACTERS, parse_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)


def test_reads_what_pyyaml_reads():
    text = "a: 1\nb: [x, 2.5, null, true]\nc: &c {d: 2021-01-02}\ne: {<<: *c, f: *c}\n"
    assert parse_yaml(text) == yaml.safe_load(text) and parse_yaml("") is None
    assert len(parse_yaml("[" + "x," * 90_000 + "]")) == 90_000 < MAX_CHARACTERS // 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases make more than"),
        (BOMB.replace("[", "{<<: [").replace("]", "]}").replace("x, x", "{}, {}"), ""),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        ("a: 2021-13-45", "month must be in 1..12"),
        ("a: " + "9" * 5000, "digits"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: !!int x", ""),
        ("a: !!float {}", ""),
        ("a: !!timestamp x", ""),
        ("? [a, b]\n: 1", ""),
        ("x" * 300_000, "300,000 characters"),
    ],
    ids=range(12),
)
def test_a_file_that_stands_for_too_much_is_one_line(text, words, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    begun = time.process_time()
    with pytest.raises(UserError, match=r"recipe\.yaml") as caught:
        methods.load_recipe(str(tmp_path / "recipe.yaml"))
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.epochs=1e300", "less than or equal to 1000000"),
        (f"seed={2**70}", "no number here is beyond 2147483647"),
        ("adapter.rank=1000000000", "less than or equal to 16384"),
        (f"train.batch_size={10**12}", "no number here is beyond"),
        ("sample.max_tokens=99999999999", "no number here is beyond"),
        ('output="a\\0b"', "NUL"),
        ("output=~nobody-of-this-name/x", "no user of that name"),
        ("model=" + "a" * 5000, "File name too long"),
        ("train.lr=" + "[" * 2000, ""),
        ("train.lr={a: &a [*a]}", ""),
        ("sample.prompts=²e5", ""),
    ],
    ids=range(11),
)
def test_settings_that_nothing_can_take_are_one_line(setting, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        methods.run(methods.load_recipe("03_lora", ["output=run", setting]))
    assert words in str(caught.value) and len(str(caught.value)) < 400
    assert not list(tmp_path.iterdir())


def test_a_wrong_value_is_shown_in_part():
    with pytest.raises(UserError, match=r"not \[0, 1, 2, .*\.\.\.$") as caught:
        config.parse({"keep": list(range(100_000))}, config.TrainSection, "train")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (["data.columns={prompt:frage,completion:antwort}"], "{prompt: frage, completion: antwort}"),
        (
            ["data.columns={prompt:", "frage,", "completion:", "antwort}"],
            "{prompt: frage, completion: antwort}",
        ),
        (
            ["data.columns=prompt:frage", "data.columns=completion:antwort"],
            "{prompt: frage, completion: antwort}",
        ),
    ],
)
def test_columns_that_the_shell_or_yaml_took_apart_get_the_right_form(words, right):
    with pytest.raises(UserError) as error:
        config.settings(["train.lr=1e-4", *words])
    assert f"'data.columns={right}'" in str(error.value)
    assert config.settings([f"data.columns={right}"]) == {
        "data.columns": {"prompt": "frage", "completion": "antwort"}
    }


def test_brackets_and_colons_that_are_right_stay():
    words = [
        "reward=[{function: 'a.py:f'}]",
        "model={sft}",
        "a={b: {c: null}}",
        "data.prompt=x {y} z",
        "n={a:}",
    ]
    assert config.settings(words)["reward"] == [{"function": "a.py:f"}]
    with pytest.raises(UserError, match=r"'reward=\[\{function: a.py:f\}\]'"):
        config.settings(["reward=[{function:a.py:f}]"])


def test_a_colon_without_its_space_in_a_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: sft\ndata: {source: embedded/qa, columns: {prompt:frage}}\n")
    with pytest.raises(UserError, match="a colon needs a space after it: prompt: frage"):
        methods.load_recipe(str(path))
