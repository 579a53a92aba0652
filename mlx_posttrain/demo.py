"""``mlx-posttrain demo``: all methods on the embedded tiny model (recipes/demo.yaml), with a summary.

Offline and within minutes: SFT, templates, LoRA, KL-SFT, a reward model, PPO, DPO and reasoning, measured
on the same held-out rows in one report; then one adapter is exported for PEFT and the base converted for
mlx-lm.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

from mlx_posttrain import config, engines, jsonl, methods, runs
from mlx_posttrain.console import Interrupted
from mlx_posttrain.convert.files import read_json
from mlx_posttrain.errors import UserError
from mlx_posttrain.generation.model import LoadedModel
from mlx_posttrain.models.export import export
from mlx_posttrain.models.source import locate
from mlx_posttrain.runs import lock


def demo(output: Path, engine: str = "auto", seed: int = 0) -> None:
    """Run the demo, or the rest of an interrupted one, and print the results.

    Raises UserError if ``output`` is in use.
    """
    started = time.monotonic()
    name = engines.get(engine).name
    chosen = methods.load_recipe("demo", [f"output={output}", f"engine={name}", f"seed={seed}"])
    try:
        _run(output, chosen, name)
    except Interrupted as error:  # the pipeline's advice would skip what is printed below
        raise Interrupted(
            str(error).replace(f"--resume {output.absolute()}", "the same `mlx-posttrain demo`")
        ) from None
    report = output / "report" / "final"
    _print_reward_model(output / "reward")
    _print_ppo(output / "ppo")
    _print_dpo(output / "dpo")
    _print_thinking(output / "distill")
    adapter = output / "lora-peft"
    # an adapter left by an interrupted demo is written again
    export(output / "lora", adapter, "peft", force=True)
    print(f"\nThe LoRA adapter is in {adapter}, in PEFT's format." + _peft_check(output / "lora", adapter))
    if name == "mlx":
        from mlx_posttrain.convert.weights import convert

        print(
            f"The base is in {convert('tiny', output / 'tiny-mlx', to='mlx').path}, in the format of mlx-lm."
        )
    print(
        f"\n{time.monotonic() - started:.0f} s in all. Open the report in a browser:\n"
        f"  {(report / 'report.html').absolute()}\n"
        "Then:\n"
        f"  mlx-posttrain chat {output}/sft\n"
        "  mlx-posttrain run 03_lora                                   GPT-2 124M from the hub\n"
        "  mlx-posttrain run 03_lora data.source=YOUR.jsonl            your own rows\n"
        "  mlx-posttrain run journey                                   the same journey on GPT-2 124M\n"
        "  mlx-posttrain recipes                                       everything else"
    )


def _run(output: Path, chosen: config.Recipe, engine: str) -> None:
    """Run the pipeline in a new folder, or continue that of the same demo.

    Raises UserError for a folder with anything else.
    """
    if not runs.is_run(output):
        if output.exists() and any(path.name != lock.NAME for path in output.iterdir()):
            raise UserError(f"{output} exists and is not empty: choose another folder with --output")
        methods.run(chosen)
        return
    _, raw = runs.reopen(output)
    last = output / ("tiny-mlx" if raw.get("engine") == "mlx" else "lora-peft")
    if any(raw.get(key) != getattr(chosen, key) for key in ("method", "description")) or last.exists():
        what = "an earlier demo" if last.exists() else "another run"
        raise UserError(f"{output} holds {what}: delete it, or choose another folder with --output")
    if (raw["engine"], raw["seed"]) != (engine, chosen.seed):
        options = f"--engine {raw['engine']} --seed {raw['seed']}"
        raise UserError(
            f"{output} holds an unfinished demo: continue it with {options}, delete it, or choose "
            "another folder with --output"
        )
    if not all(runs.Run(output / stage).finished for stage in raw["stages"]):
        whole = methods.parse_recipe({**raw, "output": str(output)}, str(output / "recipe.yaml"))
        methods.run(whole, resume=True)


def _print_reward_model(run: Path) -> None:
    report = read_json(run / "report.json")
    low, high = (f"{report['accuracy'][i]:.0%}" for i in (1, 2))
    print(
        f"The reward model prefers the better of two held-out answers in {report['accuracy'][0]:.1%} "
        f"[{low}, {high}] of pairs; "
        f"taking the longer one is right in {report['longer'][0]:.1%}, a bag of words in "
        f"{report['bag_of_words'][0]:.1%}."
    )


def _print_ppo(run: Path) -> None:
    records = jsonl.read(run / "metrics.jsonl")
    curve = [r["objective/scores"] for r in records if "objective/scores" in r]
    evaluations = [r for r in records if "eval/score" in r]
    before, after = evaluations[0], evaluations[-1]
    print(
        "\nPPO on a model that imitates good and bad answers alike; mean score of each step's answers, in "
        "standard deviations of its own:\n  " + sparkline(curve)
    )
    print("  held-out prompts, sampled      before     after")
    for key, label, form in (
        ("eval/score", "score", "{:+.2f}"),
        ("eval/kl", "KL from the start, nats", "{:.2f}"),
        ("eval/length", "length, tokens", "{:.1f}"),
        ("eval/accuracy", "right answers", "{:.1%}"),
        ("eval/eos_share", "ended by itself", "{:.0%}"),
    ):
        print(f"  {label:24} {form.format(before[key]):>12} {form.format(after[key]):>9}")
    samples = jsonl.read(run / "samples.jsonl")
    first, last = ([r for r in samples if r["step"] == step] for step in (0, samples[-1]["step"]))
    for a, b in zip(first, last, strict=True):
        print(f"\n  {' '.join(a['prompt'].split())}")
        for label, r in (("before", a), ("after", b)):
            print(f"    {label:8} {r['score']:+.2f}  {' '.join(r['answer'].split())[:90]}")


def _print_dpo(run: Path) -> None:
    records = [r for r in jsonl.read(run / "metrics.jsonl") if "eval/rewards/accuracies" in r]
    before, after = records[0], records[-1]
    print(
        f"\nDPO from the same start, on pairs alone: of held-out pairs the better answer gained more "
        f"likelihood in {after['eval/rewards/accuracies']:.0%}; the log-likelihood of better answers went "
        f"from {before['eval/logps/chosen']:.1f} to {after['eval/logps/chosen']:.1f} nats, of worse ones "
        f"from {before['eval/logps/rejected']:.1f} to {after['eval/logps/rejected']:.1f}."
    )


def _print_thinking(run: Path) -> None:
    report = read_json(run / "report.json")
    share = {
        name: f"{report[name][0]:.0%} [{report[name][1]:.0%}, {report[name][2]:.0%}]"
        for name in ("accuracy", "accuracy_at_once")
    }
    print(
        f"\nReasoning: {share['accuracy']} of {report['questions']} held-out questions right after "
        f"thinking, {share['accuracy_at_once']} when "
        "made to answer at once."
    )
    (example, *_) = jsonl.read(run / "answers.jsonl")
    print(f"  {' '.join(example['question'].split())}\n    " + example["thinking"].replace("\n", "\n    "))


def sparkline(values: Sequence[float]) -> str:
    """Return a row of bars, one per value, between the first and the last value as numbers."""
    low, high = min(values), max(values)
    bars = "".join("▁▂▃▄▅▆▇█"[int(7 * (v - low) / (high - low or 1))] for v in values)
    return f"{values[0]:+.2f} {bars} {values[-1]:+.2f}"


def _peft_check(run: Path, adapter: Path) -> str:
    """Return a sentence on how much the logits of the adapter, reloaded through PEFT, differ from the run's.

    Without torch and PEFT the sentence asks to install them.
    """
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("peft")):
        return " (Install torch and peft to reload it here.)"
    from mlx_posttrain.engines.torch.peft_check import peft_difference

    model = LoadedModel(run)
    difference = peft_difference(model.model, locate(run).folder, adapter)
    return f" Reloaded by PEFT, its logits differ from the run's own by at most {difference:.1e}."
