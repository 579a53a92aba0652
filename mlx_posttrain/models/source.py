"""From a name (hub id, folder, ``tiny``, run, adapter) to the files of a model. Reads only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_posttrain import runs
from mlx_posttrain.config import AdapterSection, parse
from mlx_posttrain.convert import adapters, hub, token_rows
from mlx_posttrain.convert.files import home, read_json
from mlx_posttrain.engines import files
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.tokenizer import has_tokenizer


@dataclass(frozen=True)
class Source:
    """Where a model's parts are.

    folder: the weights, of an adapter those of its base. adapter: the PEFT adapter folder on it. recipe: of a
    run the one that made it. base_id: the hub id of an adapter's base, if its config names one. unmerged: the
    adapter run that ``folder`` will be merged from, where that has not been done (models/merge.py).
    """

    folder: Path
    adapter: Path | None = None
    recipe: dict[str, Any] | None = None
    base_id: str | None = None
    unmerged: Source | None = None

    @property
    def shape_folder(self) -> Path:
        """A folder of the same architecture and size that exists, merged or not."""
        return self.folder if self.unmerged is None else self.unmerged.shape_folder

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the model's tokenizer: of an adapter with new tokens its own."""
        if self.adapter is not None and token_rows.has_rows(self.adapter) and has_tokenizer(self.adapter):
            return self.adapter
        if self.unmerged is None or self.folder.is_dir():
            return self.folder
        return self.unmerged.tokenizer_folder

    @property
    def template(self) -> str | None:
        """The template a run was trained with; None for a model that is no run."""
        if self.recipe is None:
            return None
        data = self.recipe.get("data") or {}
        # Rows taken as they stand were trained without marks, and are asked without them.
        if data.get("pack") or self.recipe.get("untemplated"):
            return "none"
        template = self.templates[0] if self.templates else None
        if not isinstance(template, str):
            raise UserError(f"the run's recipe.yaml has data.template {template!r}, which names no template")
        return template

    @property
    def templates(self) -> list[Any]:
        """All templates that a run's recipe names for its first data; empty for a model that is no run."""
        data = (self.recipe or {}).get("data") or {}
        found = _first_source(data).get("template") or data.get("template", "instruction")
        return [] if self.recipe is None else found if isinstance(found, list) else [found]

    @property
    def system(self) -> str | None:
        """The system prompt that a run was trained with."""
        data = (self.recipe or {}).get("data") or {}
        return _first_source(data).get("system") or data.get("system")

    @property
    def quantize(self) -> int | None:
        """Bits of a QLoRA run's base."""
        return ((self.recipe or {}).get("adapter") or {}).get("quantize")

    @property
    def dtype(self) -> str | None:
        """The number format of a run's weights; None for a model that is no run."""
        return (self.recipe or {}).get("dtype")


def _first_source(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first source of a recipe's mixture; a model is asked as that one's rows are."""
    sources = data.get("sources")
    return sources[0] if isinstance(sources, list) and sources and isinstance(sources[0], dict) else {}


def locate(name: str | Path, above: tuple[Path, ...] = ()) -> Source:
    """Find a model's parts; writes nothing. Raises UserError saying what is missing and what to do.

    above: the runs that are made of this one, by way of their recipes.
    """
    path = home(name)
    if runs.is_run(path):
        above = _below(path, above)
        run, recipe = runs.reopen(path)
        if "stages" in recipe:
            return locate(last_language_model(path, list(recipe["stages"])), above)
        _check_values(recipe, path / "recipe.yaml")
        if not run.finished:
            raise UserError(
                f"{path} is an unfinished run: continue it with `mlx-posttrain run --resume {path}`"
            )
        if (run.final / "adapter_config.json").is_file():
            if "model" not in recipe:
                raise UserError(f"{path / 'recipe.yaml'} names no model for the adapter: put it right")
            folder, unmerged = starting_folder(recipe["model"], above)
            return Source(folder, run.final, recipe, unmerged=unmerged)
        hub.check_folder(run.final)
        return Source(run.final, None, recipe)
    if (path / "adapter_config.json").is_file():
        return _adapter(path, str(name))
    found = hub.resolve(str(name), kind="either")
    return _adapter(found, str(name)) if hub.holds_adapter(found) else Source(found)


def _check_values(recipe: Mapping[str, Any], where: Path) -> None:
    """Raise UserError for a value of the wrong kind in a run's recipe, which its model is opened with."""
    if not isinstance(system := (recipe.get("data") or {}).get("system"), str | None):
        raise UserError(f"{where}: 'data.system' is {system!r:.40}, not text: put it right")
    adapter = recipe.get("adapter") or {}
    quantised = {key: adapter[key] for key in ("quantize", "group_size") if key in adapter}
    parse(quantised, AdapterSection, f"{where}, adapter")


def _below(path: Path, above: tuple[Path, ...]) -> tuple[Path, ...]:
    """``above`` and a run's own folder. Raises UserError for a run that is made of itself."""
    if path.resolve() in above:
        raise UserError(
            f"{path / 'recipe.yaml'}: the run's model is made of the run itself: put `model` right"
        )
    return (*above, path.resolve())


def starting_folder(name: str | Path, above: tuple[Path, ...] = ()) -> tuple[Path, Source | None]:
    """(folder of full weights that a new run on ``name`` starts from, adapter run to merge into it first).

    The second is None where nothing has to be merged any more. above: as in locate. Raises UserError for an
    adapter that cannot be merged: of a QLoRA run, which others continue by its adapter, and one that is no
    run.
    """
    source = locate(name, above)
    if source.adapter is None:
        return source.folder, None
    if source.quantize:
        raise UserError(
            f"{name}: a QLoRA run cannot be a new run's model; start from its adapter with "
            f"adapter.path={name}, or export it with --merge"
        )
    if source.recipe is None:
        raise UserError(
            f"{name} is an adapter without a run: start from it with adapter.path={name} and "
            f"model={source.base_id or source.folder}"
        )
    merged = source.adapter.parent / "merged"
    return merged, None if merged.is_dir() else source


def last_language_model(folder: Path, stages: list[str]) -> Path:
    """The run directory of a finished pipeline's last stage that writes text.

    It is the model that is meant by the pipeline's own folder.

    Raises UserError for an unfinished pipeline, naming the stages that can be used, and for one that has
    reward models only.
    """
    done = [name for name in stages if runs.Run(folder / name).finished]
    writers = [name for name in done if saves_language_model(folder / name / "final")]
    if len(done) < len(stages):
        usable = ", ".join(str(folder / name) for name in writers)
        raise UserError(
            f"{folder} is an unfinished pipeline: continue it with `mlx-posttrain run --resume {folder}`"
            + (f", or use a finished stage: {usable}" if writers else "")
        )
    if not writers:
        raise UserError(
            f"{folder} has no stage that writes text; its reward models: "
            f"{', '.join(str(folder / name) for name in done)}"
        )
    return folder / writers[-1]


def starting_model(name: str | Path, *, trained: bool = False) -> str:
    """The model that a run's first ancestor started from; a name that is no run is returned as it is.

    Of a model that was pre-trained here those are random weights or, with ``trained``, the pre-trained model.
    Raises UserError for a report.
    """
    above: tuple[Path, ...] = ()
    while runs.is_run(name):
        above = _below(home(name), above)
        recipe = runs.reopen(name)[1]
        if "stages" in recipe:
            name = last_language_model(Path(name), list(recipe["stages"]))
            continue
        if "model" not in recipe:
            raise UserError(f"{name} is a report, not a model: give the runs that it is about")
        made = Path(name) / "start"  # pre-training creates its own
        if made.is_dir():
            return str(name if trained else made)
        name = recipe["model"]
    return str(name)


def saves_language_model(final: Path) -> bool:
    """Whether what a run saved is a language model, not a classifier or a page."""
    adapter, config = final / "adapter_config.json", final / "config.json"
    if adapter.is_file():
        return read_json(adapter).get("task_type") != "SEQ_CLS"
    return config.is_file() and not files.is_classifier(read_json(config))


def _adapter(folder: Path, name: str) -> Source:
    config, _ = adapters.read_adapter(folder)
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{name}: adapter_config.json names no base_model_name_or_path; add the base's folder or id there"
        )
    return Source(hub.resolve(base), folder, base_id=base if is_hub_id(base) else None)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` is looked up on the hub rather than on this machine."""
    return name != "tiny" and not home(name).exists()


def adapter_folder(name: str) -> Path:
    """The folder of a PEFT adapter, which of a run is its ``final/``; a hub id's lies in the hub cache.

    Raises UserError as hub.resolve.
    """
    path = home(name)
    if (path / "final").is_dir():
        return path / "final"
    return hub.resolve(name, kind="adapter")
