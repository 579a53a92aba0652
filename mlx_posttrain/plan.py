"""What a recipe will take, before it runs: parameters, steps, tokens, and the peak of memory by part.

Weights, gradients and moments are counted. What the backward pass keeps is reckoned from the largest batch by measured coefficients
(activations.py); tests/test_plan.py holds the sum against runs. For an architecture that was not measured they are a guess, and the text says
so. The peak is that of the phase that takes most: the end of the forward pass, the update, an evaluation, a rollout.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mlx_posttrain import loading
from mlx_posttrain import reference as references
from mlx_posttrain.activations import CHUNKS_ALIVE, DORA, KEPT, LOGITS_ALIVE, REFERENCE_ALIVE, STOCK_ATTENTION, STOCK_GELU, Block
from mlx_posttrain.data.batches import Batch, layout
from mlx_posttrain.engines import fused
from mlx_posttrain.engines.base import LEAN_ABOVE, UPDATE_BYTES, block_bytes
from mlx_posttrain.errors import UserError
from mlx_posttrain.progress import say
from mlx_posttrain.sizes import Size, adapted, adapter_parameters, size  # noqa: F401  size is for those who plan

GB = 2**30
WARN_ABOVE = 0.75  # share of this machine's memory
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


#: Architectures on which the blocks' coefficients were measured, and DoRA's.
MEASURED = {"mlx": ("gpt2", "llama"), "torch": ("gpt2",)}
MEASURED_DORA = ("mlx",)
#: The interpreter and libraries, GB: the torch engine's memory is the whole process, MLX counts its arrays only.
PROGRAM = {"mlx": 0.0, "torch": 0.48}


class Shape(NamedTuple):
    """A batch: rows, padded length, trained positions, and the tokens it is read as where an engine packs rows into one."""

    rows: int
    length: int
    positions: int
    packed: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.rows * self.length if self.packed is None else self.packed


@dataclass
class Plan:
    """What a run takes. parts: GB at the peak, by what they hold; phase: when that is; shapes: of its batches, of which MLX compiles a step each."""

    name: str
    engine: str
    parameters: int
    trained: int
    steps: int
    trained_a_step: float  # tokens that the loss counts; of a reward model the scores
    positions_a_step: float  # tokens that the model reads, padding included
    parts: dict[str, float]
    phase: str
    memory_gb: float
    shapes: int
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
            f"{self.steps * self.trained_a_step:,.0f} trained in all; batches of {self.shapes} shapes",
            *(f"  {part:12} {gb:8.2f} GB" for part, gb in self.parts.items() if gb >= 0.005),
            f"  {'peak':12} {self.total_gb:8.2f} GB, {self.phase}; this machine has {self.memory_gb:.1f} GB ({self.share:.0%})",
        ]
        if not self.sure:
            lines.append("  what the blocks keep is a guess: it was measured for GPT-2, on MLX for Llama and DoRA too, and not for this")
        if self.advice and self.share > WARN_ABOVE:
            lines.append("  to make it fit: " + "; ".join(self.advice))
        return "\n".join(lines)


def shapes(batches: Iterable[Batch], packs: bool = False) -> list[Shape]:
    """The distinct shapes of batches, for a model that ``packs`` or not."""
    found = []
    for b in batches:
        packed = layout(b.tokens, b.index) if packs else None
        rows, length = b.tokens.shape
        found.append(Shape(rows, length, len(b.index), len(packed[1]) if packed else None))
    return distinct(found)


def distinct(found: Iterable[Shape]) -> list[Shape]:
    """Each shape once, with the most tokens that rows of it are read as."""
    largest: dict[tuple[int, ...], Shape] = {}
    for shape in found:
        largest[shape[:3]] = max(shape, largest.get(shape[:3], shape), key=lambda s: s.tokens)
    return [largest[key] for key in sorted(largest)]


@dataclass(frozen=True)
class Training:
    """One network in training: how it is trained, and the shapes it meets."""

    engine: str
    size: Size
    trained: int
    adapter: bool
    dtype: str = "float32"
    bits: int | None = None
    group_size: int = 64
    adapted: Sequence[tuple[int, int]] = ()  # (in, out) of the layers that an adapter stands on
    dora: bool = False
    checkpointing: bool = False
    dropout: bool = False
    reference: bool = False
    accumulate: bool = False
    batches: Sequence[Shape] = ()
    evaluations: Sequence[Shape] = ()

    @property
    def number(self) -> int:
        """Bytes of a number of the model, and of what its layers compute."""
        return DTYPE_BYTES[self.dtype]

    @property
    def packs(self) -> bool:
        """Whether rows are packed into one: engines/torch_packed.py."""
        return self.engine == "torch" and self.size.model_type == "gpt2" and not (self.adapter and self.dropout)

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained parameters, and so of their gradients and of each moment: an adapter's are float32."""
        return self.trained * (4 if self.adapter else self.number)

    def weights(self) -> float:
        """GB of the weights as they are held, an adapter's included."""
        adapter = 4 * self.trained if self.adapter else 0
        if self.size.packed:
            return (self.size.file_bytes + adapter) / GB
        number = self.number
        saved = 0.0
        if self.bits:  # the linear layers, each group of weights with a scale and an offset
            saved = sum(map(math.prod, self.size.linear.values())) * (number - self.bits / 8 - 2 * number / self.group_size)
        return (self.size.parameters * number + adapter - saved) / GB

    def reference_copy(self) -> float:
        """GB of the frozen reference: with an adapter it is the same weights."""
        return self.size.parameters * self.number / GB if self.reference and not self.adapter else 0.0

    def optimizer(self) -> float:
        """GB of AdamW's two moments."""
        return 2 * self.trained_bytes / GB

    def gradients(self) -> float:
        """GB of the gradients, and on MLX of a micro-batch's beside those of the ones before, which torch adds to weight by weight."""
        return self.trained_bytes * (2 if self.accumulate and self.engine == "mlx" else 1) / GB

    def activations(self, batch: Shape) -> float:
        """GB that the blocks keep for the backward pass, and what an adapter keeps besides; of the blocks that are computed again at once
        with checkpointing."""
        of, blocks_are = self.size, self._blocks(batch)
        kept = KEPT[blocks_are]
        if self.engine == "mlx" and not of.gated and (self.number < 4 or sys.platform != "linux"):
            weights = 0.0 if "lean" in blocks_are else STOCK_ATTENTION
            kept = kept._replace(inner=kept.inner + STOCK_GELU, pairs=kept.pairs + weights)
        block = Block(of.width, of.inner, of.key_width, of.heads)
        blocks = min(kept.again, of.layers) if self.checkpointing else of.layers
        numbers = kept.numbers(block, blocks, batch.rows, batch.length, batch.packed)
        return (numbers * self.number + blocks / of.layers * self._beside(batch.tokens)) / GB

    def inputs(self, batch: Shape) -> float:
        """GB of every block's input, which is what checkpointing keeps."""
        return self.size.layers * batch.tokens * self.size.width * self.number / GB

    def _beside(self, tokens: int) -> float:
        """Bytes that the adapted layers keep beside those of the blocks: in half precision their updates in float32; of DoRA the outputs
        before the magnitude, and weights that it makes anew."""
        outputs, weights = DORA[self.engine] if self.dora else (0.0, 0.0)
        if self.dora and (self.bits or self.size.packed):
            weights += 1  # the layer is multiplied with its dequantised weight, which the gradient needs again
        half = 4 if self.number < 4 else 0
        each = [
            tokens * leaves * (outputs * self.number + half) + weights * enters * leaves * self.number for enters, leaves in self.adapted
        ]
        return sum(each)

    def _blocks(self, batch: Shape) -> str:
        of = self.size
        much = block_bytes(batch.rows, batch.length, of.width, of.heads) > LEAN_ABOVE
        lean = self.engine == "mlx" and of.model_type == "gpt2" and much and not self.dropout and not self.checkpointing
        return self.engine + (" lean" if lean else " gated" if of.gated else "") + (", adapter" if self.adapter else "")

    def logits(self, batch: Shape, training: bool = True) -> float:
        """GB of the chunks of logits that are alive, or of all logits at a quantised head; with the other side of a divergence, and in training
        with the slopes that are kept for a trained head's gradient."""
        every = 4 * batch.positions * self.size.vocabulary
        beside = REFERENCE_ALIVE[self.engine] if self.reference else 1.0
        if self.size.packed_head or (self.bits is not None and not self.size.tied):
            return LOGITS_ALIVE * every * beside / GB
        chunks = fused.chunks(batch.positions, self.size.vocabulary)
        each, most = CHUNKS_ALIVE[self.engine][self.adapter]
        alive = min(most, each * len(chunks)) * 4 * chunks[0].stop * self.size.vocabulary
        kept = fused.kept(batch.positions, self.size.vocabulary) if training and not self.adapter else 0
        return (alive * beside + self.number * self.size.vocabulary * kept) / GB

    def head(self) -> float:
        """GB of the head's gradient, which is there before the blocks have freed anything; torch adds to the one of earlier micro-batches."""
        there = self.adapter or (self.accumulate and self.engine == "torch")
        return 0.0 if there else self.number * self.size.vocabulary * self.size.width / GB

    def forward(self, batch: Shape) -> float:
        """GB of a pass without gradients: one block's arrays."""
        s, tokens = self.size, batch.tokens
        block = tokens * (6 * s.width + (3 if s.gated else 2) * s.inner) + 2 * batch.rows * s.heads * batch.length**2
        return self.number * block / GB

    def phases(self) -> list[tuple[str, dict[str, float]]]:
        """What each phase of training holds besides weights and optimizer: GB by part, under the phase's name."""
        found: list[tuple[str, dict[str, float]]] = []
        beside = self.trained_bytes / GB if self.accumulate else 0.0
        for b in self.batches:
            kept, logits, gradients = self.activations(b), self.logits(b), self.head() + beside
            if self.checkpointing:
                inputs = self.inputs(b)
                found.append(("as the backward pass begins", {"activations": inputs, "logits": logits, "gradients": gradients}))
                found.append(("in the first block's backward pass", {"activations": inputs + kept, "gradients": gradients}))
            else:
                found.append(("as the backward pass begins", {"activations": kept, "logits": logits, "gradients": gradients}))
        found.append(("in the update", {"gradients": self.gradients(), "update": self.update()}))
        found += [
            ("in an evaluation", {"activations": self.forward(b), "logits": self.logits(b, training=False)}) for b in self.evaluations
        ]
        return found

    def update(self) -> float:
        """GB of new weights and moments beside the old: on MLX of a group of parameters, or of the largest; torch writes in place."""
        largest = max([UPDATE_BYTES, *(self.number * math.prod(shape) for shape in self.size.tensors.values())])
        return 3 * min(self.trained_bytes, largest) / GB if self.engine == "mlx" else 0.0

    @property
    def sure(self) -> bool:
        """Whether what the blocks keep was measured for this architecture on this engine."""
        return self.size.model_type in MEASURED[self.engine] and (not self.dora or self.engine in MEASURED_DORA)


def peak(name: str, training: Training, steps: int, tokens: tuple[float, float], more: Mapping[str, float] | None = None,
         others: Sequence[tuple[str, dict[str, float]]] = ()) -> Plan:  # fmt: skip
    """The plan of one trained network. tokens: trained and read in a step; more: what is there all the time beside it, GB by name;
    others: further phases."""
    from mlx_posttrain.doctor import memory

    always = {
        "program": PROGRAM[training.engine], "weights": training.weights(), "reference": training.reference_copy(), "optimizer": training.optimizer(),
        **(more or {}),
    }  # fmt: skip
    phase, parts = max([*training.phases(), *others], key=lambda found: sum(found[1].values()))
    return Plan(
        name=name, engine=training.engine, parameters=training.size.parameters + (training.trained if training.adapter else 0),
        trained=training.trained, steps=steps, trained_a_step=tokens[0], positions_a_step=tokens[1], parts={**always, **parts},
        phase=phase, memory_gb=memory()[0] / GB, shapes=len(training.batches), sure=training.sure, advice=_advice(training),
    )  # fmt: skip


def _advice(t: Training) -> list[str]:
    found = ["a smaller train.batch_size with more train.accumulate (the same steps)"]
    if not t.checkpointing:
        found.append("train.gradient_checkpointing=true" + (" with adapter.dropout=0" if t.dropout else ""))
    found.append("a smaller data.max_length")
    if not t.adapter:
        found.append("an adapter (adapter.rank=16) in place of all weights")
    elif not t.bits and t.engine == "mlx":
        found.append("adapter.quantize=4")
    return found


# From recipes


def tell(make: Callable[[], Plan]) -> None:
    """Say what a run will take before it starts; a model whose size cannot be told is no reason not to train it."""
    try:
        say(make().line())
    except UserError as error:
        say(f"memory: not planned: {error}")


def of_recipe(recipe: Any) -> list[Plan]:
    """The plan of a recipe, or of each stage of a pipeline that trains. Reads the data; loads no weights. Errors as running it."""
    from mlx_posttrain import methods

    method = methods.get(recipe.method)
    if not hasattr(method, "plan"):
        raise UserError(f"{recipe.method} trains nothing, so there is nothing to plan")
    return method.plan(recipe)


def of_data(recipe: Any, engine: str, of: Size, data: Any, *, reference: bool = False, cache_gb: float = 0.0) -> Plan:
    """The plan of a run over fixed rows. data: what training.fit is given; cache_gb: what a reference's hidden states may take."""
    training = replace(_training(recipe, engine, of), reference=reference)
    seen: list[Shape] = []
    trained = read = steps = most = 0.0
    for step in range(min(data.steps, data.steps_per_epoch)):
        micro = data.micro_batches(data.rows(step))
        seen += shapes(micro, training.packs)
        trained, read, steps = trained + sum(b.trained_tokens for b in micro), read + sum(b.tokens.size for b in micro), steps + 1
        most = max(most, len(micro))
    training = replace(training, batches=distinct(seen), evaluations=shapes(data.evaluation(), training.packs), accumulate=most > 1)
    kept = references.share(data, of.width, cache_gb).gb if reference else 0.0
    return peak(_name(recipe), training, data.steps, (trained / steps, read / steps), {"kept states": kept})


def cache(of: Size, positions: int, dtype: str) -> float:
    """GB of the keys and values of so many positions, in all layers."""
    return 2 * of.layers * of.key_width * positions * DTYPE_BYTES[dtype] / GB


def of_ppo(recipe: Any, engine: str, of: Size, longest_prompt: int, rewards: Sequence[Size]) -> Plan:
    """The plan of a PPO run whose longest prompt has so many tokens and whose reward models and judges are of these sizes."""
    from mlx_posttrain.data.batches import LENGTH_MULTIPLE, POSITION_MULTIPLE, round_up
    from mlx_posttrain.engines.decoding import CACHE_BLOCK, ROOM

    r, train = recipe.rollout, recipe.train
    length = round_up(longest_prompt + r.max_tokens, LENGTH_MULTIPLE)

    training = replace(_training(recipe, engine, of), reference=True, accumulate=train.accumulate > 1 or recipe.ptx is not None)

    def shape(rows: int) -> Shape:  # packed, each prompt is read once: at worst as many as there are rows
        packed = min(rows, r.prompts) * longest_prompt + rows * r.max_tokens if training.packs else None
        return Shape(rows, length, round_up(rows * r.max_tokens, POSITION_MULTIPLE), packed)

    answers = r.prompts * r.samples
    rows = min(train.batch_size, train.token_budget // length or 1) if train.token_budget else train.batch_size
    policy = replace(training, batches=[shape(rows)], evaluations=[shape(min(answers, 4 * rows))])
    if recipe.ptx is not None:
        longest = round_up(min(recipe.ptx.data.max_length, of.context or recipe.ptx.data.max_length), LENGTH_MULTIPLE)
        policy = replace(policy, batches=[*policy.batches, Shape(recipe.ptx.batch_size, longest, recipe.ptx.batch_size * longest)])
    more = {"reward": sum(s.parameters for s in rewards) * 4 / GB}
    others: list[tuple[str, dict[str, float]]] = []
    if recipe.critic.kind == "separate":
        critic = replace(policy, trained=of.parameters, adapter=False, bits=None, dtype="float32", reference=False)
        more["critic"] = critic.weights() + critic.optimizer()
        others = [(f"{phase} of the critic", {**parts, "logits": 0.0}) for phase, parts in critic.phases()]
    positions = round_up(longest_prompt + r.max_tokens, CACHE_BLOCK)
    together = max(1, min(answers, r.token_budget // positions))
    held = positions if engine == "mlx" else round_up(longest_prompt + r.max_tokens, ROOM)
    others.append(("in a rollout", {"cache": cache(of, together * held, recipe.dtype), "logits": 4 * 4 * together * of.vocabulary / GB}))
    return peak(_name(recipe), policy, train.steps, (answers * r.max_tokens, answers * length), more, others)


def _name(recipe: Any) -> str:
    return Path(recipe.output).name if recipe.output else recipe.method


def _training(recipe: Any, engine: str, of: Size) -> Training:
    section = getattr(recipe, "adapter", None)
    checkpointing = recipe.train.gradient_checkpointing
    if section is None:
        return Training(engine, of, of.parameters, False, recipe.dtype, checkpointing=checkpointing)
    spec = loading.adapter_spec(section)
    return Training(
        engine, of, adapter_parameters(of, spec), True, recipe.dtype, section.quantize, section.group_size,
        adapted(of, spec), spec.kind == "dora", checkpointing, section.dropout > 0,
    )  # fmt: skip
