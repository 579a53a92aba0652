"""Other trainers that the benchmark can time beside our engines, and where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from mlx_posttrain.bench import baseline_pairs, baseline_rollouts, baseline_rows
from mlx_posttrain.bench.harness import Gate


class Baseline(NamedTuple):
    """Another trainer.

    engine: ours on the library that it shares. packages: modules that it needs. install: what pip is asked
    for. kinds: the function that does each kind of work.
    """

    engine: str
    packages: tuple[str, ...]
    install: str
    kinds: Mapping[str, Callable[[dict[str, Any], Gate], None]]


def _each(function: Callable[..., None], *kinds: str) -> dict[str, Callable[..., None]]:
    return dict.fromkeys(kinds, function)


_TRL = (("trl", "accelerate", "peft"), "trl==1.16.0 accelerate peft")
BASELINES = {
    "mlx-lm": Baseline(
        "mlx",
        ("mlx_lm",),
        "mlx-lm",
        _each(baseline_rows.mlx_lm, "sft", "lora") | _each(baseline_rollouts.mlx_lm_generate, "generate"),
    ),
    "mlx-lm-lora": Baseline(
        "mlx",
        ("mlx_lm_lora",),
        "mlx-lm-lora==5.10.2",
        _each(baseline_pairs.mlx_lm_lora, "dpo", "dpo-lora")
        | _each(baseline_rollouts.mlx_lm_lora_grpo, "grpo", "grpo-lora")
        | _each(baseline_rollouts.mlx_lm_lora_generate, "generate"),
    ),
    "unsloth-zoo": Baseline(
        "mlx",
        ("unsloth_zoo",),
        "--no-deps unsloth-zoo==2026.10.9",
        _each(baseline_rollouts.unsloth_generate, "generate"),
    ),
    "transformers": Baseline(
        "torch",
        ("torch", "accelerate", "peft"),
        "torch accelerate peft",
        _each(baseline_rows.transformers, "sft", "lora"),
    ),
    "trl": Baseline(
        "torch",
        *_TRL,
        _each(baseline_rows.trl, "sft", "lora")
        | _each(baseline_pairs.trl, "dpo", "dpo-lora", "kto", "kto-lora")
        | _each(baseline_rollouts.trl_grpo, "grpo", "grpo-twice", "grpo-lora")
        | _each(baseline_rollouts.trl_ppo, "ppo"),
    ),
    # the reference computed before training
    "trl-kept": Baseline(
        "torch", *_TRL, _each(partial(baseline_pairs.trl, kept=True), "dpo", "dpo-lora", "kto", "kto-lora")
    ),
}


def installed(engines: Sequence[str], what: Sequence[str]) -> dict[str, str]:
    """The installed baselines of some kinds of work on the devices of ``engines``.

    Each with the engine that it is compared with, for example ``{"mlx-lm-cpu": "mlx-cpu"}``.
    """
    pairs: dict[str, str] = {}
    for name, baseline in _wanted(engines, what).items():
        if not _absent(baseline):
            pairs |= {
                f"{name}-{e.rpartition('-')[2]}": e for e in engines if e.startswith(f"{baseline.engine}-")
            }
    return pairs


def missing(engines: Sequence[str], what: Sequence[str]) -> list[str]:
    """A line for each package set that a baseline of these kinds of work lacks: how to install it."""
    lacking: dict[str, str] = {}
    for name, baseline in _wanted(engines, what).items():
        if absent := _absent(baseline):
            line = f"{name} is not timed, {', '.join(absent)} missing: pip install {baseline.install}"
            lacking.setdefault(baseline.install, line)
    return list(lacking.values())


def _wanted(engines: Sequence[str], what: Sequence[str]) -> dict[str, Baseline]:
    return {
        name: baseline
        for name, baseline in BASELINES.items()
        if baseline.kinds.keys() & set(what) and any(e.startswith(f"{baseline.engine}-") for e in engines)
    }


def _absent(baseline: Baseline) -> list[str]:
    return [package for package in baseline.packages if importlib.util.find_spec(package) is None]


def baseline_name(name: str) -> str:
    """The key in ``BASELINES`` of a name that ``installed`` returns: the name without its device."""
    return name.rpartition("-")[0]


def find_baseline(name: str, what: str) -> Callable[[dict[str, Any], Gate], None] | None:
    """The function by which a baseline does a kind of work; None for one of our engines."""
    baseline = BASELINES.get(baseline_name(name))
    return None if baseline is None else baseline.kinds[what]
