"""Reward model: learn from pairs which of two answers people (or checkers) prefer.

    loss = mean over pairs of  -log sigma(r(chosen) - r(rejected) - margin)  +  centring * (r(chosen) +
    r(rejected))^2

r is a scalar head on the backbone's hidden state at the row's last token (data/pairs.py, ``last_token``; the
rule of transformers' sequence classifiers, so that an exported model gives the same scores there). All pairs
of one prompt are in one batch, each answer read once (Ouyang et al. 2022, section 3.5): spread over an epoch
they would be trained on several times. The head starts from N(0, 1 / (width + 1)) (Stiennon et al. 2020), new
adapters as everywhere. ``final/`` is a sequence classifier with one label, or a PEFT adapter of one;
``report.json`` says what the model learned beyond what the length or the words of an answer give away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from mlx_posttrain import config, engines, runs
from mlx_posttrain.console import say
from mlx_posttrain.convert import hub
from mlx_posttrain.data import pairs
from mlx_posttrain.data.read import NONE_HELD_OUT, read_rows, split_rows
from mlx_posttrain.data.types import Preference
from mlx_posttrain.engines.base import Array, DeviceBatch, Loss, Model, head_start, width
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluate import preference
from mlx_posttrain.losses.preference import bradley_terry, centring
from mlx_posttrain.losses.sft import token_mean
from mlx_posttrain.memory import plan as plans
from mlx_posttrain.models.merge import base_folder
from mlx_posttrain.models.source import locate
from mlx_posttrain.models.tokenizer import check_vocabulary, load_tokenizer, pad_id
from mlx_posttrain.ops import ops
from mlx_posttrain.rewards.scorer import score_rows
from mlx_posttrain.training import setup
from mlx_posttrain.training.loop import fit


class RewardSection(config.Section):
    """The pairwise loss."""

    centring: float = Field(
        0.0,
        ge=0,
        description="weight of (r_chosen + r_rejected)^2, which keeps scores around 0; 0.01 is usual",
    )


class Recipe(config.Recipe):
    """A reward model from preference pairs."""

    method: Literal["reward"] = Field(description="reward: score answers, trained on pairs")
    adapter: config.AdapterSection | None = Field(
        None, description="train an adapter and the head instead of all weights; null: all weights"
    )
    reward: RewardSection = Field(default_factory=lambda: RewardSection())

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        config.check_one_way_of_asking(self.data, self.sample, "pairs")
        config.check_training(self)
        return self


def pair_loss(weight: float = 0.0) -> Loss:
    """Mean Bradley-Terry loss over pairs, plus ``weight`` times the centring term; metrics: accuracy,
    margin.
    """

    def loss(model: Model, batch: DeviceBatch) -> tuple[Array, dict[str, Array]]:
        scores = model.scores(batch)
        chosen, rejected = scores[batch.extra["chosen"]], scores[batch.extra["rejected"]]
        xp = ops(scores)

        def mean(values: Array) -> Array:
            return token_mean(values, batch.extra["pair_weight"], batch.total)

        nll = mean(bradley_terry(chosen, rejected, batch.extra["margin"]))
        right = xp.astype(chosen > rejected, chosen) + 0.5 * xp.astype(chosen == rejected, chosen)
        metrics = {"nll": nll, "accuracy": mean(right), "margin": mean(chosen - rejected)}
        if not weight:
            return nll, metrics
        return nll + weight * mean(centring(chosen, rejected)), metrics

    return loss


def read_preferences(
    data: config.DataSection, *, split: str, limit: int | None, seed: int
) -> list[Preference]:
    """The pairs of one split; prints what was dropped. Raises UserError for rows that are no pairs."""
    parsed = read_rows(data, split=split, limit=limit, seed=seed)
    found = [row for row in parsed if isinstance(row, Preference)]
    if len(found) < len(parsed):
        raise UserError(
            f"{data.source}: a reward model learns from pairs: rows with prompt, chosen and rejected, or "
            "chosen and rejected dialogues"
        )
    return found


def training_pairs(
    recipe: Recipe,
    train: list[Preference],
    held_out: list[Preference],
    tokenizer: Any,
    context: int | None,
    pad: int,
) -> pairs.PairData:
    """Pairs as token ids, and the batches of any step; prints what was dropped."""
    length = min(recipe.data.max_length, context or recipe.data.max_length)

    def encoded(what: str, rows: list[Preference], needed: bool) -> list[pairs.Pair]:
        if not rows:
            return []
        found, report = pairs.encode_pairs(
            rows, tokenizer, template=str(recipe.data.template), max_length=length, needed=needed
        )
        say(f"{what}: {report}")
        if not found:
            say(NONE_HELD_OUT.format(what=what))
        return found

    known, unseen = encoded("training pairs", train, True), encoded("held-out pairs", held_out, False)
    return pairs.PairData(known, unseen, recipe.train, recipe.seed, context, pad)


def plan(recipe: Recipe) -> list[plans.Plan]:
    """What the recipe would take; makes no run directory and loads no weights. Raises UserError as reading
    the data does.
    """
    folder = locate(recipe.model).folder
    of, tokenizer = plans.size(folder), load_tokenizer(folder)
    train, held_out = split_rows(recipe.data, recipe.seed, read_preferences)
    data = training_pairs(
        recipe, train, held_out, tokenizer, of.context, pad_id(hub.check_config(folder), tokenizer)
    )
    return [plans.of_data(recipe, engines.get(recipe.engine).name, of, data)]


def run(recipe: Recipe, resume: bool = False) -> dict[str, float]:
    """Run the recipe to the end; returns the figures of the final evaluation. Errors as supervised.run."""
    engine, run = setup.begin(recipe, resume)
    with setup.setting_up(run, resume):
        folder = base_folder(recipe.model)
        tokenizer = load_tokenizer(folder)
        train, held_out = split_rows(recipe.data, recipe.seed, read_preferences)
        model = setup.load_model(engine, recipe, folder, recipe.adapter)
        check_vocabulary(tokenizer, model, folder)
        if not model.has_head:
            model.add_head(head_start(width(model.config), recipe.seed))
        pad = pad_id(model.config, tokenizer)
        batches = training_pairs(recipe, train, held_out, tokenizer, model.context, pad)
        unseen = batches.held_out
        setup.announce(recipe, engine, model)
        plans.tell(lambda: plans.of_data(recipe, engine.name, plans.size(folder), batches))
    engine.seed(recipe.seed)
    show = shower(model, tokenizer, unseen[: recipe.sample.count], pad, run)
    result: dict[str, Any] = fit(
        engine, model, pair_loss(recipe.reward.centring), batches, run, resume=resume, on_evaluate=show
    )
    losses = [r["nll"] for r in run.metrics() if "nll" in r]
    result["mean_training_loss"] = float(np.mean(losses)) if losses else float("nan")
    if unseen:
        report = judge(model, unseen, train, pad, recipe.seed)
        runs.write_text(
            run.folder / "report.json",
            json.dumps(report.to_dict() | {"mean_training_loss": result["mean_training_loss"]}, indent=2)
            + "\n",
        )
        say(
            f"mean training loss {result['mean_training_loss']:.4f} (a coin has ln 2 = "
            "0.6931)\n" + "\n".join(report.lines())
        )
        result["accuracy"] = report.accuracy.mean
    setup.finish(run, result, lambda folder: model.save_classifier(folder, pad))
    say(f"{run.final} is written")
    return result


def judge(
    model: Model, held_out: Sequence[pairs.Pair], train: Sequence[Preference], pad: int, seed: int
) -> preference.PreferenceStats:
    """Score held-out pairs and compare with what length and words alone would say."""
    rows = [side for pair in held_out for side in (pair.chosen, pair.rejected)]
    scores = score_rows(model, rows, pad)
    return preference.compare_with_baselines(
        scores[::2], scores[1::2], [pair.row for pair in held_out], train, seed
    )


def shower(
    model: Model, tokenizer: Any, shown: Sequence[pairs.Pair], pad: int, run: runs.Run
) -> Callable[[int], None]:
    """A function that writes a few held-out pairs with their scores to samples.jsonl."""

    def write(step: int) -> None:
        if shown:
            scores = score_rows(model, [side for pair in shown for side in (pair.chosen, pair.rejected)], pad)
            for i, pair in enumerate(shown):
                run.sample(
                    {
                        "step": step,
                        "prompt": pair.row.prompt[-1].content,
                        "chosen": pair.row.chosen,
                        "rejected": pair.row.rejected,
                        "chosen_score": float(scores[2 * i]),
                        "rejected_score": float(scores[2 * i + 1]),
                    }
                )

    return write
