"""A set of runs as one HTML file that needs no network: findings, the table of stages, charts, samples,
recipes.

The page follows the reader's light or dark scheme and prints. Charts stand in it as SVG, and beside it in
``NAME-charts/`` as SVG and PNG; its figures are in ``NAME-comparison.json`` and ``NAME-findings.json``, NAME
being the page's, so that one folder holds many reports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mlx_posttrain import runs
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluate import charts
from mlx_posttrain.evaluate.comparison import BEYOND_CHANCE, METRICS, Comparison, table
from mlx_posttrain.evaluate.findings import Finding
from mlx_posttrain.evaluate.suite import judged_texts

CAPTIONS = {
    "perplexity": "How well each model still predicts plain text; a lower bar forgot less. The scale is "
    "logarithmic.",
    "kl": "How far each model's next-token distribution is from the base's on plain text; 0 is unchanged.",
    "drift": "How far the matrices of each layer moved, as a share of their own size.",
    "shift": "How surprising each run's training answers are to the base, beside plain text.",
    "loops": "Share of greedy continuations that have begun to repeat one block for good, by position.",
    "interference": "Entries off the diagonal compare two templates on different rows; the diagonal, two "
    "halves of the rows in one template.",
    "curves": "Training loss as lines, held-out loss as dots.",
    "loss_quality": "Each model's response loss against its right answers, both on held-out rows.",
    "reward_kl": "Each PPO run's way: mean score against the KL from its start. The large dot is the end.",
    "reward": "Mean score of each step's answers.",
    "accuracy": "Right answers on held-out questions.",
    "ceiling": "A score that no text can bring to 1; the line is what text has in which nothing occurs "
    "twice.",
    "reasoning": "Right answers of each distilled run: after thinking, made to answer at once, and of the "
    "model before training.",
    "cache": "One model's answers, decoded with the key/value cache and with an empty one.",
    "gain": "Paired gains with 95 % intervals: each pair, over questions, and over seeds.",
}
SAMPLES = 8


def write(
    path: Path,
    names: Sequence[str],
    labels: Sequence[str],
    comparison: Comparison | None,
    findings: Sequence[Finding],
) -> Path:
    """Write the page and its charts; returns the page's path.

    names, labels: the runs and what to call them; comparison, findings: as evaluate/analyze.py makes them, or
    None and nothing for a page of logs alone. Raises UserError where it cannot be written.
    """
    import jinja2

    known = [(label, Path(name)) for name, label in zip(names, labels, strict=True) if runs.is_run(name)]
    drawn: dict[str, Any] = {}
    if comparison is not None and "accuracy" in comparison.metrics():
        figures = {m.name: m.figure("accuracy") for m in comparison.models if "accuracy" in m.values}
        drawn["accuracy"] = charts.bars(
            figures, y="right answers", title="Right answers, unseen content", ceiling=1.0
        )
    thoughts = {label: _report(folder) for label, folder in known if "format_rate" in _report(folder)}
    drawn |= reward_charts(known) | reasoning_charts(thoughts)
    for finding in findings:
        drawn |= finding.charts
    folder = path.parent / f"{path.stem}-charts"
    for name, figure in drawn.items():
        charts.save(figure, folder, name)
    found = [_run(label, folder) for label, folder in known]
    rewards = [
        _reward(label, _report(folder)) for label, folder in known if "bag_of_words" in _report(folder)
    ]
    sections = [
        ("findings", "Findings", findings),
        ("stages", "Stages", comparison),
        ("charts", "Charts", drawn),
        ("samples", "Samples", comparison),
        ("thoughts", "Reasoning", thoughts),
        ("rewards", "Reward models", rewards),
        ("runs", "Runs", found),
    ]
    source = (resources.files("mlx_posttrain.evaluate") / "report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(source)
    page = template.render(
        title="Post-training report: " + ", ".join(labels)
        if len(labels) <= 4
        else f"Post-training report: {len(labels)} runs",
        machine=_machine(),
        sections=[(key, name) for key, name, there in sections if there],
        findings=list(findings),
        table=_table(comparison),
        questions=len(comparison.questions) if comparison else 0,
        asked=comparison.asked() if comparison else "",
        baseline=comparison.compared_with if comparison else "",
        beyond_chance=BEYOND_CHANCE,
        judge=judge_note(comparison) if comparison else "",
        models=[m.name for m in comparison.models] if comparison else [],
        samples=_samples(comparison),
        thoughts=[_thinking(label, figures) for label, figures in thoughts.items()],
        rewards=rewards,
        runs=found,
        charts=[
            {"name": name, "svg": charts.svg(figure), "caption": _caption(name)}
            for name, figure in drawn.items()
        ],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(path, page)
    if comparison is not None:
        runs.write_text(
            path.with_name(f"{path.stem}-comparison.json"),
            json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False) + "\n",
        )
    if findings:
        runs.write_text(
            path.with_name(f"{path.stem}-findings.json"),
            json.dumps([f.to_dict() for f in findings], indent=2, ensure_ascii=False) + "\n",
        )
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
    said = [table(comparison), *filter(None, [judge_note(comparison)]), "The same questions, answered:"]
    for sample in _samples(comparison)[:samples]:
        said += [
            "",
            "  " + " ".join(sample["prompt"].split()),
            f"    {'wanted':10} {' '.join(sample['wanted'].split())}",
        ]
        for model, answer in zip(comparison.models, sample["answers"], strict=True):
            said.append(
                f"    {model.name:10} "
                f"{' '.join(answer['text'].split())[:90]}{'   (right)' if answer['right'] else ''}"
            )
    said += ["", *(f"{f.question} {f.verdict[0].upper()}{f.verdict[1:]}. {f.sentence}" for f in findings)]
    return "\n".join(said)


def reward_charts(known: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """Score against KL, and score over steps, of the PPO runs among ``(label, folder)``; nothing where there
    is none.
    """
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
        "reward_kl": charts.scatter(
            way, x="KL from the start, nats an answer", y="score", title="Reward against KL", path=True
        ),
        "reward": charts.curves(rising, x="step", y="score", title="Reward during PPO"),
    }


def reasoning_charts(thoughts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Right answers of distilled runs, from their ``report.json`` by label; nothing where there is none."""
    bars: dict[str, Any] = {}
    for label, figures in thoughts.items():
        bars |= {f"{label}, thinking": figures["accuracy"], f"{label}, at once": figures["accuracy_at_once"]}
        bars |= {f"{label}, before": figures["base_accuracy"]} if "base_accuracy" in figures else {}
    return (
        {"reasoning": charts.bars(bars, y="right answers", title="With a thought and without", ceiling=1.0)}
        if bars
        else {}
    )


def judge_note(comparison: Comparison) -> str:
    """Whose scores and wins the table shows, and which runs were trained on that very reward model; ""
    without one.
    """
    reward = comparison.suite.get("reward")
    if not reward:
        return ""
    trained = []
    for model in comparison.models:
        recipe = runs.reopen(model.path)[1] if runs.is_run(model.path) else {}
        rewards = (
            [entry.get("model") for entry in recipe.get("reward") or []]
            if isinstance(recipe.get("reward"), list)
            else []
        )
        trained += (
            [model.name] if any(r and Path(r).resolve() == Path(reward).resolve() for r in rewards) else []
        )
    name = Path(reward).name
    if not trained:
        return (
            f"Scores and wins are those of the reward model {name}, on which none of these runs was trained."
        )
    who = " and ".join(trained)
    return (
        f"Scores and wins are those of the reward model {name}, which {who} was trained to please: of {who} "
        "they show how far that went, "
        "not how good the answers are. A reward model made of other pairs would be a judge (suite.reward)."
    )


def _caption(chart: str) -> str:
    return CAPTIONS.get(chart) or CAPTIONS.get(chart.partition("_")[0], "")


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
            cells.append(
                {
                    "value": value,
                    "interval": f"[{interval}" if interval else "",
                    "change": change,
                    "tone": tone,
                }
            )
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
            "prompt": _shown(comparison.questions[i]["prompt"]),
            "wanted": _shown(comparison.questions[i]["wanted"]),
            "answers": [
                {"text": _shown(m.answers[i]), "right": right[m.name][i] == 1} for m in comparison.models
            ],
        }
        for i in chosen
    ]


def _shown(text: str, most: int = 600) -> str:
    """A text for a table's cell; of a long one beginning and end, because a thought's answer stands at its
    end.
    """
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def _report(folder: Path) -> dict[str, Any]:
    """What a run says of itself in ``report.json``, {} without one."""
    path = folder / "report.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _share(value: Sequence[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.1%} [{value[1]:.0%}, {value[2]:.0%}]"


def _reward(label: str, report: Mapping[str, Any]) -> dict[str, str]:
    return {
        "name": label,
        "accuracy": _share(report["accuracy"]),
        "longer": _share(report["longer"]),
        "words": _share(report["bag_of_words"]),
        "loss": f"{report['mean_training_loss']:.4f}",
    }


def _thinking(label: str, report: Mapping[str, Any]) -> dict[str, str]:
    """A distilled run's row of the page's table; figures as evaluate/reasoning.py, summary."""
    trace, kept, wrong = (
        report.get("trace_tokens"),
        report.get("kept"),
        report.get("shape_score_of_wrong_answers"),
    )
    return {
        "name": label,
        "questions": str(report["questions"]),
        "accuracy": _share(report["accuracy"]),
        "at_once": _share(report["accuracy_at_once"]),
        "worth": _share(report["thinking_minus_at_once"]),
        "base": _share(report.get("base_accuracy")),
        "gain": _share(report.get("gain")),
        "form": _share(report["format_rate"]),
        "ended": _share(report.get("ended")),
        "tokens": f"{trace[0]:.0f} [{trace[1]:.0f}, {trace[2]:.0f}]" if trace else "-",
        "steps": f"{report['steps']:.1f}",
        "look": f"{report['shape_score']:.2f}" + ("" if wrong is None else f" ({wrong:.2f})"),
        "kept": "-" if kept is None else f"{kept:.1%}",
    }


def _run(label: str, folder: Path) -> dict[str, Any]:
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    raw = runs.reopen(folder)[1]
    result = folder / "result.json"
    figures = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    said = runs.read_jsonl(folder / "samples.jsonl")
    steps = sorted({r["step"] for r in said})
    shown = [r for r in said if r["step"] in (steps[:1] + steps[-1:])] if steps else []
    return {
        "name": label,
        "method": raw.get("method", ""),
        "description": raw.get("description", ""),
        "recipe": recipe,
        "figures": ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, int | float)),
        "texts": [
            {
                "step": r["step"],
                "prompt": _shown(str(r.get("prompt", ""))),
                "answer": _shown(str(r.get("answer", r.get("chosen", "")))),
            }
            for r in shown
        ],
    }


def _machine() -> str:
    facts = runs.environment_info()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"{facts['time']}, {facts['platform']}, Python {facts['python']}, {versions}"
