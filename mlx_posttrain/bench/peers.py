"""The same rows through other trainers that are installed: mlx-lm's, and TRL's for supervised training and PPO, each with its own defaults.

What is set: the batch size, the learning rate, float32, no dropout, completion-only loss. Batches, padding, masks and averages are theirs.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from mlx_posttrain.bench.material import Shape, rows
from mlx_posttrain.bench.worker import LEARNING_RATE, ROLLOUT, Gate, prompts

#: What each peer can do.
CAN = {"mlx-lm": ("sft", "lora"), "trl": ("sft", "lora", "ppo")}


def installed() -> dict[str, str]:
    """Peers by name, with their versions."""
    return {name: importlib.metadata.version(name) for name in CAN if importlib.util.find_spec(name.replace("-", "_"))}


class _Finished(Exception):
    """Raised inside a peer's loop to leave it."""


def mlx_lm(spec: dict[str, Any], gate: Gate) -> None:
    """mlx-lm's own loop; its ``full`` trains the blocks only, its LoRA is put on every block's attention and MLP projections as ours is."""
    from mlx_posttrain import blas

    blas.load()
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    if not mx.is_available(mx.Device(mx.gpu)):
        mx.set_default_device(mx.cpu)
    folder, shape = Path(spec["folder"]), Shape(**spec["shape"])
    net, config = load_model(folder)
    net.freeze()
    if spec["what"] == "lora":
        keys = {"rank": 16, "dropout": 0.0, "scale": 2.0, "keys": ["attn.c_attn", "attn.c_proj", "mlp.c_proj"]}
        linear_to_lora_layers(net, len(net.layers), keys)
    else:
        for layer in net.layers:
            layer.unfreeze()
    examples = rows(shape, config["vocab_size"])
    data = [(list(e.tokens), sum(not t for t in e.trained)) for e in examples]
    tokens = float(sum(sum(e.trained) for e in examples))
    steps = len(data) // shape.batch_size
    losses: list[tuple[float, float]] = []  # of each step, and by how many tokens: its own mean is one of batches, ours one of tokens

    class Pace(TrainingCallback):
        seen = 0.0

        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            losses.append((info["train_loss"], info["trained_tokens"] - self.seen))
            self.seen = info["trained_tokens"]
            if len(losses) == steps:
                mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
                gate.report(loss=mean, rows=steps * shape.batch_size, tokens=tokens)
                losses.clear()
                if not gate.open():
                    raise _Finished

    gate.peak = lambda: mx.get_peak_memory() / 2**30
    mx.eval(net.parameters())
    mx.reset_peak_memory()
    if gate.open():
        with tempfile.TemporaryDirectory() as scratch:
            settings = TrainingArgs(
                batch_size=shape.batch_size, iters=10**6, steps_per_report=1, steps_per_eval=10**9, steps_per_save=10**9,
                max_seq_length=config["n_positions"], adapter_file=f"{scratch}/adapters.safetensors",
            )  # fmt: skip
            with contextlib.suppress(_Finished):
                # Its recipes leave Adam's bias correction off, which makes the first steps three times as long: losses would part.
                adam = optim.AdamW(learning_rate=LEARNING_RATE, weight_decay=0.0, bias_correction=True)
                train(net, adam, data, args=settings, training_callback=Pace())
    gate.close(device="mlx-lm", version=importlib.metadata.version("mlx-lm"))


def trl(spec: dict[str, Any], gate: Gate) -> None:
    """TRL's SFTTrainer, or the PPOTrainer of releases that still have one."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    os.environ.setdefault("WANDB_DISABLED", "true")
    (_trl_ppo if spec["what"] == "ppo" else _trl_sft)(spec, gate)


def _pace(gate: Gate, figures: Any) -> Any:
    """A callback for which each line of the trainer's log is a unit; ``figures`` makes the unit's of it, None where it is another line."""
    from transformers import TrainerCallback

    class Pace(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            found = figures(logs or {})
            if found is not None:
                gate.report(**found)
                if not gate.open():
                    raise _Finished

    return Pace()


def _trl_sft(spec: dict[str, Any], gate: Gate) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    shape = Shape(**spec["shape"])
    net = AutoModelForCausalLM.from_pretrained(spec["folder"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    tokenizer = AutoTokenizer.from_pretrained(spec["folder"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    examples = rows(shape, net.config.vocab_size)
    labels = [[token if trained else -100 for token, trained in zip(e.tokens, e.trained, strict=True)] for e in examples]
    data = Dataset.from_dict({"input_ids": [list(e.tokens) for e in examples], "labels": labels})
    adapter = None
    if spec["what"] == "lora":
        from peft import LoraConfig

        adapter = LoraConfig(r=16, lora_alpha=32, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    tokens = float(sum(sum(e.trained) for e in examples))
    steps = len(examples) // shape.batch_size

    def figures(logs: dict[str, float]) -> dict[str, float] | None:
        return {"loss": logs["loss"], "rows": len(examples), "tokens": tokens} if "loss" in logs else None

    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch, per_device_train_batch_size=shape.batch_size, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
            max_steps=10**6, logging_steps=steps, save_strategy="no", report_to="none", use_cpu=True, bf16=False, fp16=False,
            max_length=None, completion_only_loss=True, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True},
            disable_tqdm=True, packing=False,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=net, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=adapter, callbacks=[_pace(gate, figures)]
        )
        if gate.open():
            with contextlib.suppress(_Finished):
                trainer.train()
    gate.close(device="trl", version=importlib.metadata.version("trl"))


def _trl_ppo(spec: dict[str, Any], gate: Gate) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    batch_size = spec["shape"]["batch_size"]
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    policy, reference = (AutoModelForCausalLM.from_pretrained(spec["folder"], **off) for _ in range(2))
    reward, value = (AutoModelForSequenceClassification.from_pretrained(spec["reward"], num_labels=1, **off) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(spec["folder"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    count = ROLLOUT["prompts"] * ROLLOUT["samples"]
    asked = [p for p in prompts(policy.config.vocab_size) for _ in range(ROLLOUT["samples"])]
    data = Dataset.from_dict({"input_ids": asked})

    def figures(logs: dict[str, float]) -> dict[str, float] | None:
        if "objective/entropy" not in logs:
            return None
        return {"loss": logs["objective/entropy"] / ROLLOUT["max_tokens"], "rows": count, "tokens": count * ROLLOUT["max_tokens"]}

    with tempfile.TemporaryDirectory() as scratch:
        settings = PPOConfig(
            output_dir=scratch, per_device_train_batch_size=batch_size, gradient_accumulation_steps=max(1, count // batch_size), num_ppo_epochs=2,
            num_mini_batches=1, total_episodes=10**6, response_length=ROLLOUT["max_tokens"], temperature=1.0, learning_rate=LEARNING_RATE,
            num_sample_generations=0, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, fp16=False,
            disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = PPOTrainer(
            args=settings, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
            train_dataset=data, callbacks=[_pace(gate, figures)],
        )  # fmt: skip
        if gate.open():
            with contextlib.suppress(_Finished):
                trainer.train()
    gate.close(device="trl", version=importlib.metadata.version("trl"))


WORK = {"mlx-lm": mlx_lm, "trl": trl}
