"""GGUF files are the models that they are made of, in transformers and in llama.cpp itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_posttrain.convert import gguf_file
from mlx_posttrain.convert.files import copy_tokenizer
from mlx_posttrain.data.tokens import bos_ids, stop_ids
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.tokenizer import load_tokenizer
from tests import architectures as made

gguf = pytest.importorskip("gguf")
TOKENS = made.tokens(40)
CASES = {str(case): case for case in made.CASES if case.kind in gguf_file.FIXED}
REFUSED = {"llama-dynamic-scaling", "llama-yarn-scaling", "qwen2-window", "qwen2-yarn-scaling"}
#: What transformers forgets when it reads a GGUF file, and llama.cpp does not.
FORGOTTEN = {"llama-llama3-scaling", "llama-linear-scaling", "llama-tied-head-and-biases"}


def written(name: str, tokenizer_folder, folder, dtype: str = "float32", wide: bool = False):
    """transformers' network of a case, and the GGUF file that its folder becomes.

    wide: a size of q8_0's blocks, and a vocabulary as the tokenizer's.
    """
    case = CASES[name]
    further = {"vocab_size": 400} if wide else {"vocab_size": 410}  # ten rows without a token
    net = made.build(made.Case(case.kind, case.about, case.settings | further), folder)
    copy_tokenizer(tokenizer_folder, folder)
    tokenizer = load_tokenizer(folder)
    file = folder / "model.gguf"
    gguf_file.write_gguf(
        folder,
        file,
        tokenizer,
        dtype=dtype,
        name=name,
        template="{{ messages }}",
        ends=stop_ids(tokenizer),
        bos=bool(bos_ids(tokenizer)),
    )
    return net, file, tokenizer


def reopened(file, case):
    """What transformers reads from a file; of a GPT-2 it would take 1,024 positions."""
    from transformers import AutoModelForCausalLM

    positions = {"n_positions": 64} if case.kind == "gpt2" else {}
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **positions).eval()


def logits(net) -> np.ndarray:
    import torch

    with torch.no_grad():
        return net(torch.from_numpy(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("name", sorted(set(CASES) - REFUSED - FORGOTTEN))
def test_transformers_reads_the_same_model(name, random_gpt2, tmp_path):
    pytest.importorskip("torch")
    net, file, tokenizer = written(name, random_gpt2, tmp_path)
    again = reopened(file, CASES[name])
    assert made.difference(logits(again), logits(net)) < 1e-5
    assert again.config.eos_token_id == stop_ids(tokenizer)[0]


@pytest.mark.parametrize(("dtype", "most"), [("float16", 0), ("bfloat16", 0), ("q8_0", 0.004)])
@pytest.mark.parametrize("name", ["gpt2-tied-head", "llama-rope-theta", "qwen2-rope-theta"])
def test_other_number_formats_round_the_matrices_alone(name, dtype, most, random_gpt2, tmp_path):
    """q8_0 has 127 steps to a block's largest weight, so it is off by at most 1/254 of that."""
    torch = pytest.importorskip("torch")
    net, file, _ = written(name, random_gpt2, tmp_path, dtype)
    again = dict(reopened(file, CASES[name]).state_dict())
    for key, value in net.state_dict().items():
        if dtype != "q8_0":
            whole = value.ndim == 1 or key.endswith("wpe.weight")
            expected = value if whole else value.to(getattr(torch, dtype)).float()
            assert torch.equal(again[key].float(), expected), key
        else:
            assert (again[key] - value).abs().max() <= most * value.abs().max() + 1e-7, key
    assert dtype != "q8_0" or any((again[k] != v).any() for k, v in net.state_dict().items())


def test_the_file_says_what_the_tokenizer_is(random_gpt2, tmp_path):
    _, file, tokenizer = written("gpt2-tied-head", random_gpt2, tmp_path)
    from gguf import GGUFReader, TokenType

    fields = GGUFReader(file).fields
    value = {key: field.contents() for key, field in fields.items()}
    assert value["tokenizer.ggml.pre"] == "gpt-2" and value["tokenizer.ggml.model"] == "gpt2"
    assert value["gpt2.context_length"] == 64 and value["general.name"] == "gpt2-tied-head"
    tokens, kinds = value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"]
    assert len(tokens) == 410 and tokens[405] == "[PAD405]" and kinds[405] == TokenType.UNUSED
    end = stop_ids(tokenizer)[0]
    assert value["tokenizer.ggml.eos_token_id"] == end and kinds[end] == TokenType.CONTROL
    assert value["tokenizer.ggml.add_bos_token"] is False
    assert value["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_be_another_model_is_refused(name, random_gpt2, tmp_path):
    with pytest.raises(UserError, match=r"is not written|are not written|does not compute"):
        written(name, random_gpt2, tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_other_architectures_are_refused_with_the_way_out(kind, tmp_path):
    made.build(next(case for case in made.CASES if case.kind == kind), tmp_path)
    with pytest.raises(UserError, match=f"{kind} is not written as GGUF .*convert_hf_to_gguf.py"):
        gguf_file.check_model(tmp_path)


def test_tokenizers_are_known_by_how_they_cut_words():
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    llama3, qwen2 = (gguf_file.PRE_TOKENIZERS[name][0]["pattern"] for name in ("llama-bpe", "qwen2"))
    smollm = [{"type": "Digits", "individual_digits": True}, plain]

    def found(*steps, normalizer=None, **model) -> str:
        cut = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
        return gguf_file.pre_tokenizer(
            {"model": {"type": "BPE", **model}, "pre_tokenizer": cut, "normalizer": normalizer}
        )

    assert found(plain) == "gpt-2" and found(*smollm) == "smollm"
    assert found({**split, "pattern": llama3}, as_bytes, ignore_merges=True) == "llama-bpe"
    assert found({**split, "pattern": qwen2}, as_bytes, normalizer={"type": "NFC"}) == "qwen2"
    for refused in (
        lambda: found({**plain, "add_prefix_space": True}),
        lambda: found(plain, normalizer={"type": "Lowercase"}),
        lambda: found(plain, byte_fallback=True),
        lambda: found(plain, ignore_merges=True),
        lambda: found({**split, "pattern": {"Regex": r"\w+"}}, as_bytes),
        lambda: found(as_bytes),
        lambda: found({"type": "Metaspace", "replacement": "▁"}),
    ):
        with pytest.raises(UserError, match=r"llama\.cpp has no tokenizer like this"):
            refused()


def test_values_beyond_float16_are_refused(random_gpt2, tmp_path):
    torch = pytest.importorskip("torch")
    net, file, tokenizer = written("qwen2-rope-theta", random_gpt2, tmp_path)
    file.unlink()
    with torch.no_grad():
        net.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    net.save_pretrained(tmp_path)
    settings = {"name": "x", "template": None, "ends": [0], "bos": False}
    with pytest.raises(UserError, match=r"blk.0.ffn_up.weight holds values .* --dtype bfloat16"):
        gguf_file.write_gguf(tmp_path, file, tokenizer, dtype="float16", **settings)


@pytest.mark.parametrize("name", sorted(set(CASES) - REFUSED))
def test_llama_cpp_itself_continues_as_transformers_does(name, random_gpt2, tmp_path):
    """Its tokens of a text and its probabilities of the next; for machines that have its bindings."""
    cpp = pytest.importorskip("xllamacpp")
    torch = pytest.importorskip("torch")
    net, file, tokenizer = written(name, random_gpt2, tmp_path, wide=True)
    settings = cpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.cpuparams.n_threads = str(file), 64, 1
    settings.warmup, settings.verbosity = False, -1
    text = "The cat sat on 42 mats; it's Ünder\n\n  the moon, 1, 2, 3."
    ids = tokenizer(text)["input_ids"]
    asked = {"prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    answer = cpp.Server(settings).handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    assert answer["usage"]["prompt_tokens"] == len(ids)
    with torch.no_grad():
        expected = net(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len(top) == 5
    for one in top:
        assert one["logprob"] == pytest.approx(float(expected[one["id"]]), abs=2e-2)
