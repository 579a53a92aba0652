"""New tokens on each engine: rows that start at the mean, their gradients, and PEFT's files both ways."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.convert.token_rows import grow
from mlx_posttrain.data.batches import collate
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines import files
from mlx_posttrain.engines.base import AdamW, AdapterSpec
from mlx_posttrain.errors import UserError
from mlx_posttrain.losses.policy import entropy
from mlx_posttrain.losses.sft import full_kl, token_logprobs
from mlx_posttrain.methods import sft

torch = pytest.importorskip("torch")
ENGINES = engines.available()
V, NEW = 40, (40, 41)  # the base's tokens, and two more
KINDS = ("gpt2", "llama")


@pytest.fixture(params=ENGINES)
def engine(request):
    return engines.get(request.param)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Random folders of a GPT-2, whose head is tied, and of a Llama, whose head is not."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
    nets = {
        "gpt2": GPT2LMHeadModel(GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
        "llama": LlamaForCausalLM(
            LlamaConfig(
                **sizes,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
            )
        ),
    }
    folders = {}
    for name, net in nets.items():
        folders[name] = tmp_path_factory.mktemp(name)
        net.save_pretrained(folders[name])
    return folders


def rows(count: int = 6) -> list[Example]:
    """Rows of 12 to 20 tokens with new ones among them, both in prompts and in answers."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        ids = rng.integers(1, V, 12 + i).tolist()
        ids[2], ids[7], ids[9], ids[11] = NEW[0], NEW[0], NEW[1], NEW[1]
        found.append(Example(tuple(ids), tuple(j > 5 for j in range(len(ids)))))
    return found


def adapted(engine, folder, tokens=NEW, **spec):
    model = engine.load(folder, vocabulary=V + 2)
    targets = ("c_attn",) if model.config["model_type"] == "gpt2" else ("q_proj", "down_proj")
    model.add_adapter(AdapterSpec(rank=2, alpha=8, targets=targets, tokens=tokens, **spec), 1)
    return model


def trained(engine, folder, steps=4, **spec):
    model = adapted(engine, folder, **spec)
    model.keep_reference()
    trainer = engine.trainer(model, AdamW(weight_decay=0.1))
    losses = [trainer.step(sft.loss, [collate(rows(), 32)], 2e-2)["loss"] for _ in range(steps)]
    return model, losses


PROBE = np.array([[3, 40, 5, 41, 7, 39, 40, 40, 1, 41]])


def theirs(base, adapter):
    """Logits of the adapter in PEFT, on a base that transformers resized with rows of its own."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(base)
    net.resize_token_embeddings(V + 2)
    with torch.no_grad():
        return PeftModel.from_pretrained(net, adapter).eval()(torch.from_numpy(PROBE)).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_start_at_the_mean(engine, bases, kind):
    from safetensors.numpy import load_file

    weights = load_file(bases[kind] / "model.safetensors")
    embedding = next(v for n, v in weights.items() if "wte" in n or "embed_tokens" in n)
    head = weights.get("lm_head.weight", embedding)
    plain = engine.load(bases[kind])
    model = engine.load(bases[kind], vocabulary=V + 2)
    assert model.config["vocab_size"] == V + 2
    more = 2 * 16 * (1 if kind == "gpt2" else 2)
    assert model.parameter_counts() == tuple(n + more for n in plain.parameter_counts())
    saved = model.weights()
    names = ["transformer.wte.weight"] if kind == "gpt2" else ["model.embed_tokens.weight", "lm_head.weight"]
    for name, old in zip(names, (embedding, head)):
        assert np.array_equal(saved[name][:V], old)
        assert np.allclose(saved[name][V:], old.mean(0), atol=1e-7)
    old, new = (m.full_logits(np.arange(1, 20)[None]) for m in (plain, model))
    assert np.abs(new[..., :V] - old).max() < 1e-5
    assert np.allclose(new[..., V:], old.mean(-1, keepdims=True), atol=1e-4)  # the head is linear


def test_growing_keeps_a_table_that_is_large_enough():
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert grow(table, 3) is table
    assert grow(table, 5).tolist() == [[0, 1], [2, 3], [4, 5], [2, 3], [2, 3]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_only_new_rows_train_beside_the_adapter(engine, bases, kind, adapter):
    model = adapted(engine, bases[kind], kind=adapter)
    plain = adapted(engine, bases[kind], kind=adapter, tokens=())
    more = 2 * 16 * (1 if kind == "gpt2" else 2)
    assert model.parameter_counts()[1] == plain.parameter_counts()[1] + more
    before = model.full_logits(PROBE)
    assert np.abs(before - plain.full_logits(PROBE)).max() < 1e-6  # the rows start as the table's
    model.keep_reference()
    trainer = engine.trainer(model, AdamW())
    for _ in range(3):
        trainer.step(sft.loss, [collate(rows(), 32)], 2e-2)
    assert np.abs(model.full_logits(PROBE) - before).max() > 1e-2
    with model.adapters_off():
        assert np.abs(model.full_logits(PROBE) - before).max() < 1e-6


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs mlx and torch")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "loss", ["sft", "kl reverse", pytest.param("kl forward", marks=pytest.mark.exhaustive)]
)
def test_engines_agree_over_ten_updates(bases, kind, loss):
    function = sft.loss if loss == "sft" else sft.kl_loss(0.2, loss.split()[1])
    curves = []
    for name in ENGINES:
        engine = engines.get(name)
        model = adapted(engine, bases[kind])
        model.keep_reference()
        trainer = engine.trainer(model, AdamW(weight_decay=0.1))
        batches = [collate(rows()[:4], 32), collate(rows()[4:], 32)]
        curves.append([trainer.step(function, batches, 3e-3) for _ in range(10)])
    for ours, others in zip(*curves):
        for name in ours:
            # Adam's first updates are signs of gradients, whose norms part before the losses do
            rel = 2e-3 if name == "grad_norm" else 1e-4
            assert ours[name] == pytest.approx(others[name], rel=rel, abs=2e-5), name
    assert curves[0][-1]["loss"] < curves[0][0]["loss"] - 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_losses_give_new_rows_the_gradient_of_all_logits(engine, bases, kind):
    """Log-probabilities, divergences and entropies at once, against the same from whole logits."""
    model, _ = trained(engine, bases[kind])

    def chunked(m, b):
        logprobs, kl = m.logprobs_and_kl(b, "reverse")
        again, entropies, _ = m.policy_terms(b, 0.7)
        total = (0.3 * logprobs + 0.5 * kl + 0.2 * again + 0.1 * entropies + m.logprobs(b)).sum()
        return total / b.total, {}

    def whole(m, b):
        logits = m.logits(b)
        logprobs, kl = token_logprobs(logits, b.target), full_kl(logits, m.reference_logits(b), "reverse")
        again, entropies = token_logprobs(logits / 0.7, b.target), entropy(logits / 0.7)
        total = (0.3 * logprobs + 0.5 * kl + 0.2 * again + 0.1 * entropies + logprobs).sum()
        return total / b.total, {}

    ours, wanted = (model.gradient(f, [collate(rows(), 32)]) for f in (chunked, whole))
    assert sum("rows" in name for name in ours) == (1 if kind == "gpt2" else 2)
    for name, value in wanted.items():
        assert np.abs(value).max() > 1e-5
        assert np.allclose(ours[name], value, rtol=1e-3, atol=2e-5), name
    # and in training, where gradients are streamed
    trainer, one = engine.trainer(model, AdamW(clip=None)), [collate(rows(), 32)]
    norm = float(np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in wanted.values())))
    assert trainer.step(chunked, one, 0.0)["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_our_adapter_in_peft(engine, bases, kind, tmp_path):
    from safetensors.numpy import load_file

    model, _ = trained(engine, bases[kind])
    model.save(tmp_path)
    names = sorted(n for n in load_file(tmp_path / "adapter_model.safetensors") if "lora" not in n)
    rest = ".token_adapter.trainable_tokens_delta"
    config = json.loads((tmp_path / "adapter_config.json").read_text())["trainable_token_indices"]
    if kind == "gpt2":
        assert names == [f"base_model.model.transformer.wte{rest}"] and config == [40, 41]
    else:
        assert names == [f"base_model.model.lm_head{rest}", f"base_model.model.model.embed_tokens{rest}"]
        assert config == {"embed_tokens": [40, 41], "lm_head": [40, 41]}
    assert np.abs(theirs(bases[kind], tmp_path) - model.full_logits(PROBE)).max() < 1e-4
    again = engine.load(bases[kind], vocabulary=V + 2)
    again.add_adapter(files.spec_of(tmp_path), 0)
    again.load_trained(tmp_path)
    assert np.array_equal(again.full_logits(PROBE), model.full_logits(PROBE))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["of all", "by layer", "of old tokens"])
def test_an_adapter_of_peft_in_ours(engine, bases, kind, form, tmp_path):
    """PEFT saves the tables of a resized base as well, and rows of old tokens without them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    net = AutoModelForCausalLM.from_pretrained(bases[kind])
    grown = V if form == "of old tokens" else 48  # a round number
    tokens = [3, 39, 7] if form == "of old tokens" else [41, 40]
    net.resize_token_embeddings(grown)
    name = "wte" if kind == "gpt2" else "embed_tokens"
    by_layer = {name: tokens} | ({} if kind == "gpt2" else {"lm_head": tokens})
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj"]
    peft = get_peft_model(
        net,
        LoraConfig(
            r=2,
            target_modules=targets,
            fan_in_fan_out=kind == "gpt2",
            task_type="CAUSAL_LM",
            trainable_token_indices=by_layer if form == "by layer" else tokens,
        ),
    )
    with torch.no_grad():
        for p in peft.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
        peft.save_pretrained(tmp_path)
        probe = PROBE % grown
        wanted = peft.eval()(torch.from_numpy(probe)).logits.numpy()
    spec = files.spec_of(tmp_path)
    model = engine.load(bases[kind], vocabulary=max(spec.tokens) + 1)
    model.add_adapter(spec, 0)
    model.load_trained(tmp_path)
    ours = model.full_logits(probe)
    assert ours.shape == wanted.shape and np.abs(ours - wanted).max() < 1e-4
    # and back again
    model.save(tmp_path / "again")
    model.load_trained(tmp_path / "again")
    assert np.array_equal(model.full_logits(probe), ours)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_reads_and_writes_new_tokens(engine, bases, kind):
    model, _ = trained(engine, bases[kind], steps=30)
    (found,) = model.generate([[3, 40, 5]], max_tokens=8, stop=None)
    ids = [3, 40, 5, *found.tokens]
    logits = model.full_logits(np.array([ids]))[0]
    assert logits[2:-1].argmax(-1).tolist() == found.tokens
    assert set(found.tokens) & set(NEW)


def test_full_training_grows_the_saved_model(engine, bases, tmp_path):
    from transformers import AutoModelForCausalLM

    for kind in KINDS:
        model = engine.load(bases[kind], vocabulary=V + 2)
        trainer = engine.trainer(model, AdamW())
        for _ in range(2):
            trainer.step(sft.loss, [collate(rows(), 32)], 1e-2)
        model.save(tmp_path / kind)
        assert json.loads((tmp_path / kind / "config.json").read_text())["vocab_size"] == V + 2
        net = AutoModelForCausalLM.from_pretrained(tmp_path / kind).eval()
        with torch.no_grad():
            wanted = net(torch.from_numpy(PROBE)).logits.numpy()
        ours = model.full_logits(PROBE)
        assert np.abs(ours - wanted).max() < 1e-4
        model.load_trained(tmp_path / kind)
        assert np.array_equal(model.full_logits(PROBE), ours)


def test_adapters_that_do_not_fit(engine, bases, tmp_path):
    model, _ = trained(engine, bases["gpt2"], steps=1)
    model.save(tmp_path)
    other = adapted(engine, bases["gpt2"], tokens=(3, 41))
    with pytest.raises(UserError, match="new tokens"):
        other.load_trained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for given, said in (
        ([40], "1 trainable_token_indices"),
        ([40, 40], "different whole numbers"),
        ({"wte": [40, 41], "lm_head": [40]}, "the same of the head"),
        ({"lm_head": [40, 41]}, "those of the embedding"),
    ):
        changed = {**config, "trainable_token_indices": given}
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=said):
            files.spec_of(tmp_path)
