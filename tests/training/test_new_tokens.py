"""data.special_tokens, from the recipe to runs, their exports and what is made of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.data import show
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.export import export
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.tokenizer import load_tokenizer
from mlx_posttrain.training.loop import Callbacks
from tests.helpers import final_weights, records, resume_run, run_recipe, same_weights, write_jsonl

ENGINES = engines.available()
ENGINE = ENGINES[-1]  # torch compiles nothing
TOKENS = ["<think>", "</think>", "<|call|>"]
TEXT = "Say <think>the cat</think> sat.<|call|>"
BASE = 382  # tokens that random_gpt2 has
NEW = [BASE, BASE + 1, BASE + 2]
PROBE = np.array([[5, BASE, 7, BASE + 1, 9, BASE + 2, 30, BASE]])
LORA = ("adapter.rank=4", "adapter.targets=[c_attn]")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows whose answers have the new tokens in them."""
    written = [
        {"instruction": f"Say {i}.", "output": f"<think>number {i}</think>It is {i}.<|call|>"}
        for i in range(24)
    ]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", written)


def given(model, rows, folder, *more, engine=ENGINE, tokens=TOKENS):
    return (
        *(f"model={model}", f"data.source={rows}", f"output={folder}", f"engine={engine}"),
        *("data.special_tokens=" + json.dumps(tokens), "train.batch_size=4", "train.steps=4"),
        *("train.lr=3e-3", "train.save_every=2", "sample.count=0", "data.max_length=64"),
        "data.template=plain",
        *more,
    )


@pytest.fixture(scope="module")
def runs(random_gpt2, rows, tmp_path_factory):
    """A function that gives the run of an engine with some overrides, made once."""
    made: dict[tuple, object] = {}

    def get(engine, *more):
        if (engine, more) not in made:
            folder = tmp_path_factory.mktemp("runs") / "run"
            run_recipe("01_sft", *given(random_gpt2, rows, folder, *more, engine=engine))
            made[engine, more] = folder
        return made[engine, more]

    return get


def test_rows_show_new_tokens_as_single_ids(random_gpt2, rows, tmp_path, capsys):
    shown = show.read(methods.load_recipe("01_sft", list(given(random_gpt2, rows, tmp_path / "run"))))
    for (example,) in shown.rows:
        assert [example.tokens.count(i) for i in NEW] == [1, 1, 1]
    text = json.loads(next(show.to_json(shown, 1)))["pieces"]
    assert "<think>number" in "".join(piece for piece, _ in text)
    assert f"3 new, ids {BASE} to {BASE + 2}; the embedding grows by 3 rows" in capsys.readouterr().err


def test_tokens_that_are_there_are_not_added(random_gpt2, rows, tmp_path, capsys):
    tokens = ["<|endoftext|>", "a", "<think>", "<think>"]
    recipe = methods.load_recipe("01_sft", list(given(random_gpt2, rows, tmp_path / "run", tokens=tokens)))
    (planned,) = methods.plan(recipe)
    (plain,) = methods.plan(
        methods.load_recipe("01_sft", list(given(random_gpt2, rows, tmp_path / "r", tokens=[])))
    )
    assert planned.parameters == planned.trained == plain.parameters + 64
    said = capsys.readouterr().err
    assert "<|endoftext|> is in the vocabulary already, id 0: not added" in said
    assert f"1 new, ids {BASE} to {BASE}" in said


def test_a_plan_counts_the_rows(random_gpt2, rows, tmp_path):
    plans = [
        methods.plan(
            methods.load_recipe("01_sft", list(given(random_gpt2, rows, tmp_path / "r", *LORA, tokens=t)))
        )[0]
        for t in ([], TOKENS)
    ]
    assert plans[1].trained - plans[0].trained == 3 * 64
    assert plans[1].parameters - plans[0].parameters == 2 * 3 * 64  # in the table, and beside the adapter


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("engine", ENGINES)
def test_exports_have_equal_logits_and_ids_in_other_libraries(engine, kind, runs, tmp_path):
    torch = pytest.importorskip("torch")
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = runs(engine, *(LORA if kind == "lora" else ()))
    ours, tokenizer, _ = open_model(run, engine)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == NEW
    wanted = ours.full_logits(PROBE)
    assert wanted.shape[-1] == BASE + 3
    exports = [(tmp_path / "hf", AutoModelForCausalLM)]
    export(run, tmp_path / "hf", "hf", merged=kind == "lora")
    if kind == "lora":
        export(run, tmp_path / "peft", "peft")
        exports.append((tmp_path / "peft", AutoPeftModelForCausalLM))
    for folder, library in exports:
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
        assert theirs.decode(theirs(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
        with torch.no_grad():
            logits = library.from_pretrained(folder).eval()(torch.from_numpy(PROBE)).logits.numpy()
        assert np.abs(logits - wanted).max() < 1e-4
        again, own, _ = open_model(folder, engine)
        assert np.abs(again.full_logits(PROBE) - wanted).max() < 1e-4
        assert own(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


@pytest.mark.skipif("mlx" not in ENGINES, reason="mlx-lm needs MLX")
def test_exports_for_mlx_lm(runs, tmp_path):
    import mlx.core as mx
    from mlx_lm import load

    run = runs("mlx", *LORA)
    with pytest.raises(UserError, match="new tokens, for which mlx-lm's adapters have no place: add --merge"):
        export(run, tmp_path / "adapter", "mlx-lm")
    export(run, tmp_path / "merged", "mlx-lm", merged=True)
    net, tokenizer = load(str(tmp_path / "merged"))
    wanted, ours, _ = open_model(run, "mlx")
    assert tokenizer.encode(TEXT, add_special_tokens=False) == ours(TEXT)["input_ids"]
    assert np.abs(np.array(net(mx.array(PROBE))) - wanted.full_logits(PROBE)).max() < 1e-4


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs mlx and torch")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_engines_agree_and_open_each_others_runs(kind, runs):
    found = [runs(engine, *(LORA if kind == "lora" else ())) for engine in ENGINES]
    ours, theirs = ([r["loss"] for r in records(folder) if "loss" in r] for folder in found)
    assert ours == pytest.approx(theirs, rel=1e-4) and ours
    for folder in found:
        one, other = (open_model(folder, engine)[0].full_logits(PROBE) for engine in ENGINES)
        assert np.abs(one - other).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_the_same(engine, more, runs, random_gpt2, rows, tmp_path):
    from mlx_posttrain import runs as run_folders

    whole = runs(engine, *more)
    chosen = methods.load_recipe(
        "01_sft", list(given(random_gpt2, rows, tmp_path / "run", *more, engine=engine))
    )

    def stop(run, row):
        if row["step"] == 3:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        methods.run(chosen, callbacks=Callbacks(on_step=stop))
    assert not run_folders.Run(tmp_path / "run").finished
    resume_run(tmp_path / "run")
    assert same_weights(whole, tmp_path / "run")


def test_a_run_on_top_of_a_run_has_its_tokens(runs, rows, tmp_path, capsys):
    first = runs(ENGINE, *LORA)
    recipe = methods.load_recipe("01_sft", list(given(first, rows, tmp_path / "second", *LORA)))
    (planned,) = methods.plan(recipe)  # before anything is merged
    assert "is in the vocabulary already" in capsys.readouterr().err
    methods.run(recipe)
    assert "trainable_token_indices" not in json.loads(
        (tmp_path / "second/final/adapter_config.json").read_text()
    )
    assert planned.trained == sum(v.size for v in final_weights(tmp_path / "second").values())
    model, tokenizer, _ = open_model(tmp_path / "second", ENGINE)
    assert model.full_logits(PROBE).shape[-1] == len(tokenizer) == BASE + 3


def test_an_adapter_to_start_from_keeps_its_tokens(runs, random_gpt2, rows, tmp_path):
    first = runs(ENGINE, *LORA)
    more = (f"adapter.path={first}", "train.lr=1e-9", "train.select=last")
    run_recipe("01_sft", *given(random_gpt2, rows, tmp_path / "on", *more))
    ours, theirs = (open_model(run, ENGINE) for run in (tmp_path / "on", first))
    assert ours[1].get_vocab() == theirs[1].get_vocab()
    assert np.abs(ours[0].full_logits(PROBE) - theirs[0].full_logits(PROBE)).max() < 1e-4
    with pytest.raises(UserError, match="<new> is not in the vocabulary of"):
        run_recipe("01_sft", *given(random_gpt2, rows, tmp_path / "no", *more, tokens=["<new>"]))


def test_rows_of_a_padded_embedding_are_used(random_gpt2, rows, tmp_path, capsys):
    """A table with eight rows more than there are tokens has room for three new ones."""
    import shutil

    from safetensors.numpy import load_file, save_file

    padded = shutil.copytree(random_gpt2, tmp_path / "padded")
    weights = load_file(padded / "model.safetensors")
    table = weights["transformer.wte.weight"]
    weights["transformer.wte.weight"] = np.concatenate([table, 2 * table[:8]])
    save_file(weights, padded / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps({**config, "vocab_size": BASE + 8}))
    run_recipe("01_sft", *given(padded, rows, tmp_path / "run", *LORA, "train.lr=1e-9"))
    assert "the embedding has rows for them" in capsys.readouterr().err
    saved = final_weights(tmp_path / "run")
    (name,) = [name for name in saved if "token" in name]
    assert np.abs(saved[name] - 2 * table[:3]).max() < 1e-5
    model, _, _ = open_model(tmp_path / "run", ENGINE)
    assert model.full_logits(PROBE).shape[-1] == BASE + 8


@pytest.mark.slow
@pytest.mark.skipif("mlx" not in ENGINES, reason="quantised training needs MLX")
def test_qlora(random_gpt2, rows, runs, tmp_path):
    run = runs("mlx", *LORA, "adapter.quantize=4", "adapter.group_size=32")
    model, _, _ = open_model(run, "mlx")
    assert model.full_logits(PROBE).shape[-1] == BASE + 3
    export(run, tmp_path / "hf", "hf", merged=True)
    merged, _, _ = open_model(tmp_path / "hf", "mlx")
    assert np.abs(merged.full_logits(PROBE) - model.full_logits(PROBE)).max() < 1e-3
    export(run, tmp_path / "mlx", "mlx-lm", merged=True, force=True)
    assert open_model(tmp_path / "mlx", "mlx")[0].full_logits(PROBE).shape[-1] == BASE + 3


@pytest.mark.skipif("mlx" not in ENGINES, reason="quantised folders need MLX")
def test_a_quantised_embedding_is_refused(random_gpt2, rows, tmp_path):
    from mlx_lm.utils import load_model, quantize_model, save_model

    from mlx_posttrain.convert.files import copy_tokenizer
    from mlx_posttrain.convert.weights import convert

    convert(random_gpt2, tmp_path / "plain", to="mlx")
    net, config = load_model(tmp_path / "plain")
    net, config = quantize_model(net, config, group_size=32, bits=4)
    save_model(tmp_path / "packed", net)
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    copy_tokenizer(random_gpt2, tmp_path / "packed")
    with pytest.raises(UserError, match="the embedding is quantised and can have no new tokens"):
        run_recipe("01_sft", *given(tmp_path / "packed", rows, tmp_path / "run", *LORA, engine="mlx"))


@pytest.mark.slow
def test_models_beside_the_policy_have_its_vocabulary(random_gpt2, rows, tmp_path, capsys):
    """PPO with a critic, and a reward model that was trained with one of three tokens."""
    pairs = [{"prompt": f"Say {i}.", "chosen": f"{i} it is.", "rejected": f"no {i}"} for i in range(12)]
    pairs_file = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    common = ("train.batch_size=4", "train.steps=1", "data.max_length=48", f"engine={ENGINE}")
    run_recipe(
        "07_reward",
        *(f"model={random_gpt2}", f"data.source={pairs_file}", f"output={tmp_path / 'rm'}", *common),
        *("data.special_tokens=[<think>]", "adapter.rank=2", "adapter.targets=[c_attn]"),
    )
    scorer, own, _ = open_model(tmp_path / "rm", ENGINE, scores=True)
    assert own.convert_tokens_to_ids("<think>") == BASE and scorer.has_head
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Say <think> {i}."} for i in range(8)])
    run_recipe(
        "07_ppo",
        *(f"model={random_gpt2}", f"data.source={prompts}", f"output={tmp_path / 'ppo'}", *common),
        *("data.special_tokens=" + json.dumps(TOKENS), f"reward=[{{model: {tmp_path / 'rm'}}}]"),
        *("rollout.prompts=4", "rollout.samples=1", "rollout.max_tokens=8", "data.holdout=2"),
        *("adapter.rank=2", "adapter.targets=[c_attn]"),
    )
    assert "has not learnt 2 of the tokens here" in capsys.readouterr().err
    assert open_model(tmp_path / "ppo", ENGINE)[0].full_logits(PROBE).shape[-1] == BASE + 3


def test_a_named_reference_gets_the_tokens(random_gpt2, rows, tmp_path):
    pairs = [
        {"prompt": f"Say {i}.", "chosen": f"<think>{i}</think> it is.", "rejected": f"no {i}"}
        for i in range(12)
    ]
    pairs_file = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    run_recipe(
        "09_dpo",
        *given(random_gpt2, pairs_file, tmp_path / "run", f"reference={random_gpt2}", "train.steps=1"),
    )
    first = next(r for r in records(tmp_path / "run") if "loss" in r)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)


def test_a_token_must_have_text(random_gpt2, rows, tmp_path):
    with pytest.raises(UserError, match="a token must have text"):
        methods.load_recipe("01_sft", list(given(random_gpt2, rows, tmp_path / "run", tokens=[" "])))


def test_added_tokens_stay_in_decoded_text(random_gpt2):
    tokenizer = load_tokenizer(random_gpt2, TOKENS)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
    assert len(load_tokenizer(random_gpt2)) == BASE
