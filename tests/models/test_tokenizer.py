"""What a model folder's files say about the ends of its texts, and everything that generates heeds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlx_posttrain import engines, load
from mlx_posttrain.data.tokens import eos_id, stop_ids
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import completions
from mlx_posttrain.models.export import export
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.tokenizer import listed_ends, load_tokenizer
from tests.helpers import read_jsonl, run_recipe, write_jsonl

ENGINES = engines.available()


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 9]}, {}, (5, 9)),
        ({"eos_token_id": 5}, {"eos_token_id": [9, 5]}, (5, 9)),
        (None, {"eos_token_id": 7}, (7,)),
        (None, {"eos_token_id": [7, 8, 7]}, (7, 8)),
        ({}, {"eos_token_id": None}, ()),
        ({"eos_token_id": []}, {"eos_token_id": -1}, ()),
    ],
)
def test_ends_that_a_folder_lists(generation, config, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert listed_ends(tmp_path) == expected


def test_eos_comes_first_and_a_tokenizer_from_elsewhere_has_it_alone(random_gpt2, tmp_path):
    from transformers import AutoTokenizer

    with_ends(random_gpt2, tmp_path / "model", [17, 0, 40])
    tokenizer = load_tokenizer(tmp_path / "model")
    assert stop_ids(tokenizer) == (eos_id(tokenizer), 17, 40) == (0, 17, 40)
    assert stop_ids(AutoTokenizer.from_pretrained(random_gpt2)) == (0,)
    (tmp_path / "model" / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config.json is not valid JSON"):
        load_tokenizer(tmp_path / "model")


def with_ends(model: Path, target: Path, ends: list[int]) -> Path:
    """A copy of a model folder whose generation_config.json lists these ends."""
    shutil.copytree(model, target)
    file = target / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ends}))
    return target


@pytest.fixture(params=ENGINES)
def listed(request, root, tmp_path):
    """(engine, folder, greedy tokens of "The cat", the place where the second end stops them)."""
    tiny = root / "mlx_posttrain" / "assets" / "tiny"
    model, tokenizer, _ = open_model(tiny, request.param)
    ids = tokenizer("The cat")["input_ids"]
    free = model.generate([ids], max_tokens=12, stop=None)[0].tokens
    place = next(i for i in range(2, 12) if free[i] not in free[:i])
    return request.param, with_ends(tiny, tmp_path / "model", [0, free[place]]), free, place


def test_generation_and_evaluation_stop_at_any_listed_end(listed):
    engine, folder, free, place = listed
    model = load(folder, engine)
    shown = model.tokenizer.decode(free[:place]).strip()
    (answer,) = model.answers(["The cat"], max_tokens=12)
    assert answer == {"prompt": "The cat", "answer": shown, "tokens": place, "stopped": True}
    assert model.chat([{"role": "user", "content": "The cat"}], max_tokens=12) == shown
    row = Conversation((Turn("user", "The cat"),), templated=False)
    options = {"template": "none", "max_tokens": 12}
    (graded,) = completions.generate_answers(model.model, model.tokenizer, [row], **options)
    assert graded.tokens == free[:place] and graded.stopped
    (continued,) = completions.generate_continuations(
        model.model, model.tokenizer, ["The cat"], max_tokens=12
    )
    assert len(continued) == 12 and not {0, free[place]} & set(continued)


def test_rollouts_end_with_the_token_that_stopped_them(listed):
    from mlx_posttrain.rl import rollouts

    engine, folder, free, place = listed
    model, tokenizer, _ = open_model(folder, engine)
    asked = [rollouts.Prompt(tuple(tokenizer("The cat")["input_ids"]), "The cat", {})]
    settings = {"samples": 1, "max_tokens": 12, "temperature": 1e-4, "seed": 0, "token_budget": 4096}
    (done,) = rollouts.sample(model, tokenizer, asked, stop=stop_ids(tokenizer), **settings)
    assert done.tokens == tuple(free[: place + 1]) and done.stopped
    assert done.text == tokenizer.decode(free[:place]).strip() and len(done.logprobs) == place + 1


def test_a_run_stops_there_and_its_exports_keep_the_list(listed, tmp_path):
    engine, folder, free, place = listed
    rows = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"prompt": "The cat" if i < 2 else "A dog", "completion": f" ran {i}."} for i in range(8)],
    )
    shared = ["01_sft", f"model={folder}", f"data.source={rows}", f"engine={engine}", "data.holdout=2"]
    shared += ["train.steps=1", "train.lr=1e-12", "sample.count=1", "sample.max_tokens=12"]
    kept = (folder / "generation_config.json").read_bytes()
    for name, adapter in (("full", []), ("lora", ["adapter.rank=2"])):
        run_recipe(*shared, f"output={tmp_path / name}", *adapter)
        samples = read_jsonl(tmp_path / name / "samples.jsonl")
        shown = load_tokenizer(folder).decode(free[:place]).strip()
        assert {(s["answer"], s["stopped"]) for s in samples} == {(shown, True)}
        for to in ("hf", "mlx-lm") if engine == "mlx" else ("hf",):
            target = tmp_path / f"{name}-{to}"
            export(tmp_path / name, target, to, merged=name == "lora")
            assert (target / "generation_config.json").read_bytes() == kept
            assert stop_ids(load_tokenizer(target)) == (0, free[place])
