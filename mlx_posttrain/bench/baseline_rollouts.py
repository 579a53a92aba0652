"""Other trainers on the same prompts: TRL's PPO and GRPO, mlx-lm-lora's GRPO, and decoding alone.

Each samples its own answers from the full softmax, so the work is compared by their number and length, by
their mean score, and by their entropy. GRPO is scored by the number of characters (harness.py), which costs
no time.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_posttrain.bench.baseline_parts import (
    Finished,
    common_arguments,
    lend_device_facts,
    mlx_adam,
    mlx_arguments,
    mlx_model,
    no_dropout,
    peft_config,
    torch_model,
    train_parts,
    unit_callback,
)
from mlx_posttrain.bench.harness import ROLLOUT, Gate, characters, learning_rate, prompts
from mlx_posttrain.bench.inputs import Shape
from mlx_posttrain.bench.kinds import training_kinds
from mlx_posttrain.errors import UserError


def trl_ppo(spec: dict[str, Any], gate: Gate) -> None:
    """TRL's PPOTrainer, one iteration per unit. Raises UserError for a release that has none."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ImportError:
        raise UserError(
            f"TRL {importlib.metadata.version('trl')} has no PPOTrainer: pip install trl==1.12.0, in an "
            "environment of its own"
        ) from None

    batch_size = spec["shape"]["batch_size"]
    policy, tokenizer = torch_model(spec["folder"], padding_side="left")
    reference = AutoModelForCausalLM.from_pretrained(spec["folder"], config=no_dropout(spec["folder"]))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(
            spec["reward"], config=no_dropout(spec["reward"], num_labels=1)
        )
        for _ in range(2)
    )
    count = ROLLOUT["prompts"] * ROLLOUT["samples"]
    asked = prompts(policy.config.vocab_size, Shape(**spec["shape"]).length)
    data = Dataset.from_dict({"input_ids": [p for p in asked for _ in range(ROLLOUT["samples"])]})
    first: dict[str, Any] = {}

    def unit_stats(logs: dict[str, float]) -> dict[str, float] | None:
        if "objective/entropy" not in logs:
            return None
        if not first:
            first.update(kl=logs["objective/kl"], score=logs["objective/scores"])
        return {
            "loss": logs["objective/entropy"] / ROLLOUT["max_tokens"],
            "rows": count,
            "tokens": count * ROLLOUT["max_tokens"],
        }

    with tempfile.TemporaryDirectory() as scratch:
        settings = PPOConfig(
            **common_arguments(scratch, batch_size, learning_rate(adapter=False)),
            gradient_accumulation_steps=max(1, count // batch_size),
            num_ppo_epochs=2,
            num_mini_batches=1,
            total_episodes=10**6,
            response_length=ROLLOUT["max_tokens"],
            temperature=1.0,
            num_sample_generations=0,
            logging_steps=1,
        )
        trainer = PPOTrainer(
            args=settings,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=data,
            callbacks=[unit_callback(gate, unit_stats)],
        )
        if gate.open():
            with contextlib.suppress(Finished):
                trainer.train()
    gate.close(device="CPU", version=importlib.metadata.version("trl"), first=first)


def trl_grpo(spec: dict[str, Any], gate: Gate) -> None:
    """TRL's GRPOTrainer without a KL penalty, one rollout with its updates per unit."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    kind, shape = training_kinds()[spec["what"]], Shape(**spec["shape"])
    policy, tokenizer = torch_model(spec["folder"], padding_side="left")
    count = ROLLOUT["prompts"] * ROLLOUT["samples"]
    epochs, accumulation = kind.algorithm.epochs, max(1, count // shape.batch_size)
    first: dict[str, Any] = {}

    class FromTokens(GRPOTrainer):
        """Takes prompts as the numbers of their tokens."""

        def _tokenize_prompts(self, prompts: Sequence[str]) -> Any:
            return [[int(number) for number in p.split()] for p in prompts], None, {}

    def unit_stats(logs: dict[str, float]) -> dict[str, float] | None:
        if "entropy" not in logs:
            return None
        if not first:
            first.update(kl=0.0, score=logs["reward"])  # without a penalty there is no reference
        tokens = count * logs["completions/mean_length"]
        return {"loss": logs["entropy"], "rows": count, "tokens": tokens}

    with tempfile.TemporaryDirectory() as scratch:
        settings = GRPOConfig(
            **common_arguments(scratch, shape.batch_size, learning_rate(kind.adapter)),
            gradient_accumulation_steps=accumulation,
            steps_per_generation=accumulation,
            num_iterations=epochs,
            num_generations=ROLLOUT["samples"],
            max_completion_length=ROLLOUT["max_tokens"],
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            loss_type="grpo",
            lr_scheduler_type="constant",
            max_steps=10**6,
            logging_steps=epochs,
        )
        trainer = FromTokens(
            model=policy,
            args=settings,
            processing_class=tokenizer,
            reward_funcs=characters,
            peft_config=peft_config(policy, kind.adapter),
            train_dataset=Dataset.from_dict(
                {"prompt": [" ".join(map(str, p)) for p in prompts(policy.config.vocab_size, shape.length)]}
            ),
            callbacks=[unit_callback(gate, unit_stats)],
        )
        if gate.open():
            with contextlib.suppress(Finished):
                trainer.train()
    gate.close(device="CPU", version=importlib.metadata.version("trl"), first=first)


def surprise(net: Any, asked: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """Mean negative log-likelihood, in nats per token, of answers under an mlx-lm model."""
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np

    total = 0.0
    for prompt, answer in zip(asked, answers, strict=True):
        logits = net(mx.array([[*prompt, *answer][:-1]]))[0, len(prompt) - 1 :]
        losses = nn.losses.cross_entropy(logits, mx.array(list(answer)))
        total += float(np.array(losses).sum())
    return total / sum(map(len, answers))


def mlx_lm_lora_grpo(spec: dict[str, Any], gate: Gate) -> None:
    """mlx-lm-lora's GRPO without a KL penalty, one rollout with its update per unit.

    Its batch is the prompts: it decodes and trains that many rows at once.
    """
    net, config = mlx_model(Path(spec["folder"]), spec["against"])
    import mlx.core as mx
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.utils import load_tokenizer
    from mlx_lm_lora.trainer import grpo_trainer

    lend_device_facts()
    kind, shape = training_kinds()[spec["what"]], Shape(**spec["shape"])
    train_parts(net, kind.adapter)
    asked = prompts(config["vocab_size"], shape.length)
    sampled: list[tuple[list[int], list[int]]] = []
    generate = grpo_trainer.generate_grpo
    first: dict[str, float] = {}

    def recorded(*args: Any, **kwargs: Any) -> Any:
        completions, texts, indices = generate(*args, **kwargs)
        sampled[:] = [
            (kwargs["prompt_tokens"][i], c.tolist()) for c, i in zip(completions, indices, strict=True)
        ]
        return completions, texts, indices

    class UnitCallback(TrainingCallback):
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            gate.stop()
            if not first:
                first.update(kl=0.0, score=info["train_characters_mean"])
            answers = [answer for _, answer in sampled]
            entropy = surprise(net, [prompt for prompt, _ in sampled], answers)
            gate.report(loss=entropy, rows=len(answers), tokens=sum(map(len, answers)))
            if not gate.open():
                raise Finished

    gate.peak = lambda: mx.get_peak_memory() / 2**30
    mx.eval(net.parameters())
    mx.reset_peak_memory()
    if gate.open():
        grpo_trainer.generate_grpo = recorded
        with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(Finished):
            settings = grpo_trainer.GRPOTrainingArgs(
                batch_size=len(asked),
                group_size=ROLLOUT["samples"],
                max_completion_length=ROLLOUT["max_tokens"],
                beta=0.0,
                epsilon=0.2,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                **mlx_arguments(scratch, config),
            )
            grpo_trainer.train_grpo(
                net,
                None,
                load_tokenizer(Path(spec["folder"])),
                mlx_adam(learning_rate(kind.adapter)),
                [(p, [0], "", "", None) for p in asked],
                reward_funcs=[characters],
                args=settings,
                training_callback=UnitCallback(),
                end_answer_token="",
            )
    gate.close(device=spec["against"], version=importlib.metadata.version("mlx-lm-lora"), first=first)


def mlx_lm_generate(spec: dict[str, Any], gate: Gate) -> None:
    """mlx-lm's own batched generation of every answer, with the log-probabilities that RL needs."""
    net, config = mlx_model(Path(spec["folder"]), spec["against"])
    import mlx.core as mx
    from mlx_lm.generate import batch_generate
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.utils import load_tokenizer

    samples, most = ROLLOUT["samples"], ROLLOUT["max_tokens"]
    asked = prompts(config["vocab_size"], Shape(**spec["shape"]).length)
    rows, tokenizer = [p for p in asked for _ in range(samples)], load_tokenizer(Path(spec["folder"]))
    tokenizer.eos_token_ids = [config["vocab_size"]]  # answers have full length
    gate.peak = lambda: mx.get_peak_memory() / 2**30
    mx.reset_peak_memory()
    while gate.open():
        found = batch_generate(
            net,
            tokenizer,
            rows,
            max_tokens=most,
            sampler=make_sampler(temp=1.0),
            return_token_ids=True,
            return_logprobs=True,
        )
        gate.stop()
        answers = [list(ids) for ids in found.token_ids or ()]
        gate.report(loss=surprise(net, rows, answers), rows=len(answers), tokens=sum(map(len, answers)))
    gate.close(device=spec["against"], version=importlib.metadata.version("mlx-lm"))


def mlx_lm_lora_generate(spec: dict[str, Any], gate: Gate) -> None:
    """The rollout of mlx-lm-lora's GRPO alone, with its own batch of 4 rows at once."""
    net, config = mlx_model(Path(spec["folder"]), spec["against"])
    import mlx.core as mx
    from mlx_lm.utils import load_tokenizer
    from mlx_lm_lora.trainer.grpo_trainer import GRPOTrainingArgs, generate_grpo

    asked = prompts(config["vocab_size"], Shape(**spec["shape"]).length)
    tokenizer = load_tokenizer(Path(spec["folder"]))
    tokenizer.eos_token_ids = [config["vocab_size"]]  # answers have full length
    gate.peak = lambda: mx.get_peak_memory() / 2**30
    mx.reset_peak_memory()
    while gate.open():
        completions, _, indices = generate_grpo(
            net,
            tokenizer,
            asked,
            max_tokens=ROLLOUT["max_tokens"],
            group_size=ROLLOUT["samples"],
            batch_size=GRPOTrainingArgs().batch_size,
            end_token="",
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
        )
        answers = [c.tolist() for c in completions]
        gate.stop()
        entropy = surprise(net, [asked[i] for i in indices], answers)
        gate.report(loss=entropy, rows=len(answers), tokens=sum(map(len, answers)))
    gate.close(device=spec["against"], version=importlib.metadata.version("mlx-lm-lora"))


def unsloth_generate(spec: dict[str, Any], gate: Gate) -> None:
    """The rollout of unsloth-zoo's GRPO alone: its batched generation, asked once for every answer."""
    net, config = mlx_model(Path(spec["folder"]), spec["against"])
    import mlx.core as mx
    from mlx_lm.utils import load_tokenizer

    # The package's own beginning asks for unsloth and for a GPU.
    found = importlib.util.find_spec("unsloth_zoo")
    assert found is not None
    package = types.ModuleType("unsloth_zoo")
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules["unsloth_zoo"] = package
    generation = importlib.import_module("unsloth_zoo.mlx.generate")

    folder, samples, most = Path(spec["folder"]), ROLLOUT["samples"], ROLLOUT["max_tokens"]
    asked = prompts(config["vocab_size"], Shape(**spec["shape"]).length)
    rows, tokenizer = [p for p in asked for _ in range(samples)], load_tokenizer(folder)
    defaults = generation.GenerationDefaults(max_tokens=most, stop_token_ids=(config["vocab_size"],))
    gate.peak = lambda: mx.get_peak_memory() / 2**30
    mx.reset_peak_memory()
    unit = 0
    while gate.open():
        requests = [
            generation.GenerationRequest(
                prompt_token_ids=tuple(prompt),
                max_tokens=most,
                sampling=generation.SamplingParams(temperature=1.0, seed=unit * len(rows) + i),
            )
            for i, prompt in enumerate(rows)
        ]
        results = generation.generate_batch(net, tokenizer, requests, defaults=defaults)
        gate.stop()
        answers, unit = [list(r.token_ids) for r in results], unit + 1
        gate.report(loss=surprise(net, rows, answers), rows=len(answers), tokens=sum(map(len, answers)))
    gate.close(device=spec["against"], version=importlib.metadata.version("unsloth-zoo"))
