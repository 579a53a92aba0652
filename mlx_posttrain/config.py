"""What a recipe may say: typed, strict, every key described.

A recipe is one YAML file. Unknown keys are errors that name the nearest key, values are checked, and
``key.sub=value`` on the command line overrides any key. A method adds its own section by subclassing
:class:`Recipe` in its own file.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from stat import S_ISREG
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mlx_posttrain.convert.files import from_here, home
from mlx_posttrain.errors import UserError
from mlx_posttrain.key_names import elsewhere_called
from mlx_posttrain.yaml_text import MAX_CHARACTERS, Written, flow, parse_yaml, unquoted, with_spaces

#: Largest whole number in a recipe, seeds included: what 32 bits hold, as libraries keep them.
MAX_INT = 2**31 - 1


class Section(BaseModel):
    """A part of a recipe; unknown keys are refused, and so are numbers and texts that nothing can take."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, given: Any) -> Any:
        """Refuse true for a number, which it would be 1: YAML reads yes, on and true so."""
        for name, value in given.items() if isinstance(given, dict) else ():
            kinds = _kinds(cls.model_fields[name].annotation) if name in cls.model_fields else set()
            parts = value if isinstance(value, list) else [value]
            if kinds & {int, float} and bool not in kinds and any(isinstance(one, bool) for one in parts):
                raise ValueError(f"{name} takes a number, not {str(value).lower()}")
        return given

    @classmethod
    def entry(cls, text: str) -> dict[str, Any]:
        """What a plain text stands for where a list of these sections is wanted."""
        return {next(iter(cls.model_fields)): text}

    @model_validator(mode="after")
    def _within_bounds(self) -> Section:
        for name in type(self).model_fields:
            given = getattr(self, name)
            for value in given if isinstance(given, list) else [given]:
                if isinstance(value, int) and abs(value) > MAX_INT:
                    raise ValueError(f"{name} is {short(value)}, and no number here is beyond {MAX_INT}")
                if isinstance(value, str) and "\0" in value:
                    raise ValueError(f"{name} has a NUL character in it: {short(value)}")
        return self


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of, those of sections aside."""
    inner = get_args(annotation)
    return {kind for one in inner for kind in _kinds(one)} if inner else {annotation}


S = TypeVar("S", bound=Section)
Ranked = Literal["best_worst", "best_random", "all"]
TrainOn = Literal["completion", "assistant", "all"]


class CleanSection(Section):
    """Data-quality filters, applied in this order; each says how many rows it dropped."""

    min_words: int = Field(3, ge=0, description="shortest answer kept, in words")
    max_words: int = Field(300, ge=1, description="longest answer kept, in words")
    complete: bool = Field(True, description="drop answers that break off in mid-sentence")
    boilerplate: bool = Field(
        True, description="drop refusals, 'As an AI language model', bare links and placeholders"
    )
    language: str | None = Field("en", description="keep rows written in this language; null keeps all")
    exact: bool = Field(True, description="drop rows that are the same but for case and spacing")
    near: float | None = Field(
        0.7,
        gt=0,
        le=1,
        description="drop near duplicates: Jaccard similarity of word 5-grams from which "
        "two rows are one; null: off",
    )
    keep: int | None = Field(
        None, ge=1, description="keep this many rows, drawn by seed; null keeps all that pass"
    )


class SourceSection(Section):
    """One source of a mixture; what it leaves out is as `data` says.

    Weights are shares of the mixture's rows, whatever they add up to; without any weight each source gives
    all its rows. No row is taken twice. Which rows are held out is decided within each source, and a question
    held out of one is not trained on by way of another. See data/split.py.
    """

    source: str = Field(description="as data.source")
    name: str | None = Field(None, description="what figures and lines call it; null: from the source")
    weight: float | None = Field(
        None, gt=0, description="its share of the rows, relative to the other weights; null in all: every row"
    )
    limit: int | None = Field(None, ge=1, description="take at most this many rows of it; null: no limit")
    split: str | None = Field(None, description="split to train on; null: data.split")
    config: str | None = Field(None, description="Hugging Face configuration; null: data.config")
    shuffle: bool | None = Field(
        None, description="shuffle by seed before rows are taken; null: data.shuffle"
    )
    format: str | None = Field(None, description="shape of a row; null: data.format")
    ranked: Ranked | None = Field(None, description="pairs of ranked answers; null: data.ranked")
    families: list[str] | None = Field(None, description="kinds of embedded rows; null: data.families")
    columns: dict[str, str] | None = Field(None, description="names of columns; null: data.columns")
    prompt: str | None = Field(None, description="question made of columns; null: data.prompt")
    template: str | list[str] | None = Field(None, description="template, or several; null: data.template")
    train_on: TrainOn | None = Field(None, description="which tokens are trained; null: data.train_on")
    system: str | None = Field(None, description="system prompt; null: data.system")
    eval_split: str | None = Field(
        None, description="split to evaluate on; null: data.eval_split, then as without sources"
    )


class DataSection(Section):
    """Where rows come from and how they become tokens."""

    source: str | None = Field(
        None,
        description="embedded/tasks, a .json/.jsonl/.csv/.parquet file, or a Hugging Face data-set id; null: "
        "rows come from `sources`",
    )
    split: str = Field("train", description="split of the source to train on")
    config: str | None = Field(None, description="configuration name of a Hugging Face data set")
    limit: int | None = Field(None, ge=1, description="take this many rows; null takes all")
    shuffle: bool = Field(False, description="shuffle by seed before taking `limit` rows")
    format: str = Field(
        "auto",
        description="shape of a row: auto (by its columns), alpaca, messages, prompt_completion, "
        "question_answer, problem_solution, input_output, role_content, text, reasoning, generations, gsm8k, "
        "preference, hh, ranked, labelled, stepwise, prompt, chosen, either",
    )
    ranked: Ranked = Field(
        "best_worst",
        description="which pairs rows with several scored answers make: the best with the worst, the best "
        "with a worse one drawn by seed, or all with different scores",
    )
    families: list[str] | None = Field(None, description="kinds of embedded rows to take; null: all")
    columns: dict[str, str] = Field(
        default_factory=dict, description="our column name: the file's column name"
    )
    prompt: str | None = Field(
        None,
        description="the question to ask where the file has only its parts: text with columns in braces, "
        "'Make {target} from {nums}.' for example; null: the file has it",
    )
    template: str | list[str] = Field(
        "instruction",
        description="a template's name, or a list from which each row draws one by seed: instruction, plain, "
        "chatml, question, dialogue, alpaca, none, or chat (the model's own)",
    )
    train_on: TrainOn = Field(
        "completion", description="which tokens are trained: the last answer, every answer, or all text"
    )
    max_length: int = Field(512, ge=8, description="longest row in tokens")
    too_long: Literal["cut", "drop"] = Field(
        "cut",
        description="a row longer than max_length: cut its answer's end, or drop the row; both are counted",
    )
    system: str | None = Field(None, description="system prompt put before every conversation that has none")
    special_tokens: list[str] = Field(
        default_factory=list,
        description="tokens to add to the vocabulary, <think> for example; those that it has already stay",
    )
    pack: bool = Field(False, description="join text rows into blocks of max_length tokens (pre-training)")
    clean: CleanSection | None = Field(None, description="data-quality filters; null: none")
    eval_split: str | None = Field(
        None, description="split to evaluate on; null: `valid` of the embedded data, else `holdout`"
    )
    holdout: float = Field(
        0.1, ge=0, description="rows kept from training for evaluation: a share below 1, or a number of rows"
    )
    eval_limit: int | None = Field(256, ge=1, description="evaluate on at most this many held-out rows")
    sources: list[SourceSection] | None = Field(
        None, description="several sources in place of `source`: the rows are a mixture by their weights"
    )

    @model_validator(mode="after")
    def _possible_rows(self) -> DataSection:
        every: Sequence[DataSection | SourceSection] = self.sources or [self]
        for section in every:
            split, eval_split = section.split or self.split, section.eval_split or self.eval_split
            if eval_split == split:
                raise ValueError(f"split and eval_split are both {split!r}: the same rows cannot serve both")
            if section.families == []:
                raise ValueError("families is empty: name at least one kind, or null for all")
        if bad := [token for token in self.special_tokens if not token.strip()]:
            raise ValueError(f"special_tokens has {bad[0]!r}: a token must have text")
        if self.holdout >= 1 and self.holdout != int(self.holdout):
            raise ValueError(f"holdout is a share below 1 or a whole number of rows, not {self.holdout}")
        return self

    @model_validator(mode="after")
    def _one_or_several(self) -> DataSection:
        if self.sources is None:
            if self.source is None:
                raise ValueError("source is missing: name where the rows come from, or several in sources")
            return self
        if self.source is not None:
            raise ValueError(
                f"source ({short(self.source)}) and sources are both given: leave one out, as source=null "
                "where a recipe has it"
            )
        if not self.sources:
            raise ValueError("sources is empty: name at least one, or use source")
        without = [one.source for one in self.sources if one.weight is None]
        if 0 < len(without) < len(self.sources):
            raise ValueError(f"sources: {without[0]} has no weight, and others have: give each one, or none")
        given = [one.name for one in self.sources if one.name is not None]
        if twice := [name for name in given if given.count(name) > 1]:
            raise ValueError(f"sources: two are called {twice[0]!r}")
        return self

    @property
    def parts(self) -> dict[str, DataSection]:
        """The section of each source of a mixture by its name, complete; this one as "" where there is one.

        A name is the last part of a source without its ending, numbered where that is not unique.
        """
        if self.sources is None:
            return {"": self}
        found: dict[str, DataSection] = {}
        taken = [one.name for one in self.sources]
        for one in self.sources:
            stem = one.source.rstrip("/").rpartition("/")[2].partition(".")[0] or "source"
            numbered = (stem, *(f"{stem}-{n}" for n in range(2, len(taken) + 2)))
            name = one.name or next(n for n in numbered if n not in taken and n not in found)
            own = {key: getattr(one, key) for key in type(one).model_fields if key in type(self).model_fields}
            kept = {key: value for key, value in own.items() if value is not None or key == "limit"}
            found[name] = self.model_copy(update={**kept, "sources": None})
        return found

    @property
    def origin(self) -> str:
        """Where the rows come from, for a message."""
        return ", ".join(from_here(str(part.source)) for part in self.parts.values())


class OptimizerSection(Section):
    """What every loop has: micro-batches, AdamW, the schedule, how often to look and to save."""

    batch_size: int = Field(8, ge=1, description="rows in a micro-batch")
    grad_accumulation: int = Field(1, ge=1, description="micro-batches per optimizer step")
    token_budget: int | None = Field(
        None, ge=32, description="split micro-batches so that none holds more padded tokens than this"
    )
    lr: float = Field(2e-5, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup: float = Field(
        0.1, ge=0, description="warm-up: a share of all steps below 1, or a number of steps"
    )
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of cosine and linear schedules")
    weight_decay: float = Field(
        0.0, ge=0, description="AdamW's decay; applies to matrices only, not to biases and norms"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="largest global gradient norm; null: no clipping"
    )
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; null: ten in a run")
    save_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; null: as often as evaluation"
    )
    keep: int = Field(2, ge=1, description="checkpoints kept, besides the best")
    precision: Literal["float32", "mixed"] = Field(
        "float32",
        description="of training all weights: float32, or mixed: blocks compute in bfloat16, and weights, "
        "summed gradients and moments are float32",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, about a third slower"
    )


class TrainSection(OptimizerSection):
    """The loop over fixed rows."""

    epochs: float = Field(1.0, gt=0, le=1_000_000, description="passes over the data")
    steps: int | None = Field(None, ge=1, description="optimizer steps; null: as many as `epochs` needs")
    early_stop: int | None = Field(
        None, ge=1, description="stop after this many evaluations without a better loss; null: never"
    )
    select: Literal["best", "last"] = Field(
        "best", description="which weights become final: best held-out loss, or the last step's"
    )


#: In place of layer names: every linear layer of the blocks, and those of them that belong to attention.
TARGET_WORDS = ("all-linear", "attention")


class AdapterSection(Section):
    """A low-rank adapter: LoRA, rsLoRA, DoRA, or LoRA on a quantised base (QLoRA).

    Hu et al. 2021; Kalajdzievski 2023; Liu et al. 2024; Dettmers et al. 2023.
    """

    kind: Literal["lora", "dora"] = Field(
        "lora", description="low-rank update, or low-rank direction with a trained magnitude"
    )
    rank: int = Field(16, ge=1, le=16_384, description="rank of the update")
    alpha: float = Field(
        32.0, gt=0, description="the update is scaled by alpha/rank (rsLoRA: alpha/sqrt(rank))"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    rslora: bool = Field(False, description="scale by alpha/sqrt(rank)")
    targets: list[str] | str | None = Field(
        None,
        description="layers that get an adapter: names matched at the end of the path, `all-linear` (of the "
        "blocks) or `attention`; null: c_attn and c_proj on GPT-2, all-linear elsewhere",
    )
    quantize: int | None = Field(
        None, description="QLoRA: hold the frozen base in 2, 3, 4, 6 or 8 bits (MLX)"
    )
    group_size: int = Field(64, description="weights that share one quantisation scale: 32, 64 or 128")
    path: str | None = Field(None, description="start from this PEFT adapter folder or run")

    @model_validator(mode="after")
    def _known_bits(self) -> AdapterSection:
        if self.quantize not in (None, 2, 3, 4, 6, 8):
            raise ValueError(f"quantize takes 2, 3, 4, 6 or 8 bits, not {self.quantize}")
        if self.targets == []:
            raise ValueError("targets is empty: name at least one layer, or null for the usual ones")
        if isinstance(self.targets, str) and self.targets not in TARGET_WORDS:
            raise ValueError(
                f"targets={self.targets}: write a list, as [{self.targets}], or one of the words "
                f"{', '.join(TARGET_WORDS)}"
            )
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size takes 32, 64 or 128, not {self.group_size}")
        if self.kind == "dora" and self.quantize in (3, 6):
            # mlx-lm's layer miscounts the width of the others
            raise ValueError("DoRA takes a base of 2, 4 or 8 bits")
        return self


class SampleSection(Section):
    """Texts written during training, for the eye."""

    prompts: list[str] = Field(
        default_factory=list, description="prompts to answer; empty: the first held-out rows"
    )
    count: int = Field(
        3, ge=0, description="how many held-out rows to answer when `prompts` is empty; 0: none"
    )
    max_tokens: int = Field(64, ge=1, description="longest answer in tokens")
    temperature: float = Field(0.0, ge=0, description="0: greedy")


class Recipe(Section):
    """Everything one run needs to know."""

    method: str = Field(description="a training method")
    description: str = Field("", description="what this recipe shows, for the run's card")
    model: str = Field(
        "tiny", description="`tiny` (embedded), a local folder, a finished run, or a Hugging Face model id"
    )
    engine: Literal["auto", "mlx", "torch"] = Field(
        "auto", description="mlx, torch, or the first of them that this machine has"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="number format of the weights; null: float32, and on a GPU that of the files under an "
        "adapter, which itself is float32",
    )
    output: str | None = Field(None, description="run directory; null: runs/<recipe's name>")
    seed: int = Field(0, ge=0, description="fixes data order, new parameters, dropout and samples")
    log: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list,
        description="where figures go besides metrics.jsonl: tensorboard (files in the run directory), wandb",
    )
    data: DataSection
    train: TrainSection = Field(default_factory=lambda: TrainSection())
    sample: SampleSection = Field(default_factory=lambda: SampleSection())


def shipped() -> dict[str, Path]:
    """The shipped recipes by name, in order."""
    folder = Path(str(resources.files("mlx_posttrain.recipes")))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Path of a recipe given as a file, or by the name of one that is shipped (``03_lora``).

    Raises UserError naming the nearest shipped recipe.
    """
    path = home(name)
    if path.is_file():
        return path
    known = shipped()
    key = path.name.removesuffix(".yaml")
    if key in known and path.parent == Path("."):
        return known[key]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "shipped recipes: " + ", ".join(known)
    raise UserError(f"no recipe {name!r}: not a file, and no shipped recipe has that name; {hint}")


def read_yaml(path: Path, most: int = MAX_CHARACTERS) -> dict[str, Any]:
    """The mapping in a YAML file of at most ``most`` characters. Raises UserError naming file and line."""
    try:
        found = path.stat()
        if not S_ISREG(found.st_mode):
            raise UserError(f"{path}: cannot be read: it is no file")
        if found.st_size > 4 * most:  # no character has more bytes
            raise ValueError(f"{found.st_size:,} bytes, more than {most:,} characters have")
        raw = parse_yaml(path.read_text(encoding="utf-8"), most)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{path}: a recipe is a mapping of keys to values; this file holds "
            f"{'nothing' if raw is None else type(raw).__name__}"
        )
    return raw


def settings(overrides: list[str]) -> dict[str, Any]:
    """``key.sub=value`` settings as a mapping; values are YAML, so ``null``, numbers and lists work.

    Raises UserError for text that is no setting.
    """
    found: dict[str, Any] = {}
    for setting in overrides:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UserError(f"override {setting!r}: write key=value, for example train.lr=1e-5")
        if whole := unquoted(setting, overrides):
            raise UserError(
                f"override {short(setting)}: the shell takes brackets apart; in quotes: '{whole}'"
            )
        try:
            value = parse_yaml(text) if text else None
        except (yaml.YAMLError, ValueError):
            value = text
        if isinstance(value, str) and value == text.strip():  # without quotes; YAML 1.1 reads 1e-5 as text
            with contextlib.suppress(ValueError):
                value = float(value)
        if (spaced := with_spaces(value)) != value:
            raise UserError(
                f"override {short(setting)}: a colon needs a space after it: '{key}={flow(spaced)}'"
            )
        found[key] = Written(value, text) if isinstance(value, dict) else value
    return found


def columns(text: str | None) -> dict[str, str]:
    """The map of an option --columns, {our name: the file's name}. Raises UserError where it is none."""
    if text is None:
        return {}
    with contextlib.suppress(UserError):  # which names a setting
        found = settings([f"columns={text}"])["columns"]
        if isinstance(found, dict) and all(isinstance(name, str) for name in found.values()):
            return dict(found)
    raise UserError(f"--columns {text}: write our names and the file's, '{{question: your_question}}'")


def override(raw: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``raw`` with dotted keys set to other values; a path becomes text."""
    raw = copy.deepcopy(raw)
    for key, value in overrides.items():
        section, last = holder(raw, key)
        section[last] = str(value) if isinstance(value, Path) else value
    return raw


def holder(raw: dict[str, Any], key: str) -> tuple[Any, Any]:
    """What holds the last part of ``key.sub`` in nested mappings and lists, and that part.

    Missing sections are made; an entry of a list is named by its number from 0, ``data.sources.0.weight``.
    Raises UserError where a part is a value, or a list has no such entry.
    """
    found: Any = raw
    *parents, last = key.split(".")
    for parent in parents:
        place = _place(found, parent, key)
        if isinstance(found, dict) and found.get(place) is None:
            found[place] = {}
        found = found[place]
        if not isinstance(found, dict | list):
            raise UserError(f"setting '{key}': {parent!r} is a value, not a section")
    return found, _place(found, last, key)


def _place(section: Any, name: str, key: str) -> str | int:
    """A part of a key as what finds it: a mapping's own, or the number of a list's entry."""
    if isinstance(section, dict):
        return name
    if not name.isdecimal() or int(name) >= len(section):
        before, _, after = f".{key}.".partition(f".{name}.")
        numbered = f"{before}.0.{name}.{after}".strip(".")
        holds = section and isinstance(section[0], dict | list) and name.isidentifier()
        shown = f", as {numbered}=..." if holds else ""
        raise UserError(
            f"setting '{key}': a list of {len(section)} has no entry {name!r}; they are numbered from 0"
            f"{shown}"
        )
    return int(name)


#: What a run's recipe.yaml says besides the recipe.
FACTS = ("environment", "untemplated", "mixture", "changes")

#: Keys that may name a file or a folder.
_PATHS = (
    "model",
    "source",
    "path",
    "start",
    "function",
    "base",
    "reference",
    "reward",
    "judge",
    "rows",
    "texts",
    "last_words",
    "runs",
    "report",
)


def absolute_paths(value: Any, key: str = "") -> Any:
    """A recipe, or a part of one, with every existing path in it made absolute.

    So a run can be opened and resumed from any folder.

    Hub ids, ``tiny`` and embedded data stay; of a reward function ``file.py:name`` the file becomes absolute.
    A recipe is changed in place.
    """
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            setattr(value, name, absolute_paths(getattr(value, name), name))
        return value
    if isinstance(value, dict):
        return {k: absolute_paths(v, key if key == "runs" else str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [absolute_paths(v, key) for v in value]
    if key not in _PATHS or not isinstance(value, str) or value == "tiny":
        return value
    name, colon, rest = value.rpartition(":") if key == "function" else (value, "", "")
    path = home(name)
    if not name or not path.exists():
        return value
    shortest = os.path.abspath(path)  # which behind a link may be elsewhere
    same = os.path.exists(shortest) and os.path.samefile(shortest, path)
    return f"{shortest if same else path.absolute()}{colon}{rest}"


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(old, new) of each dotted key whose value differs; None for a key that one of them lacks."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= {f"{key}.{inner}": pair for inner, pair in differences(old, new).items()}
        elif old != new:
            found[key] = (old, new)
    return found


def listed(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """:func:`differences` on one line."""
    return ", ".join(f"{key}: {short(old)} -> {short(new)}" for key, (old, new) in differences.items())


def check_training(recipe: Any) -> None:
    """Raise ValueError for settings that together would train something else than they say.

    They are number formats, adapter and checkpointing.
    """
    whole, mixed = recipe.dtype in (None, "float32"), recipe.train.precision == "mixed"
    if mixed and recipe.adapter is not None:
        raise ValueError(
            "train.precision=mixed is for training all weights: an adapter is float32 anyway, and "
            "dtype=bfloat16 puts the frozen weights under it into half precision"
        )
    if mixed and not whole:
        why = "float16 would need loss scaling" if recipe.dtype == "float16" else "and keeps float32 weights"
        raise ValueError(f"train.precision=mixed computes in bfloat16 ({why}): leave dtype out")
    if recipe.adapter is None:
        if not whole:
            raise ValueError(
                "full training needs dtype float32: smaller formats round most updates away; use an adapter, "
                "float32, or train.precision=mixed, which computes in bfloat16"
            )
    elif recipe.adapter.dropout and recipe.train.gradient_checkpointing:
        raise ValueError(
            "adapter.dropout and train.gradient_checkpointing exclude each other: the "
            "recomputation would draw another mask"
        )


def check_prompted(data: DataSection, what: str) -> None:
    """Raise ValueError when a recipe about answers to prompts sets data keys that mean nothing there.

    An option is never ignored silently. what: "pairs" or "prompts", for the message.
    """
    for part in data.parts.values():
        for key in ("pack", "clean", "train_on", "too_long"):
            if getattr(part, key) != DataSection.model_fields[key].default:
                raise ValueError(f"data.{key} means nothing for {what}; leave it out")
    if not all(isinstance(part.template, str) for part in data.parts.values()):
        raise ValueError("data.template takes one name here: all answers to a prompt must be asked for alike")


def check_no_answers(sample: SampleSection, what: str) -> None:
    """Raise ValueError for sample keys about answers, where samples are held-out rows and their scores."""
    for key in ("prompts", "max_tokens", "temperature"):
        if getattr(sample, key) != SampleSection.model_fields[key].get_default(call_default_factory=True):
            raise ValueError(
                f"sample.{key} means nothing for {what}: samples are the first held-out rows, "
                "sample.count of them"
            )


def parse(raw: dict[str, Any], cls: type[S], where: str, folder: Path | None = None) -> S:
    """Check ``raw``, read from a file in ``folder``, against a recipe class or another section.

    Raises UserError, one line, naming the key.
    """
    try:
        return cls.model_validate(as_meant(raw, cls), context={"folder": folder})
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_explain_all(error.errors(), cls)[:3])) from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: a text in it has half a surrogate pair, which is no character") from None


def as_meant(value: Any, kind: Any) -> Any:
    """A value for a key of the type ``kind``, or a mapping for a section, as people mean it.

    PyYAML follows YAML 1.1, in which 1e-5 (no dot) is a text, and a colon in a text makes a mapping of it.
    """
    if isinstance(value, Written) and str in _kinds(kind) and not _takes_mapping(kind):
        return value.text
    if isinstance(value, Written) and kind is None:  # of a pipeline's stage, whose recipe knows
        return value
    if isinstance(value, dict):
        section = _section(kind)
        fields = section.model_fields if section else {}
        return {k: as_meant(v, fields[k].annotation if k in fields else None) for k, v in value.items()}
    if isinstance(value, list):
        return [as_meant(v, _section(kind)) if isinstance(v, dict) else v for v in value]
    if isinstance(value, str) and str not in _kinds(kind):
        mantissa, e, exponent = value.lower().partition("e")
        if e and mantissa.replace(".", "", 1).isdigit() and exponent.lstrip("+-").isdigit():
            with contextlib.suppress(ValueError):  # digits of other scripts
                return float(value)
    return value


def _takes_mapping(annotation: Any) -> bool:
    inner = get_args(annotation)
    return (
        get_origin(annotation) is dict or _section(annotation) is not None or any(map(_takes_mapping, inner))
    )


#: What a value must be, by pydantic's type of the error, where its message is about parsing.
_MUST = {
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
}


def meant(cls: type[BaseModel], name: str, *, close: bool = False) -> list[str]:
    """The keys of a recipe class that ``name`` may mean: `lr` is train.lr, and so is others' `learning_rate`.

    close: where none is called so, those with the most similar name.
    """
    every = _all_keys(cls)
    called: dict[str, list[str]] = {}
    for key in every:
        called.setdefault(key.rsplit(".", 1)[-1], []).append(key)
    found = [key for key in every if key == name] + called.get(name, [])
    found += [key for key in elsewhere_called(name) if key in every]
    near = difflib.get_close_matches(name, called, n=1, cutoff=0.8) if close and not found else []
    return found + [key for match in near for key in called[match]]


def _explain_all(errors: Sequence[Any], cls: type[BaseModel]) -> list[str]:
    """A sentence for each key; what the types of a union say about one value is one."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for error in errors:
        if must := _MUST.get(error["type"]):
            kinds.setdefault(tuple(_path(error["loc"], cls)), []).append(must)
    return list(dict.fromkeys(_explain(error, cls, kinds) for error in errors))


def _path(loc: Sequence[int | str], cls: type[BaseModel]) -> list[str]:
    """The parts of a key in an error's place, without the names of the types in a union."""
    found: list[str] = []
    kind: Any = cls
    for part in map(str, loc):
        section = _section(kind)
        union = [one for one in get_args(kind) if one is not type(None)]
        if get_origin(kind) in (Union, UnionType) and len(union) > 1 and not part.isdigit():
            # a section's name, or that of a type such as str or list[str]
            kind = next((one for one in union if part in (getattr(one, "__name__", ""), str(one))), None)
            continue
        found.append(part)
        if section is not None and part in section.model_fields:
            kind = section.model_fields[part].annotation
    return found


def _explain(error: Any, cls: type[BaseModel], kinds: Mapping[tuple[str, ...], Sequence[str]]) -> str:
    path = _path(error["loc"], cls)
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _keys(cls, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        elsewhere = meant(cls, path[-1])
        # of several, the one of this section
        section = [part for part in path[:-1] if not part.isdigit()]
        elsewhere.sort(key=lambda k: k.split(".")[:-1] != section)
        if elsewhere:
            hint = f"did you mean '{elsewhere[0]}'?"
        elif near:
            hint = f"did you mean '{'.'.join([*path[:-1], near[0]])}'?"
        else:
            hint = "known here: " + ", ".join(sorted(known))
        return f"unknown key '{key}'; {hint}"
    if error["type"] == "missing":
        return f"the key '{key}' is missing"
    if path[-1:] and ":" in path[-1] and error["input"] is None:
        return f"'{key}': a colon needs a space after it: {path[-1].replace(':', ': ', 1)}"
    if error["msg"].startswith("Input should be "):
        each = kinds.get(tuple(path), []) if error["type"] in _MUST else []
        must = " or ".join(dict.fromkeys(each)) or error["msg"].removeprefix("Input should be ")
        entry = (
            _as_entry(error["input"], _listed_section(cls, path)) if error["type"] == "list_type" else None
        )
        if entry:
            return f"'{key}': must be a list, not {short(error['input'])}; write '{key}={flow([entry])}'"
        section = _listed_section(cls, path) if error["type"] == "model_type" and path[-1].isdigit() else None
        if section and isinstance(error["input"], str) and (entry := _as_entry(error["input"], section)):
            return f"'{key}': must be {must}, not {short(error['input'])}; write {flow(entry)}"
        colon = error["type"] == "string_type" and isinstance(error["input"], dict)
        advice = "; a text with a colon or braces stands in double quotes" if colon else ""
        return f"'{key}': must be {must}, not {short(error['input'])}{advice}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    # about several keys: the message says which
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return f"'{key}': {message}" if key else message
    return f"'{key}': {message}, got {short(error['input'])}"


def _listed_section(cls: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The sections in the list that a key takes, or that an entry is in; None where it takes none."""
    section: type[BaseModel] | None = cls
    for part in (part for part in path if not part.isdigit()):
        fields = section.model_fields if section else {}
        section = _section(fields[part].annotation) if part in fields else None
    return section


def _as_entry(given: Any, section: type[BaseModel] | None) -> dict[str, Any] | None:
    """What was given in place of a list as an entry of it; None where it can be none."""
    if section is None or not issubclass(section, Section):
        return None
    if isinstance(given, dict):
        return given if set(given) <= set(section.model_fields) else None
    return section.entry(given) if isinstance(given, str) and not set(given) & set("[]{},") else None


def short(value: Any, most: int = 80) -> str:
    """A value as a message shows it: quoted, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section in a key's type, which may be a list of them or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = map(_section, getattr(annotation, "__args__", ()))
    return next((section for section in found if section is not None), None)


def _keys(cls: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        if part.isdigit():  # of a list
            continue
        field = cls.model_fields.get(part)
        section = _section(field.annotation) if field else None
        if section is None:
            return []
        cls = section
    return list(cls.model_fields)


def _all_keys(cls: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in cls.model_fields.items():
        found.append(prefix + name)
        section = _section(field.annotation)
        if section is not None:
            found += _all_keys(section, f"{prefix}{name}.")
    return found


def describe(cls: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default as YAML, description) of every key of a recipe class, sections before what is in them."""
    rows = []
    for name, field in cls.model_fields.items():
        section = _section(field.annotation)
        if field.is_required():
            default = "required"
        else:
            value = field.get_default(call_default_factory=True)
            default = "" if section and value is not None else _as_yaml(value)
        text = field.description or ((section.__doc__ or "").strip().split("\n")[0] if section else "")
        rows.append((prefix + name, default, text))
        if section is not None:
            rows += describe(section, f"{prefix}{name}.")
    return rows


def _as_yaml(value: Any) -> str:
    """A key's value as a recipe would have it, in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()
