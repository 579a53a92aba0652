"""Waits of the host and operations, for each decoded token and each training step of the MLX engine.

Speed on a GPU cannot be tested on a CPU; what it is made of can be counted. The bounds on operations are
today's counts: a change that needs fewer may lower them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx.utils import tree_flatten  # noqa: E402

from mlx_posttrain.data.batches import Batch, collate  # noqa: E402
from mlx_posttrain.data.types import Example  # noqa: E402
from mlx_posttrain.engines.base import AdamW, AdapterSpec  # noqa: E402
from mlx_posttrain.engines.mlx import decoding as mlx_decoding  # noqa: E402
from mlx_posttrain.engines.mlx.decoding import MLXDecoder  # noqa: E402
from mlx_posttrain.engines.mlx.engine import MLXEngine  # noqa: E402
from mlx_posttrain.engines.mlx.model import MLXModel  # noqa: E402
from mlx_posttrain.methods import sft  # noqa: E402
from tests.counts import counted, operations  # noqa: E402

pytestmark = pytest.mark.usefixtures("gpu_paths")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
#: Operations of a training step, with an adapter or without, and of a decoded token; all of two layers.
STEP = {("gpt2", False): 330, ("gpt2", True): 258, ("llama", False): 339, ("llama", True): 430}
TOKEN = {"gpt2": 111, "llama": 158}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]


@pytest.fixture(scope="module")
def folders(random_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A GPT-2 and a Llama of two layers and width 64."""
    from mlx_lm.models import llama

    folder = tmp_path_factory.mktemp("llama")
    net = llama.Model(llama.ModelArgs.from_dict(LLAMA))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(net.parameters())))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return {"gpt2": random_gpt2, "llama": folder}


def batches(count: int) -> Sequence[Batch]:
    rng = np.random.default_rng(0)
    rows = [tuple(rng.integers(1, 380, 40).tolist()) for _ in range(2 * count)]
    made = [Example(row, (False,) + (True,) * 39) for row in rows]
    return [collate(made[i : i + 2], 64) for i in range(0, 2 * count, 2)]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_step_waits_once(name: str, adapter: bool, folders: dict[str, Path]) -> None:
    model = MLXEngine().load(folders[name])
    if adapter:
        model.add_adapter(AdapterSpec(rank=4), 0)
    trainer = MLXEngine().trainer(model, AdamW())
    trainer.step(sft.loss, batches(1), 1e-3)  # traces
    for micro in (1, 3):
        with counted() as found:
            result = trainer.step(sft.loss, batches(micro), 1e-3)
        assert found.waits == 1 and found.bytes == 4 * len(result)
        assert micro > 1 or found.operations <= STEP[name, adapter]


def decode(model: MLXModel, tokens: int, **settings: Any) -> Any:
    return model.generate(PROMPTS, **{"max_tokens": tokens, "stop": None, "temperature": 1.0, **settings})


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_token_waits_once(
    name: str, ahead: bool, settings: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlx_decoding, "on_gpu", lambda: ahead)
    model = MLXEngine().load(folders[name])
    found = []
    for tokens in (10, 20):
        with counted() as c:
            decode(model, tokens, **settings)
        found.append(c)
    each = found[1].since(found[0])
    assert each.waits == 10 == found[0].waits  # none for the prompt
    assert each.bytes == 10 * 2 * 8  # for each row a token and its log-probability
    assert settings or each.operations <= 10 * TOKEN[name]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rows_leave_without_a_wait(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the rows at a time, and each row's text stays that of the row alone."""
    left = []
    keep = MLXDecoder.keep

    def watched(self: MLXDecoder, rows: np.ndarray, array: mx.array) -> mx.array:
        left.append(len(rows))
        return keep(self, rows, array)

    monkeypatch.setattr(MLXDecoder, "keep", watched)
    model, stop = MLXEngine().load(folders[name]), set(range(0, 400, 25))
    with counted() as found:
        together = decode(model, 40, stop=stop, samples=4, seed=3)
    tokens = max(len(c.logprobs) for c in together)
    assert found.waits == tokens and len(left) >= 2
    assert all(after <= before / 2 for before, after in itertools.pairwise(left))
    for number, row in enumerate(together):
        (alone,) = model.generate(
            [PROMPTS[number // 4]], max_tokens=40, stop=stop, temperature=1.0, seed=3, first_row=number
        )
        assert row.tokens == alone.tokens and row.stop == alone.stop
        assert row.logprobs == pytest.approx(alone.logprobs, abs=2e-5)


def test_counting_sees_every_kind_of_wait() -> None:
    x = mx.array([0.0, 1.0, 2.0, 3.0]) * 2
    with counted() as found:
        y = (x + 1)[:2]
        mx.async_eval(y)
        assert (found.waits, found.operations) == (0, 2)  # the slice is a view
        mx.eval(y)
        y[0].item(), y.tolist(), float(y[0]), int(y[1]), bool(y[0] > 0), np.array(y), np.asarray(y)
        mx.synchronize()
        np.array([1, 2])  # of NumPy alone
    assert (found.waits, found.bytes) == (9, 4 + 8 + 4 + 4 + 1 + 8 + 8)
    assert operations(mx.exp(x).reshape(2, 2).T) == ["Exp"]
