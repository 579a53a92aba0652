"""Model cards: front matter that the hub accepts, and sections that also state what is not recorded."""

from __future__ import annotations

import yaml
from huggingface_hub import ModelCard

from mlx_posttrain.convert.card import model_card

INFO = {
    "name": "gpt2-alpaca-lora",
    "base_model": "openai-community/gpt2",
    "datasets": ["yahma/alpaca-cleaned", "data/own.jsonl", "embedded/tasks"],
    "license": "mit",
    "language": "en",
    "library_name": "peft",
    "tags": ["lora"],
    "description": "Answers instructions.",
    "data": {"yahma/alpaca-cleaned": "200 rows"},
    "method": "LoRA, rank 16.",
    "figures": [{"model": "base", "loss": 3.14159265, "rows": 1200}, {"model": "tuned | best", "loss": 2.5}],
    "command": "mlx-posttrain run recipes/03_lora.yaml",
    "limitations": ["Small.", "English only."],
    "versions": {"mlx": "0.32.4"},
}


def front_matter(card):
    return yaml.safe_load(card.split("---")[1])


def test_a_full_card():
    card = model_card(INFO)
    head = front_matter(card)
    assert head["base_model"] == "openai-community/gpt2" and head["datasets"] == ["yahma/alpaca-cleaned"]
    assert (
        head["library_name"] == "peft"
        and head["license"] == "mit"
        and head["tags"] == ["lora", "mlx-posttrain"]
    )
    assert ModelCard(card).data.base_model == "openai-community/gpt2"
    titles = [line for line in card.splitlines() if line.startswith("#")]
    sections = ["What", "Data", "Method", "Figures", "Command", "Limitations", "Versions"]
    assert titles == ["# gpt2-alpaca-lora", *(f"## {section}" for section in sections)]
    assert "An adapter for `openai-community/gpt2`, trained with mlx-posttrain." in card
    assert "- yahma/alpaca-cleaned: 200 rows" in card
    assert (
        "| model | loss | rows |" in card
        and "| base | 3.142 | 1,200 |" in card
        and r"| tuned \| best | 2.5 |  |" in card
    )
    assert (
        "```sh\nmlx-posttrain run recipes/03_lora.yaml\n```" in card
        and "- English only." in card
        and "- mlx: 0.32.4" in card
    )


def test_a_bare_card_claims_nothing():
    card = model_card({"name": "x"})
    assert set(front_matter(card)) == {"library_name", "pipeline_tag", "tags"}
    assert (
        "Not recorded." in card
        and "Not measured." in card
        and "## Command" not in card
        and "None" not in card
    )


def test_local_paths_stay_out_of_the_front_matter():
    for base in ("tiny", "./runs/sft", "/home/someone/model", "a/b/c"):
        assert "base_model" not in front_matter(model_card({"name": "x", "base_model": base}))
    assert front_matter(model_card({"name": "x", "base_model": "gpt2"}))["base_model"] == "gpt2"
    assert "`./runs/sft`" in model_card({"name": "x", "base_model": "./runs/sft"})


def test_figures_by_name():
    assert "- loss: 0.6931\n- steps: 12,000" in model_card(
        {"name": "x", "figures": {"loss": 0.693147, "steps": 12000}}
    )


def test_html_is_shown_and_not_run():
    evil = "<script>alert(1)</script>"
    card = model_card(
        {
            "name": evil,
            "base_model": evil,
            "description": f"{evil} for a < b",
            "data": {evil: evil},
            "method": evil,
            "figures": [{evil: 1, "x": evil}],
            "command": f"run ``` {evil}",
        }
    )
    outside, command = card.split("````sh\n")
    assert "<script" not in outside and "</script" not in outside and "a < b" in outside
    assert command.startswith(f"run ``` {evil}\n````\n")
