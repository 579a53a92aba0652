"""From a recipe to a finished run, for every method: set up, train, report, save."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_posttrain import engines, runs
from mlx_posttrain.config import AdapterSection, Recipe, absolute_paths
from mlx_posttrain.console import log
from mlx_posttrain.convert import hub
from mlx_posttrain.convert.files import home, require_space
from mlx_posttrain.data import mixture
from mlx_posttrain.data.read import ModelFacts
from mlx_posttrain.engines import files
from mlx_posttrain.engines.base import Engine, Model, hidden_size, initial_head
from mlx_posttrain.errors import UserError
from mlx_posttrain.memory import plan as plans
from mlx_posttrain.memory.model_size import Size, grown, size
from mlx_posttrain.models import dtypes
from mlx_posttrain.models.adapters import adapter_spec
from mlx_posttrain.models.card import run_card
from mlx_posttrain.models.merge import base_folder
from mlx_posttrain.models.prompt_format import say_other_formats, write_prompt_format, write_tokenizer
from mlx_posttrain.models.source import Source, adapter_folder, is_hub_id, locate
from mlx_posttrain.models.tokenizer import check_vocabulary, load_tokenizer
from mlx_posttrain.rl import actors, learner, prompts
from mlx_posttrain.runs import trackers
from mlx_posttrain.training import edits, new_tokens, samples
from mlx_posttrain.training.checks import check_warmup
from mlx_posttrain.training.loop import Callbacks, Learner, fit
from mlx_posttrain.training.method import Method, Resume
from mlx_posttrain.training.reference import cache_hidden_states, cache_logprobs, digest
from mlx_posttrain.training.rows import RowLearner
from mlx_posttrain.training.session import Session

#: Nats an answer by which float32 log-probs of one model may differ between two batches.
START_WITHIN = 1e-3


def train(
    method: Method, recipe: Any, resume: Resume = False, callbacks: Callbacks | None = None
) -> dict[str, Any]:
    """Run a recipe to the end; returns the evaluation of the final weights with the report's figures.

    Raises UserError for every foreseeable failure, see loop.fit. A new run whose setting up fails leaves
    nothing behind.
    """
    engine, run = open_run(recipe, resume)
    with discard_on_failure(run, resume):
        session = open_session(method, recipe, engine, run, bool(resume))
        chosen = row_learner(session) if method.trains_on == "rows" else _rollout_learner(session)
        engine.seed(recipe.seed)
    result = fit(engine, chosen, run, recipe.train, resume=bool(resume), callbacks=callbacks)
    if method.report is not None:
        result |= method.report(session)
    finish(run, result, _saver(session))
    evaluated = {k: v for k, v in result.items() if isinstance(v, float) and k == "loss"}
    log(f"{run.final} is written" + (f": held-out loss {result['loss']:.4f}" if evaluated else ""))
    if method.after is not None:
        method.after(session)
    return result


def plan(method: Method, recipe: Any) -> list[plans.Plan]:
    """What a recipe would take; makes no run directory, writes no model and loads no weights.

    Raises UserError as reading the data does.
    """
    with tempfile.TemporaryDirectory() as scratch:
        made = method.start and method.start(recipe, Path(scratch))
        chosen = engines.get(recipe.engine)
        folder, facts = shape_facts(chosen, recipe, made)
        recipe = recipe.model_copy(update={"dtype": dtypes.of_recipe(recipe, chosen)})
        engine, of = chosen.name, _size(folder, facts)
        if method.trains_on == "rows":
            assert method.dataset is not None
            return [plans.of_rows(recipe, engine, of, method.make_dataset(recipe, facts), method.reference)]
        read = prompts.read(recipe.data, facts.tokenizer, of.context, recipe.rollout.max_tokens, recipe.seed)
        return [plan_rollouts(method, recipe, chosen, of, read)]


def validate(method: Method, recipe: Any) -> list[str]:
    """Check what a run would check before its first step, without weights; returns what was found, in lines.

    Raises UserError as running the recipe would.
    """
    trackers.check(recipe.log)
    folder = runs.check_free(recipe.output)
    for entry in [*getattr(recipe, "reward", ()), *getattr(recipe, "judge", ())]:
        if entry.model is None:
            entry.load()
    (planned,) = plan(method, recipe)
    check_warmup(recipe.train, planned.steps)
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    require_space(there, 12 * planned.trained + 2**20)
    return [*planned.text().splitlines(), f"{recipe.output}: the run can start"]


def open_run(recipe: Any, resume: Resume) -> tuple[Engine, runs.Run]:
    """The recipe's engine and its run directory, new or reopened, locked for this process.

    Paths in the recipe are made absolute, and its engine and number format are named, so that the run can be
    opened from any folder and is never resumed on another engine or in another format. Raises UserError for a
    recipe that was edited since the run's last checkpoint, unless ``resume`` is "edited".
    """
    trackers.check(recipe.log)
    engine = engines.get(recipe.engine)
    assert recipe.output is not None
    recipe.output = str(home(recipe.output))
    recipe.engine = engine.name
    recipe.dtype = dtypes.of_recipe(recipe, engine)
    absolute_paths(recipe)
    if resume:
        run, _ = runs.reopen(recipe.output, write=True)
        if run.finished:
            raise UserError(
                f"{run.folder} is finished: there is nothing to resume. To train it further, start another "
                f"run from it: model={run.folder} output=FOLDER"
            )
        edits.check(run, recipe, accept=resume == "edited")
    else:
        run = runs.create(recipe.output, recipe)
    run.recipe = edits.settled(recipe)
    run.track(trackers.make(recipe.log, run.folder, recipe))
    return engine, run


@contextlib.contextmanager
def discard_on_failure(run: runs.Run, resume: Resume) -> Iterator[None]:
    """Take a new run directory away again if what happens inside fails or is interrupted.

    Nothing has been trained, and the next try must not find it in use.
    """
    try:
        yield
    except BaseException:
        if not resume:
            run.discard()
        raise


def open_session(method: Method, recipe: Any, engine: Engine, run: runs.Run, resume: bool = False) -> Session:
    """The recipe's model, tokenizer and dataset on an engine. Raises UserError where one does not fit."""
    folder = method.start(recipe, run.folder) if method.start else base_folder(recipe.model)
    facts = facts_on(engine, recipe, folder)
    if not method.start:
        say_other_formats(recipe)
    # Before the weights: a mistake in the rows is found at once.
    dataset = method.make_dataset(recipe, facts) if method.dataset else None
    model = load_model(engine, recipe, folder, getattr(recipe, "adapter", None), facts)
    check_vocabulary(facts.tokenizer, model, folder)
    if method.saves(recipe) == "classifier":
        if not model.has_head:
            model.add_head(initial_head(hidden_size(model.config), recipe.seed))
    elif model.has_head:
        raise UserError(
            f"{recipe.model} is a reward model: it scores texts and cannot learn to write them; start from a "
            "language model"
        )
    return Session(method, recipe, engine, run, resume, folder, model, facts, dataset)


def shape_facts(engine: Engine, recipe: Any, made: Path | None) -> tuple[Path, ModelFacts]:
    """(folder of the model's shape, facts) of a recipe before it runs; ``made``: as Method.start made it."""
    if made is not None:
        return made, facts_on(engine, recipe, made)
    source = locate(recipe.model)
    say_other_formats(recipe)
    return source.shape_folder, facts_on(engine, recipe, source.shape_folder, source.tokenizer_folder)


def facts_on(engine: Engine, recipe: Recipe, folder: Path, tokenizer: Path | None = None) -> ModelFacts:
    """The facts of a recipe's model on an engine, its new tokens included.

    tokenizer: the folder that has it, where that is another. Raises UserError where the recipe's rows may be
    longer than what the engine computes right, and as new_tokens.facts.
    """
    facts, context = new_tokens.facts(recipe, folder, tokenizer), engine.context(folder)
    if context == facts.context or context is None:
        return facts
    if recipe.data.max_length > context:
        raise UserError(
            f"data.max_length={recipe.data.max_length}: on {engine.name} {recipe.model} computes texts of at "
            f"most {context} tokens right (docs/models.md); lower it, or use engine=torch"
        )
    return replace(facts, context=context)


def load_model(
    engine: Engine,
    recipe: Recipe,
    folder: Path,
    adapter: AdapterSection | None,
    facts: ModelFacts | None = None,
) -> Model:
    """The recipe's model on an engine, with a new adapter or one to start from, and the ``facts``' tokens."""
    quantize = adapter.quantize if adapter else None
    if quantize and hub.check_config(folder).get("quantization"):
        raise UserError(f"{recipe.model} is quantised already: leave out adapter.quantize")
    model = engine.load(
        folder,
        dtype=dtypes.of_recipe(recipe, engine),
        quantize=quantize,
        group_size=adapter.group_size if adapter else 64,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        vocabulary=facts.vocabulary if facts else 0,
        mixed=recipe.train.precision == "mixed",
    )
    model.base_name = recipe.model if is_hub_id(recipe.model) else str(folder)
    if adapter is not None:
        spec = adapter_spec(adapter)
        if facts is not None:
            spec = replace(spec, tokens=facts.new_tokens)
        model.add_adapter(spec, recipe.seed)
        if adapter.path is not None:
            start = adapter_folder(adapter.path)
            log(
                f"adapter from {start}: its own {spec.kind}, rank {spec.rank}, alpha {spec.alpha:g} hold, "
                "not the recipe's"
            )
            model.load_trained(start)
    return model


def row_learner(session: Session) -> Learner:
    """What trains on the session's rows, with the reference that the method needs."""
    method, recipe, model, dataset = session.method, session.recipe, session.model, session.dataset
    assert method.loss is not None and dataset is not None
    reference = method.reference(recipe)
    facts: dict[str, Any] = {"untemplated": True} if dataset.untemplated else {}
    _note(session, facts, mixture.tally(recipe.data, dataset.train, dataset.held_out))
    print_parameters(recipe, session.engine, model)
    of = _size(session.folder, session.facts)
    plans.print_plan(lambda: plans.of_rows(recipe, session.engine.name, of, dataset, method.reference))
    if reference == "distribution":
        model.keep_reference()
    if reference == "logprobs":
        _keep_reference_logprobs(session)

    def cache() -> None:
        with discard_on_failure(session.run, session.resume):
            cache_hidden_states(model, dataset, recipe.kl.cache_gb)

    return RowLearner(
        session.engine,
        model,
        method.loss(recipe),
        dataset,
        metrics=method.metrics,
        samples=(method.samples or samples.default_for(session))(session),
        prepare=cache if reference == "distribution" else None,
    )


def _note(session: Session, facts: dict[str, Any], sources: dict[str, dict[str, int]]) -> None:
    """Write into a new run's recipe.yaml what its rows told: ``facts``, and how many each source gives."""
    facts = {**facts, "mixture": sources} if sources else facts
    if facts and not session.resume:
        session.run.write_recipe(session.recipe, **facts)


def _keep_reference_logprobs(session: Session) -> None:
    """Give the dataset the reference's log-probabilities, before a checkpoint's weights are read.

    Raises UserError where the starting model, as the reference of itself, is not itself: every log-ratio must
    begin at 0.
    """
    recipe, dataset, adapter = session.recipe, session.dataset, getattr(session.recipe, "adapter", None)
    assert dataset is not None
    named = getattr(recipe, "reference", None)
    folders = [base_folder(named)] if named else [session.folder]
    if not named and adapter is not None and adapter.path is not None:
        folders.append(adapter_folder(adapter.path))
    gap = cache_logprobs(
        dataset,
        session.run.folder / runs.REFERENCE,
        digest(folders),
        lambda: (
            load_reference(session.engine, recipe, session.folder, session.facts) if named else session.model
        ),
    )
    if gap is None or named:
        return
    log(f"reference: the starting model, so log-ratios begin at 0 (within {gap:.1g} nats an answer)")
    if gap > START_WITHIN and recipe.dtype == "float32" and recipe.train.precision == "float32":
        raise UserError(
            f"the starting model differs from itself as the reference by {gap:.3g} nats an answer: a defect "
            "of this engine on this machine; try the other engine, and report it with the output of doctor"
        )


def load_reference(engine: Engine, recipe: Any, folder: Path, facts: ModelFacts) -> Model:
    """The model that a policy is compared with: the recipe's ``reference``, or the one it starts from.

    facts: the policy's, whose new tokens the reference gets too. Raises UserError for a reference with
    another vocabulary.
    """
    if recipe.reference is None:
        return load_model(engine, recipe, folder, recipe.adapter, facts)
    other = base_folder(recipe.reference)
    theirs = load_tokenizer(other, recipe.data.special_tokens)
    if facts.tokenizer.get_vocab() != theirs.get_vocab():
        raise UserError(
            f"reference: {recipe.reference} has another vocabulary than {recipe.model}, so their "
            "log-probabilities cannot be compared; name a model with the same tokenizer"
        )
    mixed = recipe.train.precision == "mixed"
    return engine.load(
        other, dtype=dtypes.of_recipe(recipe, engine), vocabulary=facts.vocabulary, mixed=mixed
    )


def _rollout_learner(session: Session) -> Learner:
    method, recipe = session.method, session.recipe
    assert method.algorithm is not None
    read = prompts.read(
        recipe.data, session.facts.tokenizer, session.model.context, recipe.rollout.max_tokens, recipe.seed
    )
    _note(session, {}, mixture.tally(recipe.data, *read))
    # Before reference, critic and scorers are there.
    of = _size(session.folder, session.facts)
    plans.print_plan(lambda: plan_rollouts(method, recipe, session.engine, of, read))
    algorithm, reference = method.algorithm(recipe), method.reference(recipe)
    made, data = actors.make_actors(
        session.engine,
        recipe,
        algorithm,
        reference,
        session.folder,
        session.model,
        session.facts.tokenizer,
        read,
    )
    print_parameters(recipe, session.engine, session.model)
    return learner.RolloutLearner(
        session.engine, made, algorithm, recipe, data, reference, session.run.sample
    )


def plan_rollouts(
    method: Method, recipe: Any, engine: Engine, of: Size, read: tuple[Sequence[Any], Sequence[Any]]
) -> plans.Plan:
    """The plan of a run on rollouts; ``read`` are its training and held-out prompts."""
    training, held_out = ([len(p.tokens) for p in part] for part in read)
    first = prompts.order(len(training), recipe.seed, -1)[: learner.NORMALISE_ON]
    lengths = plans.PromptLengths(max(training), [training[i] for i in first], held_out)
    named = [entry.model for entry in [*recipe.reward, *recipe.judge] if entry.model]
    sources = [locate(name) for name in named]
    scorers = [(size(source.shape_folder), dtypes.of_source(source, engine)) for source in sources]
    assert method.algorithm is not None
    return plans.of_rollouts(recipe, engine.name, of, lengths, scorers, method.algorithm, method.reference)


def _size(folder: Path, facts: ModelFacts) -> Size:
    """A model's size with its new tokens, and the context that its engine computes right."""
    return replace(grown(size(folder), facts.vocabulary, len(facts.new_tokens)), context=facts.context)


def print_parameters(recipe: Recipe, engine: Engine, model: Model) -> None:
    """Say how much of the model trains. Raises UserError when nothing does."""
    total, trained = model.parameter_counts()
    if trained == 0:
        raise UserError(
            f"{recipe.model} is quantised, so none of its weights can be trained: add an adapter, for "
            "example adapter.rank=16"
        )
    half = "" if recipe.dtype in (None, "float32") else f" in {recipe.dtype}"
    half = " in mixed precision" if recipe.train.precision == "mixed" else half
    log(
        f"{recipe.model}{half} on {engine.device()}: {trained:,} of {total:,} parameters train "
        f"({trained / total:.2%})"
    )


def _saver(session: Session) -> Callable[[Path], None]:
    """A function that writes the trained model into a folder, as what the method says it is."""
    model = session.model
    _, raw = runs.reopen(session.run.folder)
    source, tokenizer = Source(session.folder, None, raw), session.facts.tokenizer

    def classifier(folder: Path) -> None:
        model.save_classifier(folder, session.facts.pad)
        if session.facts.new_tokens:
            write_tokenizer(folder, source, tokenizer)

    def save(folder: Path) -> None:
        model.save(folder)
        # A value head is of no use to whoever runs the model.
        (folder / files.HEAD_FILE).unlink(missing_ok=True)
        write_prompt_format(folder, source, tokenizer)

    return classifier if session.method.saves(session.recipe) == "classifier" else save


def finish(run: runs.Run, result: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Write figures, card and, last, ``final/``: a run that has it is complete."""
    runs.write_text(run.folder / "result.json", json.dumps(result, indent=2) + "\n")
    runs.write_text(run.folder / "card.md", run_card(run.folder))
    runs.replace_folder(run.final, write)
    run.close()
