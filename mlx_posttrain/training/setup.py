"""From a recipe to a finished run, for every method that trains on fixed rows."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_posttrain import engines, runs
from mlx_posttrain.config import AdapterSection, Recipe, paths_in_full
from mlx_posttrain.console import say
from mlx_posttrain.convert import hub
from mlx_posttrain.data import encode
from mlx_posttrain.data.dataset import Data
from mlx_posttrain.data.read import encode_rows, read_conversations, split_rows
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.engines.base import Engine, Loss, Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.memory import plan
from mlx_posttrain.models.adapters import adapter_spec
from mlx_posttrain.models.card import run_card
from mlx_posttrain.models.merge import base_folder
from mlx_posttrain.models.source import adapter_folder, is_hub_id, locate
from mlx_posttrain.models.tokenizer import check_vocabulary, load_tokenizer
from mlx_posttrain.runs import trackers
from mlx_posttrain.training import reference as references
from mlx_posttrain.training.loop import fit

Start = Callable[[Path], Path]  # makes the model that a run starts from in the run's folder

Prepare = Callable[[list[Conversation]], list[Conversation]]  # changes the training rows


def load_model(engine: Engine, recipe: Recipe, folder: Path, adapter: AdapterSection | None) -> Model:
    """The recipe's model on an engine, with a new adapter or one to start from."""
    quantize = adapter.quantize if adapter else None
    if quantize and hub.check_config(folder).get("quantization"):
        raise UserError(f"{recipe.model} is quantised already: leave out adapter.quantize")
    model = engine.load(
        folder,
        dtype=recipe.dtype,
        quantize=quantize,
        group_size=adapter.group_size if adapter else 64,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
    )
    model.base_name = recipe.model if is_hub_id(recipe.model) else str(folder)
    if adapter is not None:
        spec = adapter_spec(adapter)
        model.add_adapter(spec, recipe.seed)
        if adapter.path is not None:
            start = adapter_folder(adapter.path)
            say(
                f"adapter from {start}: its own {spec.kind}, rank {spec.rank}, alpha {spec.alpha:g} hold, "
                "not the recipe's"
            )
            model.load_trained(start)
    return model


def sampler(
    model: Model, tokenizer: Any, recipe: Recipe, held_out: list[Conversation], run: runs.Run
) -> Callable[[int], None]:
    """A function that answers a few prompts and writes them to samples.jsonl."""
    data, sample = recipe.data, recipe.sample
    template = data.template if isinstance(data.template, str) else data.template[0]
    if sample.prompts:
        asked = [(Turn("user", p),) for p in sample.prompts]
        wanted = [None] * len(asked)
        templated = held_out[0].templated if held_out else True
    else:
        rows = held_out[: sample.count] if not data.pack else []
        asked = [c.turns[:-1] for c in rows]
        wanted = [c.turns[-1].content for c in rows]
        templated = rows[0].templated if rows else True
    length = (model.context or data.max_length) - 1
    prompts = (
        [p[-length:] for p in encode.encode_prompts(asked, tokenizer, template, templated=templated)]
        if asked
        else []
    )

    def write(step: int) -> None:
        if not prompts:
            return
        answers = model.generate(
            prompts,
            max_tokens=sample.max_tokens,
            stop=encode.eos_id(tokenizer),
            temperature=sample.temperature,
            seed=recipe.seed,
        )
        for turns, answer, want in zip(asked, answers, wanted, strict=True):
            text = tokenizer.decode(answer.tokens).strip()
            run.sample(
                {
                    "step": step,
                    "prompt": turns[-1].content if turns else "",
                    "answer": text,
                    "stopped": answer.stopped,
                    "wanted": want,
                }
            )

    return write


def begin(recipe: Recipe, resume: bool) -> tuple[Engine, runs.Run]:
    """The recipe's engine and its run directory, new or reopened; what the recipe names by path is then named
    in full.
    """
    trackers.check(recipe.log)
    engine = engines.get(recipe.engine)
    assert recipe.output is not None
    recipe.output = str(Path(recipe.output).expanduser())
    # Resolved, so that the run can be opened from any folder and is never resumed on another engine.
    recipe.engine = engine.name  # type: ignore[assignment]
    paths_in_full(recipe)
    if resume:
        run, _ = runs.reopen(recipe.output, write=True)
        if run.finished:
            raise UserError(f"{run.folder} is finished: there is nothing to resume")
    else:
        run = runs.create(recipe.output, recipe)
    run.track(trackers.make(recipe.log, run.folder, recipe))
    return engine, run


@contextlib.contextmanager
def setting_up(run: runs.Run, resume: bool) -> Iterator[None]:
    """Take the run directory away again if what happens inside fails or is interrupted: nothing has been
    trained, and the next try must not find it in use.
    """
    try:
        yield
    except BaseException:
        if not resume:
            run.discard()
        raise


def announce(recipe: Recipe, engine: Engine, model: Model) -> None:
    """Say how much of the model trains. Raises UserError when nothing does."""
    total, trained = model.parameter_counts()
    if trained == 0:
        raise UserError(
            f"{recipe.model} is quantised, so none of its weights can be trained: add an "
            "adapter, for example adapter.rank=16"
        )
    say(
        f"{recipe.model} on {engine.device()}: {trained:,} of {total:,} parameters train "
        f"({trained / total:.2%})"
    )


def finish(run: runs.Run, result: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Write figures, card and, last, ``final/``: a run that has it is complete."""
    runs.write_text(run.folder / "result.json", json.dumps(result, indent=2) + "\n")
    runs.write_text(run.folder / "card.md", run_card(run.folder))
    runs.replace_folder(run.final, write)
    run.close()


def training_data(
    recipe: Recipe,
    train: list[Conversation],
    held_out: list[Conversation],
    tokenizer: Any,
    context: int | None,
) -> Data:
    """Rows as token ids, and the batches of any step; prints what was dropped. Raises UserError where rows
    and ``data.pack`` do not go together.
    """
    if recipe.data.pack and train[0].templated:
        raise UserError(
            "data.pack joins plain text: these rows have prompts; leave out data.pack, or give "
            "rows with a column 'text'"
        )
    examples = encode_rows(train, recipe.data, tokenizer, context, recipe.seed, "training rows")
    unseen = encode_rows(
        held_out, recipe.data, tokenizer, context, recipe.seed, "held-out rows", needed=False
    )
    return Data(examples, unseen, recipe.train, recipe.seed, context)


def planned(
    recipe: Recipe,
    *,
    reference: bool = False,
    cache_gb: float = 0.0,
    start: Start | None = None,
    prepare: Prepare | None = None,
) -> list[plan.Plan]:
    """What a run would take; arguments as of :func:`run`. Makes no run directory and loads no weights. Raises
    UserError as reading the data does.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = start(Path(scratch)) if start else locate(recipe.model).folder
        of = plan.size(source)
        train, held_out = split_rows(recipe.data, recipe.seed, read_conversations)
        train = prepare(train) if prepare else train
        data = training_data(recipe, train, held_out, load_tokenizer(source), of.context)
    return [
        plan.of_data(
            recipe, engines.get(recipe.engine).name, of, data, reference=reference, cache_gb=cache_gb
        )
    ]


def run(
    recipe: Recipe,
    loss: Loss,
    *,
    adapter: AdapterSection | None = None,
    reference: bool = False,
    cache_gb: float = 0.0,
    resume: bool = False,
    start: Start | None = None,
    prepare: Prepare | None = None,
    judge: Callable[[runs.Run, Model, Any, list[Conversation], float], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Load, train, save.

    ``start(run_folder)`` makes the model to start from, by default ``recipe.model``; ``prepare`` changes the
    training rows; ``judge(run, model, tokenizer, held_out, kept)`` looks at the trained model and returns
    further figures; kept is the share of the training rows that were trained on.

    ``reference`` keeps the starting model beside the trained one, and as much of what it says of the rows as
    takes ``cache_gb``.

    Returns the final evaluation. Raises UserError for every foreseeable failure, see fit.
    """
    engine, run = begin(recipe, resume)
    with setting_up(run, resume):
        source = start(run.folder) if start else base_folder(recipe.model)
        tokenizer = load_tokenizer(source)
        train, held_out = split_rows(recipe.data, recipe.seed, read_conversations)
        train = prepare(train) if prepare else train
        model = load_model(engine, recipe, source, adapter)
        if model.has_head:
            raise UserError(
                f"{recipe.model} is a reward model: it scores texts and cannot learn to write them; start "
                "from a language model"
            )
        check_vocabulary(tokenizer, model, source)
        data = training_data(recipe, train, held_out, tokenizer, model.context)
        untemplated, kept = not train[0].templated, len(data.train) / len(train)
        if untemplated and not resume:
            run.write_recipe(recipe, untemplated=True)
        announce(recipe, engine, model)
        plan.tell(
            lambda: plan.of_data(
                recipe, engine.name, plan.size(source), data, reference=reference, cache_gb=cache_gb
            )
        )
        engine.seed(recipe.seed)
        if reference:
            model.keep_reference()

    def remember() -> None:
        with setting_up(run, resume):
            references.remember(model, data, cache_gb)

    result: dict[str, Any] = fit(
        engine,
        model,
        loss,
        data,
        run,
        resume=resume,
        on_evaluate=sampler(model, tokenizer, recipe, held_out, run),
        before=remember if reference else None,
    )
    if judge is not None:
        result |= judge(run, model, tokenizer, held_out, kept)
    finish(run, result, model.save)
    say(f"{run.final} is written" + (f": held-out loss {result['loss']:.4f}" if "loss" in result else ""))
    return result
