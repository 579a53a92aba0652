"""``mlx-posttrain demo``: the embedded tiny model tuned three ways, and what each way did, measured on the same held-out rows.

Offline and within minutes: convert, full SFT, LoRA and KL-SFT on the embedded tasks, one comparison, one export, and from the SFT model a
reward model and PPO.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain import engines, export, methods, recipe
from mlx_posttrain.data import encode, formats, tasks
from mlx_posttrain.data.types import Conversation
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluate import measure
from mlx_posttrain.evaluate.metrics import Interval, bootstrap, paired_bootstrap, perplexity
from mlx_posttrain.loading import open_model
from mlx_posttrain.progress import say
from mlx_posttrain.runs import read_jsonl

STAGES = {"SFT": "demo_sft", "LoRA": "demo_lora", "KL-SFT": "demo_kl"}
TEMPLATE = "question"  # the shortest: on a small machine every token of the prompt counts
# Of the 30 families, those that a model of this size learns something of in a minute; `data.families: null` in a recipe takes all.
FAMILIES = ["quotes", "polite_request", "completion", "compare_sizes", "true_false", "pick_kind", "past_tense", "reading"]
ROWS = 160  # held-out rows of each kind
ANSWER_TOKENS = 40
OPENING_WORDS = 12  # of each base text, continued greedily to see whether the model repeats itself
CONTINUATION_TOKENS = 64


@dataclass(frozen=True)
class Measured:
    """What one model did on the held-out rows; per-row values stay for paired intervals."""

    name: str
    unseen_content: np.ndarray
    unseen_phrasing: np.ndarray
    response: measure.RowLoss
    base_text: measure.RowLoss
    repetition: np.ndarray
    answers: list[str]


def measured(name: str, model: Any, tokenizer: Any) -> Measured:
    """Ask, score and read: the same rows, template and greedy decoding for every model."""
    content, phrasing = (tasks.load(split, limit=ROWS, families=FAMILIES) for split in ("valid", "phrasing"))
    both = measure.answers(model, tokenizer, content + phrasing, template=TEMPLATE, max_tokens=ANSWER_TOKENS)
    right = measure.task_accuracy(content + phrasing, both)
    parsed, _ = formats.parse_rows(content, source="embedded/tasks")
    conversations = [row for row in parsed if isinstance(row, Conversation)]
    examples, _ = encode.encode_all(conversations, tokenizer, templates=[TEMPLATE], max_length=256)
    texts = measure.base_text()
    return Measured(
        name,
        right[: len(content)],
        right[len(content) :],
        measure.response_loss(model, examples),
        measure.base_text_loss(model, tokenizer, texts),
        measure.repetition(model, tokenizer, [" ".join(t.split()[:OPENING_WORDS]) for t in texts], max_tokens=CONTINUATION_TOKENS),
        [a.text for a in both],
    )


def demo(output: Path, engine: str = "auto", seed: int = 0) -> None:
    """Run it all and print what came out. Raises UserError when ``output`` is in use."""
    begun = time.monotonic()
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} holds an earlier demo: delete it, or choose another folder with --output")
    name = engines.get(engine).name
    if name == "mlx":
        from mlx_posttrain.convert.weights import convert

        done = convert("tiny", output / "tiny-mlx", to="mlx")
        say(f"converted the embedded model to {done.path} ({done.tensors} tensors), which mlx-lm loads")
    results = []
    model, tokenizer, _ = open_model("tiny", name)
    results.append(measured("base", model, tokenizer))
    for stage, recipe_name in STAGES.items():
        folder = _run(stage, recipe_name, output, name, seed)
        model, tokenizer, _ = open_model(folder, name)
        results.append(measured(stage, model, tokenizer))
    _print_table(results)
    _print_samples(results)
    (output / "comparison.json").write_text(json.dumps([_summary(r) for r in results], indent=2) + "\n")
    _rlhf(output, name, seed)
    adapter = output / "lora-peft"
    export.export(output / "lora", adapter, "peft")
    print(f"\nThe LoRA adapter is in {adapter}, in PEFT's format." + _peft_check(output / "lora", adapter))
    print(
        f"\n{time.monotonic() - begun:.0f} s in all. Next:\n"
        f"  mlx-posttrain chat {output}/sft\n"
        "  mlx-posttrain run 03_lora                                   GPT-2 124M from the hub\n"
        "  mlx-posttrain run 03_lora data.source=YOUR.jsonl            your own rows\n"
        "  mlx-posttrain recipes                                       everything else"
    )


def _run(stage: str, recipe_name: str, output: Path, engine: str, seed: int, *more: str) -> Path:
    """Run one of the demo's recipes; returns its run directory."""
    folder = output / recipe_name.removeprefix("demo_")
    say(f"\n{stage}: " + shlex.join(["mlx-posttrain", "run", recipe_name, f"output={folder}", *more]))
    chosen = recipe.load(recipe_name, [f"output={folder}", f"engine={engine}", f"seed={seed}", *more])
    methods.get(chosen.method).run(chosen)
    return folder


def _rlhf(output: Path, engine: str, seed: int) -> None:
    """A reward model from pairs; a model that imitates good and bad answers alike; PPO, which has to find out which are which."""
    sft = output / "sft"
    reward = _run("Reward model", "demo_reward", output, engine, seed, f"model={sft}")
    report = json.loads((reward / "report.json").read_text())
    low, high = (f"{report['accuracy'][i]:.0%}" for i in (1, 2))
    print(
        f"\nThe reward model prefers the better of two held-out answers in {report['accuracy'][0]:.1%} [{low}, {high}] of pairs; "
        f"taking the longer one is right in {report['longer'][0]:.1%}, a bag of words in {report['bag_of_words'][0]:.1%}."
    )
    crowd = _run("A model of mixed answers", "demo_crowd", output, engine, seed)
    ppo = _run("PPO", "demo_ppo", output, engine, seed, f"model={crowd}", f"reward=[{{model: {json.dumps(str(reward))}}}]")
    records = read_jsonl(ppo / "metrics.jsonl")
    curve = [r["objective/scores"] for r in records if "objective/scores" in r]
    evaluations = [r for r in records if "eval/score" in r]
    before, after = evaluations[0], evaluations[-1]
    print(
        "\nPPO on a model that imitates good and bad answers alike; mean score of each step's answers, in standard deviations of its own:\n  "
        + sparkline(curve)
    )
    print("  held-out prompts, sampled      before     after")
    for key, label, form in (
        ("eval/score", "score", "{:+.2f}"), ("eval/kl", "KL from the start, nats", "{:.2f}"), ("eval/length", "length, tokens", "{:.1f}"),
        ("eval/accuracy", "right answers", "{:.1%}"), ("eval/eos_share", "ended by itself", "{:.0%}"),
    ):  # fmt: skip
        print(f"  {label:24} {form.format(before[key]):>12} {form.format(after[key]):>9}")
    said = read_jsonl(ppo / "samples.jsonl")
    first, last = ([r for r in said if r["step"] == step] for step in (0, said[-1]["step"]))
    for a, b in zip(first, last, strict=True):
        print(f"\n  {' '.join(a['prompt'].split())}")
        for label, r in (("before", a), ("after", b)):
            print(f"    {label:8} {r['score']:+.2f}  {' '.join(r['answer'].split())[:90]}")


def sparkline(values: Sequence[float]) -> str:
    """A row of bars, one a value, with the first and the last value beside it."""
    low, high = min(values), max(values)
    bars = "".join("▁▂▃▄▅▆▇█"[int(7 * (v - low) / (high - low or 1))] for v in values)
    return f"{values[0]:+.2f} {bars} {values[-1]:+.2f}"


def _summary(r: Measured) -> dict[str, Any]:
    return {
        "name": r.name,
        "unseen_content": float(r.unseen_content.mean()),
        "unseen_phrasing": float(r.unseen_phrasing.mean()),
        "response_loss": r.response.mean,
        "base_text_perplexity": perplexity(*r.base_text),
        "seq_rep_4": float(np.nanmean(r.repetition)),
    }


def _percent(interval: Interval) -> str:
    return f"{interval.mean:.1%} [{interval.low:.0%}, {interval.high:.0%}]"


def _print_table(results: list[Measured]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="\nThe same held-out rows, template and greedy decoding for all (95 % bootstrap intervals)")
    for heading in (
        "",
        "right answers:\nunseen content",
        "right answers:\nunseen phrasing",
        "response\nloss",
        "base-text\nperplexity",
        "seq-rep-4\n(repetition)",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for r in results:
        table.add_row(
            r.name, _percent(bootstrap(r.unseen_content)), _percent(bootstrap(r.unseen_phrasing)), f"{r.response.mean:.3f}",
            f"{perplexity(*r.base_text):.1f}", f"{np.nanmean(r.repetition):.3f}",
        )  # fmt: skip
    # A pipe or a file has no width of its own; 120 keeps every column readable.
    Console(width=None if Console().is_terminal else 120).print(table)
    base, sft, _, kl = results
    gain = paired_bootstrap(sft.unseen_content, base.unseen_content)
    print(f"SFT answers {gain.mean:+.1%} [{gain.low:+.1%}, {gain.high:+.1%}] more of the unseen contents than the base.")
    less = paired_bootstrap(kl.base_text.per_token, sft.base_text.per_token, weights=sft.base_text.tokens)
    print(
        f"Forgetting: base-text perplexity {perplexity(*base.base_text):.1f} before, {perplexity(*sft.base_text):.1f} after SFT, "
        f"{perplexity(*kl.base_text):.1f} after KL-SFT; "
        f"KL-SFT against SFT {less.mean:+.3f} [{less.low:+.3f}, {less.high:+.3f}] nats per token."
    )


def _print_samples(results: list[Measured]) -> None:
    rows = tasks.load("valid", limit=ROWS, families=FAMILIES)
    families: dict[str, int] = {}
    for i, row in enumerate(rows):  # the first row of each family, three families spread over the list
        families.setdefault(row["family"], i)
    chosen = sorted(families.values())[:: max(1, len(families) // 3)][:3]
    print("\nThree held-out questions, answered:")
    for i in chosen:
        row = rows[i]
        asked = " ".join(f"{row['instruction']} {row['input']}".split())
        print(f"\n  {asked}\n    {'wanted':8} {row['output']}")
        for r in results:
            print(f"    {r.name:8} {' '.join(r.answers[i].split())[:90]}{'' if not r.unseen_content[i] else '   (right)'}")


def _peft_check(run: Path, adapter: Path) -> str:
    """Reload the adapter through PEFT where torch is installed, and say how far its logits are from the run's own."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("peft")):
        return " (Install torch and peft to reload it here.)"
    difference = peft_difference(run, adapter)
    return f" Reloaded by PEFT, its logits differ from the run's own by at most {difference:.1e}."


def peft_difference(run: Path, adapter: Path) -> float:
    """Largest absolute difference between a run's logits and those of base plus exported adapter in transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from mlx_posttrain.loading import locate

    model, _, _ = open_model(run)
    base = AutoModelForCausalLM.from_pretrained(locate(run).folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, adapter).eval()
    tokens = np.random.default_rng(0).integers(0, model.config["vocab_size"], (2, 48))
    with torch.no_grad():
        wanted = theirs(input_ids=torch.from_numpy(tokens)).logits.numpy()
    return float(np.abs(model.full_logits(tokens) - wanted).max())
