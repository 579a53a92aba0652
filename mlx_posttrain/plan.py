"""What a recipe will take, before it runs: parameters, steps, tokens, and the peak of memory by part.

Weights, gradients and moments are counted. What the backward pass keeps is reckoned from the largest batch by coefficients that were measured
on GPT-2 with both engines (``KEPT``); tests/test_plan.py holds the sum against runs. For another architecture they are a guess, and the
text says so. A step's peak is the largest of its moments: the end of the forward pass, the update, an evaluation, a rollout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mlx_posttrain.convert import hub
from mlx_posttrain.data.batches import Batch
from mlx_posttrain.engines import fused
from mlx_posttrain.engines.base import AdapterSpec
from mlx_posttrain.errors import UserError

GB = 2**30
WARN_ABOVE = 0.75  # share of this machine's memory
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Kept(NamedTuple):
    """What blocks keep for their backward pass, in numbers: for each token ``width`` times the model's width and ``inner`` times the
    feed-forward's in every block; for each head and pair of positions ``attention`` in all, the blocks taking turns. ``again``: how many blocks'
    worth is alive where whole blocks are recomputed."""

    width: float
    inner: float
    attention: float
    again: float


#: (engine, with an adapter) -> measured on GPT-2 124M at 8 x 128 and 4 x 512 tokens.
KEPT = {
    ("mlx", False): Kept(9.0, 1.5, 3.0, 6.0),
    ("mlx", True): Kept(9.0, 1.5, 3.0, 6.0),
    ("torch", False): Kept(12.0, 2.5, 0.0, 2.0),
    ("torch", True): Kept(15.0, 2.85, 0.0, 2.0),
}
#: Arrays of one chunk of logits that are alive at once (engines/fused.py).
CHUNKS_ALIVE = 3
_EMBEDDING = re.compile(r"(^|\.)(wte|wpe|\w*embed\w*|lm_head)\.")
#: The interpreter and libraries, GB: the torch engine's memory is the whole process, MLX counts its arrays only.
PROGRAM = {"mlx": 0.0, "torch": 0.45}


@dataclass(frozen=True)
class Size:
    """A model as its files describe it. tensors: shapes by name."""

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    context: int | None
    model_type: str
    tied: bool
    tensors: Mapping[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """How many there are; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.tensors.values())


class Shape(NamedTuple):
    """A batch: rows, padded length, trained positions."""

    rows: int
    length: int
    positions: int


@dataclass
class Plan:
    """What a run takes. parts: GB at the peak, by what they hold; moment: when that is."""

    name: str
    engine: str
    parameters: int
    trained: int
    steps: int
    trained_a_step: float  # tokens that the loss counts; of a reward model the scores
    positions_a_step: float  # tokens that the model reads, padding included
    parts: dict[str, float]
    moment: str
    memory_gb: float
    sure: bool = True
    advice: list[str] = field(default_factory=list)

    @property
    def total_gb(self) -> float:
        """The predicted peak."""
        return sum(self.parts.values())

    @property
    def share(self) -> float:
        """Of this machine's memory."""
        return self.total_gb / self.memory_gb if self.memory_gb else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "total_gb": self.total_gb, "share": self.share}

    def line(self) -> str:
        """The total in one line, with what to do when it is much."""
        text = f"memory: about {self.total_gb:.2f} GB at the peak ({self.share:.0%} of this machine's {self.memory_gb:.0f} GB)"
        if self.share > WARN_ABOVE:
            text += "; that may not fit. Less memory: " + "; ".join(self.advice)
        return text

    def text(self) -> str:
        """For people."""
        lines = [
            f"{self.name} on {self.engine}: {self.trained:,} of {self.parameters:,} parameters train",
            f"{self.steps:,} steps of about {self.trained_a_step:,.0f} trained tokens ({self.positions_a_step:,.0f} read, padding included); "
            f"{self.steps * self.trained_a_step:,.0f} trained in all",
            *(f"  {part:12} {gb:8.2f} GB" for part, gb in self.parts.items() if gb >= 0.005),
            f"  {'peak':12} {self.total_gb:8.2f} GB, {self.moment}; this machine has {self.memory_gb:.1f} GB ({self.share:.0%})",
        ]
        if not self.sure:
            lines.append("  measured on GPT-2: for this architecture what the blocks keep is a guess")
        if self.advice and self.share > WARN_ABOVE:
            lines.append("  to make it fit: " + "; ".join(self.advice))
        return "\n".join(lines)


def size(folder: Path) -> Size:
    """Read a model's size from its config and the headers of its weights. Raises UserError when the config does not give it."""
    from safetensors import safe_open

    config = hub.check_config(folder)
    tensors: dict[str, tuple[int, ...]] = {}
    for name in hub.weight_files(folder):
        with safe_open(str(folder / name), framework="np") as file:
            for key in file.keys():  # noqa: SIM118  # not a mapping
                if not key.endswith((".attn.bias", ".attn.masked_bias")):
                    tensors[key] = tuple(file.get_slice(key).get_shape())
    tied = bool(config.get("tie_word_embeddings", config["model_type"] == "gpt2"))
    if tied:
        tensors.pop("lm_head.weight", None)

    def number(*names: str) -> int:
        for name in names:
            if isinstance(config.get(name), int):
                return config[name]
        raise UserError(f"{folder}: config.json names none of {', '.join(names)}, so memory cannot be planned")

    width = number("n_embd", "hidden_size")
    return Size(
        layers=number("n_layer", "num_hidden_layers"), width=width, heads=number("n_head", "num_attention_heads"),
        inner=config.get("n_inner") or config.get("intermediate_size") or 4 * width, vocabulary=number("vocab_size"),
        context=config.get("n_positions") or config.get("max_position_embeddings"), model_type=config["model_type"], tied=tied,
        tensors=tensors,
    )  # fmt: skip


def adapter_parameters(of: Size, spec: AdapterSpec) -> int:
    """How many parameters an adapter has: rank * (in + out) a target, and out more for DoRA's magnitudes (Hu et al. 2021, section 4.1)."""
    targets = spec.resolved(of.model_type).targets or ()
    found = 0
    for name, shape in of.tensors.items():
        path, _, kind = name.rpartition(".")
        if kind == "weight" and len(shape) == 2 and path.endswith(tuple(f".{t}" for t in targets)):
            out = shape[1] if of.model_type == "gpt2" else shape[0]  # GPT-2's Conv1D is [in, out]
            found += spec.rank * sum(shape) + (out if spec.kind == "dora" else 0)
    return found


def shapes(steps: Iterable[Sequence[Batch]]) -> list[Shape]:
    """The distinct shapes of the micro-batches of some steps."""
    return sorted({Shape(b.tokens.shape[0], b.tokens.shape[1], len(b.index)) for step in steps for b in step})


@dataclass(frozen=True)
class Training:
    """One network in training: how it is trained, and the shapes it meets."""

    engine: str
    size: Size
    trained: int
    adapter: bool
    dtype: str = "float32"
    bits: int | None = None
    checkpointing: bool = False
    reference: bool = False
    accumulate: bool = False
    batches: Sequence[Shape] = ()
    evaluations: Sequence[Shape] = ()

    def weights(self) -> float:
        """GB of the weights as they are held, an adapter's included."""
        number = DTYPE_BYTES[self.dtype]
        packed = 0.0
        if self.bits:  # linear layers only, with a scale and an offset for each group of 64
            linear = sum(math.prod(shape) for name, shape in self.size.tensors.items() if len(shape) == 2 and not _EMBEDDING.search(name))
            packed = linear * (number - self.bits / 8 - 2 * number / 64)
        return (self.size.parameters * number + (self.trained * 4 if self.adapter else 0) - packed) / GB

    def copy(self) -> float:
        """GB of the frozen reference: with an adapter it is the same weights."""
        return self.size.parameters * 4 / GB if self.reference and not self.adapter else 0.0

    def moments(self) -> float:
        """GB of AdamW's two moments."""
        return 8 * self.trained / GB

    def gradients(self) -> float:
        """GB of the gradients, and of a micro-batch's beside those of the ones before."""
        return 4 * self.trained * (2 if self.accumulate else 1) / GB

    def activations(self, batch: Shape) -> float:
        """GB that the blocks keep for the backward pass."""
        s, kept = self.size, KEPT[self.engine, self.adapter]
        tokens = batch.rows * batch.length
        block = tokens * (kept.width * s.width + kept.inner * s.inner)
        attention = kept.attention * batch.rows * s.heads * batch.length**2
        if self.checkpointing:  # each block's input, and some blocks in full
            return 4 * (s.layers * tokens * s.width + kept.again * block + attention) / GB
        return 4 * (s.layers * block + attention) / GB

    def logits(self, batch: Shape) -> float:
        """GB of the chunk of logits that is alive, on both sides of a divergence from a reference."""
        chunk = min(fused.CHUNK_BYTES, 4 * batch.positions * self.size.vocabulary)
        return CHUNKS_ALIVE * chunk * (2 if self.reference else 1) / GB

    def head(self) -> float:
        """GB of the head's gradient, which is there before the blocks have freed anything."""
        return 0.0 if self.adapter else 4 * self.size.vocabulary * self.size.width / GB

    def forward(self, batch: Shape) -> float:
        """GB of a pass without gradients: one block's arrays."""
        s = self.size
        return 4 * (batch.rows * batch.length * (6 * s.width + 2 * s.inner) + 2 * batch.rows * s.heads * batch.length**2) / GB

    def moments_of_step(self) -> list[tuple[str, dict[str, float]]]:
        """What is there, besides weights and moments, at each moment that may be the peak."""
        found: list[tuple[str, dict[str, float]]] = []
        beside = self.gradients() - 4 * self.trained / GB
        for b in self.batches:
            kept, logits = self.activations(b), self.logits(b)
            found.append(("as the backward pass begins", {"activations": kept, "logits": logits, "gradients": self.head() + beside}))
        update = {"mlx": 3 * 4 * max_tensor(self.size, self.trained), "torch": 0.0}[self.engine] / GB
        found.append(("in the update", {"gradients": self.gradients(), "update": update}))
        found += [("in an evaluation", {"activations": self.forward(b), "logits": self.logits(b)}) for b in self.evaluations]
        return found


def max_tensor(of: Size, trained: int) -> int:
    """Elements updated together on MLX: the largest tensor, or a group of them (engines/mlx.py, UPDATE_BYTES)."""
    return min(trained, max([2**24, *(math.prod(s) for s in of.tensors.values())]))


def peak(name: str, training: Training, steps: int, tokens: tuple[float, float], more: Mapping[str, float] | None = None,
         others: Sequence[tuple[str, dict[str, float]]] = ()) -> Plan:  # fmt: skip
    """The plan of one trained network. tokens: trained and read in a step; more: what is there all the time beside it, GB by name;
    others: further moments."""
    from mlx_posttrain.doctor import memory

    always = {
        "program": PROGRAM[training.engine], "weights": training.weights(), "reference": training.copy(), "optimizer": training.moments(),
        **(more or {}),
    }  # fmt: skip
    moment, parts = max([*training.moments_of_step(), *others], key=lambda found: sum(found[1].values()))
    return Plan(
        name=name, engine=training.engine, parameters=training.size.parameters + (training.trained if training.adapter else 0),
        trained=training.trained, steps=steps, trained_a_step=tokens[0], positions_a_step=tokens[1], parts={**always, **parts},
        moment=moment, memory_gb=memory()[0] / GB, sure=training.size.model_type == "gpt2", advice=_advice(training),
    )  # fmt: skip


def _advice(t: Training) -> list[str]:
    found = ["a smaller train.batch_size with more train.accumulate (the same steps)"]
    if not t.checkpointing:
        found.append("train.gradient_checkpointing=true")
    found.append("a smaller data.max_length")
    if not t.adapter:
        found.append("an adapter (adapter.rank=16) in place of all weights")
    elif not t.bits and t.engine == "mlx":
        found.append("adapter.quantize=4")
    return found


# From recipes


def of_recipe(recipe: Any) -> list[Plan]:
    """The plan of a recipe, or of each stage of a pipeline that trains. Reads the data; loads no weights. Errors as running it."""
    from mlx_posttrain import methods

    method = methods.get(recipe.method)
    if not hasattr(method, "plan"):
        raise UserError(f"{recipe.method} trains nothing, so there is nothing to plan")
    return method.plan(recipe)


def of_data(recipe: Any, engine: str, of: Size, data: Any, *, reference: bool = False) -> Plan:
    """The plan of a run over fixed rows. data: what training.fit is given."""
    epoch = [data.micro_batches(data.rows(step)) for step in range(min(data.steps, data.steps_per_epoch))]
    training = replace(
        _training(recipe, engine, of), reference=reference, batches=shapes(epoch), evaluations=shapes([data.evaluation()]),
        accumulate=any(len(step) > 1 for step in epoch),
    )  # fmt: skip
    flat = [b for step in epoch for b in step]
    tokens = sum(b.trained_tokens for b in flat) / len(epoch), sum(b.tokens.size for b in flat) / len(epoch)
    return peak(_name(recipe), training, data.steps, tokens)


def of_ppo(recipe: Any, engine: str, of: Size, longest_prompt: int, rewards: Sequence[Size]) -> Plan:
    """The plan of a PPO run whose longest prompt has so many tokens and whose reward models and judges are of these sizes."""
    from mlx_posttrain.data.batches import LENGTH_MULTIPLE, POSITION_MULTIPLE, round_up
    from mlx_posttrain.engines.decoding import CACHE_BLOCK

    r, train = recipe.rollout, recipe.train
    length = round_up(longest_prompt + r.max_tokens, LENGTH_MULTIPLE)

    def shape(rows: int) -> Shape:
        return Shape(rows, length, round_up(rows * r.max_tokens, POSITION_MULTIPLE))

    answers = r.prompts * r.samples
    rows = min(train.batch_size, train.token_budget // length or 1) if train.token_budget else train.batch_size
    policy = replace(
        _training(recipe, engine, of), reference=True, batches=[shape(rows)], evaluations=[shape(min(answers, 4 * rows))],
        accumulate=train.accumulate > 1,
    )  # fmt: skip
    more = {"reward": sum(s.parameters for s in rewards) * 4 / GB}
    others: list[tuple[str, dict[str, float]]] = []
    if recipe.critic.kind == "separate":
        critic = replace(policy, trained=of.parameters, adapter=False, bits=None, dtype="float32", reference=False)
        more["critic"] = critic.weights() + critic.moments()
        others = [(f"{moment} of the critic", {**parts, "logits": 0.0}) for moment, parts in critic.moments_of_step()]
    positions = round_up(longest_prompt + r.max_tokens, CACHE_BLOCK)
    together = max(1, min(answers, r.token_budget // positions))
    held = positions if engine == "mlx" else longest_prompt + r.max_tokens
    cache = 4 * 2 * together * held * of.layers * of.width
    others.append(("in a rollout", {"cache": cache / GB, "logits": 4 * 4 * together * of.vocabulary / GB}))
    return peak(_name(recipe), policy, train.steps, (answers * r.max_tokens, answers * length), more, others)


def _name(recipe: Any) -> str:
    return Path(recipe.output).name if recipe.output else recipe.method


def _training(recipe: Any, engine: str, of: Size) -> Training:
    section = getattr(recipe, "adapter", None)
    trained = of.parameters
    if section is not None:
        trained = adapter_parameters(
            of, AdapterSpec(section.kind, section.rank, section.alpha, targets=tuple(section.targets) if section.targets else None)
        )
    return Training(
        engine, of, trained, section is not None, recipe.dtype, section.quantize if section else None, recipe.train.gradient_checkpointing
    )
