"""Names of recipe keys: what other trainers call them, and what this one called them once."""

from __future__ import annotations

import copy
from typing import Any

#: Keys that had another name once; run folders made then are read under the present one.
RENAMED = {
    "train.clip": "train.max_grad_norm",
    "train.accumulate": "train.grad_accumulation",
    "ppo.clip": "ppo.clip_range",
    "ppo.value_clip": "ppo.clip_range_value",
    "reward.centring": "reward.centering",
}


def present_names(raw: dict[str, Any]) -> dict[str, Any]:
    """A run folder's recipe with its keys under their present names.

    Those of a pipeline's stages too; see :data:`RENAMED`.
    """
    raw = copy.deepcopy(raw)
    for old, new in RENAMED.items():
        section, key = old.split(".")
        if isinstance(raw.get(section), dict) and key in raw[section]:
            raw[section][new.split(".")[1]] = raw[section].pop(key)
        if old in raw:  # as a pipeline's `set` writes it
            raw[new] = raw.pop(old)
    for stage in (raw.get("stages") or {}).values() if isinstance(raw.get("stages"), dict) else ():
        for part in ("recipe", "set"):
            if isinstance(stage, dict) and isinstance(stage.get(part), dict):
                stage[part] = present_names(stage[part])
    return raw


#: What other trainers (TRL and transformers, mlx-lm, axolotl), and this one once, call a key of ours.
OTHER_NAMES = {
    "model": "model_name_or_path model_name base_model pretrained_model_name_or_path",
    "output": "output_dir adapter_path save_dir",
    "dtype": "torch_dtype",
    "log": "report_to",
    "data.source": "dataset_name dataset data_path train_file dataset_path",
    "data.sources": "datasets dataset_mixer",
    "data.sources.source": "path",
    "data.sources.format": "type",
    "data.config": "dataset_config dataset_config_name",
    "data.split": "dataset_train_split train_split",
    "data.eval_split": "dataset_test_split valid_split",
    "data.holdout": "val_set_size validation_split_percentage",
    "data.eval_limit": "val_batches max_eval_samples",
    "data.limit": "max_train_samples max_samples",
    "data.max_length": "max_seq_length max_seq_len cutoff_len sequence_len seq_length model_max_length",
    "data.template": "chat_template prompt_template",
    "data.train_on": "train_on_inputs completion_only_loss assistant_only_loss mask_prompt",
    "data.pack": "packing sample_packing",
    "data.special_tokens": "additional_special_tokens new_special_tokens add_tokens",
    "data.system": "system_prompt default_system",
    "train.lr": "learning_rate",
    "train.epochs": "num_train_epochs num_epochs",
    "train.steps": "max_steps iters total_episodes num_train_steps",
    "train.batch_size": "per_device_train_batch_size micro_batch_size mini_batch_size",
    "train.grad_accumulation": "gradient_accumulation_steps grad_accumulation_steps accumulate",
    "train.max_grad_norm": "gradient_clipping grad_clip clip",
    "train.schedule": "lr_scheduler_type lr_scheduler lr_schedule",
    "train.warmup": "warmup_ratio warmup_steps",
    "train.weight_decay": "wd",
    "train.beta1": "adam_beta1",
    "train.beta2": "adam_beta2",
    "train.eps": "adam_epsilon adam_eps",
    "train.eval_every": "eval_steps steps_per_eval",
    "train.save_every": "save_steps",
    "train.keep": "save_total_limit",
    "train.early_stop": "early_stopping_patience",
    "train.precision": "bf16 fp16 mixed_precision",
    "train.gradient_checkpointing": "grad_checkpoint",
    "adapter.rank": "r lora_r lora_rank",
    "adapter.alpha": "lora_alpha scale",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "target_modules lora_target_modules lora_modules num_layers lora_layers",
    "adapter.kind": "use_dora peft_use_dora fine_tune_type",
    "adapter.rslora": "use_rslora",
    "adapter.quantize": "load_in_4bit load_in_8bit q_bits bits",
    "kl.beta": "kl_coef init_kl_coef beta",
    "ppo.epochs": "num_ppo_epochs ppo_epochs",
    "ppo.clip_range": "cliprange clip epsilon",
    "ppo.clip_range_value": "cliprange_value value_clip",
    "reward.centering": "center_rewards_coefficient centring",
    "rollout.samples": "num_generations group_size",
    "rollout.max_tokens": "response_length max_new_tokens max_completion_length",
}
_OURS: dict[str, list[str]] = {
    other: [ours for ours, names in OTHER_NAMES.items() if other in names.split()]
    for names in OTHER_NAMES.values()
    for other in names.split()
}


def elsewhere_called(name: str) -> list[str]:
    """Our keys that other trainers call ``name``."""
    return _OURS.get(name, [])
