"""The engines and devices of this machine against each other: logits, one training step, and texts.

Each computes in a process of its own, as MLX's device is chosen once for a process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain.console import log
from mlx_posttrain.errors import UserError
from mlx_posttrain.verify.checks import FAILED, PASSED, Check, skipped

#: Largest difference of logits, relative to the largest logit; rounding in float32 gives 1e-6 to 1e-5.
LOGITS = 1e-3
#: Relative difference of a step's loss and of its gradient's norm.
LOSS, NORM = 1e-4, 1e-3
#: Share of texts that may part: where a draw, or two equal logits, fall between two roundings.
TEXTS = 0.125
PROMPTS, SAMPLES, ANSWER = 8, 2, 24
VOCABULARY, CONTEXT, WIDTH = 512, 128, 64


@dataclass(frozen=True)
class Measured:
    """What one engine computed from one model.

    logits: [rows, tokens, V]. loss, norm: of one step of supervised fine-tuning. greedy, sampled: tokens of
    each answer.
    """

    logits: np.ndarray
    loss: float
    norm: float
    greedy: list[list[int]]
    sampled: list[list[int]]


def compare(only: str | None = None) -> list[Check]:
    """Compare every two engines of this machine on the embedded model, a random GPT-2 and a random Llama.

    only: one of the three.
    """
    names = engine_names()
    if len(names) < 2:
        have = ", ".join(names) or "none"
        return [
            skipped("engines against each other", f"{have} alone: `pip install -e '.[torch]'` adds another")
        ]
    with tempfile.TemporaryDirectory(prefix="mlx-posttrain-verify-") as scratch:
        folders = {name: at for name, at in models(Path(scratch)).items() if only in (None, name)}
        found: dict[str, dict[str, Measured] | str] = {}
        for name in names:
            log(f"verify: {name} ...")
            found[name] = _in_own_process(name, folders)
    checks = []
    for ours, theirs in combinations(names, 2):
        a, b = found[ours], found[theirs]
        for engine, result in ((ours, a), (theirs, b)):
            if isinstance(result, str):
                checks.append(Check(engine, "computes", result, "", FAILED))
        if isinstance(a, dict) and isinstance(b, dict):
            for model in folders:
                checks += agreement(f"{model}, {ours} against {theirs}", a[model], b[model])
    return list(dict.fromkeys(checks))


def engine_names() -> list[str]:
    """The engines with their devices that this machine has, of ``mlx-gpu``, ``mlx-cpu``, ``torch-cpu``."""
    from mlx_posttrain import engines
    from mlx_posttrain.engines import probe

    have = engines.available()
    names = []
    if "mlx" in have:
        names = ["mlx-gpu", "mlx-cpu"] if probe.mlx_devices().gpu is not None else ["mlx-cpu"]
    return names + (["torch-cpu"] if "torch" in have else [])


def agreement(where: str, ours: Measured, theirs: Measured) -> list[Check]:
    """How far the first result is from the second."""
    apart = float(np.abs(ours.logits - theirs.logits).max() / np.abs(theirs.logits).max())
    checks = [Check(f"{where}: logits", "0", f"{apart:.1e}", f"{LOGITS:.0e}", _verdict(apart <= LOGITS))]
    for what, a, b, most in (
        ("loss of a step", ours.loss, theirs.loss, LOSS),
        ("gradient norm", ours.norm, theirs.norm, NORM),
    ):
        near = abs(a - b) <= most * abs(b)
        checks.append(Check(f"{where}: {what}", f"{b:.6f}", f"{a:.6f}", f"{most:.0e} of it", _verdict(near)))
    for what, mine, other in (
        ("greedy texts", ours.greedy, theirs.greedy),
        ("sampled texts", ours.sampled, theirs.sampled),
    ):
        same, all_of_them = sum(a == b for a, b in zip(mine, other, strict=True)), len(other)
        least = all_of_them - int(TEXTS * all_of_them)
        checks.append(
            Check(
                f"{where}: {what}",
                f"{all_of_them} equal",
                f"{same} equal",
                f"at least {least}",
                _verdict(same >= least),
            )
        )
    return checks


def _verdict(holds: bool) -> str:
    return PASSED if holds else FAILED


def _in_own_process(name: str, folders: dict[str, str]) -> dict[str, Measured] | str:
    """What an engine computes from each model, or in one line why it does not.

    In full float32: with TF32, which is faster, a GPU's results would differ by design.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with _environment("MLX_ENABLE_TF32", "0"), ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(measure_all, name, folders).result()
    except BrokenProcessPool:
        return "its process ended"
    except Exception as error:  # whatever an engine raises here is what this command is to find
        first = (str(error).splitlines() or [""])[0]
        return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for processes that start meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def measure_all(name: str, folders: dict[str, str]) -> dict[str, Measured]:
    """Let the engine called ``name`` compute from the model in each folder."""
    from mlx_posttrain.bench.harness import open_engine

    engine = open_engine(name)
    return {model: measure(engine, folder) for model, folder in folders.items()}


def measure(engine: Any, folder: str) -> Measured:
    """Compute logits of random tokens, answers to random prompts, and one step on random rows."""
    from mlx_posttrain.data.batches import collate
    from mlx_posttrain.data.types import Example
    from mlx_posttrain.engines.base import AdamW
    from mlx_posttrain.methods import sft

    model = engine.load(Path(folder))
    rng = np.random.default_rng(0)
    vocabulary = model.config["vocab_size"]
    tokens = rng.integers(1, vocabulary, (2, 48))
    prompts = [rng.integers(1, vocabulary, n).tolist() for n in range(3, 3 + PROMPTS)]
    rows = [rng.integers(1, vocabulary, n).tolist() for n in (12, 33, 48, 20)]
    examples = [Example(tuple(r), (False,) * 4 + (True,) * (len(r) - 4)) for r in rows]

    def texts(**settings: Any) -> list[list[int]]:
        answers = model.generate(prompts, max_tokens=ANSWER, stop=None, seed=0, **settings)
        return [answer.tokens for answer in answers]

    logits = model.full_logits(tokens)
    greedy = texts(temperature=0.0, top_p=1.0, samples=1)
    sampled = texts(temperature=0.8, top_p=0.95, samples=SAMPLES)
    step = engine.trainer(model, AdamW()).step(sft.loss, [collate(examples, model.context)], 1e-4)
    return Measured(np.asarray(logits, np.float32), step["loss"], step["grad_norm"], greedy, sampled)


def models(scratch: Path) -> dict[str, str]:
    """Folders of the models that are compared; the random ones have no tokenizer."""
    from safetensors.numpy import save_file

    from mlx_posttrain.convert import hub
    from mlx_posttrain.methods.pretrain import PretrainSection, gpt2_config, random_weights

    size = PretrainSection(vocab_size=VOCABULARY, layers=2, heads=4, width=WIDTH, context=CONTEXT)
    made = {
        "random GPT-2": (gpt2_config(VOCABULARY, size, eos=0), random_weights(VOCABULARY, size, 0)),
        "random Llama": (LLAMA, _llama_weights()),
    }
    folders = {"tiny": str(hub.resolve("tiny"))}
    for name, (config, weights) in made.items():
        folder = scratch / name.replace(" ", "-")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        folders[name] = str(folder)
    return folders


#: Grouped-query attention and a head of its own, as most models of this family have.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "dtype": "float32",
}


def _llama_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.05).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": normal(VOCABULARY, WIDTH),
        "lm_head.weight": normal(VOCABULARY, WIDTH),
        "model.norm.weight": np.ones(WIDTH, np.float32),
    }
    shapes: Sequence[tuple[str, int, int]] = (
        ("self_attn.q_proj", WIDTH, WIDTH),
        ("self_attn.k_proj", WIDTH // 2, WIDTH),
        ("self_attn.v_proj", WIDTH // 2, WIDTH),
        ("self_attn.o_proj", WIDTH, WIDTH),
        ("mlp.gate_proj", 2 * WIDTH, WIDTH),
        ("mlp.up_proj", 2 * WIDTH, WIDTH),
        ("mlp.down_proj", WIDTH, 2 * WIDTH),
    )
    for i in range(2):
        layer = f"model.layers.{i}."
        weights |= {f"{layer}{name}.weight": normal(out, into) for name, out, into in shapes}
        weights |= {
            f"{layer}{name}.weight": np.ones(WIDTH, np.float32)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
    return weights
