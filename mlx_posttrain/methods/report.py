"""A comparison of runs and an HTML page: not a training method, but the stage that ends a pipeline.

In a pipeline ``runs`` names earlier stages, ``{sft: "{sft}", ppo: "{ppo}"}``; alone, any run directories.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mlx_posttrain import config, console, engines
from mlx_posttrain import runs as rundirs
from mlx_posttrain.convert.files import home
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import choice
from mlx_posttrain.evaluation.best_of import BestOf
from mlx_posttrain.evaluation.choice import Choice
from mlx_posttrain.evaluation.paired_runs import Gain
from mlx_posttrain.evaluation.suite import SuiteSection
from mlx_posttrain.training import setup
from mlx_posttrain.training.loop import Callbacks
from mlx_posttrain.training.method import Method, Resume


class Recipe(config.Section):
    """A comparison, an analysis and a report of runs."""

    method: Literal["report"] = Field(description="report: compare runs and write an HTML page")
    description: str = Field("", description="what this report shows")
    engine: Literal["auto", "mlx", "torch"] = Field(
        "auto", description="mlx, torch, or the first of them that this machine has"
    )
    output: str | None = Field(None, description="folder of the report; null: runs/<recipe's name>")
    seed: int = Field(0, ge=0, description="fixes intervals, samples and what the analysis draws")
    runs: dict[str, str] = Field(min_length=1, description="what to call each run: its directory")
    base: str | None = Field(
        None, description="the model they are compared with; null: the one that the first run started from"
    )
    not_asked: list[str] = Field(
        default_factory=list,
        description="runs that are shown with their own figures and curves, and are "
        "not asked the suite's questions",
    )
    suite: SuiteSection = Field(default_factory=lambda: SuiteSection(), description="what is asked and read")
    choose: Choice | None = Field(
        None,
        description="of each grid show the best setting only, chosen by an earlier report; its runs are then "
        "called by their grid and seed",
    )
    best_of: dict[str, BestOf] = Field(
        default_factory=dict,
        description="answers of the base to show beside the runs', the best of several by a reward model",
    )
    gains: dict[str, Gain] = Field(
        default_factory=dict,
        description="what is to be shown as a gain, by the question that the page answers: a metric, and "
        "pairs of runs",
    )

    @model_validator(mode="after")
    def _known(self) -> Recipe:
        for run in self.not_asked:
            if run not in self.runs:
                raise ValueError(
                    f"not_asked names {run!r}, which is none of the runs ({', '.join(self.runs)})"
                )
        shown = list(self.runs) if self.choose is None else choice.names(list(self.runs))
        for name, best in self.best_of.items():
            if taken := [label for label in best.labels(name) if label in shown]:
                raise ValueError(f"best_of: a run is already called {taken[0]!r}")
            shown += best.labels(name)
        for name, gain in self.gains.items():
            try:
                gain.spread(shown)
            except ValueError as error:
                raise ValueError(f"gains.{name} {error}") from None
        return self


def run(recipe: Recipe, resume: Resume, callbacks: Callbacks | None) -> dict[str, Any]:
    """Measure the runs and write ``final/report.html`` and ``report.txt``; returns main results.

    Raises UserError as compare; a resumed report starts over.
    """
    from mlx_posttrain.evaluation import analyze, paired_runs, report

    engine = engines.get(recipe.engine)
    assert recipe.output is not None
    recipe.engine = engine.name  # type: ignore[assignment]
    config.absolute_paths(recipe)
    folder = home(recipe.output)
    one = rundirs.reopen(folder, write=True)[0] if resume else rundirs.create(folder, recipe)  # type: ignore[arg-type]
    if resume and one.finished:
        raise UserError(f"{folder} is finished: there is nothing to resume")
    # 0, the default of both, leaves it to the other
    suite = recipe.suite.model_copy(update={"seed": recipe.suite.seed or recipe.seed})
    with setup.discard_on_failure(one, resume):
        shown, chosen = recipe.runs, []
        if recipe.choose is not None:
            shown, finding = choice.choose(recipe.choose, recipe.runs)
            chosen = [finding]
        comparison, found = analyze.analyze(
            list(shown.values()),
            suite,
            engine.name,
            base=recipe.base,
            labels=list(shown),
            not_asked=recipe.not_asked,
            chosen=recipe.best_of,
        )
    found = [*chosen, *paired_runs.compare_all_pairs(comparison, recipe.gains), *found]
    said = report.format_text(comparison, found)

    def fill(final: Path) -> None:
        report.write(final / "report.html", list(shown.values()), list(shown), comparison, found)
        (final / "report.txt").write_text(said + "\n", encoding="utf-8")

    result = {
        f"{m.name}/{name}": m.interval(name).mean
        for m in comparison.models
        for name in ("accuracy", "perplexity")
        if name in m.values
    }
    rundirs.write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
    rundirs.replace_folder(one.final, fill)
    one.close()
    print(said)
    console.log(f"the report is {one.final / 'report.html'}")
    return result


METHOD = Method(
    name="report",
    summary="a comparison of runs, with findings and an HTML page",
    Recipe=Recipe,
    saves=lambda recipe: "page",
    run=run,
)
