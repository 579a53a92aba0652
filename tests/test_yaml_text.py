"""YAML within bounds: what a text stands for, values out of range, and what a recipe says of them."""

from __future__ import annotations

import os
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


def test_numbers_are_what_people_mean():
    text = "[010, -017, 0, 1_000, 0x1F, 0b11, +5, 1.5, 1.0e+3, .5, 08, 1:30, 1:30.5, 1e3]"
    assert parse_yaml(text) == [10, -17, 0, 1000, 31, 3, 5, 1.5, 1000.0, 0.5, "08", "1:30", "1:30.5", "1e3"]
    assert parse_yaml("[.inf, -.inf]") == [float("inf"), float("-inf")]
    # what a run has written is read back
    texts = ["08", "010", "1:30", "0x1F", "1_0", "5", ".5", "1e3", "yes", "<<", "2024-01-01"]
    assert parse_yaml(yaml.safe_dump(texts)) == texts
    assert config.parse({"steps": "08"}, config.TrainSection, "train").steps == 8


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train:\n  steps: 1\n  lr: 1\n  steps: 2\n", 4),
        ("a: {b: 1, 'b': 2}", 1),
        ("a: &x {b: 1}\nc: {<<: *x, d: 1, d: 2}", 2),
        ("- [{a: 1}, {a: 1,\n a: 2}]", 2),
    ],
)
def test_a_key_that_is_there_twice(text, line, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(
        UserError, match=rf"r.yaml:{line}: not valid YAML: the key '.*' is there twice, on line"
    ):
        config.read_yaml(tmp_path / "r.yaml")


def test_merged_keys_are_no_repeated_ones():
    text = "a: &x {b: 1, c: 1}\nd: &y {b: 2, e: 3}\nf: {<<: [*x, *y], c: 4}\ng: {<<: *x, <<: *y}"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml(text)["f"] == {"b": 1, "c": 4, "e": 3}


def test_what_is_no_file_of_a_fair_size_is_not_read(tmp_path):
    with (tmp_path / "big.yaml").open("wb") as file:
        file.truncate(6 * 2**30)  # without using the disk
    with pytest.raises(UserError, match=r"big.yaml: not valid YAML: 6,442,450,944 bytes, more than"):
        config.read_yaml(tmp_path / "big.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match=r"pipe.yaml: cannot be read: it is no file"):
        config.read_yaml(tmp_path / "pipe.yaml")


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
        ("train.steps=true", "'train': steps takes a number, not true"),
        ("train.lr=yes", "'train': lr takes a number, not true"),
        ("train.batch_size=on", "'train': batch_size takes a number, not true"),
        ("seed=off", "seed takes a number, not false"),
        ("train.steps=1:30", "'train.steps': must be a whole number, not '1:30'"),
    ],
    ids=range(16),
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
