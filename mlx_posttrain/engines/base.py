"""What an engine must offer: the seam between methods and the two array libraries.

A method sees a :class:`Model` inside its loss and a :class:`Trainer` in its loop; it never imports mlx or
torch. Arrays named ``Array`` belong to the engine; everything else is plain Python or NumPy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlx_posttrain.config import TARGET_WORDS
from mlx_posttrain.data.batches import Batch
from mlx_posttrain.errors import UserError

Array = Any
#: loss(model, batch) -> (scalar, metrics), all divided by ``batch.total``, so that micro-batches add up.
Loss = Callable[["Model", "DeviceBatch"], tuple[Array, dict[str, Array]]]
#: The tokens that end a completion: one, any of several, or none.
Stop = int | Collection[int] | None

#: Name in ``Batch.extra`` of what ``Model.reference_hidden`` returned for the batch: [N, d] float32 hidden
#: states.
REFERENCE_HIDDEN = "reference_hidden"

#: Name in ``Batch.extra`` of [N] float32 log-probabilities of the targets under the reference.
REFERENCE_LOGPROBS = "ref_logprobs"

#: Bytes of gradients whose parameters MLX updates together. Memory holds new weights and moments of as many
#: parameters beside the old ones, and those of what MLX begins ahead.
UPDATE_BYTES = 64 * 2**20

#: A GPT-2 block on MLX that would keep more bytes than this, times sizes.scale(), for its backward pass
#: recomputes part of them (engines/mlx/lean.py).
LEAN_ABOVE = 128 * 2**20


def block_bytes(rows: int, length: int, width: int, heads: int) -> float:
    """Bytes that mlx-lm's GPT-2 block keeps for its backward pass in float32, as measured.

    25 numbers for each token and unit of width, and 1.25 for each head and pair of positions.
    """
    return 4 * (25 * rows * length * width + 1.25 * rows * heads * length**2)


@dataclass(frozen=True)
class DeviceBatch:
    """A :class:`~mlx_posttrain.data.batches.Batch` as the engine's arrays, with what its loss is divided by.

    total: scalar, sum of ``Batch.count`` over all micro-batches of the optimizer step that have the batch's
    ``term``.
    """

    tokens: Array
    index: Array
    target: Array
    row: Array
    mask: Array
    weight: Array
    total: Array
    extra: dict[str, Array] = field(default_factory=dict)

    FIELDS = ("tokens", "index", "target", "row", "mask", "weight")


_IN_BLOCK = re.compile(r".*?\.\d+\.(.+)")
_ATTENTION = re.compile(r"(\w*attn|attention)\.")
#: Routers and experts, which each see a part of the tokens.
_ROUTED = re.compile(r"(^|\.)(experts?|shared_expert\w*|gate|router)(\.|$)")


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA or DoRA adapter.

    targets: ends of layer paths, or words of ``config.TARGET_WORDS``; None: the architecture's usual layers.
    tokens: ids whose rows of the embedding, and of a head that is not tied to it, are trained beside it.
    """

    kind: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] | None = None
    tokens: tuple[int, ...] = ()

    @property
    def scale(self) -> float:
        """Factor on the adapter's update.

        alpha / r (Hu et al. 2021, section 4.1) or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, eq. 4).
        """
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def resolved(self, model_type: str, layers: Iterable[str]) -> AdapterSpec:
        """The spec with ends of layer paths as ``targets``.

        layers: paths of the model's linear layers, Hugging Face's. Without targets all layers of the blocks
        are meant (Dettmers et al. 2023, section 4), on GPT-2 c_attn and both c_proj.
        """
        targets = self.targets or (("c_attn", "c_proj") if model_type == "gpt2" else ("all-linear",))
        found = {target for target in targets if target not in TARGET_WORDS}
        if found != set(targets):
            inner = {
                m[1] for layer in layers if (m := _IN_BLOCK.fullmatch(layer)) and not _ROUTED.search(m[1])
            }
            found |= {p for p in inner if "all-linear" in targets or _ATTENTION.match(p)}
        return replace(self, targets=tuple(sorted(found)))


@dataclass(frozen=True)
class AdamW:
    """Settings of the optimizer, the same on both engines (Loshchilov & Hutter 2019; bias correction on).

    Weight decay applies to matrices only. ``clip`` bounds the global norm of the gradient.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0


@dataclass(frozen=True)
class Generated:
    """One sampled completion.

    tokens: without the stop token. logprobs: log-probabilities at the sampling temperature, one per token
    and, when ``stopped``, one more for the stop token, from the softmax over the tokens that were not
    forbidden. stopped: whether a stop token ended it. stop: that token.
    """

    tokens: list[int]
    logprobs: list[float]
    stopped: bool
    stop: int | None = None


class Model(Protocol):
    """A causal language model, with an optional adapter, scalar head and frozen reference."""

    config: dict[str, Any]
    base_name: str  # the base that a saved adapter names: a hub id or a folder
    context: int | None  # longest sequence in tokens; None where the architecture has no limit

    @property
    def shares_prefixes(self) -> bool:
        """Whether the rows of a batch share the work of common prefixes.

        Batches are then best made of rows that begin alike.
        """

    @property
    def exact_sampler(self) -> bool:
        """Whether ``generate`` gives the log-probabilities of ``logprobs`` but for the rounding of float32.

        In half precision they differ by more, as they do on GPUs that shorten float32 products (TF32), and
        where a text's length changes the rotation of its positions, since cached keys keep theirs.
        """

    # The vocabulary of losses: N trained positions, V vocabulary entries.

    def logits(self, batch: DeviceBatch) -> Array:
        """[N, V] float32 logits at the trained positions."""

    def reference_logits(self, batch: DeviceBatch) -> Array:
        """[N, V] logits of the frozen reference, without gradient.

        The reference is the model with its adapters off, or the copy made by ``keep_reference``.
        """

    # What follows is read off logits that exist for a part of the positions at a time, see engines/fused.py.
    # Logits are divided by ``temperature``.

    def logprobs(self, batch: DeviceBatch, temperature: float = 1.0) -> Array:
        """[N] float32 log-probabilities of the targets.

        Equal to :func:`mlx_posttrain.losses.sft.token_logprobs` of ``logits``.
        """

    def reference_logprobs(self, batch: DeviceBatch, temperature: float = 1.0) -> Array:
        """[N] float32 log-probabilities of the targets under the reference, without gradient."""

    def logprobs_and_kl(
        self, batch: DeviceBatch, direction: str, beta: float | None = None
    ) -> tuple[Array, Array]:
        """[N] ``logprobs`` and [N] divergences from the reference over the whole vocabulary.

        The divergences equal :func:`mlx_posttrain.losses.sft.full_kl` of ``logits`` and ``reference_logits``.
        The reference's blocks do not run for a batch that carries ``REFERENCE_HIDDEN``. A caller that passes
        ``beta`` promises a loss that is a weighted sum of ``beta * kl - logprobs``: the gradient of that sum
        is then right and costs one product with the head less, but the gradient of either part alone is
        wrong.
        """

    @property
    def reference_width(self) -> int | None:
        """Size d of the hidden states that ``logprobs_and_kl`` accepts.

        None where the head is not one plain matrix: it then accepts none.
        """

    def reference_hidden(self, batch: Batch) -> np.ndarray:
        """[N, ``reference_width``] float32 hidden states of the reference at ``index``.

        In evaluation mode and without gradients.
        """

    def policy_terms(self, batch: DeviceBatch, temperature: float = 1.0) -> tuple[Array, Array, Array | None]:
        """[N] ``logprobs``, [N] entropies in nats and [N] ``scores`` of a policy from one forward pass.

        The scores are None where the model has no head.
        """

    def scores(self, batch: DeviceBatch) -> Array:
        """[N] float32 outputs of the scalar head at ``batch.index``.

        The scores of a reward model, or the values of a critic.
        """

    def full_logits(self, tokens: np.ndarray) -> np.ndarray:
        """[B, T, V] float32 logits of unpadded rows [B, T], in evaluation mode.

        For parity checks and small probes.
        """

    # Around training.

    def parameter_counts(self) -> tuple[int, int]:
        """(all, trained) numbers of parameters; a quantised weight counts as the weights it stands for."""

    def add_adapter(self, spec: AdapterSpec, seed: int) -> None:
        """Freeze the model and put an adapter on every target.

        Raises UserError when a target matches no layer.
        """

    @property
    def has_head(self) -> bool:
        """Whether there is a scalar head.

        There is one after ``add_head``, and when the folder was a sequence classifier with one label.
        """

    def add_head(self, weight: np.ndarray) -> None:
        """Put a trained scalar head [1, d] without bias on the hidden states; see :func:`initial_head`."""

    def head(self) -> np.ndarray:
        """The scalar head's weight, [1, d] float32."""

    def keep_reference(self) -> None:
        """Remember the present weights as the reference.

        No copy is made where adapters can be switched off.
        """

    def adapters_off(self) -> AbstractContextManager[Any]:
        """A context in which a model with an adapter computes what its base does; no weight is copied."""

    def evaluate(self, loss: Loss, batches: Sequence[Batch]) -> dict[str, float]:
        """Metrics of ``loss`` over all batches together, in evaluation mode and without gradients."""

    def token_logprobs(self, batches: Sequence[Batch]) -> list[np.ndarray]:
        """For each batch [N] float32 log-probabilities of its targets, aligned with ``index``.

        In evaluation mode and without gradients: what a loss per row, and with it a confidence interval, is
        computed from. Entries of weight 0 mean nothing.
        """

    def apply(
        self,
        function: Callable[[Model, DeviceBatch], dict[str, Array]],
        batches: Sequence[Batch],
        beside: Sequence[Model] = (),
    ) -> list[dict[str, np.ndarray]]:
        """The arrays that ``function`` returns for each batch: scores, values, log-probabilities.

        In evaluation mode and without gradients. beside: other models of this engine that ``function`` asks.
        """

    def gradient(self, loss: Loss, batches: Sequence[Batch]) -> dict[str, np.ndarray]:
        """Gradient of ``loss`` over all batches together, float32 by the trained parameters' names.

        In evaluation mode.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        stop: Stop,
        temperature: float = 0.0,
        top_p: float = 1.0,
        samples: int = 1,
        seed: int = 0,
        first_row: int = 0,
        on_token: Callable[[int, int], None] | None = None,
        forbidden: Sequence[int] = (),
    ) -> list[Generated]:
        """``samples`` completions of each prompt, in order, from one decode batch.

        See :func:`mlx_posttrain.engines.decoding.decode`.
        """

    # Files.

    def save(self, folder: Path) -> None:
        """Write the trained weights in Hugging Face's format.

        A model folder, or a PEFT adapter folder; a scalar head goes into a file beside the weights.
        """

    def save_classifier(self, folder: Path, pad: int) -> None:
        """Write model and head as a sequence classifier with one label.

        A folder for transformers' AutoModelForSequenceClassification, or a PEFT adapter of task type SEQ_CLS.
        The classifier pools at the last token other than ``pad``.
        """

    def load_trained(self, folder: Path) -> None:
        """Read back what ``save`` or ``save_classifier`` wrote into this model."""

    def weights(self) -> Mapping[str, np.ndarray]:
        """Trained parameters as float32 NumPy arrays under Hugging Face's names."""


class Trainer(Protocol):
    """A model's optimizer."""

    @property
    def compiled(self) -> int:
        """Number of batch shapes for which a step has been compiled; 0 where nothing is compiled."""

    def step(self, loss: Loss, batches: Sequence[Batch], lr: float) -> dict[str, float]:
        """One optimizer step over micro-batches: gradient of the summed loss, clip, update.

        Returns the metrics with ``loss`` and ``grad_norm`` (before clipping). Raises FloatingPointError,
        leaving weights and optimizer as they were, when loss or gradient is not finite.
        """

    def save(self, path: Path) -> None:
        """Write the optimizer's moments and step count to a safetensors file."""

    def load(self, path: Path) -> None:
        """Read back what ``save`` wrote."""


class Engine(Protocol):
    """An array library that can load and train models."""

    name: str

    @property
    def gpu(self) -> bool:
        """Whether a GPU computes."""

    def load(
        self,
        folder: Path,
        *,
        dtype: str = "float32",
        quantize: int | None = None,
        group_size: int = 64,
        gradient_checkpointing: bool = False,
        vocabulary: int = 0,
        mixed: bool = False,
    ) -> Model:
        """A model from a Hugging Face or MLX folder, every parameter trainable unless quantised.

        vocabulary: rows that embedding and head have at least; new ones are the mean of the old, see
        :func:`mlx_posttrain.convert.token_rows.grow`. mixed: its blocks compute in bfloat16, in training and
        otherwise, and its weights are float32. Raises UserError where a table that is quantised would have to
        grow.
        """

    def context(self, folder: Path) -> int | None:
        """The longest sequence in tokens of a folder's model on this engine; None without a limit."""

    def trainer(self, model: Any, settings: AdamW) -> Trainer:
        """An optimizer over the model's trained parameters."""

    def seed(self, seed: int) -> None:
        """Seed dropout."""

    def random_state(self) -> dict[str, np.ndarray]:
        """State of the library's random numbers."""

    def set_random_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what ``random_state`` returned."""

    def memory(self) -> dict[str, float]:
        """``peak_gb``: the most memory held since the last ``reset_memory``, in GB (2**30 bytes).

        On MLX, which counts its arrays, also ``active_gb``, what they take now, and ``cache_gb``, the buffers
        that it keeps for later arrays.
        """

    def reset_memory(self) -> None:
        """Begin to measure the peak again."""

    def resident(self) -> AbstractContextManager[Any]:
        """A context in which a GPU's arrays stay in memory, as far as the system allows; for training."""

    def synchronize(self) -> None:
        """Wait for all work in progress: MLX returns from a step while its update still runs."""

    def device(self) -> str:
        """A description for people: 'Apple M3 (Metal)', 'CPU, 2 threads'."""


def match_targets(paths: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The layer paths that end in one of ``targets``, sorted.

    Raises UserError for targets that match no path, naming them and the layers that exist.
    """
    chosen = {t: [p for p in paths if f".{p}".endswith(f".{t}")] for t in targets}
    missing = [t for t, found in chosen.items() if not found]
    if missing:
        names = sorted({p.rpartition(".")[2] for p in paths})
        raise UserError(
            f"adapter.targets: no layer is called {', '.join(missing)}; this model has {', '.join(names)}"
        )
    return sorted({p for found in chosen.values() for p in found})


def initial_adapter(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, np.ndarray]:
    """First values of LoRA's A matrices, the same on both engines.

    shapes: layer path -> (in, out). Returns path -> [rank, in] float32, uniform in +-1/sqrt(in), as PEFT and
    mlx-lm choose it. B starts at zero (Hu et al. 2021, section 4.1).
    """
    rng = np.random.default_rng([seed, 0x10CA])
    return {
        path: rng.uniform(-1.0, 1.0, (rank, shapes[path][0])).astype(np.float32)
        / np.float32(shapes[path][0] ** 0.5)
        for path in sorted(shapes)
    }


def hidden_size(config: Mapping[str, Any]) -> int:
    """Size of a model's hidden states. Raises UserError when its config does not give it."""
    size = config.get("n_embd") or config.get("hidden_size")
    if not isinstance(size, int):
        raise UserError(
            f"{config['model_type']}: config.json has neither n_embd nor hidden_size, so the model cannot "
            "have a scalar head"
        )
    return size


def initial_head(hidden_size: int, seed: int | None) -> np.ndarray:
    """First values of a scalar head, [1, hidden_size] float32; zeros without a seed.

    Drawn from N(0, 1 / (hidden_size + 1)), as in the code of Stiennon et al. 2020.
    """
    if seed is None:
        return np.zeros((1, hidden_size), np.float32)
    values = np.random.default_rng([seed, 0x5C0E]).standard_normal((1, hidden_size))
    return (values / (hidden_size + 1) ** 0.5).astype(np.float32)


def check_fits(length: int, context: int | None) -> None:
    """Raise UserError for a sequence longer than the model's context.

    MLX would silently read position embeddings out of bounds.
    """
    if context is not None and length > context:
        raise UserError(
            f"a sequence of {length} tokens does not fit the model's context of {context}; shorten it"
        )


def device_batch(batch: Batch, total: float, array: Callable[[np.ndarray], Array]) -> DeviceBatch:
    """A batch as an engine's arrays, made by ``array``."""
    fields = {name: array(np.ascontiguousarray(getattr(batch, name))) for name in DeviceBatch.FIELDS}
    extra = {name: array(np.ascontiguousarray(value)) for name, value in batch.extra.items()}
    return DeviceBatch(**fields, total=array(np.array(total, np.float32)), extra=extra)


def micro_batch_totals(batches: Sequence[Batch]) -> dict[str, float]:
    """What each group of a step's micro-batches is averaged over.

    At least 1, so that an empty step divides by something.
    """
    totals: dict[str, float] = {}
    for b in batches:
        totals[b.term] = totals.get(b.term, 0.0) + b.count
    return {term: max(1.0, total) for term, total in totals.items()}
