"""What works beside logits for each architecture of docs/models.md, found by doing it on both engines.

A small random model is adapted and trained for three steps, answers greedily, and its adapter is exported in
every format and read back by the program that the format is for. A cell names the engines, or the formats,
with which that came out as it should.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain import engines
from mlx_posttrain.convert import hub
from mlx_posttrain.convert.files import copy_tokenizer
from mlx_posttrain.data.batches import collate
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import AdamW, AdapterSpec
from mlx_posttrain.errors import UserError
from mlx_posttrain.methods import sft
from mlx_posttrain.models.export import FORMATS, export
from tests import architectures as made

COLUMNS = ("LoRA", "QLoRA", "greedy text", "exports of an adapter, from MLX", "from torch")
ENGINES = ("mlx", "torch")
VOCABULARY = 4096  # the embedded model's, whose tokenizer the models get
SPEC = AdapterSpec(rank=4, alpha=16)
TOKENS = made.tokens(14)
ANSWER = 12
#: Largest difference of logits, as a share of the largest. mlx-lm rounds Gemma 3's scale and approximates
#: GPT-NeoX's activation.
NEAR = {"mlx-lm": 2e-3}
OTHERWISE = 1e-3


def table() -> list[str]:
    """The lines of the table."""
    kinds = sorted({case.kind for case in made.CASES})
    found = [("`model_type`", *COLUMNS), *((kind, *cells(kind)) for kind in kinds)]
    lines = ["| " + " | ".join(row) + " |" for row in found]
    return [lines[0], "|---" * (1 + len(COLUMNS)) + "|", *lines[1:]]


@cache
def cells(kind: str) -> tuple[str, ...]:
    """One architecture's cells, in the order of ``COLUMNS``."""
    case = next(case for case in made.CASES if case.kind == kind)
    settings = {"vocab_size": VOCABULARY, **({"sliding_window": 64} if kind == "gemma2" else {})}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        net = made.build(made.Case(kind, case.about, case.settings | settings), folder)
        copy_tokenizer(hub.resolve("tiny"), folder)
        start = _logits(net)
        runs = {
            (name, bits): _train(name, folder, Path(scratch) / f"{name}-{bits}", bits)
            for name in ENGINES
            for bits in (None, 4)
        }
        whole = [runs[name, None] for name in ENGINES]
        agree = all(whole) and made.difference(whole[0][1], whole[1][1]) < OTHERWISE
        lora = [name for name in ENGINES if agree and made.difference(runs[name, None][1], start) > 1e-2]
        qlora = [name for name in ENGINES if runs[name, 4]]
        greedy = [name for name in ENGINES if _answers_as(net, name, folder)]
        exports = [
            [to for to in FORMATS if found and _reads(to, folder, Path(scratch) / f"{name}-None", found[1])]
            for name, found in zip(ENGINES, whole, strict=True)
        ]
    return tuple(", ".join(found) or "-" for found in (lora, qlora, greedy, *exports))


def _logits(net: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return net.eval()(input_ids=torch.from_numpy(TOKENS)).logits.float().numpy()


def _train(name: str, folder: Path, adapter: Path, bits: int | None) -> tuple[list[float], np.ndarray] | None:
    """Losses of three steps on the same rows, which must fall, and the logits after them.

    Writes the adapter; None where the engine refuses the model.
    """
    engine = engines.get(name)
    try:
        model = engine.load(folder, quantize=bits, group_size=32)
        model.add_adapter(SPEC, seed=0)
    except UserError:
        return None
    rng = np.random.default_rng(0)
    tokens = [rng.integers(3, VOCABULARY, n).tolist() for n in (12, 14, 16, 10)]
    examples = [Example(tuple(r), (False,) * 4 + (True,) * (len(r) - 4)) for r in tokens]
    trainer, batch = engine.trainer(model, AdamW()), [collate(examples, model.context)]
    losses = [trainer.step(sft.loss, batch, 1e-2)["loss"] for _ in range(3)]
    adapter.mkdir()
    model.save(adapter)
    return (losses, model.full_logits(TOKENS)) if losses[-1] < losses[0] else None


def _answers_as(net: Any, name: str, folder: Path) -> bool:
    """Whether greedy decoding of prompts of two lengths gives transformers' tokens."""
    import torch

    prompts = [TOKENS[0].tolist(), TOKENS[1, :5].tolist()]
    net.generation_config.eos_token_id = None
    for prompt, found in zip(
        prompts, engines.get(name).load(folder).generate(prompts, max_tokens=ANSWER, stop=None), strict=True
    ):
        ids = torch.tensor([prompt])
        theirs = net.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False, pad_token_id=0
        )
        if theirs[0, len(prompt) :].tolist() != found.tokens:
            return False
    return True


def _reads(to: str, folder: Path, adapter: Path, ours: np.ndarray) -> bool:
    """Whether the program that a format is for gets our logits from an adapter exported in it."""
    from transformers import AutoModelForCausalLM

    out = adapter.with_name(f"{adapter.name}-{to}")
    try:
        export(adapter, out, to, merged=to in ("hf", "mlx-lm"), dtype="float32" if to == "gguf" else None)
    except UserError:
        return False
    if to == "peft":
        from peft import PeftModel

        theirs = _logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(out)))
    elif to == "hf":
        theirs = _logits(AutoModelForCausalLM.from_pretrained(out))
    elif to == "gguf":
        sizes = {"n_positions": 64} if "gpt2" in (folder / "config.json").read_text() else {}
        theirs = _logits(AutoModelForCausalLM.from_pretrained(out, gguf_file="model-f32.gguf", **sizes))
    else:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        theirs = np.array(load_model(out)[0].eval()(mx.array(TOKENS.astype(np.int32))))
    return made.difference(theirs, ours) < NEAR.get(to, OTHERWISE)
