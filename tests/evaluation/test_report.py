"""The report of real runs: complete, self-contained, consistent with its JSON, and shown by a browser."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest

from mlx_posttrain import cli, config, engines, methods
from mlx_posttrain.data.types import Preference, Turn
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import charts, report, stage_table
from mlx_posttrain.evaluation.comparison import Comparison, ModelResult, Values
from mlx_posttrain.evaluation.findings import training
from mlx_posttrain.evaluation.preference import compare_with_baselines

ENGINE = engines.available()[0]
BROWSER = next(
    (b for b in ("chromium", "chromium-browser", "google-chrome", "chrome") if shutil.which(b)), None
)
SUITE = [
    "limit=24",
    "families=[quotes,true_false]",
    "max_tokens=12",
    "text_limit=6",
    "continuation=16",
    "samples=1",
]


@pytest.fixture(scope="module")
def journey(tmp_path_factory) -> Path:
    """Two supervised runs, full and LoRA, a distilled run, and a report on them from the command line."""
    folder = tmp_path_factory.mktemp("journey")
    for name, more in (("sft", []), ("lora", ["adapter.rank=4"])):
        chosen = methods.load_recipe(
            "01_sft",
            [
                "model=tiny",
                f"engine={ENGINE}",
                "data.source=embedded/tasks",
                "data.families=[quotes,true_false]",
                "data.limit=64",
                "data.eval_limit=16",
                "data.template=question",
                "data.max_length=96",
                "train.steps=8",
                "train.batch_size=8",
                "train.grad_accumulation=1",
                "train.lr=1e-3",
                "train.eval_every=4",
                "sample.count=1",
                "sample.max_tokens=8",
                f"output={folder / name}",
                *more,
            ],
        )
        methods.run(chosen)
    methods.run(
        methods.load_recipe(
            "demo_distill",
            [
                f"engine={ENGINE}",
                "data.limit=33",
                "data.eval_limit=8",
                "data.max_length=96",
                "train.steps=2",
                "train.batch_size=8",
                "think.questions=4",
                "sample.count=1",
                "sample.max_tokens=8",
                f"output={folder / 'distilled'}",
            ],
        )
    )
    names = [str(folder / name) for name in ("sft", "lora", "distilled")]
    cli.app(["report", *names, *SUITE, "--output", str(folder / "report.html")], standalone_mode=False)
    return folder


def test_the_page_is_complete_and_needs_no_network(journey):
    page = (journey / "report.html").read_text()
    assert (
        not re.search(r"""(?:src|href)=["'](?:https?:)?//""", page)
        and "<script" not in page
        and "@import" not in page
    )
    for text in (
        "What the runs show",
        "The models side by side",
        "Was base text forgotten?",
        "Do templates interfere",
        "sft",
        "lora",
        "true_false",
    ):
        assert text in page, text
    assert (
        page.count("<svg")
        == len(list((journey / "report-charts").glob("*.svg")))
        == len(list((journey / "report-charts").glob("*.png")))
    )
    assert "mathdefault" not in page  # a logarithmic axis has numbers, not formulae
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))  # a clip path of one chart must not cut another
    for target in re.findall(r"""(?:xlink:href="#|href="#|url\(#)([^")]+)""", page):
        assert target in ids, target


def test_many_runs_are_told_apart():
    charts.SERIES_ORDER.set(names := tuple(f"run {i}" for i in range(20)))
    styles = [tuple(charts.series_style(name, 0).values()) for name in names]
    assert len(set(styles)) == 20 and len({colour for colour, _ in styles[:10]}) == 10


def test_the_page_has_the_numbers_of_the_json(journey):
    page = (journey / "report.html").read_text()
    numbers = json.loads((journey / "report-comparison.json").read_text())
    assert [m["name"] for m in numbers["models"]] == ["base", "sft", "lora", "distilled"]
    for model in numbers["models"]:
        assert f"{model['figures']['perplexity']['mean']:.1f}" in page
        assert f"{model['figures']['accuracy']['mean']:.1%}" in page
    findings = json.loads((journey / "report-findings.json").read_text())
    assert {f["verdict"] for f in findings} <= {"yes", "no", "cannot say"} and len(findings) == 9
    assert "where the cache is left empty" in page and "Was a score at its ceiling before training?" in page


def test_the_page_shows_the_gain_from_thinking(journey):
    page = (journey / "report.html").read_text()
    figures = json.loads((journey / "distilled" / "report.json").read_text())
    section = page[page.index('<h2 id="thoughts">') :].partition("<h2 id=")[2]
    for value in (
        figures["accuracy"],
        figures["accuracy_at_once"],
        figures["base_accuracy"],
        figures["format_rate"],
        figures["ended"],
    ):
        assert f"{value[0]:.1%} [{value[1]:.0%}, {value[2]:.0%}]" in section
    assert (
        f"{figures['trace_tokens'][0]:.0f} [" in section
        and f"{figures['kept']:.1%}" in section
        and figures["kept"] < 1
    )
    assert "keyword score, for comparison only" in section
    assert (journey / "report-charts" / "reasoning.svg").is_file()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(journey, scheme, tmp_path):
    shot = tmp_path / "shot.png"
    more = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    common = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        *more,
    ]
    address = (journey / "report.html").as_uri()
    seen = subprocess.run(
        [*common, "--enable-logging=stderr", "--window-size=1280,2400", f"--screenshot={shot}", address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert seen.returncode == 0 and "CONSOLE" not in seen.stderr, seen.stderr[-2000:]
    dom = subprocess.run([*common, "--dump-dom", address], capture_output=True, text=True, timeout=120).stdout
    assert "Was base text forgotten?" in dom and "base-text perplexity" in dom
    assert shot.stat().st_size > 20_000
    dark = _corner(shot) < 80
    assert dark == (scheme == "dark")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_folded_sections_are_printed(journey, tmp_path):
    """Nobody can unfold a recipe on paper: the page prints as many sheets as with everything unfolded."""
    sheets = {}
    page = (journey / "report.html").read_text()
    for name, text in (("folded", page), ("unfolded", page.replace("<details>", "<details open>"))):
        (tmp_path / f"{name}.html").write_text(text)
        pdf = tmp_path / f"{name}.pdf"
        subprocess.run(
            [
                str(BROWSER),
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--print-to-pdf={pdf}",
                (tmp_path / f"{name}.html").as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        sheets[name] = len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
    assert sheets["folded"] == sheets["unfolded"] > 3


def _corner(path: Path) -> int:
    """Brightness of the top left pixel of a PNG, 0 to 255."""
    from matplotlib.image import imread

    return int(255 * float(imread(path)[2, 2, :3].mean()))


@pytest.mark.exhaustive
def test_logs_alone_and_the_stage_of_a_pipeline(journey, tmp_path):
    cli.app(
        ["report", str(journey / "sft"), "--logs-only", "--output", str(tmp_path / "r.html")],
        standalone_mode=False,
    )
    page = (tmp_path / "r.html").read_text()
    assert "Did a run learn its rows by heart?" in page and "side by side" not in page
    chosen = config.parse(
        {
            "method": "report",
            "engine": ENGINE,
            "output": str(tmp_path / "report"),
            "runs": {"full": str(journey / "sft"), "low rank": str(journey / "lora")},
            "suite": {
                "limit": 4,
                "max_tokens": 8,
                "families": ["quotes"],
                "text_limit": 3,
                "continuation": 12,
                "samples": 0,
            },
        },
        methods.get("report").Recipe,
        "test",
    )
    chosen.not_asked = ["full", "low rank"]
    with pytest.raises(UserError, match="none of these runs but those of not_asked writes text"):
        methods.run(chosen)
    chosen.runs["thinks"], chosen.not_asked = str(journey / "distilled"), ["thinks"]
    result = methods.run(chosen)
    numbers = json.loads((tmp_path / "report" / "final" / "report-comparison.json").read_text())
    # runs of not_asked are shown all the same
    assert [m["name"] for m in numbers["models"]] == ["base", "full", "low rank"]
    page = (tmp_path / "report" / "final" / "report.html").read_text()
    assert "right after thinking" in page and "<b>thinks</b>" in page
    assert (tmp_path / "report" / "final" / "report.html").is_file() and "low rank/accuracy" in result


@pytest.mark.exhaustive
def test_reports_in_one_folder_keep_their_files_apart(journey, tmp_path):
    """``compare`` writes the findings that need no further model, the curves, and the unnamed base."""
    for name in ("sft", "lora"):
        target = str(tmp_path / f"{name}.html")
        cli.app(
            ["compare", str(journey / name), str(journey / "distilled"), *SUITE, "--report", target],
            standalone_mode=False,
        )
    for name in ("sft", "lora"):
        numbers = json.loads((tmp_path / f"{name}-comparison.json").read_text())
        assert [m["name"] for m in numbers["models"]] == [name, "distilled", "base"] and numbers[
            "baseline"
        ] == name
        asked = {f["question"] for f in json.loads((tmp_path / f"{name}-findings.json").read_text())}
        assert asked == {
            "Was base text forgotten?",
            "Did tuning make the model repeat itself?",
            "Was a score at its ceiling before training?",
            "Did a run learn its rows by heart?",
            "Can a model with a lower loss be the worse one?",
        }
        assert (tmp_path / f"{name}-charts" / "curves.svg").is_file()
    assert not (tmp_path / "comparison.json").exists()


@pytest.mark.exhaustive
def test_the_python_of_the_documentation_runs(journey, root, tmp_path, monkeypatch, capsys):
    """The code of recipes/README.md, on the runs of this module and with fewer rows."""
    text = (root / "recipes" / "README.md").read_text().partition("From Python:\n")[2]
    code = textwrap.dedent(re.match(r"(?:    .*\n|\n)+", text)[0])
    assert code.count("runs/demo/") == 3 and code.count("limit=80, samples=4") == 1
    code = code.replace("runs/demo/", f"{journey}/")
    code = code.replace(
        "limit=80, samples=4", "limit=6, samples=1, max_tokens=6, text_limit=4, continuation=16"
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "recipes/README.md", "exec"), {})
    assert "right answers" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file() and (tmp_path / "report-findings.json").is_file()


def test_one_run_is_compared_with_its_base(journey, capsys):
    cli.app(["eval", str(journey / "sft"), *SUITE, "--json"], standalone_mode=False)
    numbers = json.loads(capsys.readouterr().out)
    assert [m["name"] for m in numbers["models"]] == ["base", "sft"] and "kl" in numbers["models"][1][
        "figures"
    ]


def test_a_report_says_which_runs_were_trained_on_its_reward_model(tmp_path):
    for name, reward in (("ppo", "reward"), ("other", "elsewhere")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(
            f"method: ppo\nreward: [{{model: {tmp_path / reward}}}, {{function: checker}}]\n"
        )
    models = [ModelResult(name, str(tmp_path / name)) for name in ("ppo", "other")]
    note = report.reward_model_note(Comparison({"reward": str(tmp_path / "reward")}, "own", models, []))
    assert "on which ppo was trained" in note and "other was" not in note
    assert "none of these runs was trained" in report.reward_model_note(
        Comparison({"reward": str(tmp_path / "judge")}, "own", models, [])
    )
    assert report.reward_model_note(Comparison({"reward": None}, "own", models, [])) == ""


def test_the_page_has_a_calibration_error_beside_that_of_perfect_scores(tmp_path):
    pairs = [Preference((Turn("user", str(i)),), "yes", "no") for i in range(30)]
    margins = np.where(np.arange(30) % 4, 1.0, -1.0)
    judged = compare_with_baselines(margins, np.zeros(30), pairs, pairs).to_dict()
    earlier = {key: value for key, value in judged.items() if key != "calibration_null"}
    for name, stats in (("new", judged), ("old", earlier)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text("method: reward\n")
        (tmp_path / name / "report.json").write_text(json.dumps(stats | {"mean_training_loss": 0.5}))
    page = report.write(
        tmp_path / "r.html", [str(tmp_path / n) for n in ("new", "old")], ["new", "old"], None, []
    ).read_text()
    null = judged["calibration_null"]
    assert f"<td>{judged['calibration_error']:.3f}</td><td>{null.mean:.3f} [{null.low:.3f}, " in page
    assert f"<td>{judged['calibration_error']:.3f}</td><td>-</td>" in page


@pytest.mark.parametrize(("asked", "used"), [({}, 3), ({"seed": 7}, 7)])
def test_a_report_uses_its_seed(asked, used, journey, tmp_path, monkeypatch):
    seen = []

    def stop(names, suite, *rest, **more):
        seen.append(suite.seed)
        raise UserError("enough")

    monkeypatch.setattr("mlx_posttrain.evaluation.analyze.analyze", stop)
    fields = {
        "method": "report",
        "seed": 3,
        "output": str(tmp_path / "report"),
        "runs": {"full": str(journey / "sft")},
        "suite": asked,
    }
    with pytest.raises(UserError, match="enough"):
        methods.run(methods.parse_recipe(fields, "test"))
    assert seen == [used]


@pytest.mark.exhaustive
def test_runs_of_few_rows_and_of_one_name_are_reported(journey, tmp_path, capsys):
    """Too few rows cost only their finding, and two folders of one name remain two models."""
    rows = tmp_path / "five.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"instruction": f"Say {w}.", "output": w}) + "\n"
            for w in ("cat", "dog", "hen", "cow", "pig")
        )
    )
    for name in ("a", "b"):
        chosen = methods.load_recipe(
            "01_sft",
            [
                "model=tiny",
                f"engine={ENGINE}",
                f"data.source={rows}",
                "data.holdout=0",
                "data.template=question",
                "train.steps=1",
                "sample.count=0",
                f"output={tmp_path / name / 'run'}",
            ],
        )
        methods.run(chosen)
    names = [str(tmp_path / name / "run") for name in ("a", "b")]
    cli.app(["report", *names, *SUITE, "--output", str(tmp_path / "r.html")], standalone_mode=False)
    assert "template interference is left out: 5 training rows" in capsys.readouterr().err
    numbers = json.loads((tmp_path / "r-comparison.json").read_text())
    assert [m["name"] for m in numbers["models"]] == ["base", *names]
    rows.write_text(json.dumps({"instruction": "Say it. " * 600, "output": "it"}) + "\n")
    cli.app(["analyze", names[0], *SUITE], standalone_mode=False)
    assert "decoding without a cache is left out: prompt 1" in capsys.readouterr().err
    rows.unlink()
    cli.app(["analyze", names[0], *SUITE], standalone_mode=False)
    assert "the training rows of run are left out" in capsys.readouterr().err


def test_ticks_of_a_logarithmic_axis_are_plain_numbers_within_it():
    assert charts.log_ticks(0.9, 1100) == [1, 10, 100, 1000]
    assert charts.log_ticks(3, 60) == [3, 10, 30] and charts.log_ticks(4, 60) == [5, 10, 20, 50]
    assert charts.log_ticks(4000, 4100) == [4000, 4020, 4040, 4060, 4080, 4100]
    for low, high in itertools.product((0.003, 1.2, 17.0, 4137.0), (1.001, 1.3, 4, 30, 1e4, 1e12)):
        ticks = charts.log_ticks(low, low * high)
        assert 2 <= len(ticks) <= 9 and all(low <= tick <= low * high * (1 + 1e-9) for tick in ticks)


def test_a_run_keeps_its_colour_in_bars_named_after_it():
    charts.SERIES_ORDER.set(("base", "sft"))
    own = charts.series_style("sft", 0)["color"]
    assert (
        charts.series_style("sft, thinking", 5)["color"]
        == own
        == charts.series_style("base text, sft", 2)["color"]
    )
    assert charts.series_style("other", 0)["color"] not in (own, charts.series_style("base", 0)["color"])


def test_points_of_a_curve_are_means_of_equally_many_steps():
    for count in (1, 59, 60, 61, 119, 120, 121, 222, 1000):
        smooth = training.smooth([(step, step) for step in range(count)])
        width = -(-count // 60)
        assert len(smooth) <= 60 and smooth[-1][0] == (count - width + count - 1) / 2
        assert smooth[0][0] == (width - 1) / 2


def test_a_chart_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    figure = charts.bars({"a": (0.5, 0.4, 0.6)}, y="right")

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(UserError, match=r"/right.svg cannot be written: No space left on device$"):
        charts.save(figure, tmp_path / "charts", "right")


def compared(**means):
    """Two models on 40 questions: of the second, as many are right as said."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=40) / 10
    models = [ModelResult(name, name, baseline_index=0) for name in ("base", "sft")]
    for name, (before, after) in means.items():
        for model, mean in zip(models, (before, after), strict=True):
            values = (np.arange(40) < 40 * mean).astype(float) if name == "accuracy" else mean + noise
            model.values[name] = Values(values)
    return Comparison({}, "own", models, [], where="held out from sft's rows.csv")


def test_the_page_opens_with_what_changed_in_words():
    said = stage_table.opening(compared(accuracy=(0.25, 0.75), response_loss=(3, 2), seq_rep_4=(0.1, 0.1)))
    assert said == [
        "sft against base: right answers 25.0% to 75.0%, better; response loss 2.994 to 1.994, better."
    ]
    same = compared(accuracy=(0.5, 0.5), response_loss=(3, 3))
    assert stage_table.opening(same) == ["sft against base: nothing differs beyond chance, of 2 measured."]


def test_too_few_rows_are_not_called_chance(tmp_path):
    """Two measures have 40 rows and one has 12; then 12 is all there is."""
    made = compared(accuracy=(0.5, 0.5), response_loss=(3, 3), perplexity=(3, 4))
    for model in made.models:
        model.values["perplexity"] = Values(model.values["perplexity"].rows[:12])
    assert stage_table.opening(made) == [
        "sft against base: nothing differs beyond chance, of 2 measured; "
        "1 more has fewer than 20 rows, too few to tell."
    ]
    mixed = ". Too few rows to tell (20 are needed): base-text perplexity (12)"
    assert made.significance_note("*").startswith("* beyond chance: p < .05")
    assert made.significance_note("*").endswith(mixed)
    for model in made.models:
        model.values = {"perplexity": model.values["perplexity"]}
    assert stage_table.opening(made) == [
        "sft against base: too few rows to tell what differs (12 at most, and 20 are needed)."
    ]
    page = report.write(tmp_path / "r.html", ["base", "sft"], ["base", "sft"], made, [])
    text = page.read_text(encoding="utf-8")
    assert "chance: 12 at most, and 20 are needed." in text and "beyond chance" not in text


def test_the_table_and_the_page_say_which_answers_are_not_judged(tmp_path):
    """Of four questions one has a long answer; a checker, a short answer and none at all are no reason."""
    long = " ".join(["word"] * 9)
    rules = [{"answer": long}, {"answer": "4"}, {"checker": {}, "answer": long}, {}]
    model = ModelResult("base", "base", {"accuracy": Values(np.array([np.nan, 1, 0, np.nan]))}, ["4"] * 4)
    asked = [{"prompt": "q", "expected": "", "family": "", "rule": rule} for rule in rules]
    note = (
        "Right answers: 1 of 4 questions cannot be judged, because their answers are longer than 8 words, "
        "which no rule compares."
    )
    made = Comparison({}, "own", [model], asked)
    assert note in " ".join(made.table().split())
    assert Comparison({}, "own", [model], asked[1:]).notes() == []
    made, model.answers = Comparison({}, "own", [model], asked[:2]), ["4"] * 2
    page = report.write(tmp_path / "r.html", ["base"], ["base"], made, [])
    assert note.replace("of 4", "of 2") in page.read_text(encoding="utf-8")


def test_five_rows_are_shown_and_the_rest_folded():
    names = ["length", "distinct_2", "accuracy", "ended", "seq_rep_4", "response_loss", "diversity"]
    comparison = compared(**dict.fromkeys(names, (0.5, 0.75)))
    first = stage_table.headlines(comparison)
    assert first == ["accuracy", "response_loss", "seq_rep_4", "ended", "length"]
    (row,) = stage_table.table(comparison, ["response_loss"])
    mean, low, high = row["cells"][1]["bar"]
    assert low < mean < high == 100.0 and row["cells"][0]["bar"][1] == 0.0
    assert len(stage_table.headlines(compared(distinct_2=(0.5, 0.5)))) == 1


def test_score_at_kl_has_a_colour_for_each_grid(tmp_path):
    results = []
    for number, name in enumerate(["dpo lr=1 seed=0", "dpo lr=2 seed=0", "ppo seed=0", "sft"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({"kl": float(number)} if number < 3 else {}))
        results.append(ModelResult(name, name, {"score": Values(np.full(4, 10.0 * number))}))
    folders = [(m.name, tmp_path / m.name) for m in results]
    [figure] = report.score_at_kl(folders, Comparison({}, "own", results, [])).values()
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert drawn == {"dpo": [[0.0, 0.0], [1.0, 10.0]], "ppo": [[2.0, 20.0]]}
    assert report.score_at_kl(folders[:2], Comparison({}, "own", results, [])) == {}
    assert report.score_at_kl(folders, None) == {}


def test_the_page_opens_with_one_chart_local_time_and_a_short_machine_name(tmp_path):
    page = report.write(
        tmp_path / "r.html", ["base", "sft"], ["base", "sft"], compared(accuracy=(0.1, 0.9)), []
    )
    text = page.read_text(encoding="utf-8")
    opening = text.partition('id="changes"')[2].partition("<h2")[0]
    assert opening.count("<svg") == 1 and 'id="accuracy"' in opening and text.count('id="accuracy"') == 1
    header = text.partition('<p class="dim"')[2].partition("</p>")[0]
    shown, versions = header.partition('">')[2], header.partition('">')[0]
    assert re.fullmatch(r"\d{1,2} \w+ \d{4}, \d\d:\d\d, \w+[^,]* on [^,]+, mlx-posttrain [^,]+", shown)
    assert "transformers " in versions and "glibc" not in shown
