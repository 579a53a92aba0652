"""A set of runs as one HTML file that needs no network: findings, the table of stages, charts, samples, recipes.

The page follows the reader's light or dark scheme and prints. Charts stand in it as SVG, and beside it in ``NAME-charts/`` as SVG and PNG.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mlx_posttrain import runs
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluate import charts
from mlx_posttrain.evaluate.findings import Finding
from mlx_posttrain.evaluate.suite import METRICS, Comparison, judged_texts, table

CAPTIONS = {
    "perplexity": "How well each model still predicts plain text; a lower bar forgot less. The scale is logarithmic.",
    "kl": "How far each model's next-token distribution is from the base's on plain text; 0 is unchanged.",
    "drift": "How far the matrices of each layer moved, as a share of their own size.",
    "shift": "How surprising each run's training answers are to the base, beside plain text.",
    "loops": "Share of greedy continuations that have begun to repeat one block for good, by position.",
    "interference": "Entries off the diagonal compare two templates on different rows; the diagonal, two halves of the rows in one template.",
    "curves": "Training loss as lines, held-out loss as dots.",
    "loss_quality": "Each model's response loss against its right answers, both on held-out rows.",
    "reward_kl": "Each PPO run's way: mean score against the KL from its start. The large dot is the end.",
    "reward": "Mean score of each step's answers.",
    "accuracy": "Right answers on held-out questions.",
}
SAMPLES = 8


def write(path: Path, names: Sequence[str], labels: Sequence[str], comparison: Comparison | None, findings: Sequence[Finding]) -> Path:
    """Write the page and its charts; returns the page's path.

    names, labels: the runs and what to call them; comparison, findings: as evaluate/analyze.py makes them, or None and nothing for a page
    of logs alone. ``comparison.json`` and ``findings.json`` are written beside the page. Raises UserError where it cannot be written.
    """
    import jinja2

    known = [(label, Path(name)) for name, label in zip(names, labels, strict=True) if runs.is_run(name)]
    drawn: dict[str, Any] = {}
    if comparison is not None and "accuracy" in comparison.metrics():
        figures = {m.name: m.figure("accuracy") for m in comparison.models if "accuracy" in m.values}
        drawn["accuracy"] = charts.bars(figures, y="right answers", title="Right answers, unseen content", ceiling=1.0)
    drawn |= reward_charts(known)
    for finding in findings:
        drawn |= finding.charts
    folder = path.parent / f"{path.stem}-charts"
    for name, figure in drawn.items():
        charts.save(figure, folder, name)
    found = [_run(label, folder) for label, folder in known]
    rewards = [_reward(label, folder) for label, folder in known if _has_report(folder, "bag_of_words")]
    sections = [
        ("findings", "Findings", findings), ("stages", "Stages", comparison), ("charts", "Charts", drawn), ("samples", "Samples", comparison),
        ("reward", "Reward models", rewards), ("runs", "Runs", found),
    ]  # fmt: skip
    source = (resources.files("mlx_posttrain.evaluate") / "report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(source)
    page = template.render(
        title="Post-training report: " + ", ".join(labels) if len(labels) <= 4 else f"Post-training report: {len(labels)} runs",
        machine=_machine(), sections=[(key, name) for key, name, there in sections if there], findings=list(findings),
        table=_table(comparison), questions=len(comparison.questions) if comparison else 0,
        template=comparison.template if comparison else "", baseline=comparison.models[0].name if comparison else "",
        models=[m.name for m in comparison.models] if comparison else [], samples=_samples(comparison), rewards=rewards, runs=found,
        charts=[{"name": name, "svg": charts.svg(figure), "caption": CAPTIONS.get(name, "")} for name, figure in drawn.items()],
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(path, page)
    if comparison is not None:
        runs.write_text(path.with_name("comparison.json"), json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False) + "\n")
    if findings:
        runs.write_text(path.with_name("findings.json"), json.dumps([f.to_dict() for f in findings], indent=2, ensure_ascii=False) + "\n")
    return path


def check_target(path: Path) -> None:
    """Raise UserError where no page can be written: before measuring, not after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / f".{path.name}.tmp").write_bytes(b"")
        (path.parent / f".{path.name}.tmp").unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def text(comparison: Comparison, findings: Sequence[Finding], samples: int = 3) -> str:
    """The same for a terminal: the table, a few questions with every model's answer, the findings."""
    said = [table(comparison), "The same questions, answered:"]
    for sample in _samples(comparison)[:samples]:
        said += ["", "  " + " ".join(sample["prompt"].split()), f"    {'wanted':10} {' '.join(sample['wanted'].split())}"]
        for model, answer in zip(comparison.models, sample["answers"], strict=True):
            said.append(f"    {model.name:10} {' '.join(answer['text'].split())[:90]}{'   (right)' if answer['right'] else ''}")
    said += ["", *(f"{f.question} {f.verdict[0].upper()}{f.verdict[1:]}. {f.sentence}" for f in findings)]
    return "\n".join(said)


def reward_charts(known: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """Score against KL, and score over steps, of the PPO runs among ``(label, folder)``; nothing where there is none."""
    way, rising = {}, {}
    for label, folder in known:
        records = [r for r in runs.Run(folder).metrics() if "objective/scores" in r]
        if len(records) < 2:
            continue
        score = [r["objective/scores"] for r in records]
        rising[label] = ([r["step"] for r in records], score)
        way[label] = ([r["objective/kl"] for r in records], score)
    if not way:
        return {}
    return {
        "reward_kl": charts.scatter(way, x="KL from the start, nats an answer", y="score", title="Reward against KL", path=True),
        "reward": charts.curves(rising, x="step", y="score", title="Reward during PPO"),
    }


def _table(comparison: Comparison | None) -> list[dict[str, Any]]:
    rows = []
    for name in comparison.metrics() if comparison else []:
        assert comparison is not None
        metric, cells = METRICS[name], []
        for model in comparison.models:
            value, _, interval = comparison.cell(name, model).partition(" [")
            d = comparison.difference(name, model)
            tone = ""
            if d is not None and comparison.sure(name, model) and metric.better != "neither":
                tone = "good" if (d.mean > 0) == (metric.better == "higher") else "bad"
            change = (comparison.sentence(name, model) or "").partition(": no difference")[0]
            cells.append({"value": value, "interval": f"[{interval}" if interval else "", "change": change, "tone": tone})
        rows.append({"label": metric.label, "about": metric.about, "ceiling": metric.ceiling, "cells": cells})
    return rows


def _samples(comparison: Comparison | None) -> list[dict[str, Any]]:
    """The first question of each family, families spread over the list."""
    if comparison is None:
        return []
    first: dict[str, int] = {}
    for i, question in enumerate(comparison.questions):
        first.setdefault(question["family"] or str(i), i)
    chosen = sorted(first.values())
    chosen = chosen[:: max(1, len(chosen) // SAMPLES)][:SAMPLES]
    right = judged_texts(comparison)
    return [
        {
            "prompt": comparison.questions[i]["prompt"][:600], "wanted": comparison.questions[i]["wanted"][:600],
            "answers": [{"text": m.answers[i][:600], "right": right[m.name][i] == 1} for m in comparison.models],
        }
        for i in chosen
    ]  # fmt: skip


def _has_report(folder: Path, key: str) -> bool:
    path = folder / "report.json"
    return path.is_file() and key in json.loads(path.read_text(encoding="utf-8"))


def _reward(label: str, folder: Path) -> dict[str, str]:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))

    def share(value: Sequence[float] | None) -> str:
        return "-" if value is None else f"{value[0]:.1%} [{value[1]:.0%}, {value[2]:.0%}]"

    return {
        "name": label, "accuracy": share(report["accuracy"]), "longer": share(report["longer"]), "words": share(report["bag_of_words"]),
        "loss": f"{report['mean_training_loss']:.4f}",
    }  # fmt: skip


def _run(label: str, folder: Path) -> dict[str, Any]:
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    raw = runs.reopen(folder)[1]
    result = folder / "result.json"
    figures = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    said = runs.read_jsonl(folder / "samples.jsonl")
    steps = sorted({r["step"] for r in said})
    shown = [r for r in said if r["step"] in (steps[:1] + steps[-1:])] if steps else []
    return {
        "name": label, "method": raw.get("method", ""), "description": raw.get("description", ""), "recipe": recipe,
        "figures": ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, int | float)),
        "texts": [
            {"step": r["step"], "prompt": str(r.get("prompt", ""))[:600], "answer": str(r.get("answer", r.get("chosen", "")))[:600]} for r in shown
        ],
    }  # fmt: skip


def _machine() -> str:
    facts = runs.environment_info()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"{facts['time']}, {facts['platform']}, Python {facts['python']}, {versions}"
