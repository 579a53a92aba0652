"""What a recipe will take, before it runs: parameters, steps, tokens, and the peak of memory by part.

Weights, gradients and moments are counted. What the backward pass keeps is reckoned from the largest batch by coefficients that were measured
on GPT-2 with both engines (``KEPT``); tests/test_plan.py holds the sum against runs. For another architecture they are a guess, and the
text says so. The peak is that of the phase that
takes most: the end of the forward pass, the update, an evaluation, a rollout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mlx_posttrain import loading
from mlx_posttrain import reference as references
from mlx_posttrain.convert import gpt2, hub
from mlx_posttrain.data.batches import Batch
from mlx_posttrain.engines import fused
from mlx_posttrain.engines.base import LEAN_ABOVE, UPDATE_BYTES, AdapterSpec, block_bytes, match_targets
from mlx_posttrain.errors import UserError
from mlx_posttrain.progress import say

GB = 2**30
WARN_ABOVE = 0.75  # share of this machine's memory
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Kept(NamedTuple):
    """What blocks keep for their backward pass, in numbers.

    width, inner: for each token so many times the model's width and the feed-forward's, in every block. pairs: for each head and pair of
    positions, in every block. working: the same in all, since the blocks take turns. again: how many blocks' worth is alive where whole blocks
    are recomputed.
    """

    width: float
    inner: float
    pairs: float
    working: float
    again: float


#: Measured on GPT-2 124M at 8 x 128 and 4 x 512 tokens. mlx: as mlx-lm has it (engines/base.py, block_bytes); mlx lean: engines/mlx_lean.py.
KEPT = {
    "mlx": Kept(13.0, 3.0, 1.25, 3.0, 6.0),
    "mlx lean": Kept(9.0, 1.5, 0.0, 3.0, 6.0),
    "torch": Kept(12.0, 2.5, 0.0, 0.0, 2.0),
    "torch with an adapter": Kept(15.0, 2.85, 0.0, 0.0, 2.0),
}
#: Arrays of one chunk of logits that are alive at once (engines/fused.py).
CHUNKS_ALIVE = 3
_NO_LINEAR = re.compile(r"(^|\.)(wte|wpe|\w*embed\w*|lm_head|score)$")
#: The interpreter and libraries, GB: the torch engine's memory is the whole process, MLX counts its arrays only.
PROGRAM = {"mlx": 0.0, "torch": 0.48}


@dataclass(frozen=True)
class Size:
    """A model as its files describe it. tensors: shapes by name, those of the weights that packed ones stand for; file_bytes: what they take
    on disk; packed: whether the folder is quantised."""

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    context: int | None
    model_type: str
    tensors: Mapping[str, tuple[int, ...]]
    file_bytes: int = 0
    packed: bool = False

    @property
    def parameters(self) -> int:
        """How many there are; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def linear(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the linear layers' weights, by the layers' paths; embeddings and a head are none."""
        found = {
            name.removesuffix(".weight"): shape for name, shape in self.tensors.items() if name.endswith(".weight") and len(shape) == 2
        }
        return {path: shape for path, shape in found.items() if not _NO_LINEAR.search(path)}


class Shape(NamedTuple):
    """A batch: rows, padded length, trained positions."""

    rows: int
    length: int
    positions: int


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
            lines.append("  measured on GPT-2: for this architecture what the blocks keep is a guess")
        if self.advice and self.share > WARN_ABOVE:
            lines.append("  to make it fit: " + "; ".join(self.advice))
        return "\n".join(lines)


def size(folder: Path) -> Size:
    """Read a model's size from its config and the headers of its weights. Raises UserError when the config does not give it."""
    from safetensors import safe_open

    config = hub.check_config(folder)
    tensors: dict[str, tuple[int, ...]] = {}
    files = hub.weight_files(folder)
    for name in files:
        with safe_open(str(folder / name), framework="np") as file:
            for key in file.keys():  # noqa: SIM118  # not a mapping
                if not key.endswith((".attn.bias", ".attn.masked_bias")):
                    tensors[key] = tuple(file.get_slice(key).get_shape())
    if config.get("tie_word_embeddings", config["model_type"] == "gpt2"):
        tensors.pop("lm_head.weight", None)
    bits = (config.get("quantization") or {}).get("bits", 0)
    for scales in [name for name in tensors if name.endswith(".scales")] if bits else []:
        path = scales.removesuffix(".scales")
        out, packed = tensors[f"{path}.weight"]
        tensors[f"{path}.weight"] = (out, packed * 32 // bits)
        del tensors[scales]
        tensors.pop(f"{path}.biases", None)

    def number(*names: str) -> int:
        for name in names:
            if isinstance(config.get(name), int):
                return config[name]
        raise UserError(f"{folder}: config.json names none of {', '.join(names)}, so memory cannot be planned")

    width = number("n_embd", "hidden_size")
    return Size(
        layers=number("n_layer", "num_hidden_layers"), width=width, heads=number("n_head", "num_attention_heads"),
        inner=config.get("n_inner") or config.get("intermediate_size") or 4 * width, vocabulary=number("vocab_size"),
        context=config.get("n_positions") or config.get("max_position_embeddings"), model_type=config["model_type"],
        tensors=tensors, file_bytes=sum((folder / name).stat().st_size for name in files), packed=bits > 0,
    )  # fmt: skip


def adapter_parameters(of: Size, spec: AdapterSpec) -> int:
    """How many parameters an adapter has: rank * (in + out) a target, and out more for DoRA's magnitudes (Hu et al. 2021, section 4.1).

    Raises UserError when a target matches no layer.
    """
    found = 0
    for path in match_targets(list(of.linear), spec.resolved(of.model_type).targets or ()):
        shape = of.linear[path]
        conv1d = of.model_type == "gpt2" and not gpt2.is_mlx(of.tensors)  # [in, out]; every other file has [out, in]
        found += spec.rank * sum(shape) + (shape[1 if conv1d else 0] if spec.kind == "dora" else 0)
    return found


def shapes(batches: Iterable[Batch]) -> list[Shape]:
    """The distinct shapes of batches."""
    return sorted({Shape(b.tokens.shape[0], b.tokens.shape[1], len(b.index)) for b in batches})


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
    checkpointing: bool = False
    dropout: bool = False
    reference: bool = False
    accumulate: bool = False
    batches: Sequence[Shape] = ()
    evaluations: Sequence[Shape] = ()

    def weights(self) -> float:
        """GB of the weights as they are held, an adapter's included."""
        adapter = 4 * self.trained if self.adapter else 0
        if self.size.packed:
            return (self.size.file_bytes + adapter) / GB
        number = DTYPE_BYTES[self.dtype]
        saved = 0.0
        if self.bits:  # the linear layers, each group of weights with a scale and an offset
            saved = sum(map(math.prod, self.size.linear.values())) * (number - self.bits / 8 - 2 * number / self.group_size)
        return (self.size.parameters * number + adapter - saved) / GB

    def reference_copy(self) -> float:
        """GB of the frozen reference: with an adapter it is the same weights."""
        return self.size.parameters * 4 / GB if self.reference and not self.adapter else 0.0

    def optimizer(self) -> float:
        """GB of AdamW's two moments."""
        return 8 * self.trained / GB

    def gradients(self) -> float:
        """GB of the gradients, and of a micro-batch's beside those of the ones before."""
        return 4 * self.trained * (2 if self.accumulate else 1) / GB

    def activations(self, batch: Shape) -> float:
        """GB that the blocks keep for the backward pass."""
        s, kept = self.size, KEPT[self._blocks(batch)]
        tokens, pairs = batch.rows * batch.length, batch.rows * s.heads * batch.length**2
        block = tokens * (kept.width * s.width + kept.inner * s.inner) + kept.pairs * pairs
        if self.checkpointing:  # each block's input, and some blocks in full
            return 4 * (s.layers * tokens * s.width + kept.again * block + kept.working * pairs) / GB
        return 4 * (s.layers * block + kept.working * pairs) / GB

    def _blocks(self, batch: Shape) -> str:
        if self.engine == "torch":
            return "torch with an adapter" if self.adapter else "torch"
        much = block_bytes(batch.rows, batch.length, self.size.width, self.size.heads) > LEAN_ABOVE
        return "mlx lean" if self.size.model_type == "gpt2" and much and not self.dropout and not self.checkpointing else "mlx"

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

    def phases(self) -> list[tuple[str, dict[str, float]]]:
        """What each phase of training holds besides weights and optimizer: GB by part, under the phase's name."""
        found: list[tuple[str, dict[str, float]]] = []
        beside = self.gradients() - 4 * self.trained / GB
        for b in self.batches:
            kept, logits = self.activations(b), self.logits(b)
            found.append(("as the backward pass begins", {"activations": kept, "logits": logits, "gradients": self.head() + beside}))
        found.append(("in the update", {"gradients": self.gradients(), "update": self.update()}))
        found += [("in an evaluation", {"activations": self.forward(b), "logits": self.logits(b)}) for b in self.evaluations]
        return found

    def update(self) -> float:
        """GB of new weights and moments beside the old: on MLX of a group of parameters, or of the largest; torch writes in place."""
        largest = max([UPDATE_BYTES, *(4 * math.prod(shape) for shape in self.size.tensors.values())])
        return 3 * min(4 * self.trained, largest) / GB if self.engine == "mlx" else 0.0


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
        phase=phase, memory_gb=memory()[0] / GB, shapes=len(training.batches), sure=training.size.model_type == "gpt2", advice=_advice(training),
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
    seen: set[Shape] = set()
    trained = read = steps = most = 0.0
    for step in range(min(data.steps, data.steps_per_epoch)):
        micro = data.micro_batches(data.rows(step))
        seen |= set(shapes(micro))
        trained, read, steps = trained + sum(b.trained_tokens for b in micro), read + sum(b.tokens.size for b in micro), steps + 1
        most = max(most, len(micro))
    training = replace(
        _training(recipe, engine, of), reference=reference, batches=sorted(seen), evaluations=shapes(data.evaluation()), accumulate=most > 1
    )
    kept = references.share(data, of.width, cache_gb).gb if reference else 0.0
    return peak(_name(recipe), training, data.steps, (trained / steps, read / steps), {"kept states": kept})


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
        accumulate=train.accumulate > 1 or recipe.ptx is not None,
    )  # fmt: skip
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
    held = positions if engine == "mlx" else longest_prompt + r.max_tokens
    cache = 4 * 2 * together * held * of.layers * of.width
    others.append(("in a rollout", {"cache": cache / GB, "logits": 4 * 4 * together * of.vocabulary / GB}))
    return peak(_name(recipe), policy, train.steps, (answers * r.max_tokens, answers * length), more, others)


def _name(recipe: Any) -> str:
    return Path(recipe.output).name if recipe.output else recipe.method


def _training(recipe: Any, engine: str, of: Size) -> Training:
    section = getattr(recipe, "adapter", None)
    checkpointing = recipe.train.gradient_checkpointing
    if section is None:
        return Training(engine, of, of.parameters, False, recipe.dtype, checkpointing=checkpointing)
    trained = adapter_parameters(of, loading.adapter_spec(section))
    return Training(engine, of, trained, True, recipe.dtype, section.quantize, section.group_size, checkpointing, section.dropout > 0)
