"""What a recipe will need, before it runs: parameters, steps, tokens, and peak memory by part.

memory/footprint.py computes what a network holds in each phase; the peak is that of the phase that needs
most: the end of the forward pass, the update, an evaluation, a rollout. For an architecture whose blocks were
not measured it is a guess, and the text says so. Recipes with one setting changed are planned as well: those
that need less are the advice.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mlx_posttrain import config
from mlx_posttrain.console import log
from mlx_posttrain.data.batches import (
    PACKING,
    evaluation_limits,
    for_evaluation,
    padded_length,
    padded_positions,
    round_up,
)
from mlx_posttrain.data.dataset import Dataset
from mlx_posttrain.engines.decoding import CACHE_BLOCK, TORCH_CACHE_BLOCK, split
from mlx_posttrain.errors import UserError
from mlx_posttrain.memory.coefficients import PAIRS_OF_PROMPTS
from mlx_posttrain.memory.footprint import DTYPE_BYTES, GB, Shape, Training, distinct, shapes
from mlx_posttrain.memory.model_size import Size, adapted, adapter_parameters, size  # noqa: F401  (size is re-exported)
from mlx_posttrain.models.adapters import adapter_spec
from mlx_posttrain.training import reference as references

#: Share of this machine's memory above which a plan warns, and of what Metal advises to use at most, which is
#: two thirds to three quarters of it already.
WARN_ABOVE, WARN_ABOVE_METAL = 0.75, 0.95
#: Share of the training rows that a shorter data.max_length must keep to be advised.
KEPT_ROWS = 0.9
#: A change is advised where its peak is below this share of the recipe's.
LESS = 0.97
#: The longest row that a plan looks at, and the steps in which it does.
LONGEST, ROW_STEP = 2**17, 64
#: GB of the interpreter and libraries: the torch engine's memory is that of the whole process, MLX counts its
#: arrays only.
PROGRAM = {"mlx": 0.0, "torch": 0.48}


@dataclass
class Plan:
    """What a run needs.

    trained_a_step: tokens that the loss counts, or scores of a reward model. positions_a_step: tokens that
    the model reads, padding included. parts: GB at the peak by what they hold. phase: when the peak is.
    shapes: number of batch shapes, for each of which MLX compiles a step. sure: whether the blocks were
    measured for this architecture. metal: whether ``memory_gb`` is the working set that Metal advises to keep
    within, and the parts count the unused buffers that MLX keeps; else it is this machine's memory. dtype:
    of the weights and, where it is another, of what is computed with them. longest: tokens of the longest
    rows that fit, and how many of them there are in such a batch; None where that was not asked.
    """

    name: str
    engine: str
    parameters: int
    trained: int
    steps: int
    trained_a_step: float
    positions_a_step: float
    parts: dict[str, float]
    phase: str
    memory_gb: float
    shapes: int
    sure: bool = True
    metal: bool = False
    dtype: str = "float32"
    advice: list[str] = field(default_factory=list)
    longest: tuple[int, int] | None = None

    @property
    def fits(self) -> bool:
        """Whether no warning is due."""
        return self.share <= (WARN_ABOVE_METAL if self.metal else WARN_ABOVE)

    @property
    def total_gb(self) -> float:
        """The predicted peak in GB."""
        return sum(self.parts.values())

    @property
    def share(self) -> float:
        """The peak as a share of ``memory_gb``."""
        return self.total_gb / self.memory_gb if self.memory_gb else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return {**asdict(self), "total_gb": self.total_gb, "share": self.share}

    def line(self) -> str:
        """The peak in one line, with advice when it may not fit."""
        owner = "Metal's working set of" if self.metal else "this machine's"
        text = (
            f"memory: about {self.total_gb:.2f} GB at the peak ({self.share:.0%} of "
            f"{owner} {self.memory_gb:.0f} GB)"
        )
        if not self.fits:
            text += "; that may not fit" + (
                "; with less: " + ", or ".join(self.advice) if self.advice else ""
            )
        return text

    def text(self) -> str:
        """The plan in lines for people."""
        lines = [
            f"{self.name} on {self.engine} in {self.dtype}: {self.trained:,} of {self.parameters:,} "
            "parameters train",
            f"{self.steps:,} steps of about {self.trained_a_step:,.0f} trained tokens "
            f"({self.positions_a_step:,.0f} read, padding included); "
            f"{self.steps * self.trained_a_step:,.0f} trained in all; {self.shapes} "
            f"{'shape' if self.shapes == 1 else 'shapes'} of batches",
            *(f"  {part:12} {gb:8.2f} GB" for part, gb in self.parts.items() if gb >= 0.005),
            f"  {'peak':12} {self.total_gb:8.2f} GB, {self.phase}; "
            f"{'Metal advises at most' if self.metal else 'this machine has'} {self.memory_gb:.1f} GB "
            f"({self.share:.0%})",
        ]
        if not self.sure:
            lines.append(
                "  what the blocks keep is a guess: it was measured for GPT-2, on MLX for Llama "
                "and DoRA too, and not for this"
            )
        lines += [f"  with less: {less}" for less in self.advice]
        if self.longest is not None:
            tokens, rows = self.longest
            lines.append(
                f"  longest rows that fit, {rows} in a batch: {tokens:,} tokens"
                if tokens
                else f"  not even rows of {ROW_STEP} tokens fit, {rows} in a batch"
            )
        return "\n".join(lines)


def peak(
    name: str,
    training: Training,
    steps: int,
    tokens: tuple[float, float],
    more: Mapping[str, float] | None = None,
    others: Sequence[tuple[str, dict[str, float]]] = (),
) -> Plan:
    """The plan of one trained network.

    tokens: trained and read in a step. more: GB by name of what else is held all the time. others: further
    phases, whose parts may replace those that are held all the time.
    """
    from mlx_posttrain.engines import probe, process

    always = {
        "program": PROGRAM[training.engine],
        "weights": training.weights(),
        "reference": training.reference_copy(),
        "optimizer": training.optimizer(),
        **(more or {}),
    }
    phase, parts = max([*training.phases(), *others], key=lambda found: sum({**always, **found[1]}.values()))
    metal = probe.working_set() if training.engine == "mlx" else 0
    if metal:
        # What the phase lets go is kept for arrays of the same sizes, which a batch of another shape has not.
        parts = {**parts, "unused": min(probe.CACHE_SHARE * metal / GB, sum(parts.values()))}
    return Plan(
        name=name,
        engine=training.engine,
        parameters=training.size.parameters + (training.trained if training.adapter else 0),
        trained=training.trained,
        steps=steps,
        trained_a_step=tokens[0],
        positions_a_step=tokens[1],
        parts={**always, **parts},
        phase=phase,
        memory_gb=(metal or process.memory()[0]) / GB,
        shapes=len(training.batches),
        sure=training.sure,
        metal=bool(metal),
        dtype=training.dtype + (", computed in bfloat16" if training.mixed else ""),
    )


def _advised(found: Plan, options: Iterable[tuple[str, Callable[[], Plan]]]) -> Plan:
    """The plan with advice: those of the ``options`` that need less.

    options: overrides of the recipe, and the plan with them.
    """
    advice = []
    for text, make in options:
        # Not every option suits every model: it may lack the usual layers for an adapter, for example.
        with contextlib.suppress(UserError):
            gb = make().total_gb
            if gb < LESS * found.total_gb:
                advice.append(f"{text} ({gb:.2f} GB)")
    return replace(found, advice=advice)


def _alternatives(recipe: Any, engine: str, of: Size) -> Iterator[tuple[str, Any]]:
    """Overrides that may save memory in any training, mildest first, each with the recipe they give."""
    train, adapter = recipe.train, getattr(recipe, "adapter", None)
    if train.batch_size > 1:
        rows = train.batch_size // 2
        times = math.ceil(train.batch_size * train.grad_accumulation / rows)
        yield (
            f"train.batch_size={rows} train.grad_accumulation={times}",
            _changed(recipe, "train", batch_size=rows, grad_accumulation=times),
        )
    if not train.gradient_checkpointing:
        text, changed = (
            "train.gradient_checkpointing=true",
            _changed(recipe, "train", gradient_checkpointing=True),
        )
        if adapter is not None and adapter.dropout:
            text, changed = f"{text} adapter.dropout=0", _changed(changed, "adapter", dropout=0.0)
        yield text, changed
    if adapter is None and "adapter" in type(recipe).model_fields:
        yield "adapter.rank=16", recipe.model_copy(update={"adapter": config.AdapterSection(rank=16)})
    elif (
        adapter is not None
        and adapter.quantize is None
        and engine == "mlx"
        and not of.packed
        and _fits_groups(of, adapter.group_size)
    ):
        yield "adapter.quantize=4", _changed(recipe, "adapter", quantize=4)


def _fits_groups(of: Size, group_size: int) -> bool:
    """Whether every linear layer can be divided into groups of weights that share a quantisation scale."""
    return all(n % group_size == 0 for shape in of.linear.values() for n in shape)


def _changed(recipe: Any, section: str, **values: Any) -> Any:
    """The recipe with other values in one section, without validation: for planning only."""
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


# From recipes.


def print_plan(make: Callable[[], Plan]) -> None:
    """Print what a run will need before it starts.

    Nothing that goes wrong in planning keeps the run from training.
    """
    try:
        log(make().line())
    except UserError as error:
        log(f"memory: not planned: {error}")
    except Exception as error:  # a defect of the planner must not end a run
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        log(f"memory: not planned, by a defect of the planner ({type(error).__name__} at {place}: {error})")


#: What a recipe needs of the model as it was before training; see training/method.py.
ReferenceOf = Callable[[Any], str | None]


def of_rows(recipe: Any, engine: str, of: Size, dataset: Dataset, reference: ReferenceOf) -> Plan:
    """The plan of a run on a dataset; reference: Method.reference."""
    packs = _training(recipe, engine, of).packs
    known: list[Shape] = []
    trained = read = steps = most = 0.0
    for step in range(min(dataset.steps, dataset.steps_per_epoch)):
        micro = dataset.micro_batches(dataset.rows(step))
        known += shapes(micro, packs)
        trained += sum(b.trained_tokens for b in micro)
        read += sum(b.tokens.size for b in micro)
        steps, most = steps + 1, max(most, len(micro))
    known, evaluated = distinct(known), shapes(dataset.evaluation(), packs)
    limit = recipe.kl.cache_gb if reference(recipe) == "distribution" else 0.0
    cached = references.share(dataset, of.width, limit) if limit else references.Share()
    lengths = dataset.lengths
    together = for_evaluation(lengths, recipe.train.batch_size, recipe.train.token_budget)
    reading = distinct(Shape(len(rows), padded_length(max(lengths[i] for i in rows)), 0) for rows in together)

    def of_recipe(
        changed: Any, longest: int | None = None, cached: references.Share = cached, only: Shape | None = None
    ) -> Plan:
        """The plan of the recipe, or with another one's settings of the same rows, cut to ``longest``.

        only: the one batch there is, instead of the rows.
        """
        old, new = recipe.train.batch_size, changed.train.batch_size
        kind = reference(changed)
        training = replace(
            _training(changed, engine, of),
            reference=kind == "distribution",
            divergence=kind == "distribution",
            beside=kind == "distribution" and not cached.held_out,
            grad_accumulation=most > 1 or new < old,
            batches=[only] if only else _at_most(known, old, new, longest),
            evaluations=[]
            if only
            else _at_most(evaluated, evaluation_limits(old)[0], evaluation_limits(new)[0], longest),
        )
        once = reading if (cached.training or kind == "logprobs") and not only else []
        once = _at_most(once, evaluation_limits(old)[0], evaluation_limits(new)[0], longest)
        others = [
            ("as the reference's states are computed", {"activations": training.forward(b), "optimizer": 0.0})
            for b in once
        ]
        more = {"kept states": cached.gb}
        return peak(_name(recipe), training, dataset.steps, (trained / steps, read / steps), more, others)

    options: list[tuple[str, Callable[[], Plan]]] = [
        (text, partial(of_recipe, changed)) for text, changed in _alternatives(recipe, engine, of)
    ]
    if shorter := _shorter(recipe, dataset):
        options.append((shorter[1], partial(of_recipe, recipe, longest=shorter[0])))
    if cached.gb:
        options.append(("kl.cache_gb=0", partial(of_recipe, recipe, cached=references.Share())))
    found = _advised(of_recipe(recipe), options)
    rows, budget = max(b.rows for b in known), recipe.train.token_budget

    def batch(length: int) -> Shape:
        count = max(1, min(rows, budget // length)) if budget else rows
        return Shape(count, length, count * length)

    longest = _longest(lambda length: of_recipe(recipe, only=batch(length)).fits, of.context)
    return replace(found, longest=(longest, batch(max(longest, 1)).rows))


def _longest(fits: Callable[[int], bool], context: int | None) -> int:
    """The most tokens that fit, in steps of ROW_STEP up to a model's context, or 0."""
    few, many = 0, max(1, min(context or LONGEST, LONGEST) // ROW_STEP)
    if fits(many * ROW_STEP):
        return min(many * ROW_STEP, context or LONGEST)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if fits(middle * ROW_STEP) else (few, middle)
    return few * ROW_STEP


def _shorter(recipe: Any, data: Any) -> tuple[int, str] | None:
    """A shorter data.max_length, and its override with what it does to the rows; None where there is none.

    The larger of half the longest training row and the length with which nine of ten rows still train.
    """
    most, packed, pairs = max(data.lengths), recipe.data.pack, data.collate.rows_per_item > 1

    def needs(row: Any, length: int) -> int:
        """Tokens of a row; of one that may be cut, those up to its first trained one."""
        return length if pairs or recipe.data.too_long == "drop" else row.answer_start + 1

    needed = sorted(map(needs, data.train, data.lengths))
    longest = padded_length(max(most // 2, 0 if packed else needed[math.ceil(KEPT_ROWS * len(needed)) - 1]))
    if longest >= most:
        return None
    lost, long = (sum(n > longest for n in lengths) for lengths in (needed, data.lengths))
    dropped, unit = ("shortens or drops", "pairs") if pairs else ("drops", "rows")
    fates = " and ".join(f"{fate} {n:,}" for fate, n in (("cuts", long - lost), (dropped, lost)) if n)
    return longest, f"data.max_length={longest}" + (
        "" if packed else f", which {fates} of {len(needed):,} {unit}"
    )


def _at_most(batches: Sequence[Shape], old: int, new: int, longest: int | None) -> list[Shape]:
    """The batches under a limit of ``new`` rows in place of ``old``, cut to ``longest`` tokens.

    Batches that other limits or the data already make smaller stay as they are. A pair is two rows: the limit
    is counted in rows of the largest batch where those are more.
    """
    rows = new / old * max([old, *(b.rows for b in batches)])
    return distinct(b.part(min(1.0, rows / b.rows), longest) for b in batches)


def cache(of: Size, positions: int, dtype: str) -> float:
    """GB of the keys and values of ``positions`` positions, in all layers."""
    return 2 * of.layers * of.key_width * positions * DTYPE_BYTES[dtype] / GB


class PromptLengths(NamedTuple):
    """Lengths of prompts in tokens.

    longest: of the longest in training. ahead: of those that are completed before training. held_out: of the
    held-out ones.
    """

    longest: int
    ahead: Sequence[int]
    held_out: Sequence[int]


def of_rollouts(
    recipe: Any,
    engine: str,
    of: Size,
    prompts: PromptLengths,
    rewards: Sequence[tuple[Size, str]],
    algorithm: Callable[[Any], Any],
    reference: ReferenceOf,
) -> Plan:
    """The plan of a run on rollouts.

    rewards: sizes and number formats of the reward models and judges. algorithm, reference: of the Method.
    """
    r = recipe.rollout
    changes = [*_alternatives(recipe, engine, of)]
    critic = algorithm(recipe).critic
    if critic is not None and critic.kind == "separate":
        own = " critic.lr=null" * (critic.lr is not None) + " critic.init=auto" * (critic.init != "auto")
        changes.append((f"critic.kind=shared{own}", _changed(recipe, "critic", kind="shared")))
    # Where the context limits prompts, shorter completions would only make room for longer prompts.
    roomy = of.context is None or r.max_tokens + recipe.data.max_length <= of.context
    halves = {"max_tokens": r.max_tokens // 2 if roomy else 0, "token_budget": r.token_budget // 2}
    changes += [
        (f"rollout.{key}={half}", _changed(recipe, "rollout", **{key: half}))
        for key, half in halves.items()
        if half
    ]

    def of_recipe(changed: Any) -> Plan:
        return _rollouts(changed, engine, of, prompts, rewards, algorithm(changed), reference(changed))

    return _advised(of_recipe(recipe), [(text, partial(of_recipe, changed)) for text, changed in changes])


def _rollouts(
    recipe: Any,
    engine: str,
    of: Size,
    prompts: PromptLengths,
    rewards: Sequence[tuple[Size, str]],
    algorithm: Any,
    reference: str | None,
) -> Plan:
    """:func:`of_rollouts` without advice."""
    r, train, ptx = recipe.rollout, recipe.train, algorithm.ptx
    training = replace(
        _training(recipe, engine, of),
        reference=reference is not None,
        grad_accumulation=train.grad_accumulation > 1 or ptx is not None,
    )

    def shape(most: int, budget: int | None, completions: int, distinct_prompts: int, longest: int) -> Shape:
        """Of a batch of completions; packed, each prompt is read once."""
        length = padded_length(longest + r.max_tokens)
        rows = min(completions, most, max(1, budget // length) if budget else most)
        packed = None
        if training.packs:
            tokens = min(rows, distinct_prompts) * longest + rows * r.max_tokens
            packed = PACKING[training.packs].tokens(tokens, rows * length)
        return Shape(rows, length, padded_positions(rows * r.max_tokens), packed)

    completions = r.prompts * r.samples
    limits, sampled = (train.batch_size, train.token_budget), (completions, r.prompts, prompts.longest)
    evaluations = [shape(*evaluation_limits(*limits), *sampled)]
    if unseen := len(prompts.held_out):
        evaluations.append(shape(*evaluation_limits(*limits), unseen, unseen, max(prompts.held_out)))
    policy = replace(training, batches=[shape(*limits, *sampled)], evaluations=evaluations)
    if ptx is not None:
        longest = padded_length(min(ptx.data.max_length, of.context or ptx.data.max_length))
        texts = Shape(ptx.batch_size, longest, ptx.batch_size * longest)
        policy = replace(policy, batches=[*policy.batches, texts])
    more = {"reward": sum(of.parameters * DTYPE_BYTES[dtype] for of, dtype in rewards) / GB}
    untrained = {"optimizer": 0.0}  # moments come with the first update
    others: list[tuple[str, dict[str, float]]] = []
    if algorithm.critic is not None and algorithm.critic.kind == "separate":
        critic = replace(
            policy, trained=of.parameters, adapter=False, bits=None, dtype="float32", reference=False
        )
        untrained["critic"] = critic.weights()
        more["critic"] = critic.weights() + critic.optimizer()
        others += [(f"{phase}, of the critic", {**parts, "logits": 0.0}) for phase, parts in critic.phases()]
    for lengths, samples in (([prompts.longest] * r.prompts, r.samples), (prompts.held_out, 1)):
        others += _rollout(policy, lengths, samples, r.max_tokens, r.token_budget)
    others += [
        (phase, {**parts, **untrained})
        for phase, parts in _rollout(policy, prompts.ahead, 1, r.max_tokens, r.token_budget)
    ]
    length = padded_length(prompts.longest + r.max_tokens)
    tokens = completions * r.max_tokens, completions * length
    return peak(_name(recipe), policy, train.steps, tokens, more, others)


def _rollout(
    model: Training, lengths: Sequence[int], samples: int, max_tokens: int, token_budget: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """The phases of a rollout: reading the prompts of each decode batch, and decoding it.

    lengths: tokens of each prompt.
    """
    most = min(max_tokens, model.size.context or max_tokens)
    dtype = "bfloat16" if model.mixed else model.dtype
    for batch, at_once in split(lengths, samples, most, token_budget):
        prompts = Shape(len(lengths[batch]), max(lengths[batch]), 0)
        block = CACHE_BLOCK if model.engine == "mlx" else TORCH_CACHE_BLOCK
        room = round_up(prompts.length + most, block)
        read, held = (
            cache(model.size, rows * room, dtype) for rows in (prompts.rows, prompts.rows * at_once)
        )
        yield (
            "as a rollout reads its prompts",
            {"cache": read, "activations": model.forward(prompts, PAIRS_OF_PROMPTS)},
        )
        yield (
            "in a rollout",
            {
                "cache": held,
                "logits": 4 * 4 * prompts.rows * at_once * model.size.vocabulary / GB + model.decoding_head(),
            },
        )


def _name(recipe: Any) -> str:
    return Path(recipe.output).name if recipe.output else recipe.method


def _training(recipe: Any, engine: str, of: Size) -> Training:
    section, dtype = getattr(recipe, "adapter", None), recipe.dtype or "float32"
    checkpointing = recipe.train.gradient_checkpointing
    if section is None:
        mixed = recipe.train.precision == "mixed"
        return Training(engine, of, of.parameters, False, dtype, mixed=mixed, checkpointing=checkpointing)
    spec = adapter_spec(section)
    return Training(
        engine,
        of,
        adapter_parameters(of, spec),
        True,
        dtype,
        bits=section.quantize,
        group_size=section.group_size,
        adapted=adapted(of, spec),
        dora=spec.kind == "dora",
        checkpointing=checkpointing,
        dropout=section.dropout > 0,
    )
