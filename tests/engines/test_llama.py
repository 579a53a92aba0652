"""Another architecture through the same code: a random Llama on both engines.

Full training and LoRA, saved and reopened.
"""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.models.export import export
from mlx_posttrain.models.open import open_model

pytest.importorskip("torch")
ENGINES = engines.available()
TOKENS = np.arange(3, 40)[None]


@pytest.fixture(scope="module")
def llama(random_gpt2, tmp_path_factory):
    """A Llama folder with grouped-query attention, an untied head and GPT-2's tokenizer files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mlx_posttrain.convert.files import copy_tokenizer

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    copy_tokenizer(random_gpt2, folder)
    return folder


@pytest.mark.parametrize("adapter", [[], ["adapter.rank=4"]], ids=["full", "lora"])
def test_engines_agree_and_reopen_each_others_runs(adapter, llama, rows_file, tmp_path):
    from transformers import AutoModelForCausalLM

    curves, folders = [], []
    for engine in ENGINES:
        folders.append(tmp_path / engine)
        chosen = methods.load_recipe(
            "01_sft",
            [
                f"model={llama}",
                f"data.source={rows_file}",
                f"output={folders[-1]}",
                f"engine={engine}",
                "train.steps=5",
                "train.lr=3e-3",
                "sample.count=0",
                "train.eval_every=1",
                "train.select=last",
                *adapter,
            ],
        )
        methods.run(chosen)
        from mlx_posttrain.runs import Run

        curves.append([r["loss"] for r in Run(folders[-1]).metrics() if "loss" in r])
    assert curves[0] == pytest.approx(curves[-1], rel=1e-4)
    logits = [open_model(f, e)[0].full_logits(TOKENS) for f in folders for e in ENGINES]
    assert all(np.abs(x - logits[0]).max() < 1e-3 for x in logits)
    export(folders[0], tmp_path / "hf", "hf", merged=bool(adapter))
    import torch

    with torch.no_grad():
        theirs = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
            .eval()(torch.from_numpy(TOKENS))
            .logits.numpy()
        )
    assert np.abs(theirs - logits[0]).max() < 1e-4


@pytest.mark.skipif("mlx" not in ENGINES, reason="needs mlx")
def test_quantising_leaves_the_head_as_it_is(llama):
    """With a packed head the logits of all positions would be formed at once."""
    import mlx.nn as nn

    from mlx_posttrain.data.batches import collate
    from mlx_posttrain.data.types import Example
    from mlx_posttrain.engines.base import AdamW, AdapterSpec
    from mlx_posttrain.methods import sft

    engine = engines.get("mlx")
    model = engine.load(llama, quantize=4, group_size=32)
    assert not isinstance(model.net.lm_head, nn.QuantizedLinear)
    packed = [path for path, m in model.net.named_modules() if isinstance(m, nn.QuantizedLinear)]
    assert len(packed) == 2 * 7  # in each block four of attention and three of the feed-forward
    model.add_adapter(AdapterSpec(rank=4), seed=0)
    assert model._fused_head(model.net.train()) == (
        model.net.lm_head.weight,
        {"trained": False, "training": True},
    )
    assert model.reference_width == 64
    batch = collate([Example(tuple(range(1, 30)), (False,) * 9 + (True,) * 20)])
    trainer = engine.trainer(model, AdamW())
    losses = [trainer.step(sft.kl_loss(0.1, "forward"), [batch], 1e-2)["loss"] for _ in range(10)]
    assert losses[-1] < losses[0] - 0.1


def test_generation_is_the_same_on_both_engines(llama):
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    texts = [
        [
            c.tokens
            for c in open_model(llama, e)[0].generate(
                prompts, max_tokens=10, stop=0, temperature=0.9, samples=2, seed=4
            )
        ]
        for e in ENGINES
    ]
    assert all(t == texts[0] for t in texts)
