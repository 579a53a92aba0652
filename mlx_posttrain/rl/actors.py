"""Who takes part in a run on rollouts: policy, reference, critic, scorers; and the prompts they work on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain.data.mixture import interleave
from mlx_posttrain.data.read import encode_rows, read_conversations
from mlx_posttrain.data.split import read_parts
from mlx_posttrain.engines.base import Engine, Model, hidden_size, initial_head
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.merge import base_folder
from mlx_posttrain.rewards.scorer import Scorer
from mlx_posttrain.rl.config import CriticSection, RolloutRecipe
from mlx_posttrain.rl.experience import Actors
from mlx_posttrain.rl.learner import RolloutData
from mlx_posttrain.rl.rollouts import Prompt
from mlx_posttrain.training.method import Algorithm, Reference


def make_actors(
    engine: Engine,
    recipe: RolloutRecipe,
    algorithm: Algorithm,
    reference: Reference,
    folder: Path,
    policy: Model,
    tokenizer: Any,
    prompts: tuple[list[Prompt], list[Prompt]],
) -> tuple[Actors, RolloutData]:
    """Policy with its reference, critic, scorers, and data; ``prompts`` are training and held-out ones.

    Raises UserError for a policy that is a reward model, and for a reward model that cannot read the longest
    prompt with its completion.
    """
    if policy.has_head:
        raise UserError(f"{recipe.model} is a reward model: a policy is a language model")
    if reference is not None:
        policy.keep_reference()
    template = str(recipe.data.template)
    actors = Actors(
        policy,
        _critic(engine, recipe, algorithm.critic, folder, policy),
        tokenizer,
        Scorer(recipe.reward, engine, tokenizer, template),
        Scorer(recipe.judge, engine, tokenizer, template),
    )
    longest = max(len(p.tokens) for part in prompts for p in part) + recipe.rollout.max_tokens
    for scorer in (actors.scorer, actors.judge):  # a critic reads as far as the model that it is a copy of
        scorer.check_context(longest)

    def calibrate(actors: Actors) -> None:
        """Let a critic that started as a reward model predict what that model adds to the sum of rewards.

        What other rewards add it has to learn.
        """
        source = critic_source(recipe, algorithm.critic)
        if actors.critic is not None and source is not None:
            factor, actors.value_offset = actors.scorer.share_of(source)
            actors.critic.add_head(actors.critic.head() * np.float32(factor))

    data = RolloutData(*prompts, _ptx_examples(recipe, algorithm, tokenizer, policy.context), calibrate)
    return actors, data


def critic_source(recipe: RolloutRecipe, critic: CriticSection | None) -> str | None:
    """The reward model that a separate critic starts as a copy of; None when it starts as the policy."""
    if critic is None or critic.kind == "shared" or critic.init == "policy":
        return None
    return next((entry.model for entry in recipe.reward if entry.model), None)


def _critic(
    engine: Engine, recipe: RolloutRecipe, section: CriticSection | None, folder: Path, policy: Model
) -> Model | None:
    if section is None:
        return None
    if section.kind == "shared":
        policy.add_head(initial_head(hidden_size(policy.config), None))
        return None
    reward = critic_source(recipe, section)
    source = base_folder(reward) if reward else folder
    # Trained as a whole, whatever format the policy's frozen base has.
    critic = engine.load(
        source,
        dtype="float32",
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        vocabulary=policy.config.get("vocab_size") or 0,
        mixed=recipe.train.precision == "mixed",
    )
    if not critic.has_head:
        critic.add_head(initial_head(hidden_size(critic.config), None))
    return critic


def _ptx_examples(
    recipe: RolloutRecipe, algorithm: Algorithm, tokenizer: Any, context: int | None
) -> list[Any]:
    if algorithm.ptx is None:
        return []
    data = algorithm.ptx.data
    rows = interleave(read_parts(data, recipe.seed, read_conversations).values())
    return encode_rows(rows, data, tokenizer, context, recipe.seed, "ptx rows")
