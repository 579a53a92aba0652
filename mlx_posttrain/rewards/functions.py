"""Reward functions: plain Python, ``f(prompts, completions, **columns) -> list[float | None]``.

``prompts`` are the texts of the last user turns, ``completions`` the answers' texts without outer white
space, and every other column of the data is passed by name if the function takes it (``**columns`` takes
all). A score of None means that the answer cannot be scored. TRL's reward functions have the same signature
and, as there, may leave out ``prompts``: ``f(completions, **columns)``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mlx_posttrain.convert.files import home
from mlx_posttrain.data.sources import nearest
from mlx_posttrain.errors import UserError

RewardFunction = Callable[..., Sequence[float | None]]

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


#: Functions of rewards/stock.py that a recipe names without a file. Their checkers are read when one is used.
BUILT_IN = ("checker", "exact_answer")
#: Callables given in Python, by the name that a recipe has for them.
_CALLABLE = "python:"
_REGISTERED: dict[str, RewardFunction] = {}


def register(function: RewardFunction) -> str:
    """A name under which a recipe of this process can use a callable as its reward."""
    name = f"{_CALLABLE}{getattr(function, '__name__', type(function).__name__)}"
    _REGISTERED[name] = function
    return name


def load(spec: str) -> RewardFunction:
    """Return the function of ``package.module:function``, ``path/to/file.py:function``, or of BUILT_IN.

    Raises a one-line UserError for a missing file, module or function, for an object that cannot be called,
    and for any exception that the file raises on import.
    """
    if spec in BUILT_IN:
        stock = importlib.import_module("mlx_posttrain.rewards.stock")
        return getattr(stock, spec)  # type: ignore[no-any-return]
    if spec.startswith(_CALLABLE):
        if spec not in _REGISTERED:
            raise UserError(
                f"reward function {spec!r} was given in Python: continue in Python with train(..., "
                "reward=...)"
            )
        return _REGISTERED[spec]
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise UserError(
            f"reward function {spec!r}: write module:function or file.py:function, or one of "
            f"{', '.join(BUILT_IN)}"
        )
    module = _module(where)
    function = getattr(module, name, None)
    if function is None:
        known = [n for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_")]
        raise UserError(
            f"{where} has no function {name!r}{nearest(name, known)} (there are {', '.join(known) or 'none'})"
        )
    if not callable(function):
        raise UserError(f"{spec} is no function but a {type(function).__name__}")
    return function


def _module(where: str) -> ModuleType:
    path = home(where).absolute()  # as in tracebacks
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        if not path.is_file():
            raise UserError(f"reward function: there is no file {path}")
        name = f"mlx_posttrain_user_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a script without a main guard may call sys.exit
        raise UserError(
            f"reward function: {where} cannot be imported: {_describe(error, str(path))}"
        ) from None


def call(
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: Mapping[str, list[Any]],
    name: str,
) -> np.ndarray:
    """Return the function's scores as float64 [R], nan for None.

    Raises UserError, with the function's name, for a column that it needs and the rows lack, an exception
    inside it, a result that is not a list or has another length, and a score that is not a finite number.
    """
    positional, by_name = _arguments(function, prompts, completions, columns, name)
    try:
        returned = function(*positional, **by_name)
        iterable = isinstance(returned, Iterable) and not isinstance(returned, str | bytes | Mapping)
        values = list(returned) if iterable else None
    except Exception as error:
        code = getattr(inspect.unwrap(function), "__code__", None)
        raise UserError(f"reward function {name}: {_describe(error, code and code.co_filename)}") from None
    if values is None:
        raise UserError(
            f"reward function {name}: it must return a list with a number or None per answer, "
            f"found {type(returned).__name__}"
        )
    if len(values) != len(completions):
        raise UserError(f"reward function {name}: {len(values)} scores for {len(completions)} answers")
    scores = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if value is None:
            continue
        try:
            number = None if isinstance(value, str) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None:
            raise UserError(
                f"reward function {name}: the score of answer {i + 1} must be a number or None, "
                f"found {value!r:.60}"
            )
        if not math.isfinite(number):
            raise UserError(
                f"reward function {name}: the score of answer {i + 1} is {value}; return None "
                "where an answer cannot be scored"
            )
        scores[i] = number
    return scores


def _arguments(
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: Mapping[str, list[Any]],
    name: str,
) -> tuple[list[list[str]], dict[str, list[Any]]]:
    """Return (positional arguments, arguments by name) for the function.

    Prompts and completions are passed by name if the function has a parameter ``completions``.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise UserError(
            f"reward function {name}: its arguments cannot be read; call it from a Python "
            "function of your own"
        ) from None
    positional: list[list[str]] = []
    offered = {**columns, "prompts": prompts, "completions": completions}
    if "completions" not in parameters:
        positional, offered = (
            [prompts, completions],
            {k: v for k, v in columns.items() if k not in ("prompts", "completions")},
        )
    first = [n for n, p in parameters.items() if p.kind in _BY_POSITION][: len(positional)]
    needed = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind not in _VARIADIC and n not in first
    ]
    missing = next((n for n in needed if n not in offered), None)
    if missing is not None:
        hint = f"{nearest(missing, list(columns))} (there are {', '.join(columns) or 'none'})"
        raise UserError(
            f"reward function {name}: it needs the column {missing!r}, which the rows do not have{hint}"
        )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return positional, {k: v for k, v in offered.items() if (takes_all or k in parameters) and k not in first}


def _describe(error: BaseException, file: str | None) -> str:
    """Return the error in one line, with the innermost line of the user's ``file``.

    A line of a library that the file calls is named only where the file has none.
    """
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename != __file__ and not f.filename.startswith("<frozen")
    ]
    frames = [f for f in frames if f.filename == file] or frames
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}{where}"


def combine(parts: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Return the weighted sum of several rewards' scores, [R].

    A reward without a score for an answer adds nothing; an answer without any score gets nan.
    """
    stacked = np.stack(parts)
    scored = np.isfinite(stacked)
    total = (np.where(scored, stacked, 0.0) * np.asarray(weights, np.float64)[:, None]).sum(0)
    return np.where(scored.any(0), total, np.nan)


class Normaliser:
    """(score - mean) / std, with the mean and std of a reference's scores.

    So one unit is one standard deviation of the answers before training (Ziegler et al. 2019, section 2.2;
    Huang et al. 2024). The identity until ``fit``. A standard deviation of 0, or below the resolution of
    float32 scores (a millionth of the largest), counts as 1.
    """

    def __init__(self) -> None:
        self.mean, self.std = 0.0, 1.0

    def fit(self, scores: np.ndarray) -> None:
        """Set mean and standard deviation from scores [R], without those that are nan."""
        finite = scores[np.isfinite(scores)]
        if len(finite):
            self.mean = float(finite.mean())
            std = float(finite.std())
            self.std = std if std > 1e-6 * float(np.abs(finite).max()) else 1.0

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        return (scores - self.mean) / self.std

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"mean": self.mean, "std": self.std}

    def restore(self, state: Mapping[str, float]) -> None:
        """Restore the state of a checkpoint."""
        self.mean, self.std = state["mean"], state["std"]
