"""The command line: parse, call, print. Everything heavy is imported inside the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="mlx-posttrain", help="Post-train language models on a Mac or Linux machine: recipes on MLX and on PyTorch CPU.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

EngineOption = Annotated[str, typer.Option("--engine", help="mlx, torch or auto")]


@app.command()
def run(
    recipe: Annotated[str | None, typer.Argument(help="a YAML file or the name of a shipped recipe, see `recipes`")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value settings, for example model=tiny train.lr=1e-4")] = None,
    resume: Annotated[Path | None, typer.Option(help="continue this unfinished run; takes no recipe")] = None,
) -> None:
    """Run a recipe, or continue a run."""
    from mlx_posttrain import methods, runs
    from mlx_posttrain import recipe as recipes
    from mlx_posttrain.errors import UserError

    if resume is not None:
        if recipe or overrides:
            raise UserError("--resume continues a run with its own recipe: give no recipe and no settings")
        _, raw = runs.reopen(resume)
        raw.pop("untemplated", None)
        raw["output"] = str(resume)
        chosen = recipes.parse(raw, methods.get(str(raw.get("method"))).Recipe, str(resume / "recipe.yaml"))
    elif recipe is None:
        raise UserError("name a recipe: a YAML file or one that `mlx-posttrain recipes` lists")
    else:
        chosen = recipes.load(recipe, overrides)
    methods.get(chosen.method).run(chosen, resume=resume is not None)
    typer.echo(chosen.output)


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from mlx_posttrain import recipe as module

    for path in module.shipped().values():
        raw = module.read_yaml(path)
        typer.echo(f"{path.stem:20} {raw.get('method', ''):10} {raw.get('description', '')}")


@app.command()
def keys(method: Annotated[str, typer.Argument(help="sft, reward, ppo, pipeline or pretrain")] = "sft") -> None:
    """List every key a recipe may have, with its default."""
    from mlx_posttrain import methods
    from mlx_posttrain import recipe as module

    for key, default, description in module.describe(methods.get(method).Recipe):
        typer.echo(f"{key:32} {default:18} {description}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(file_okay=False, help="folder for the runs")] = Path("runs/demo"),
    engine: EngineOption = "auto",
    seed: Annotated[int, typer.Option(min=0, help="seed of every run")] = 0,
) -> None:
    """Tune the embedded tiny model three ways and compare: a few minutes, no network."""
    from mlx_posttrain import demo as module

    module.demo(output, engine, seed)


@app.command()
def convert(
    src: Annotated[str, typer.Argument(help="a model folder or a hub id")],
    dst: Annotated[Path, typer.Argument(help="folder to write")],
    to: Annotated[str, typer.Option(help="mlx or hf")] = "mlx",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as it is")] = None,
    quantize: Annotated[int | None, typer.Option(help="bits of an MLX-quantised model")] = None,
    force: Annotated[bool, typer.Option(help="write into a folder that is not empty")] = False,
) -> None:
    """Convert weights between Hugging Face's and MLX's formats."""
    from mlx_posttrain.convert.weights import convert as convert_weights

    done = convert_weights(src, dst, to=to, dtype=dtype, quantize=quantize, force=force)
    bits = f", {done.bits} bits" if done.bits else ""
    typer.echo(f"{done.path}: {done.model_type}, {done.tensors} tensors, {done.bytes / 2**20:.1f} MB{bits}")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="a run, a model or adapter folder, `tiny`, or a hub id")],
    prompt: Annotated[list[str] | None, typer.Option(help="prompt; may be given several times")] = None,
    file: Annotated[Path | None, typer.Option(help="one prompt a line, as UTF-8 text")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer in tokens")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="sample from the smallest set of tokens with this probability")] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="answers per prompt")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="fixes what is sampled")] = 0,
    template: Annotated[str | None, typer.Option(help="prompt format; default: the run's own, `none` for a plain model")] = None,
    engine: EngineOption = "auto",
    json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
) -> None:
    """Answer prompts, as many at once as memory allows."""
    from mlx_posttrain import generation
    from mlx_posttrain.errors import UserError

    prompts = list(prompt or [])
    if file is not None:
        try:
            prompts += [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except OSError as error:
            raise UserError(f"--file {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--file {file}: not UTF-8 text (byte {error.start + 1}); give a text file with one prompt a line") from None
    if not prompts:
        raise UserError("give a prompt: --prompt TEXT (several times if you like) or --file FILE")
    answers = generation.answer(
        model,
        prompts,
        engine=engine,
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
            typer.echo(f"> {a['prompt']}\n{a['answer']}\n")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="a run, a model or adapter folder, `tiny`, or a hub id")],
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0)] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 0.95,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    template: Annotated[str | None, typer.Option(help="prompt format; default: the run's own")] = None,
    engine: EngineOption = "auto",
) -> None:
    """Talk to a model; answers stream. An empty line or Ctrl-D ends, /new starts over."""
    from mlx_posttrain import generation

    generation.chat(model, engine=engine, template=template, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a finished run")],
    output: Annotated[Path | None, typer.Option(help="folder to write; default: RUN/export-FORMAT")] = None,
    to: Annotated[str, typer.Option(help="peft, hf or mlx-lm")] = "peft",
    merge: Annotated[bool, typer.Option(help="fold the adapter into its base")] = False,
    force: Annotated[bool, typer.Option(help="write into a folder that is not empty; merge in spite of a large drift")] = False,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="also upload to this hub repository")] = None,
) -> None:
    """Write a run for PEFT, transformers or mlx-lm, with a model card."""
    from mlx_posttrain import export as module

    target = output or run / f"export-{to}"
    done = module.export(run, target, to, merged=merge, force=force)
    if drift := done.get("drift"):
        typer.echo(
            f"merged into the quantised base: {drift['lost']:.1%} of the adapter's effect on the logits lost, "
            f"largest difference {drift['max_logit_difference']:.3f}, KL {drift['kl']:.4f} nats"
        )
    typer.echo(done["path"])
    if push:
        typer.echo(module.push(target, push))


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False) -> None:
    """Show what this machine has, what is used, and what to fix."""
    from mlx_posttrain import doctor as module

    raise typer.Exit(module.doctor(json=json))


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
        print(f"mlx-posttrain: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("mlx-posttrain: interrupted", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head` closed our output
        sys.exit(0)
