"""The command line: parse, call, print. Everything heavy is imported inside the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_posttrain.hints import Commands, Prompts, Settings
from mlx_posttrain.methods import METHODS

app = typer.Typer(
    name="mlx-posttrain",
    cls=Commands,
    help="Post-train language models on a Mac or Linux machine: recipes on MLX and on PyTorch CPU.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _dtype(given: str | None) -> str | None:
    from mlx_posttrain.engines.precision import check_dtype

    return check_dtype(given)


#: Beyond which no option is read, as config.MAX_INT, which help must not wait for.
MAX_INT = 2**31 - 1
TOP_P = "sample from the smallest set of tokens with this probability"
EngineOption = Annotated[str, typer.Option("--engine", help="mlx, torch or auto")]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16; default: the model's own", callback=_dtype),
]


@app.command(cls=Settings)
def run(
    recipe: Annotated[
        str | None, typer.Argument(help="a YAML file or the name of a shipped recipe, see `recipes`")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value settings, for example model=tiny train.lr=1e-4")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="continue this unfinished run; takes no recipe")] = None,
    accept_edits: Annotated[
        bool,
        typer.Option(
            "--accept-edits",
            help="with --resume: continue although recipe.yaml was edited, and note the changes in it",
        ),
    ] = False,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="train nothing: try growing learning rates and suggest one")
    ] = False,
) -> None:
    """Run a recipe, or continue a run."""
    from mlx_posttrain import api, config
    from mlx_posttrain.console import log
    from mlx_posttrain.errors import UserError
    from mlx_posttrain.models.next_steps import next_steps

    if resume is not None:
        if recipe or overrides or find_lr:
            raise UserError(
                "--resume continues a run with its own recipe: give no recipe, settings or --find-lr"
            )
        done = api.train(resume.expanduser(), resume=True, accept_edits=accept_edits)
    elif accept_edits:
        raise UserError("--accept-edits belongs to --resume")
    elif recipe is None:
        raise UserError("name a recipe: a YAML file or one that `mlx-posttrain recipes` lists")
    elif find_lr:
        from mlx_posttrain import methods
        from mlx_posttrain.training import find_lr as module

        typer.echo(module.find_lr(methods.load_recipe(recipe, overrides)).text())
        return
    else:
        done = api.train(recipe, config.settings(overrides or []))
    log("next:" + "".join(f"\n  {command}" for command in next_steps(Path(done.folder))))
    typer.echo(done.folder)


@app.command(cls=Settings)
def sweep(
    recipe: Annotated[str, typer.Argument(help="a YAML file or the name of a shipped recipe")],
    overrides: Annotated[
        list[str],
        typer.Argument(help="settings; a key with several values is varied: train.lr=1e-5,1e-4 seed=0,1,2"),
    ],
    metric: Annotated[
        str | None, typer.Option(help="the figure of result.json to compare; default: the first one in it")
    ] = None,
) -> None:
    """Run a recipe for every combination of settings, and compare.

    Combinations are compared over seeds.
    """
    from mlx_posttrain import methods, pipeline

    whole = pipeline.sweep(recipe, overrides, metric)
    methods.run(whole)
    typer.echo(whole.output)


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from mlx_posttrain import config, console

    for path in config.shipped().values():
        raw = config.read_yaml(path)
        typer.echo(
            console.columns([f"{path.stem:20}", f"{raw.get('method', ''):10}"], raw.get("description", ""))
        )


@app.command()
def keys(
    of: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="METHOD",
            help=f"a method ({', '.join(METHODS)}), suite, or words to find in the keys of all; default: sft",
        ),
    ] = None,
) -> None:
    """List a recipe's keys with their defaults, or find a key.

    `keys suite`: those of eval and compare; `keys WORD`: those of any method that have this word in their
    name or description, and of several words all.
    """
    from mlx_posttrain import config, console, methods
    from mlx_posttrain.evaluation.suite import SuiteSection

    name = " ".join(of or ["sft"])
    if name != "suite" and name not in METHODS and (found := methods.find_keys(name)):
        for line in found:
            typer.echo(line)
        return
    section = SuiteSection if name == "suite" else methods.get(name).Recipe
    for key, default, description in config.describe(section):
        typer.echo(f"{key}: {default}".rstrip())
        typer.echo(console.columns(["   "], description))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(file_okay=False, help="folder for the runs")] = Path("runs/demo"),
    engine: EngineOption = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="seed of every run")] = 0,
) -> None:
    """Tune the embedded tiny model in eight ways and compare.

    Takes a few minutes and no network.
    """
    from mlx_posttrain import demo as module

    module.demo(output.expanduser(), engine, seed)


@app.command()
def convert(
    src: Annotated[str, typer.Argument(help="a model folder or a hub id")],
    dst: Annotated[Path, typer.Argument(help="folder to write")],
    to: Annotated[str, typer.Option(help="mlx or hf")] = "mlx",
    dtype: DtypeOption = None,
    quantize: Annotated[int | None, typer.Option(help="bits of an MLX-quantised model")] = None,
    force: Annotated[bool, typer.Option(help="write into a folder that is not empty")] = False,
) -> None:
    """Convert weights between Hugging Face's and MLX's formats."""
    from mlx_posttrain.convert.weights import convert as convert_weights

    done = convert_weights(src, dst, to=to, dtype=dtype, quantize=quantize, force=force)
    bits = f", {done.bits} bits" if done.bits else ""
    typer.echo(f"{done.path}: {done.model_type}, {done.tensors} tensors, {done.bytes / 2**20:.1f} MB{bits}")


@app.command(cls=Prompts)
def generate(
    model: Annotated[str, typer.Argument(help="a run, a model or adapter folder, `tiny`, or a hub id")],
    prompt: Annotated[list[str] | None, typer.Option(help="prompt; may be given several times")] = None,
    file: Annotated[Path | None, typer.Option(help="one prompt a line, as UTF-8 text")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=MAX_INT, help="longest answer in tokens")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help=TOP_P)] = 1.0,
    samples: Annotated[int, typer.Option(min=1, max=MAX_INT, help="answers per prompt")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="fixes what is sampled")] = 0,
    template: Annotated[
        str | None, typer.Option(help="prompt format; default: the run's own, `none` for a plain model")
    ] = None,
    engine: EngineOption = "auto",
    dtype: DtypeOption = None,
    json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
) -> None:
    """Answer prompts, as many at once as memory allows."""
    from mlx_posttrain import api, console
    from mlx_posttrain.errors import UserError

    prompts = list(prompt or [])
    if file is not None:
        try:
            if file.expanduser().exists() and not file.expanduser().is_file():  # a pipe would be waited for
                raise UserError(f"--file {file}: not a regular file; save the prompts as one")
            prompts += [
                line for line in file.expanduser().read_text(encoding="utf-8-sig").split("\n") if line.strip()
            ]
        except OSError as error:
            raise UserError(f"--file {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"--file {file}: not UTF-8 text (byte {error.start + 1}); give a text file with "
                "one prompt a line"
            ) from None
    if not prompts:
        raise UserError("give a prompt: --prompt TEXT (several times if you like) or --file FILE")
    if samples > 1 and temperature == 0:
        console.log(
            f"the {samples} answers to a prompt are equal at temperature 0: --temperature 0.7 varies them"
        )
    answers = api.load(_home(model), engine, dtype).answers(
        prompts,
        template=template,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        samples=samples,
        seed=seed,
    )
    for a in answers:
        if json:
            import json as jsonlib

            typer.echo(jsonlib.dumps(a, ensure_ascii=False))
        else:
            typer.echo(console.shown(f"> {a['prompt']}\n{a['answer']}\n"))


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="a run, a model or adapter folder, `tiny`, or a hub id")],
    max_tokens: Annotated[int, typer.Option(min=1, max=MAX_INT, help="longest answer in tokens")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help=TOP_P)] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="fixes what is sampled")] = 0,
    template: Annotated[str | None, typer.Option(help="prompt format; default: the run's own")] = None,
    engine: EngineOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Talk to a model; answers stream.

    /help lists what else there is to type; an empty line ends.
    """
    from mlx_posttrain import api
    from mlx_posttrain.generation import chat as module

    module.chat(
        api.load(_home(model), engine, dtype),
        template=template,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a finished run")],
    output: Annotated[Path | None, typer.Option(help="folder to write; default: RUN/export-FORMAT")] = None,
    to: Annotated[str, typer.Option(help="peft, hf, mlx-lm or gguf (llama.cpp, Ollama)")] = "peft",
    merge: Annotated[bool, typer.Option(help="fold the adapter into its base")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="of a GGUF file: float32, float16 (the default), bfloat16 or q8_0 (8 bits)"),
    ] = None,
    force: Annotated[
        bool, typer.Option(help="write into a folder that is not empty; merge in spite of a large drift")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="also upload to this hub repository")
    ] = None,
) -> None:
    """Write a run for PEFT, transformers, mlx-lm or llama.cpp.

    A model card is written with it.
    """
    from mlx_posttrain.models import export as module

    run = run.expanduser()
    target = (output or run / f"export-{to}").expanduser()
    # what an upload that failed left is uploaded as it is
    if not (push and not force and module.is_export(target, run, to, merge, dtype)):
        done = module.export(run, target, to, merged=merge, force=force, dtype=dtype)
        if "note" in done:
            typer.echo(done["note"])
    typer.echo(target)
    if push:
        typer.echo(module.push(target, push))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="a run, a model or adapter folder, `tiny`, or a hub id")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="key=value of the suite, for example rows=my.jsonl limit=50 samples=4"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="all figures as JSON")] = False,
    engine: EngineOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Measure one model: right answers, losses, perplexity.

    Each figure has its interval. `keys suite` lists the settings.
    """
    _compare([model], settings, json, engine, dtype)


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Argument(help="runs or models, the first is the baseline; then key=value of the suite"),
    ],
    report: Annotated[
        Path | None, typer.Option(dir_okay=False, help="also write this HTML page, with charts beside it")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="all figures as JSON")] = False,
    engine: EngineOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Measure several models on the same questions and texts.

    Differences beyond chance are marked.
    """
    names, settings = [m for m in models if not _setting(m)], [m for m in models if _setting(m)]
    _compare(names, settings, json, engine, dtype, report)


@app.command()
def analyze(
    runs: Annotated[list[str], typer.Argument(help="run directories; then key=value of the suite")],
    base: Annotated[
        str | None,
        typer.Option(help="the model they are compared with; default: the one that the first started from"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="also write this HTML page, with charts beside it")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="findings as JSON")] = False,
    engine: EngineOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Compare runs with the model they started from.

    Looks for forgetting, drift, loops, foreign data and overfitting.
    """
    import json as jsonlib

    from mlx_posttrain.evaluation import analyze as module
    from mlx_posttrain.evaluation import report as pages

    names, suite = _suite(runs)
    if output:
        output = output.expanduser()
        pages.check_target(output)
    comparison, found = module.analyze(names, suite, engine, base=base, dtype=dtype)
    if json:
        typer.echo(jsonlib.dumps([f.to_dict() for f in found], indent=2, ensure_ascii=False))
    else:
        for f in found:
            typer.echo(f"{f.question} {f.verdict}\n  {f.sentence}")
    if output:
        _page(output, names, comparison, found)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="run directories; then key=value of the suite")],
    output: Annotated[Path, typer.Option(dir_okay=False, help="the page to write")] = Path("report.html"),
    base: Annotated[
        str | None,
        typer.Option(help="the model they are compared with; default: the one that the first started from"),
    ] = None,
    logs_only: Annotated[
        bool, typer.Option("--logs-only", help="curves, samples and recipes; load and measure no model")
    ] = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="as --logs-only, written anew while a run goes on; the page reloads itself"
        ),
    ] = False,
    engine: EngineOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Write one self-contained HTML page about runs.

    It has findings, a table, charts, samples and recipes. Its charts and figures lie beside it as files too.
    """
    from mlx_posttrain.evaluation import analyze as module
    from mlx_posttrain.evaluation import report as pages
    from mlx_posttrain.evaluation import watch as logs

    names, suite = _suite(runs)
    output = output.expanduser()
    pages.check_target(output)
    if watch:
        logs.watch(output, names)
    if watch or logs_only:
        typer.echo(logs.write(output, names), err=True)
    else:
        _page(output, names, *module.analyze(names, suite, engine, base=base, dtype=dtype))


def _home(name: str) -> str:
    """A name with its ~ filled in; hub ids and ``tiny`` have none."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _setting(text: str) -> bool:
    key, equals, _ = text.partition("=")
    return bool(equals) and key.replace("_", "").replace(".", "").isalnum() and not Path(text).exists()


def _suite(arguments: list[str]) -> tuple[list[str], Any]:
    """Names and suite settings, which stand in any order."""
    from mlx_posttrain import config
    from mlx_posttrain.evaluation.suite import SuiteSection

    raw = config.override({}, config.settings([a for a in arguments if _setting(a)]))
    return [_home(a) for a in arguments if not _setting(a)], config.parse(raw, SuiteSection, "settings")


def _compare(
    names: list[str],
    settings: list[str] | None,
    json: bool,
    engine: str,
    dtype: str | None,
    page: Path | None = None,
) -> None:
    import json as jsonlib

    from mlx_posttrain.errors import UserError
    from mlx_posttrain.evaluation import analyze, charts
    from mlx_posttrain.evaluation import report as pages
    from mlx_posttrain.evaluation import suite as module

    if not names:
        raise UserError("name at least one run or model")
    others, suite = _suite(settings or [])
    if others:
        raise UserError(
            f"{others[0]!r} is no setting (write key=value); several models are measured by "
            "`mlx-posttrain compare`"
        )
    if page:
        page = page.expanduser()
        pages.check_target(page)
    names = [_home(name) for name in names]
    names, labels = analyze.add_base(names, module.model_labels(names))
    charts.SERIES_ORDER.set(tuple(labels))
    found = module.compare(names, suite, engine, labels, dtype=dtype)
    typer.echo(jsonlib.dumps(found.to_dict(), indent=2, ensure_ascii=False) if json else found.table())
    if page:
        findings = analyze.comparison_findings(found, analyze.read_logs(names, labels))
        typer.echo(pages.write(page, names, labels, found, findings), err=True)


def _page(path: Path, names: list[str], comparison: Any, findings: list[Any]) -> None:
    from mlx_posttrain.evaluation import report as module
    from mlx_posttrain.evaluation.suite import model_labels

    typer.echo(module.write(path, names, model_labels(names), comparison, findings), err=True)


@app.command()
def synthesize(
    output: Annotated[
        Path, typer.Argument(dir_okay=False, help="JSONL file to write; an interrupted one is continued")
    ],
    teacher: Annotated[
        str,
        typer.Option(
            help="a run, a model or adapter folder, `tiny`, or a hub id; with --teacher-url what the server "
            "calls its model"
        ),
    ],
    prompts: Annotated[
        str,
        typer.Option(help="questions: a file, embedded data, or a hub id, with answers where a rule checks"),
    ],
    samples: Annotated[int, typer.Option(min=1, max=MAX_INT, help="candidates drawn for each question")] = 8,
    keep: Annotated[int, typer.Option(min=1, help="candidates kept of each question at most")] = 1,
    reward: Annotated[
        str | None, typer.Option(help="a reward model that chooses the best, instead of the row's rule")
    ] = None,
    thoughts: Annotated[
        bool, typer.Option("--thoughts", help="keep only answers of the form <think> ... </think> answer")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="the higher, the more varied")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help=TOP_P)] = 0.95,
    max_tokens: Annotated[int, typer.Option(min=1, max=MAX_INT, help="longest answer in tokens")] = 512,
    near: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="of answers to one question whose word 5-grams have this Jaccard similarity or more, keep "
            "one; 0: keep all",
        ),
    ] = 0.7,
    template: Annotated[str | None, typer.Option(help="prompt format; default: the teacher's own")] = None,
    system: Annotated[str | None, typer.Option(help="system prompt; default: the teacher's own")] = None,
    format: Annotated[str, typer.Option(help="shape of a question's row, as data.format")] = "auto",
    columns: Annotated[
        str | None,
        typer.Option(help="our column name: the file's, as data.columns, for example '{question: ask}'"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="ask this many questions")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**31 - 1,
            help="fixes what is sampled; default: 0, and none with --teacher-url",
            show_default=False,
        ),
    ] = None,
    teacher_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="ask an OpenAI-compatible server instead of loading the teacher, for example "
            "http://localhost:8080/v1; a key is read from MLX_POSTTRAIN_TEACHER_KEY",
        ),
    ] = None,
    in_flight: Annotated[int, typer.Option(min=1, max=256, help="requests to the server at a time")] = 4,
    timeout: Annotated[
        float, typer.Option(min=1, help="seconds that one answer of the server may take")
    ] = 600,
    engine: EngineOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Make data for 08_distill by rejection sampling.

    A teacher answers many times, and what is right is kept; with a reward model, what it likes best is kept
    instead.
    """
    from mlx_posttrain import config
    from mlx_posttrain.generation import synthesize as module
    from mlx_posttrain.generation.server import Server

    server = Server(teacher_url, teacher, in_flight, timeout) if teacher_url else None
    settings = module.Settings(
        samples, temperature, top_p, max_tokens, template, system, reward, keep, near or None, thoughts, seed
    )
    output = output.expanduser()
    told = module.synthesize(
        teacher,
        prompts,
        output,
        settings,
        engine=engine,
        limit=limit,
        format=format,
        columns=config.columns(columns),
        server=server,
        dtype=dtype,
    )
    typer.echo(f"{output}: " + ", ".join(f"{count} {what}" for what, count in told.items()))


@app.command(cls=Settings)
def plan(
    recipe: Annotated[str, typer.Argument(help="a YAML file or the name of a shipped recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value settings, as of `run`")] = None,
    json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Show what a recipe needs: parameters, steps, memory.

    Nothing is trained or written; where memory may be short, advice follows.
    """
    from mlx_posttrain import methods

    found = methods.plan(methods.load_recipe(recipe, overrides))
    if json:
        import json as jsonlib

        typer.echo(jsonlib.dumps([p.to_dict() for p in found], indent=2))
    else:
        typer.echo("\n\n".join(p.text() for p in found))


@app.command(cls=Settings)
def data(
    recipe: Annotated[str, typer.Argument(help="a YAML file or the name of a shipped recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value settings, as of `run`")] = None,
    rows: Annotated[
        int | None, typer.Option(min=0, help="show this many rows; default: 5, and all with --json")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="a JSON object for each row, then one of totals")
    ] = False,
) -> None:
    """Show a recipe's rows as its model sees them.

    Also what is dropped and why. Trained tokens are green, or in [[brackets]] where there is no colour.
    """
    from mlx_posttrain import methods
    from mlx_posttrain.data import show

    shown = show.read(methods.load_recipe(recipe, overrides))
    if json:
        lines = show.to_json(shown, rows)
    else:
        lines = show.to_text(shown, 5 if rows is None else rows, show.has_colour())
    for line in lines:
        typer.echo(line)


@app.command(cls=Settings)
def validate(
    recipe: Annotated[str, typer.Argument(help="a YAML file or the name of a shipped recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value settings, as of `run`")] = None,
) -> None:
    """Check a recipe, its data and its model in seconds.

    These are the checks that a run makes before its first step; nothing is trained or written.
    """
    from mlx_posttrain import methods

    for line in methods.validate(methods.load_recipe(recipe, overrides)):
        typer.echo(line)


@app.command()
def bench(
    model: Annotated[
        str,
        typer.Option(
            help="gpt2, gpt2-medium, gpt2-large, gpt2-xl (random weights), tiny, or a folder or run"
        ),
    ] = "gpt2",
    what: Annotated[
        str, typer.Option(help="kinds of work, separated by commas; an unknown one lists them all")
    ] = "sft,lora,kl,generate",
    engines: Annotated[
        str | None, typer.Option(help="of mlx-gpu, mlx-cpu, torch-cpu; default: what this machine has")
    ] = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="also the trainers of mlx-lm, mlx-lm-lora, unsloth-zoo, transformers and TRL, where "
            "they are installed",
        ),
    ] = False,
    units: Annotated[int, typer.Option(min=1, help="timed units of each engine, of 2 seconds or more")] = 3,
    rows: Annotated[int, typer.Option(min=1, help="rows of a training unit")] = 32,
    length: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="tokens of every row, or of every prompt that is answered; default: prompts of 20 to 60, "
            "answers of 10 to 200, or of 10 to 100 where something is trained on pairs",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    dtype: Annotated[
        str, typer.Option(help="of weights that are not trained: float32, bfloat16 or float16")
    ] = "float32",
    output: Annotated[
        Path, typer.Option(file_okay=False, help="folder for bench.json, bench.md and the chart")
    ] = Path("runs/bench"),
    publish: Annotated[
        bool,
        typer.Option(
            "--publish",
            help="also write publish.md, one block with machine, versions, command and figures to send to "
            "others; nothing is sent",
        ),
    ] = False,
) -> None:
    """Time the engines on the same weights and rows.

    They take turns, and ratios are given only where their losses agree.
    """
    from mlx_posttrain import bench as module
    from mlx_posttrain.bench import render

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",")]

    output = output.expanduser()
    with render.reserve_folder(output):
        result = module.bench(
            model,
            names(what),
            None if engines is None else names(engines),
            baselines=peers,
            units=units,
            shape=module.Shape(rows, length, batch_size),
            dtype=dtype,
        )
        typer.echo(render.markdown(result))
        command = ["mlx-posttrain", *sys.argv[1:]] if publish else None
        typer.echo(f"{output}: {', '.join(render.write(result, output, command))}", err=True)


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    model: Annotated[
        str | None, typer.Option(help="also compare the logits of this model or run on the two engines")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="also compute on the GPU and on the CPU, and say whether they agree"),
    ] = False,
) -> None:
    """Show what this machine has, what is used, and what to fix.

    With --check a block to paste follows: logits, a training step and texts of the embedded model on every
    device; without a GPU the installed engines on the CPU.
    """
    from mlx_posttrain import doctor as module
    from mlx_posttrain import verify
    from mlx_posttrain.errors import UserError

    if json and check:
        raise UserError("--check prints Markdown: leave out --json")
    code = module.doctor(json=json, model=model)
    if check:
        block, holds = verify.machine()
        typer.echo(f"\n{block}")
        code = code or int(not holds)
    raise typer.Exit(code)


@app.command()
def verify(
    anchors: Annotated[
        bool,
        typer.Option(
            "--anchors",
            help="also measure published figures of GPT-2 124M: loads weights and data from the hub, minutes",
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="also write the table to this Markdown file")
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="mlx, torch or auto, for --anchors; parity takes all there are")
    ] = "auto",
) -> None:
    """Check that this machine computes what it should.

    Engines and devices are compared with each other. Prints a Markdown table to paste; ends with 1 if a
    check fails.
    """
    from mlx_posttrain import runs
    from mlx_posttrain import verify as module
    from mlx_posttrain.evaluation import report as pages
    from mlx_posttrain.verify.checks import failed

    if output:
        output = output.expanduser()
        pages.check_target(output, page=False)
    checks = module.verify(anchors, engine)
    table = module.markdown(checks)
    typer.echo(table)
    if output:
        runs.write_text(output, table + "\n")
    raise typer.Exit(int(failed(checks)))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        from mlx_posttrain import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: a UserError becomes one line and its exit code; anything else keeps its traceback."""
    from mlx_posttrain.errors import UserError

    try:
        app(args=arguments)
    except UserError as error:
        from mlx_posttrain.console import printable

        print(f"mlx-posttrain: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as done:
        if done.code != 130:  # what Typer makes of Ctrl-C, without a word
            raise
        print("mlx-posttrain: interrupted", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head` closed our output
        sys.exit(0)
