"""LoRA and DoRA adapters: PEFT and mlx-lm load the files that are written, and compute the same."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_posttrain.convert import adapters
from mlx_posttrain.convert.adapters import (
    mlx_to_peft,
    peft_to_mlx,
    rank_of,
    read_adapter,
    save_adapter,
    scale_of,
    to_mlx_lm,
)
from mlx_posttrain.convert.weights import convert
from mlx_posttrain.errors import UserError

mx = pytest.importorskip("mlx.core")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

SHAPES = {"attn.c_attn": (64, 192), "attn.c_proj": (64, 64), "mlp.c_fc": (64, 256), "mlp.c_proj": (256, 64)}
KINDS = pytest.mark.parametrize(
    ("rslora", "dora"), [(False, False), (True, False), (False, True), (True, True)]
)


def random_modules(
    targets=("attn.c_attn", "attn.c_proj", "mlp.c_proj"), rank=4, dora=False, layers=2, seed=0
):
    """Return an adapter that changes the logits: B is not zero, magnitudes are not the weights' norms."""
    generator = np.random.default_rng(seed)
    modules = {}
    for i in range(layers):
        for target in targets:
            inner, outer = SHAPES[target]
            module = {
                "lora_a": generator.normal(0, 0.1, (inner, rank)).astype(np.float32),
                "lora_b": generator.normal(0, 0.1, (rank, outer)).astype(np.float32),
            }
            if dora:
                module["m"] = generator.uniform(0.3, 1.0, outer).astype(np.float32)
            modules[f"model.h.{i}.{target}"] = module
    return modules


def save(folder, modules, dora=False, **options):
    options = {
        "base_model": None,
        "rank": 4,
        "alpha": 8,
        "targets": ["c_attn", "c_proj"],
        "dora": dora,
        **options,
    }
    save_adapter(folder, modules, **options)
    return folder


def peft_model(base, folder, quiet):
    """Load an adapter through PEFT and check that there are no unused or missing tensors and no warnings."""
    from peft import PeftModel, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    with quiet():
        model = PeftModel.from_pretrained(base, str(folder)).eval()
    result = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    assert result.unexpected_keys == [] and not [key for key in result.missing_keys if "lora_" in key]
    return model


@pytest.fixture
def both(tmp_path, gpt2_folder):
    """Return (a function that loads a base model with transformers, its mlx-lm folder)."""
    from transformers import AutoModelForCausalLM

    source = gpt2_folder()
    convert(source, tmp_path / "mlx")
    return lambda: AutoModelForCausalLM.from_pretrained(source), tmp_path / "mlx"


@KINDS
def test_peft_and_mlx_lm_compute_the_same_from_saved_adapters(
    tmp_path, both, quiet, hf_logits, mlx_logits, tokens, rslora, dora
):
    import mlx_lm

    base, mlx_folder = both
    modules = random_modules(dora=dora)
    save(tmp_path / "peft", modules, dora=dora, rslora=rslora, dropout=0.1)
    expected = hf_logits(peft_model(base(), tmp_path / "peft", quiet), tokens)
    assert np.abs(expected - hf_logits(base(), tokens)).max() > 0.1
    config, read = read_adapter(tmp_path / "peft")
    assert all(
        np.array_equal(read[path][part], value)
        for path, module in modules.items()
        for part, value in module.items()
    )
    to_mlx_lm(tmp_path / "adapters", read, config)
    model, _ = mlx_lm.load(str(mlx_folder), adapter_path=str(tmp_path / "adapters"))
    layer = model.model.h[1].attn.c_attn
    assert type(layer).__name__ == ("DoRALinear" if dora else "LoRALinear")
    assert layer.scale == pytest.approx(8 / 2 if rslora else 8 / 4)
    assert np.abs(mlx_logits(model, tokens) - expected).max() < 1e-4


@KINDS
def test_adapters_saved_by_peft_are_read(tmp_path, both, hf_logits, mlx_logits, tokens, rslora, dora):
    import mlx_lm
    from peft import LoraConfig, get_peft_model

    base, mlx_folder = both
    torch.manual_seed(1)
    settings = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["c_attn", "c_fc"],
        use_rslora=rslora,
        use_dora=dora,
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base(), settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "magnitude" in name:
                parameter.mul_(1.3)
    expected = hf_logits(model, tokens)
    model.save_pretrained(tmp_path / "peft")
    config, modules = read_adapter(tmp_path / "peft")
    assert set(modules) == {f"model.h.{i}.{t}" for i in range(2) for t in ("attn.c_attn", "mlp.c_fc")}
    to_mlx_lm(tmp_path / "adapters", modules, config)
    loaded, _ = mlx_lm.load(str(mlx_folder), adapter_path=str(tmp_path / "adapters"))
    assert np.abs(mlx_logits(loaded, tokens) - expected).max() < 1e-4


def test_layers_of_mlx_lm_are_saved_directly(tmp_path, both, quiet, hf_logits, mlx_logits, tokens):
    """From the layers of an mlx-lm model with trained values to a PEFT folder."""
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    base, mlx_folder = both
    model, _ = load_model(mlx_folder)
    linear_to_lora_layers(
        model,
        2,
        {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": {"attn.c_attn", "attn.c_proj", "mlp.c_proj"}},
        use_dora=True,
    )
    mx.random.seed(0)
    modules: dict = {}
    for name, value in tree_flatten(model.parameters()):
        path, _, part = name.rpartition(".")
        if part in ("lora_a", "lora_b", "m"):
            modules.setdefault(path, {})[part] = (
                value * 1.2 if part == "m" else mx.random.normal(value.shape) * 0.1
            )
    model.load_weights(
        [(f"{path}.{part}", v) for path, module in modules.items() for part, v in module.items()],
        strict=False,
    )
    model.eval()
    save(tmp_path / "peft", modules, dora=True)
    assert (
        np.abs(
            hf_logits(peft_model(base(), tmp_path / "peft", quiet), tokens) - mlx_logits(model, tokens)
        ).max()
        < 1e-4
    )


def test_names_and_layouts_by_hand():
    a, b, m = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(4, 3) * 2, np.arange(4.0)
    # PEFT: A (r, in) = (3, 2), B (out, r) = (4, 3)
    tensors = {
        "base_model.model.transformer.h.7.attn.c_attn.lora_A.weight": a.T,
        "base_model.model.transformer.h.7.attn.c_attn.lora_B.weight": b,
        "base_model.model.transformer.h.7.attn.c_attn.lora_magnitude_vector": m,
    }
    modules = peft_to_mlx(tensors)
    assert list(modules) == ["model.h.7.attn.c_attn"]
    module = modules["model.h.7.attn.c_attn"]
    assert (
        np.array_equal(module["lora_a"], a)
        and np.array_equal(module["lora_b"], b.T)
        and np.array_equal(module["m"], m)
    )
    back = mlx_to_peft(modules)
    assert set(back) == set(tensors) and all(np.array_equal(back[k], v) for k, v in tensors.items())


@pytest.mark.parametrize(
    "suffixes",
    [
        ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
        ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"),
        ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default"),
        ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"),
    ],
)
@pytest.mark.parametrize(
    "prefix", ["base_model.model.transformer.h.0", "base_model.model.h.0", "transformer.h.0"]
)
def test_spellings_of_the_keys(prefix, suffixes):
    values = (np.ones((2, 5)), np.ones((3, 2)), np.ones((3, 1)))
    modules = peft_to_mlx({f"{prefix}.mlp.c_fc.{suffix}": value for suffix, value in zip(suffixes, values)})
    assert {k: v.shape for k, v in modules["model.h.0.mlp.c_fc"].items()} == {
        "lora_a": (5, 2),
        "lora_b": (2, 3),
        "m": (3,),
    }


def test_other_architectures_keep_their_paths():
    tensors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight": np.ones((2, 2)) for x in "AB"
    }
    assert list(peft_to_mlx(tensors)) == ["model.layers.0.self_attn.q_proj"]
    assert set(mlx_to_peft(peft_to_mlx(tensors))) == set(tensors)
    # gpt_bigcode's path is transformer.h in mlx-lm too
    tensors = {f"base_model.model.transformer.h.0.attn.c_attn.lora_{x}.weight": np.ones((2, 2)) for x in "AB"}
    assert list(peft_to_mlx(tensors, "gpt_bigcode")) == ["transformer.h.0.attn.c_attn"]
    assert set(mlx_to_peft(peft_to_mlx(tensors, "gpt_bigcode"), "gpt_bigcode")) == set(tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_adapters(tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    modules = random_modules()
    save(tmp_path, modules)
    halves = {
        k: v.to(getattr(torch, dtype)) for k, v in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    save_file(halves, tmp_path / "adapter_model.safetensors")
    _, read = read_adapter(tmp_path)
    for path, module in modules.items():
        expected = torch.from_numpy(module["lora_a"]).to(getattr(torch, dtype)).float().numpy()
        assert read[path]["lora_a"].dtype == np.float32 and np.array_equal(read[path]["lora_a"], expected)
    halved = {
        p: {k: mx.array(v).astype(getattr(mx, dtype)) for k, v in m.items()} for p, m in modules.items()
    }
    save(tmp_path / "again", halved)
    assert np.array_equal(
        read_adapter(tmp_path / "again")[1]["model.h.0.attn.c_attn"]["lora_b"],
        read["model.h.0.attn.c_attn"]["lora_b"],
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_by_pattern(tmp_path, both, quiet, hf_logits, mlx_logits, tokens, rslora):
    import mlx_lm

    base, mlx_folder = both
    modules = random_modules(("attn.c_attn",), rank=4) | random_modules(
        ("attn.c_proj", "mlp.c_proj"), rank=2, seed=1
    )
    extra = {
        "rank_pattern": {"c_proj": 2},
        "alpha_pattern": {r"h\.1\.attn\.c_proj": 3, "transformer.h.0.attn.c_attn": 1},
    }
    save(tmp_path / "peft", modules, rslora=rslora, extra_config=extra)
    config, read = read_adapter(tmp_path / "peft")
    assert rank_of(config, "model.h.0.attn.c_attn") == 4 and rank_of(config, "model.h.1.mlp.c_proj") == 2
    root = np.sqrt if rslora else float
    assert scale_of(config, "model.h.1.attn.c_proj") == pytest.approx(3 / root(2))
    assert scale_of(config, "model.h.0.attn.c_attn") == pytest.approx(1 / root(4))
    assert scale_of(config, "model.h.1.attn.c_attn") == pytest.approx(8 / root(4))
    expected = hf_logits(peft_model(base(), tmp_path / "peft", quiet), tokens)
    to_mlx_lm(tmp_path / "adapters", read, config)
    model, _ = mlx_lm.load(str(mlx_folder), adapter_path=str(tmp_path / "adapters"))
    assert np.abs(mlx_logits(model, tokens) - expected).max() < 1e-4


def test_an_adapter_on_some_layers_by_full_paths(tmp_path, both, quiet, hf_logits, mlx_logits, tokens):
    import mlx_lm

    base, mlx_folder = both
    # the first layer only: mlx-lm's "last n layers" would take the other one
    modules = random_modules(layers=1)
    save(tmp_path / "peft", modules, targets=None)
    expected = hf_logits(peft_model(base(), tmp_path / "peft", quiet), tokens)
    to_mlx_lm(tmp_path / "adapters", modules, read_adapter(tmp_path / "peft")[0])
    model, _ = mlx_lm.load(str(mlx_folder), adapter_path=str(tmp_path / "adapters"))
    assert np.abs(mlx_logits(model, tokens) - expected).max() < 1e-4


def test_files_that_are_written(tmp_path):
    save(
        tmp_path / "a", random_modules(), base_model="openai-community/gpt2", extra_config={"revision": None}
    )
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (
        config["peft_type"] == "LORA"
        and config["task_type"] == "CAUSAL_LM"
        and config["fan_in_fan_out"] is True
    )
    assert config["base_model_name_or_path"] == "openai-community/gpt2" and config["target_modules"] == [
        "c_attn",
        "c_proj",
    ]
    assert (config["r"], config["lora_alpha"], config["bias"], config["revision"]) == (4, 8, "none", None)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    to_mlx_lm(tmp_path / "b", random_modules(dora=True), {**config, "use_dora": True, "lora_dropout": 0.1})
    written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (
        written["fine_tune_type"] == "dora"
        and written["num_layers"] == 2
        and written["model"] == "openai-community/gpt2"
    )
    parameters = written["lora_parameters"]
    assert (parameters["rank"], parameters["scale"], parameters["dropout"]) == (4, 2.0, 0.1)
    assert parameters["keys"] == sorted(random_modules())


def test_contradictions_between_modules_and_settings(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"targets \['c_attn'\] do not match transformer.h.0.attn.c_proj, so PEFT would "
        r"ignore its tensors",
    ):
        save(tmp_path, random_modules(), targets=["c_attn"])
    with pytest.raises(
        ValueError,
        match=r"match transformer.h.0.mlp.c_proj too, which has no adapter; PEFT "
        r"would make a new one",
    ):
        save(tmp_path, random_modules(("attn.c_attn", "attn.c_proj")))
    with pytest.raises(ValueError, match=r"has rank 4, but the config says 8"):
        save(tmp_path, random_modules(), rank=8)
    with pytest.raises(ValueError, match=r"has a magnitude vector, but the config says use_dora False"):
        save(tmp_path, random_modules(dora=True))
    with pytest.raises(ValueError, match=r"lacks the magnitude vector, but the config says use_dora True"):
        save(tmp_path, random_modules(), dora=True)
    assert not (tmp_path / "adapter_config.json").exists()
    save(
        tmp_path / "regex", random_modules(("attn.c_attn", "attn.c_proj")), targets=r".*\.attn\.c_(attn|proj)"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported, only LORA"),
        (
            {"bias": "all"},
            "bias 'all' is not supported, only 'none': the adapter changes the base model's biases",
        ),
        (
            {"modules_to_save": ["wte"]},
            r"modules_to_save is not supported; merge the adapter with PEFT "
            r"\(merge_and_unload\)",
        ),
        ({"layers_to_transform": [0]}, "layers_to_transform is not supported"),
        ({"trainable_token_indices": [1]}, "no rows of an embedding"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changed the base model's weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights 'pissa_niter_16' changed"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' changed"),
        ({"r": 16}, "model.h.0.attn.c_attn has rank 4, but the config says 16"),
        ({"use_dora": True}, "lacks the magnitude vector, but the config says use_dora True"),
    ],
)
def test_adapters_that_cannot_be_applied_exactly(tmp_path, changes, message):
    save(tmp_path, random_modules())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_initialisations_that_leave_the_base_unchanged(tmp_path, init):
    save(tmp_path, random_modules(), extra_config={"init_lora_weights": init})
    assert read_adapter(tmp_path)[0]["init_lora_weights"] == init


def test_broken_adapter_folders(tmp_path):
    with pytest.raises(UserError, match=r"has no adapter_config.json"):
        read_adapter(tmp_path)
    save(tmp_path, random_modules())
    file = tmp_path / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged or is not a safetensors file"):
        read_adapter(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors; only safetensors weights load"):
        read_adapter(tmp_path)
    file.write_bytes(data)
    (tmp_path / "adapter_config.json").write_text('{"r": 4')
    with pytest.raises(UserError, match=r"adapter_config.json is not valid JSON: .* at line 1"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"base_model.model.transformer.wte.lora_embedding_A": (4, 8)},
            "holds .*lora_embedding_A, which is not a LoRA or DoRA matrix",
        ),
        (
            {"base_model.model.lm_head.weight": (4, 8)},
            "holds base_model.model.lm_head.weight, which is not a LoRA",
        ),
        (
            {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": (4, 8)},
            "the adapter lacks lora_b of model.h.0.attn.c_attn",
        ),
        (
            {"transformer.h.0.x.lora_A.weight": (4, 8), "transformer.h.0.x.lora_B.weight": (9, 5)},
            r"do not fit together: lora_a \(in, r\) is \(8, 4\), lora_b \(r, out\) is \(5, 9\)",
        ),
        (
            {
                "transformer.h.0.x.lora_A.weight": (4, 8),
                "transformer.h.0.x.lora_B.weight": (9, 4),
                "transformer.h.0.x.lora_magnitude_vector": (8,),
            },
            r"magnitude vector of model.h.0.x has shape \(8,\), expected \(9,\)",
        ),
        (
            {
                "transformer.h.0.x.lora_A.weight": (4, 8),
                "transformer.h.0.x.lora_A.other.weight": (4, 8),
                "transformer.h.0.x.lora_B.weight": (9, 4),
            },
            "holds lora_A of transformer.h.0.x twice, under two adapters' names",
        ),
        (
            {f"transformer.h.0.{'x' * 200}.lora_A.weight": (4, 8)},
            "holds transformer.h.0.x{184}, which is not a LoRA",
        ),
    ],
)
def test_tensors_that_are_not_lora(tensors, message):
    with pytest.raises(UserError, match=message):
        peft_to_mlx({name: np.zeros(shape) for name, shape in tensors.items()})


def test_an_empty_adapter(tmp_path):
    from safetensors.numpy import save_file

    save(tmp_path, random_modules())
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"holds no tensor"):
        read_adapter(tmp_path)
    with pytest.raises(UserError, match=r"the adapter has no module"):
        to_mlx_lm(tmp_path / "x", {}, {})


def test_disk_space(tmp_path, monkeypatch):
    monkeypatch.setattr(
        adapters,
        "require_space",
        lambda folder, needed: (_ for _ in ()).throw(UserError(f"not enough: {needed}")),
    )
    with pytest.raises(UserError, match=r"not enough"):
        save(tmp_path / "a", random_modules())
    assert not (tmp_path / "a").exists()
