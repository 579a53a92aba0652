"""The best setting of each grid, chosen on the questions of an earlier report.

A comparison of methods is as fair as the search for their settings: each gets as many tries, is chosen on
some questions, and is judged on others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field, field_validator

from mlx_posttrain import config
from mlx_posttrain.convert.files import home, read_json
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation.findings import Finding
from mlx_posttrain.evaluation.metric_table import METRICS, one_way_is_better


class Choice(config.Section):
    """Which of a grid's settings are shown: the one that was best, over its seeds, in an earlier report."""

    report: str = Field(description="folder of the earlier report, which has the same runs by the same names")
    metric: str = Field("accuracy_sampled", description="the metric in which the chosen setting was best")

    _better = field_validator("metric")(one_way_is_better)


def without_settings(run: str) -> tuple[str, str]:
    """A run's name and its setting: ``dpo seed=0`` and ``lr=0.1`` of ``dpo lr=0.1 seed=0``."""
    words = run.split(" ")
    kept = [word for word in words if "=" not in word or word.startswith("seed=")]
    return " ".join(kept), " ".join(word for word in words if word not in kept)


def names(runs: Sequence[str]) -> list[str]:
    """The names of the runs that are left, one of each that differ in their setting alone."""
    return list(dict.fromkeys(without_settings(run)[0] for run in runs))


def choose(choice: Choice, runs: Mapping[str, str]) -> tuple[dict[str, str], Finding]:
    """The runs of the best settings by :func:`names`, and what was chosen from what, in words.

    runs: name and folder. A setting's value is its mean over seeds; one without a value for some seed (a run
    that diverged) is not chosen. Raises UserError for a folder without a report, and for a run or a metric
    that it does not have.
    """
    values = _values(choice)
    groups: dict[str, dict[str, list[str]]] = {}  # method: {setting: its runs}
    for run in runs:
        name, setting = without_settings(run)
        method = " ".join(word for word in name.split(" ") if "=" not in word)
        groups.setdefault(method, {}).setdefault(setting, []).append(run)
    kept: dict[str, str] = {}
    told = []
    form, sign = METRICS[choice.metric].format, 1 if METRICS[choice.metric].better == "higher" else -1
    for method, settings in groups.items():
        if len(settings) == 1:
            kept |= {without_settings(run)[0]: runs[run] for run in next(iter(settings.values()))}
            continue
        most = max(len(own) for own in settings.values())
        means = {
            setting: float(np.mean([values[run] for run in own]))
            for setting, own in settings.items()
            if len(own) == most and all(run in values for run in own)
        }
        if not means:
            raise UserError(
                f"{choice.report}: no setting of {method} has {METRICS[choice.metric].label} for all "
                "its seeds"
            )
        best = max(means, key=lambda setting: sign * means[setting])
        kept |= {without_settings(run)[0]: runs[run] for run in settings[best]}
        others = ", ".join(f"{setting} {form.format(mean)}" for setting, mean in means.items())
        told.append(f"{method}: {best} of {len(settings)} ({others})")
    sentence = f"By {METRICS[choice.metric].label} on other questions, means over seeds. " + "; ".join(told)
    return kept, Finding("Which settings are shown?", f"{sentence}.", "yes", {"runs": kept})


def _values(choice: Choice) -> dict[str, float]:
    """The metric of each of the earlier report's runs, in the unit of its rows."""
    folder = home(choice.report)
    for path in (folder / "final" / "report-comparison.json", Path(folder) / "report-comparison.json"):
        if path.is_file():
            figures = {m["name"]: m["figures"] for m in read_json(path)["models"]}
            return {name: own[choice.metric]["mean"] for name, own in figures.items() if choice.metric in own}
    raise UserError(f"choose.report: {choice.report} has no report of runs (report-comparison.json)")
