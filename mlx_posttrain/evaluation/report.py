"""A report on runs as one HTML file that needs no network: findings, a table, charts, samples and recipes.

The page follows the reader's light or dark scheme and can be printed. Its charts are part of the page as SVG,
and are also written to ``NAME-charts/`` as SVG and PNG; its numbers are in ``NAME-comparison.json`` and
``NAME-findings.json``. NAME is the page's, so that one folder can hold several reports.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from mlx_posttrain import jsonl, runs
from mlx_posttrain.convert.files import read_json
from mlx_posttrain.engines.process import command_output
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import charts, stage_table
from mlx_posttrain.evaluation.comparison import Comparison
from mlx_posttrain.evaluation.findings import Finding
from mlx_posttrain.evaluation.right_answers import check_greedy_answers

CAPTIONS = {
    "perplexity": "How well each model still predicts plain text: the lower the bar, the less was forgotten. "
    "The scale is logarithmic.",
    "kl": "How far each model's next-token distribution is from the base's on plain text; 0 is unchanged.",
    "drift": "How far the matrices of each layer moved, relative to their norm.",
    "shift": "Perplexity of each run's training answers under the base, compared with plain text.",
    "loops": "Share of greedy continuations that repeat one block from here to their end, by position.",
    "interference": "Entries off the diagonal compare two templates on different rows; the diagonal compares "
    "two halves of the rows in one template.",
    "curves": "Training loss as lines, each point the mean of equally many steps; held-out loss as dots.",
    "loss_quality": "Each model's response loss against its right answers, both on held-out rows.",
    "reward_kl": "Path of each run on rollouts: mean score against KL from its start; the large dot ends it.",
    "reward": "Mean score of each step's answers.",
    "score_kl": "Each run's final answers: at equal KL from its start, the higher point got more for it.",
    "accuracy": "Right answers on held-out questions.",
    "ceiling": "A score that no text can bring to 1; the line is that of text in which nothing occurs twice.",
    "reasoning": "Right answers of each distilled run: after thinking, when made to answer at once, and of "
    "the model before training.",
    "cache": "One model's answers, decoded with the key/value cache and with an empty one.",
    "gain": "Paired gains with 95 % intervals: of each pair, over questions, and over seeds.",
}
SAMPLES = 8
#: The chart beside what changed: the first of these that there is.
OPENING = ("accuracy", "perplexity", "reward", "curves")


@dataclass(frozen=True)
class Live:
    """What a page has while its runs go on.

    seconds: after which the page loads itself again. states: how far each run is. charts: figures by name.
    """

    seconds: int
    states: Sequence[str]
    charts: Mapping[str, Any]


def write(
    path: Path,
    names: Sequence[str],
    labels: Sequence[str],
    comparison: Comparison | None,
    findings: Sequence[Finding],
    live: Live | None = None,
) -> Path:
    """Write the page, its charts and its numbers; returns the page's path.

    names, labels: the runs and their labels; comparison, findings: those of analyze.py, or None and an empty
    list for a page of logs alone. With ``live`` the page alone is written, whole at every moment. Raises
    UserError where it cannot be written.
    """
    import jinja2

    folders = [(label, Path(name)) for name, label in zip(names, labels, strict=True) if runs.is_run(name)]
    drawn: dict[str, Any] = dict(live.charts) if live else {}
    if comparison is not None and "accuracy" in comparison.metrics():
        accuracy = {m.name: m.interval("accuracy") for m in comparison.models if "accuracy" in m.values}
        drawn["accuracy"] = charts.bars(
            accuracy, y="right answers", title="Right answers, held-out contents", ceiling=1.0
        )
    thoughts = {
        label: _read_report(folder) for label, folder in folders if "format_rate" in _read_report(folder)
    }
    drawn |= reward_charts(folders) | reasoning_charts(thoughts) | score_at_kl(folders, comparison)
    for finding in findings:
        drawn |= finding.charts
    chart_folder = path.parent / f"{path.stem}-charts"
    if live is None:
        for name, figure in drawn.items():
            charts.save(figure, chart_folder, name)
    run_sections = [_run(label, folder) for label, folder in folders]
    rewards = [
        _reward_row(label, _read_report(folder))
        for label, folder in folders
        if "bag_of_words" in _read_report(folder)
    ]
    changes = stage_table.opening(comparison) if comparison else []
    machine, versions = _machine()
    shown = [
        {"name": name, "svg": charts.svg(figure), "caption": _caption(name)} for name, figure in drawn.items()
    ]
    opening = next((name for name in OPENING if changes and name in drawn), None)
    sections = [
        ("changes", "What changed", changes),
        ("findings", "Findings", findings),
        ("stages", "Side by side", comparison),
        ("charts", "Charts", drawn.keys() - {opening}),
        ("samples", "Samples", comparison),
        ("thoughts", "Reasoning", thoughts),
        ("rewards", "Reward models", rewards),
        ("runs", "Runs", run_sections),
    ]
    source = (resources.files("mlx_posttrain.evaluation") / "report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(source)
    page = template.render(
        title="Post-training report: " + ", ".join(labels)
        if len(labels) <= 4
        else f"Post-training report: {len(labels)} runs",
        machine=machine,
        versions=versions,
        live=live,
        sections=[(key, name) for key, name, content in sections if content],
        findings=list(findings),
        changes=changes,
        tables=_tables(comparison),
        questions=len(comparison.questions) if comparison else 0,
        templates=comparison.templates_label() if comparison else "",
        where=comparison.where if comparison else "",
        baseline=comparison.baseline_label if comparison else "",
        significance=comparison.significance_note("In colour where it is") if comparison else "",
        reward_model=reward_model_note(comparison) if comparison else "",
        notes=comparison.notes() if comparison else [],
        models=[m.name for m in comparison.models] if comparison else [],
        samples=_samples(comparison),
        thoughts=[_reasoning_row(label, stats) for label, stats in thoughts.items()],
        rewards=rewards,
        runs=run_sections,
        charts=[one for one in shown if one["name"] != opening],
        opening=[one for one in shown if one["name"] == opening],
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


def check_target(path: Path, page: bool = True) -> None:
    """Raise UserError where no page, or no file at all, can be written: nothing is measured in vain."""
    if page and path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path} is no name of a page: give one that ends in .html")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / f".{path.name}.tmp").write_bytes(b"")
        (path.parent / f".{path.name}.tmp").unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def format_text(comparison: Comparison, findings: Sequence[Finding], samples: int = 3) -> str:
    """The report for a terminal: the table, ``samples`` questions with every model's answer, the findings."""
    lines = [
        comparison.table(),
        *filter(None, [reward_model_note(comparison)]),
        "The same questions, answered by each:",
    ]
    for sample in _samples(comparison)[:samples]:
        lines += [
            "",
            "  " + " ".join(sample["prompt"].split()),
            f"    {'expected':10} {' '.join(sample['expected'].split())}",
        ]
        for model, answer in zip(comparison.models, sample["answers"], strict=True):
            lines.append(
                f"    {model.name:10} "
                f"{' '.join(answer['text'].split())[:90]}{'   (right)' if answer['right'] else ''}"
            )
    lines += ["", *(f"{f.question} {f.verdict[0].upper()}{f.verdict[1:]}. {f.sentence}" for f in findings)]
    return "\n".join(lines)


#: Names of a step's mean score, and of its KL to the reference, in the metrics of runs on rollouts.
SCORE, KL = ("objective/scores", "reward"), ("objective/kl", "kl")


def reward_charts(folders: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """Score over steps, and against KL, of the runs on rollouts among (label, folder); {} without any."""
    path, curve = {}, {}
    for label, folder in folders:
        records = runs.Run(folder).metrics()
        score, kl = ([r[k] for r in records for k in names if k in r] for names in (SCORE, KL))
        if len(score) < 2:
            continue
        curve[label] = ([r["step"] for r in records if any(k in r for k in SCORE)], score)
        if len(kl) == len(score):
            path[label] = (kl, score)
    if not curve:
        return {}
    found = {}
    if path:
        found["reward_kl"] = charts.scatter(
            path, x="KL from the start, nats per answer", y="score", title="Reward against KL", path=True
        )
    return {**found, "reward": charts.curves(curve, x="step", y="score", title="Reward in training")}


def score_at_kl(folders: Sequence[tuple[str, Path]], comparison: Comparison | None) -> dict[str, Any]:
    """The judge's score of each run against its KL, a colour for each method or grid; {} below three runs."""
    scores = (
        {m.name: m.interval("score").mean for m in comparison.models if "score" in m.values}
        if comparison
        else {}
    )
    kls: dict[str, float] = {}
    for label, folder in folders:
        result = read_json(folder / "result.json") if (folder / "result.json").is_file() else {}
        kls |= {label: result["kl"]} if "kl" in result else {}
    if comparison:
        kls |= {m.name: m.answer_kl for m in comparison.models if m.answer_kl is not None}
    points: dict[str, tuple[list[float], list[float]]] = {}
    for label in (label for label in kls if label in scores):
        grid = " ".join(word for word in label.split(" ") if "=" not in word)
        xs, ys = points.setdefault(grid, ([], []))
        xs.append(kls[label])
        ys.append(scores[label])
    if sum(len(xs) for xs, _ in points.values()) < 3:
        return {}
    x = "KL from the start, nats per answer"
    return {"score_kl": charts.scatter(points, x=x, y="score", title="Score at equal KL")}


def reasoning_charts(thoughts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Right answers of distilled runs; thoughts: their ``report.json`` by label."""
    bars: dict[str, Any] = {}
    for label, stats in thoughts.items():
        bars |= {f"{label}, thinking": stats["accuracy"], f"{label}, at once": stats["accuracy_at_once"]}
        bars |= {f"{label}, before": stats["base_accuracy"]} if "base_accuracy" in stats else {}
    return (
        {"reasoning": charts.bars(bars, y="right answers", title="With a thought and without", ceiling=1.0)}
        if bars
        else {}
    )


def reward_model_note(comparison: Comparison) -> str:
    """Which reward model gave the scores and wins, and which runs were trained on it; "" without one."""
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
        f"Scores and wins are those of the reward model {name}, on which {who} was trained: for {who} they "
        "show how far that training went, not how good the answers are. A reward model trained on other "
        "pairs would be independent (suite.reward)."
    )


def _caption(chart: str) -> str:
    return CAPTIONS.get(chart) or CAPTIONS.get(chart.partition("_")[0], "")


def _tables(comparison: Comparison | None) -> list[list[dict[str, Any]]]:
    """The rows that a reader sees first, and those that are folded."""
    if comparison is None:
        return [[], []]
    first = stage_table.headlines(comparison)
    return [
        stage_table.table(comparison, names)
        for names in (first, [name for name in comparison.metrics() if name not in first])
    ]


def _samples(comparison: Comparison | None) -> list[dict[str, Any]]:
    """The first questions of at most SAMPLES families, spread evenly over the list."""
    if comparison is None:
        return []
    first: dict[str, int] = {}
    for i, question in enumerate(comparison.questions):
        first.setdefault(question["family"] or str(i), i)
    chosen = sorted(first.values())
    chosen = chosen[:: max(1, len(chosen) // SAMPLES)][:SAMPLES]
    correct = check_greedy_answers(comparison)
    return [
        {
            "prompt": _shorten(comparison.questions[i]["prompt"]),
            "expected": _shorten(comparison.questions[i]["expected"]),
            "answers": [
                {"text": _shorten(m.answers[i]), "right": correct[m.name][i] == 1} for m in comparison.models
            ],
        }
        for i in chosen
    ]


def _shorten(text: str, most: int = 600) -> str:
    """A text for a table's cell; a long one keeps its end too, because an answer follows its thought."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def _read_report(folder: Path) -> dict[str, Any]:
    """A run's ``report.json``, {} without one."""
    path = folder / "report.json"
    return read_json(path) if path.is_file() else {}


def _percent(value: Sequence[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.1%} [{value[1]:.0%}, {value[2]:.0%}]"


def _reward_row(label: str, report: Mapping[str, Any]) -> dict[str, str]:
    return {
        "name": label,
        "accuracy": _percent(report["accuracy"]),
        "longer": _percent(report["longer"]),
        "words": _percent(report["bag_of_words"]),
        "calibration": f"{report['calibration_error']:.3f}",
        # reports of earlier releases have no null
        "null": "{:.3f} [{:.3f}, {:.3f}]".format(*null) if (null := report.get("calibration_null")) else "-",
        # a policy's implicit reward has none of its own
        "loss": f"{report['mean_training_loss']:.4f}" if "mean_training_loss" in report else "-",
    }


def _reasoning_row(label: str, report: Mapping[str, Any]) -> dict[str, str]:
    """A distilled run's row of the page's table; report: the result of reasoning.summarize."""
    trace, kept, wrong = (
        report.get("trace_tokens"),
        report.get("kept"),
        report.get("shape_score_of_wrong_answers"),
    )
    return {
        "name": label,
        "questions": str(report["questions"]),
        "accuracy": _percent(report["accuracy"]),
        "at_once": _percent(report["accuracy_at_once"]),
        "worth": _percent(report["thinking_minus_at_once"]),
        "base": _percent(report.get("base_accuracy")),
        "gain": _percent(report.get("gain")),
        "form": _percent(report["format_rate"]),
        "ended": _percent(report.get("ended")),
        "tokens": f"{trace[0]:.0f} [{trace[1]:.0f}, {trace[2]:.0f}]" if trace else "-",
        "steps": f"{report['steps']:.1f}",
        "shape": f"{report['shape_score']:.2f}" + ("" if wrong is None else f" ({wrong:.2f})"),
        "kept": "-" if kept is None else f"{kept:.1%}",
    }


def _run(label: str, folder: Path) -> dict[str, Any]:
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    raw = runs.reopen(folder)[1]
    result = folder / "result.json"
    # Answers beside a reference's, of runs on preferences, are of the final weights and have no step.
    stats = read_json(result) if result.is_file() else {}
    samples = jsonl.read(folder / "samples.jsonl")
    steps = sorted({r["step"] for r in samples if isinstance(r.get("step"), int)})
    shown = [r for r in samples if r.get("step") in (steps[:1] + steps[-1:])] if steps else []
    return {
        "name": label,
        "method": raw.get("method", ""),
        "description": raw.get("description", ""),
        "recipe": recipe,
        "stats": ", ".join(f"{k} {v:.4g}" for k, v in stats.items() if isinstance(v, int | float)),
        "texts": [
            {
                "step": r["step"],
                "prompt": _shorten(str(r.get("prompt", ""))),
                "answer": _shorten(str(r.get("answer", r.get("chosen", "")))),
            }
            for r in shown
        ],
    }


def _machine() -> tuple[str, str]:
    """When and on what the page was made, in few words; and all versions."""
    facts = runs.environment_info()
    versions = [f"{name} {version}" for name, version in facts["versions"].items()]
    made = datetime.now().astimezone()
    if sys.platform == "darwin":
        chip = command_output("sysctl", "-n", "machdep.cpu.brand_string") or facts["machine"]
        system = f"macOS {platform.mac_ver()[0]} on {chip}"
    else:
        system = f"{platform.system()} on {facts['machine']}"
    short = f"{made.day} {made:%B %Y, %H:%M}, {system}, {versions[0] if versions else ''}".rstrip(", ")
    return short, ", ".join([facts["platform"], f"Python {facts['python']}", *versions])
