"""Runs of every architecture: trained, saved, reopened and exported on both engines, or refused."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.convert.files import copy_tokenizer
from mlx_posttrain.engines import files
from mlx_posttrain.engines.base import AdapterSpec, initial_head
from mlx_posttrain.errors import UserError
from mlx_posttrain.memory.model_size import adapter_parameters, size
from mlx_posttrain.models.export import export
from mlx_posttrain.models.open import open_model
from tests import architectures as made
from tests.helpers import records, run_recipe

pytest.importorskip("torch")
ENGINES = engines.available()
TOKENS = made.tokens(14)
#: Each architecture once, and GPT-2 with a head of its own.
CASES = {case.kind: case for case in reversed(made.CASES)} | {"gpt2-untied": made.CASES[1]}
LINEAR = {
    "gpt2": 4,
    "gpt2-untied": 4,
    "gpt_neox": 4,
    "mixtral": 4,
    "phi3": 4,
    "qwen3_moe": 4,
}  # of a block; 7 elsewhere


@pytest.fixture(scope="module")
def folders(tmp_path_factory, random_gpt2):
    """A model folder of each architecture, with a vocabulary of 400 and GPT-2's tokenizer files."""
    found = {}
    for name, case in CASES.items():
        found[name] = tmp_path_factory.mktemp(name)
        settings = {"vocab_size": 400, **({"sliding_window": 64} if case.kind == "gemma2" else {})}
        wide = made.Case(case.kind, case.about, case.settings | settings)
        made.build(wide, found[name])
        copy_tokenizer(random_gpt2, found[name])
    return found


def train(folder, rows_file, output, engine, *further: str) -> list[float]:
    """Losses of a short run."""
    run_recipe(
        "01_sft",
        f"model={folder}",
        f"data.source={rows_file}",
        f"output={output}",
        f"engine={engine}",
        "train.steps=3",
        "train.lr=3e-3",
        "train.batch_size=4",
        "data.limit=24",
        "data.max_length=48",
        "data.holdout=4",
        "sample.count=0",
        "train.select=last",
        *further,
    )
    return [r["loss"] for r in records(output) if "loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "adapter"),
    [("mixtral", ["adapter.rank=4"])]
    + [
        (name, adapter)
        for name in ("gemma2", "gemma3_text", "gpt2-untied", "gpt_neox", "phi3", "qwen2")
        for adapter in ([], ["adapter.rank=4"])
    ],
)
def test_a_run_is_the_same_on_both_engines_and_opens_on_each_and_in_transformers(
    name, adapter, folders, rows_file, tmp_path
):
    import torch
    from transformers import AutoModelForCausalLM

    runs = {engine: tmp_path / engine for engine in ENGINES}
    curves = [train(folders[name], rows_file, runs[engine], engine, *adapter) for engine in ENGINES]
    assert curves[0] == pytest.approx(curves[-1], rel=1e-3) and curves[0][-1] < curves[0][0]
    logits = [open_model(run, engine)[0].full_logits(TOKENS) for run in runs.values() for engine in ENGINES]
    assert all(made.difference(x, logits[0]) < 5e-3 for x in logits)
    start = engines.get("torch").load(folders[name]).full_logits(TOKENS)
    assert made.difference(logits[0], start) > 2e-2  # what was trained is there
    for engine, run in runs.items():
        export(run, tmp_path / f"hf-{engine}", "hf", merged=bool(adapter))
        net = AutoModelForCausalLM.from_pretrained(tmp_path / f"hf-{engine}").eval()
        with torch.no_grad():
            assert made.difference(net(torch.from_numpy(TOKENS)).logits.numpy(), logits[0]) < 5e-3


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "gpt2-untied", "gpt_neox", "mixtral", "phi3"])
def test_generation_is_the_same_on_both_engines(name, folders):
    """Beyond gemma3's window of 8 too."""
    prompts = [made.tokens(20)[0].tolist(), made.tokens(5)[1].tolist()]
    settings = {"max_tokens": 12, "stop": 0, "temperature": 0.9, "samples": 2, "seed": 4}
    texts = [
        [c.tokens for c in engines.get(engine).load(folders[name]).generate(prompts, **settings)]
        for engine in ENGINES
    ]
    assert all(t == texts[0] for t in texts)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_weights_of_a_model_whose_tensors_have_other_names_are_refused_before_a_step(
    engine, folders, rows_file, tmp_path
):
    with pytest.raises(UserError, match=r"experts|switch_mlp"):
        train(folders["mixtral"], rows_file, tmp_path / "run", engine)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_words_for_targets(engine, name, folders):
    of = size(folders[name])
    gpt2 = name.startswith("gpt2")
    counted = {}
    for targets in (None, ("all-linear",), ("attention",)):
        model = engines.get(engine).load(folders[name])
        spec = AdapterSpec(rank=2, targets=targets)
        model.add_adapter(spec, seed=0)
        assert model.parameter_counts()[1] == adapter_parameters(of, spec)
        adapted = [p for p, _ in (model.adapted() if engine == "mlx" else model._adapted())]
        counted[targets] = len(adapted) // (4 if name == "gemma3_text" else 2)
    attention = {"gpt2": 2, "gpt2-untied": 2, "gpt_neox": 2, "phi3": 2}.get(name, 4)
    assert counted[("all-linear",)] == LINEAR.get(name, 7) and counted[("attention",)] == attention
    assert counted[None] == (3 if gpt2 else counted[("all-linear",)])


def test_lora_of_gpt2_by_default():
    """rank * (in + out) of c_attn, and of both c_proj: 16 * (3072 + 1536 + 3840) * 12."""
    shapes = {}
    for i in range(12):
        shapes[f"h.{i}.attn.c_attn.weight"] = (768, 2304)
        shapes[f"h.{i}.attn.c_proj.weight"] = (768, 768)
        shapes[f"h.{i}.mlp.c_fc.weight"] = (768, 3072)
        shapes[f"h.{i}.mlp.c_proj.weight"] = (3072, 768)
    from mlx_posttrain.memory.model_size import Size

    of = Size(12, 768, 3072, 12, 50257, 1024, "gpt2", shapes)
    assert adapter_parameters(of, AdapterSpec(rank=16)) == 1_622_016


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["gpt_neox", "phi3", "gemma2", "gpt2-untied"])
def test_a_scalar_head_is_saved_and_reopened(engine, name, folders, tmp_path):
    model = engines.get(engine).load(folders[name])
    model.add_head(initial_head(32, 3))
    model.save_classifier(tmp_path, 0)
    assert files.is_classifier(files.check_config(tmp_path))
    heads = [engines.get(e).load(tmp_path).head() for e in ENGINES]
    assert all(np.array_equal(h, model.head()) for h in heads)


@pytest.mark.skipif("mlx" not in ENGINES, reason="needs mlx")
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_neox", "phi3", "qwen2"])
def test_what_is_exported_for_mlx_lm_is_right_in_mlx_lm(name, folders, rows_file, tmp_path):
    """From configs of transformers 5, which mlx-lm itself would misread: an adapter and a merged model."""
    import mlx.core as mx
    from mlx_lm.utils import load_adapters, load_model

    from mlx_posttrain.convert.weights import convert

    train(folders[name], rows_file, tmp_path / "run", "mlx", "adapter.rank=4")
    ours = open_model(tmp_path / "run", "mlx")[0].full_logits(TOKENS)
    convert(folders[name], tmp_path / "base")
    export(tmp_path / "run", tmp_path / "adapter", "mlx-lm")
    export(tmp_path / "run", tmp_path / "merged", "mlx-lm", merged=True)
    nets = [
        load_adapters(load_model(tmp_path / "base")[0], str(tmp_path / "adapter")),
        load_model(tmp_path / "merged")[0],
    ]
    # mlx-lm rounds Gemma 3's scale and approximates GPT-NeoX's activation
    bound = 2e-3 if name in ("gemma3_text", "gpt_neox") else 1e-4
    for net in nets:
        theirs = np.array(net.eval()(mx.array(TOKENS.astype(np.int32))))
        assert made.difference(theirs, ours) < bound


@pytest.mark.skipif("mlx" not in ENGINES, reason="needs mlx")
@pytest.mark.parametrize("name", ["gpt_neox", "qwen2"])
def test_a_merge_into_a_quantised_base_is_read_here_and_by_mlx_lm(name, folders, rows_file, tmp_path):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    quantised = ["adapter.rank=4", "adapter.quantize=8", "adapter.group_size=32", "train.lr=3e-2"]
    train(folders[name], rows_file, tmp_path / "run", "mlx", *quantised)
    export(tmp_path / "run", tmp_path / "merged", "mlx-lm", merged=True)
    here = open_model(tmp_path / "merged", "mlx")[0].full_logits(TOKENS)
    theirs = load_model(tmp_path / "merged")[0](mx.array(TOKENS.astype(np.int32)))
    assert made.difference(np.array(theirs), here) < (2e-3 if name == "gpt_neox" else 1e-4)
