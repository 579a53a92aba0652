"""What a run leaves behind is what PEFT, transformers and mlx-lm load: logits compared, warnings and
unexpected keys refused.
"""

from __future__ import annotations

import json
import logging
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.export import _describe, export, push
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import locate
from tests.helpers import cli, read_jsonl, run_recipe

ENGINES = engines.available()
TOKENS = np.arange(3, 51)[None].repeat(2, 0)


@pytest.fixture(scope="module")
def runs(random_gpt2, rows_file, tmp_path_factory):
    """Finished runs by (engine, kind), made once."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}

    def get(engine: str, kind: str, *more: str):
        if (engine, kind) not in made:
            adapter = {
                "full": [],
                "lora": ["adapter.rank=4", "adapter.alpha=16"],
                "rslora": ["adapter.rank=4", "adapter.rslora=true"],
                "dora": ["adapter.rank=4", "adapter.kind=dora"],
                "qlora": ["adapter.rank=4", "adapter.quantize=4", "adapter.alpha=64"],
            }[kind]
            output = folder / f"{engine}-{kind}"
            overrides = [
                f"model={random_gpt2}",
                f"data.source={rows_file}",
                f"output={output}",
                f"engine={engine}",
                "train.steps=6",
                "train.lr=2e-2",
                "sample.count=0",
                *adapter,
                *more,
            ]
            run_recipe("01_sft", *overrides)
            made[engine, kind] = output
        return made[engine, kind]

    return get


@contextmanager
def no_warning():
    """Fail on Python warnings and on anything that transformers or peft logs as a warning."""
    seen = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())
    names = ("transformers", "peft", "torch")
    for name in names:
        logging.getLogger(name).addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # deprecations between peft and transformers say nothing of our files
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)
    assert not seen, seen


def transformers_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.from_numpy(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("engine", ENGINES)
def test_peft_loads_the_exported_adapter(engine, kind, runs, random_gpt2, tmp_path):
    pytest.importorskip("torch")
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    run = runs(engine, kind)
    export(run, tmp_path / "adapter", "peft")
    base = AutoModelForCausalLM.from_pretrained(random_gpt2)
    with no_warning():
        model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    result = set_peft_model_state_dict(model, load_peft_weights(str(tmp_path / "adapter")))
    assert not result.unexpected_keys  # PEFT ignores what it does not know, silently
    ours, _, _ = open_model(run, engine)
    assert np.abs(transformers_logits(model) - ours.full_logits(TOKENS)).max() < 1e-4
    bare, _, _ = open_model(random_gpt2, engine)
    # the adapter does something
    assert np.abs(bare.full_logits(TOKENS) - ours.full_logits(TOKENS)).max() > 1e-2
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(random_gpt2) and config["fan_in_fan_out"] is True
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "lr: 0.02" in card and "loss" in card


@pytest.mark.parametrize("kind", ["lora", "full", "dora"])
@pytest.mark.parametrize("engine", ENGINES)
def test_transformers_loads_full_and_merged_models(engine, kind, runs, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = runs(engine, kind)
    export(run, tmp_path / "model", "hf", merged=kind != "full")
    with no_warning():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ours, tokenizer, _ = open_model(run, engine)
    assert np.abs(transformers_logits(model) - ours.full_logits(TOKENS)).max() < 1e-4
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "model")("the cat")["input_ids"]
        == tokenizer("the cat")["input_ids"]
    )


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_mlx_lm_itself_loads_the_export(kind, merged, runs, random_gpt2, tmp_path):
    pytest.importorskip("mlx_lm")
    if kind == "full" and merged:
        pytest.skip("nothing to merge")
    import mlx.core as mx
    from mlx_lm import load

    run = runs("mlx", kind)
    export(run, tmp_path / "out", "mlx-lm", merged=merged)
    if kind == "lora" and not merged:
        from mlx_posttrain.convert.weights import convert

        convert(random_gpt2, tmp_path / "base", to="mlx")
        model, _ = load(str(tmp_path / "base"), adapter_path=str(tmp_path / "out"))
    else:
        model, _ = load(str(tmp_path / "out"))
    ours, _, _ = open_model(run, "mlx")
    assert np.abs(np.array(model(mx.array(TOKENS))) - ours.full_logits(TOKENS)).max() < 1e-4


@pytest.mark.skipif("mlx" not in ENGINES, reason="needs mlx")
def test_qlora_really_quantises_trains_and_merges_with_its_drift_measured(runs, random_gpt2, tmp_path):
    import mlx.nn as nn

    run = runs("mlx", "qlora")
    model, _, source = open_model(run, "mlx")
    assert source.quantize == 4
    packed = [m for m in model.net.modules() if isinstance(m, nn.QuantizedLinear)]
    assert len(packed) == 8 and all(m.bits == 4 for m in packed)  # 4 matrices in each of 2 blocks
    records = read_jsonl(run / "metrics.jsonl")
    assert records[-1]["eval/loss"] < records[0]["eval/loss"]
    total, trained = model.parameter_counts()
    plain, _, _ = open_model(random_gpt2, "mlx")
    # a packed weight counts as the weights it stands for
    assert total - trained == plain.parameter_counts()[0]

    # To full precision: the base after rounding plus the adapter, nothing lost.
    export(run, tmp_path / "hf", "hf", merged=True)
    merged, _, _ = open_model(tmp_path / "hf", "mlx")
    assert np.abs(merged.full_logits(TOKENS) - model.full_logits(TOKENS)).max() < 1e-3

    # Into the grid again: measured; refused when too much of the adapter is lost, and then nothing is left
    # behind.
    drift = export(run, tmp_path / "forced", "mlx-lm", merged=True, force=True)["drift"]
    import mlx.core as mx
    from mlx_lm import load

    again, _ = load(str(tmp_path / "forced"))
    probe = np.random.default_rng(0).integers(0, model.config["vocab_size"], (4, 32))
    difference = np.abs(np.array(again(mx.array(probe))) - model.full_logits(probe)).max()
    assert drift["max_logit_difference"] == pytest.approx(difference, rel=1e-3)
    assert 0 < drift["lost"] < 2 and drift["kl"] > 0
    assert (
        f"largest difference {drift['max_logit_difference']:.3f}"
        in (tmp_path / "forced" / "README.md").read_text()
    )
    monkey = pytest.MonkeyPatch()
    monkey.setattr("mlx_posttrain.models.export.MAX_LOST", drift["lost"] / 2)
    with pytest.raises(UserError, match=r"4-bit base costs too much: .* --force"):
        export(run, tmp_path / "refused", "mlx-lm", merged=True)
    monkey.undo()
    assert not (tmp_path / "refused").exists()


def test_no_more_than_everything_is_said_to_be_lost():
    said = [_describe({"lost": x, "max_logit_difference": 1, "kl": 0}) for x in (0.25, 6.236)]
    assert said[0].startswith("25.0% of the adapter's effect on the logits is lost, largest")
    assert said[1].startswith("rounding changes the logits 6.2 times as much as the adapter does, largest")


@pytest.mark.skipif("torch" not in ENGINES, reason="needs torch")
def test_qlora_on_torch_says_what_to_do(random_gpt2):
    with pytest.raises(UserError, match="engine=mlx"):
        engines.get("torch").load(random_gpt2, quantize=4)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_made_by_peft_is_a_starting_point(engine, random_gpt2, rows_file, tmp_path):
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(random_gpt2)
    theirs = get_peft_model(
        base,
        LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    )
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    opened, _, _ = open_model(tmp_path / "adapter", engine)  # its base is named in its config
    assert np.abs(opened.full_logits(TOKENS) - transformers_logits(theirs)).max() < 1e-4
    run_recipe(
        "01_sft",
        f"model={random_gpt2}",
        f"data.source={rows_file}",
        f"output={tmp_path / 'run'}",
        f"engine={engine}",
        "train.steps=1",
        "train.lr=1e-9",
        "sample.count=0",
        f"adapter.path={tmp_path / 'adapter'}",
    )
    continued, _, _ = open_model(tmp_path / "run", engine)
    assert np.abs(continued.full_logits(TOKENS) - transformers_logits(theirs)).max() < 1e-4


def test_a_run_made_by_one_engine_opens_on_the_other(runs):
    if len(ENGINES) < 2:
        pytest.skip("needs mlx and torch")
    for engine in ENGINES:
        for kind in ("full", "lora", "dora"):
            logits = [open_model(runs(engine, kind), e)[0].full_logits(TOKENS) for e in ENGINES]
            assert np.abs(logits[0] - logits[1]).max() < 1e-4, (engine, kind)


def test_a_run_is_a_new_runs_model(runs, rows_file, tmp_path):
    """Also an adapter run, which is merged once, beside its final/."""
    first = runs(ENGINES[0], "lora")
    run_recipe(
        "01_sft",
        f"model={first}",
        f"data.source={rows_file}",
        f"output={tmp_path / 'second'}",
        f"engine={ENGINES[0]}",
        "train.steps=1",
        "train.lr=1e-9",
        "sample.count=0",
    )
    assert locate(tmp_path / "second").adapter is None
    ours, theirs = (open_model(r, ENGINES[0])[0].full_logits(TOKENS) for r in (first, tmp_path / "second"))
    assert np.abs(ours - theirs).max() < 1e-4


def test_refusals(runs, tmp_path):
    full, lora = runs(ENGINES[0], "full"), runs(ENGINES[0], "lora")
    with pytest.raises(UserError, match="--to hf"):
        export(full, tmp_path / "a", "peft")
    with pytest.raises(UserError, match="--merge"):
        export(lora, tmp_path / "a", "hf")
    with pytest.raises(UserError, match="formats: peft, hf, mlx-lm, gguf"):
        export(lora, tmp_path / "a", "onnx")
    with pytest.raises(UserError, match="the folder runs/nosuch does not exist"):
        export("runs/nosuch", tmp_path / "a", "peft")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        export(lora, tmp_path / "used", "peft")
    with pytest.raises(UserError, match="unfinished run"):
        (tmp_path / "half").mkdir()
        (tmp_path / "half" / "recipe.yaml").write_text("method: sft\n")
        export(tmp_path / "half", tmp_path / "a", "peft")
    assert not (tmp_path / "a").exists()


def test_push_uploads_only_when_asked_and_fails_in_one_line(runs, tmp_path, monkeypatch):
    calls = []
    api = SimpleNamespace(
        create_repo=lambda *a, **k: calls.append("create"),
        upload_folder=lambda **k: calls.append(k["repo_id"]) or "url",
    )
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    export(runs(ENGINES[0], "lora"), tmp_path / "a", "peft")
    assert calls == []
    assert push(tmp_path / "a", "me/model") == "url" and calls == ["create", "me/model"]

    def refuse(*a, **k):
        raise OSError("no route to host\nlong story")

    api.create_repo = refuse
    with pytest.raises(UserError, match=r"upload to me/model failed: no route to host; .*hf auth login"):
        push(tmp_path / "a", "me/model")

    def without_network(*a, **k):
        raise type("ConnectError", (Exception,), {})()  # the HTTP library's own, which is no OSError

    api.create_repo = without_network
    with pytest.raises(
        UserError,
        match=r"upload to me/model failed: ConnectError; .*give the same command "
        r"again",
    ):
        push(tmp_path / "a", "me/model")


def test_an_upload_that_failed_is_tried_again(runs, tmp_path, monkeypatch, capfd):
    """With the export that is there, and only where it is one of this run in this format."""
    down = [True]

    def create(*a, **k):
        if down:
            raise down.pop() and ConnectionError("no network")

    api = SimpleNamespace(create_repo=create, upload_folder=lambda **k: f"url of {k['folder_path'].name}")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    lora, full = (str(runs(ENGINES[0], kind)) for kind in ("lora", "full"))
    command = ["export", lora, "--output", str(tmp_path / "out"), "--push", "me/model"]
    outcome = []
    for arguments in (
        command,
        command,
        ["export", full, "--to", "hf", *command[2:]],
        [*command, "--to", "mlx-lm"],
    ):
        code, said = cli(*arguments), capfd.readouterr()
        outcome.append((code, "url of out" in said.out, "no network" in said.err, "not empty" in said.err))
    refused = (2, False, False, True)
    assert outcome == [(2, False, True, False), (0, True, False, False), refused, refused]
