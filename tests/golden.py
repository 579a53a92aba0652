"""What every method computed before a change to the code, and a check that it still does, bit for bit.

    python tests/golden.py write     record every loss and the sha256 of the final weights in golden.json
    python tests/golden.py           run the same again and compare

Sums round differently on other processors and with other library releases, so the list holds on the machine
that wrote it; ``tests/test_golden.py`` compares where processor and releases are the same and is skipped
elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_name("golden.json")
TEXTS = Path(__file__).parents[1] / "mlx_posttrain" / "assets" / "base_text.jsonl"
FIGURES = (
    "loss",
    "nll",
    "kl",
    "grad_norm",
    "lr",
    "tokens",
    "eval/loss",
    "eval/score",
    "eval/kl",
    "objective/kl",
    "objective/scores",
    "loss/policy_avg",
    "loss/value_avg",
    "loss/ptx_avg",
    "val/ratio",
    "policy/entropy_avg",
)


def of_stage(stage: str, overrides: str) -> str:
    """The overrides of one stage of a pipeline."""
    return "".join(f"{stage}.{override} " for override in overrides.split())


SHORT = "train.steps=6 train.eval_every=3 sample.count=1 data.limit=160 data.eval_limit=24"
PPO = (
    "train.steps=3 train.eval_every=2 data.limit=64 data.eval_limit=8 rollout.prompts=8 rollout.samples=2 "
    "rollout.max_tokens=16 train.batch_size=4 train.grad_accumulation=2 sample.count=1"
)
GENERATED = "data.split=train data.eval_split=valid"
#: Each case's recipe and overrides; ``{reward}`` is the run of the case of that name, ``{texts}`` plain text.
CASES = {
    "sft": f"demo_sft {SHORT} train.batch_size=8 train.grad_accumulation=2 train.weight_decay=0.01",
    "templates": f"demo_sft {SHORT} data.max_length=160 "
    "data.template=[instruction,plain,chatml,question,dialogue]",
    "token_budget": f"demo_sft {SHORT} train.token_budget=512 train.gradient_checkpointing=true",
    "lora_dropout": f"demo_lora {SHORT} adapter.dropout=0.1 train.grad_accumulation=2",
    "dora": f"demo_lora {SHORT} adapter.kind=dora",
    "qlora": f"demo_lora {SHORT} adapter.quantize=4",
    "kl": f"demo_kl {SHORT}",
    "kl_lora": f"demo_kl {SHORT} adapter.rank=4 kl.direction=reverse kl.cache_gb=0",
    "reward": f"demo_reward {SHORT} model=tiny reward.centering=0.01",
    "reward_lora": f"demo_reward {SHORT} model=tiny adapter.rank=4",
    "ppo_separate": f"demo_ppo {PPO} model=tiny reward=[{{model:{{reward}}}}] critic.kind=separate "
    "kl.controller=adaptive",
    "ppo_shared_ptx": f"demo_ppo {PPO} model=tiny adapter.rank=4 judge=[{{model:{{reward}}}}] "
    "reward=[{function:checker},{model:{reward},weight:0.5}] "
    "ptx.data.source=embedded/tasks ptx.data.limit=32 ptx.data.template=question ptx.data.max_length=96",
    "distill": f"demo_distill {SHORT} think.questions=4 think.max_tokens=24 adapter.rank=4",
    "pretrain": f"00_pretrain_tiny {SHORT} data.source={{texts}} data.limit=40 data.holdout=4 "
    "data.max_length=64 pretrain.vocab_size=400 pretrain.layers=2 pretrain.heads=2 pretrain.width=32 "
    "pretrain.context=64 pretrain.repeated=0.2 train.batch_size=4 train.warmup=0",
    "pipeline": "07_rlhf "
    + of_stage("sft", f"model=tiny data.source=embedded/tasks {SHORT} data.format=auto sample.max_tokens=8")
    + of_stage("reward", f"data.source=embedded/preferences {GENERATED} {SHORT}")
    + of_stage("ppo", f"data.source=embedded/tasks {GENERATED} {PPO}"),
}


def environment() -> dict[str, str]:
    """What rounding depends on: the processor and the libraries' releases."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        **{
            name: metadata.version(name)
            for name in ("mlx", "mlx-lm", "torch", "transformers", "peft", "numpy", "scipy")
        },
    }


def figures(run: Path) -> list[list[Any]]:
    """Of every record of a run the step and the figures that are compared."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]
    return [[r["step"], *([name, r[name]] for name in FIGURES if name in r)] for r in records]


def digest(folder: Path) -> str:
    """sha256 over all tensors of a folder, by name."""
    from safetensors.numpy import load_file

    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        for name, array in sorted(load_file(file).items()):
            found.update(name.encode() + str(array.shape).encode() + array.tobytes())
    return found.hexdigest()


def record(case: str, engine: str, folder: Path) -> dict[str, Any]:
    """Run one case; every run directory that it leaves, with its figures and the hash of its weights."""
    from mlx_posttrain.cli import app

    output = folder / f"{case}-{engine}"
    places = {"{reward}": str(folder / f"reward-{engine}"), "{texts}": str(TEXTS)}
    name, *overrides = CASES[case].split()
    for place, path in places.items():
        overrides = [text.replace(place, path) for text in overrides]
    overrides = [text.replace(":", ": ") for text in overrides]  # YAML wants the space, the list above none
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        app(args=["run", name, *overrides, f"engine={engine}", f"output={output}"], standalone_mode=False)
    runs = sorted(path.parent for path in output.rglob("metrics.jsonl"))
    return {
        run.relative_to(folder).as_posix(): {"weights": digest(run / "final"), "figures": figures(run)}
        for run in runs
    }


def record_all(cases: list[str] | None = None) -> dict[str, Any]:
    """All cases on all engines that are installed."""
    from mlx_posttrain import engines

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for engine in engines.available():
            for case in CASES:
                if (cases and case not in cases) or (case == "qlora" and engine != "mlx"):
                    continue
                found |= record(case, engine, Path(scratch))
                print(f"{case} on {engine}", file=sys.stderr)
    return found


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not the same, a line each."""
    found = [f"{name}: was not run" for name in sorted(set(before) - set(now))]
    for name in sorted(set(before) & set(now)):
        if before[name]["weights"] != now[name]["weights"]:
            found.append(f"{name}: other weights")
        for old, new in zip(before[name]["figures"], now[name]["figures"], strict=False):
            if old != new:
                found.append(f"{name}: {old} was, {new} is")
                break
        if len(before[name]["figures"]) != len(now[name]["figures"]):
            found.append(
                f"{name}: {len(before[name]['figures'])} records were, {len(now[name]['figures'])} are"
            )
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        LIST.write_text(json.dumps({"environment": environment(), "runs": record_all()}, indent=0) + "\n")
    else:
        chosen = sys.argv[1:] or None
        stored = json.loads(LIST.read_text())
        if stored["environment"] != environment():
            sys.exit(f"golden.json was written elsewhere: {stored['environment']}; this is {environment()}")
        now = record_all(chosen)
        before = {k: v for k, v in stored["runs"].items() if not chosen or k in now}
        lines = differences(before, now)
        print("\n".join(lines) or f"all {len(before)} runs as before")
        sys.exit(bool(lines))
