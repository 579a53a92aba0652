"""What a training method is made of: an entry of the table in methods/__init__.py.

A method says what is its own; everything else (reading the recipe, setting up, the loop, resuming, planning,
the model card, the benchmark) reads its entry. Most parts are functions of the recipe, since what one method
needs varies with its settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlx_posttrain.config import Section
from mlx_posttrain.data.dataset import Collator, Dataset
from mlx_posttrain.data.read import ModelFacts, row_collator
from mlx_posttrain.engines.base import Loss

if TYPE_CHECKING:
    from mlx_posttrain.rl.aggregation import Aggregation
    from mlx_posttrain.rl.config import CriticSection, PTXSection
    from mlx_posttrain.rl.experience import ExperienceFunction
    from mlx_posttrain.rl.groups import Shape
    from mlx_posttrain.training.loop import Callbacks
    from mlx_posttrain.training.session import Session

#: What a method compares the policy with: nothing, token log-probabilities, or whole distributions.
Reference = Literal["logprobs", "distribution"] | None
#: Whether a run is continued; "edited": with a recipe that was changed since its last checkpoint, too.
Resume = bool | Literal["edited"]
#: What ``final/`` holds: a language model, a sequence classifier, or an HTML page.
Saves = Literal["model", "classifier", "page"]


@dataclass(frozen=True)
class Algorithm:
    """What a method does with a step's rollouts.

    loss: of a minibatch of completions; ``batch.extra`` has what ``experience`` made.
    experience: from scored completions to per-token arrays: ``experience(completions, scores, stats, beta,
        value_offset)`` gives a rl.experience.Experience. It also takes ``moving``, what a moving baseline was
        before the step, where it returns one, and ``greedy`` where the algorithm says so.
    value_loss: of a critic that is a network of its own.
    epochs: passes of updates over a step's completions.
    target_kl: end a step's updates once approx-KL to the old policy passes it; None: never.
    critic: what predicts the return; None: nothing does.
    ptx: rows imitated beside the updates; None: none.
    aggregation: how the loss averages tokens (rl/aggregation.py); None: over all tokens.
    resample: how often groups of equal scores make way for other prompts (dynamic sampling: Yu et al. 2025).
    greedy: whether ``experience`` compares with greedy completions: it is given ``greedy``, one
        (completion, score) for each group.
    shape: scores as they are compared (rl/groups.py), for ``resample``; None: as they are.
    measured: whether a pass before the updates measures log-probabilities. Without it ``old_logprobs`` are
        the sampler's, and the loss compares the policy with itself: for one update a step.
    trusts_sampler: whether that pass may leave out the policy where its sampler is exact; see
        rl/experience.py, ``measure``.
    note: for the beginning of a run.
    """

    loss: Loss
    experience: ExperienceFunction
    value_loss: Loss | None = None
    epochs: int = 1
    target_kl: float | None = None
    critic: CriticSection | None = None
    ptx: PTXSection | None = None
    aggregation: Aggregation | None = None
    resample: int = 0
    greedy: bool = False
    shape: Shape | None = None
    measured: bool = True
    trusts_sampler: bool = False
    note: str = ""


@dataclass(frozen=True)
class Method:
    """One training method, or a recipe that trains nothing itself (``run``).

    name, summary: for people: help, ``keys``, README's table.
    Recipe: what its recipe may say.

    A method on rows gives ``dataset`` and ``loss``; one on rollouts ``algorithm``.

    dataset: the recipe's items, to be collated by the third argument: row_dataset or pair_dataset.
    collator: how items become batches; a method on pairs names one of data/read.py.
    loss: what is minimised, ``loss(model, batch) -> (scalar, metrics)``.
    metrics: from the loss's metrics, summed over a step or an evaluation, to those that are logged.
    algorithm: see :class:`Algorithm`; the recipe is a rl.config.RolloutRecipe.
    reference: what it needs of the model as it was before training.
    saves: what ``final/`` holds.
    start: makes the model that a run starts from in a folder, in place of ``recipe.model``.
    samples: ``samples(session)`` gives a function of the step that writes to samples.jsonl; None: answers, or
        scores of pairs for a classifier (training/samples.py).
    report: looks at the trained model before it is saved; returns figures for ``result.json``.
    after: once the run is finished.
    bench: what ``bench`` can measure: a name, and the recipe's keys that make it.
    run: for recipes that train nothing themselves; then only name, summary, Recipe, saves and plan matter.
    plan: for the same, what ``plan`` predicts; None: there is nothing to plan.
    """

    name: str
    summary: str
    Recipe: type[Section]
    dataset: Callable[[Any, ModelFacts, Collator], Dataset] | None = None
    collator: Callable[[Any, ModelFacts], Collator] = row_collator
    loss: Callable[[Any], Loss] | None = None
    metrics: Callable[[Mapping[str, float]], dict[str, float]] = dict
    algorithm: Callable[[Any], Algorithm] | None = None
    reference: Callable[[Any], Reference] = lambda recipe: None
    saves: Callable[[Any], Saves] = lambda recipe: "model"
    start: Callable[[Any, Path], Path] | None = None
    samples: Callable[[Session], Callable[[int], None]] | None = None
    report: Callable[[Session], dict[str, Any]] | None = None
    after: Callable[[Session], None] | None = None
    bench: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    run: Callable[[Any, Resume, Callbacks | None], dict[str, Any]] | None = None
    plan: Callable[[Any], Sequence[Any]] | None = None

    @property
    def trains_on(self) -> Literal["rows", "rollouts"] | None:
        """What it learns from; None for a recipe that trains nothing itself."""
        if self.run is not None:
            return None
        return "rows" if self.algorithm is None else "rollouts"

    def make_dataset(self, recipe: Any, facts: ModelFacts) -> Dataset:
        """The recipe's dataset. Raises UserError as reading the rows does."""
        assert self.dataset is not None
        return self.dataset(recipe, facts, self.collator(recipe, facts))
