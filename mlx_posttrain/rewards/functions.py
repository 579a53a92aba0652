"""Reward functions: plain Python, ``f(prompts, completions, **columns) -> list[float | None]``.

``prompts`` are the texts of the last user turns, ``completions`` the answers' texts without outer white
space, and every other column of the data is passed by name if the function takes it (``**columns`` takes
all), ``completion_ids`` too: the answers' token ids, stop token included. A parameter ``columns`` gets all of
them as a mapping. A score of None means that the answer cannot be scored. The function may be asynchronous
(``async def``), or return a list with coroutines. TRL's reward functions have the same signature and, as
there, may leave out ``prompts``: ``f(completions, **columns)``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from pydantic import create_model

from mlx_posttrain import config
from mlx_posttrain.console import log
from mlx_posttrain.convert.files import home
from mlx_posttrain.data.sources import nearest
from mlx_posttrain.errors import UserError
from mlx_posttrain.rewards import limits

RewardFunction = Callable[..., Sequence[float | None]]
Scores = list[float | None]

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


#: Functions that a recipe names without a file, each with its module, which is read when one is used.
BUILT_IN = {
    "checker": "stock",
    "countdown": "stock",
    "exact_answer": "stock",
    "format": "shape",
    "ifeval": "stock",
    "json": "shape",
    "length": "shape",
    "overlong": "shape",
    "python_tests": "python_tests",
    "repetition": "shape",
    "similarity": "stock",
}
#: Seconds that one call of a function may take, and the import of its file.
TIMEOUT = 60.0
#: Largest score, without its sign: float32 loses the spread of larger ones, and their squares overflow.
MAX_SCORE = 1e6
#: Callables given in Python, by the name that a recipe has for them.
_CALLABLE = "python:"
_REGISTERED: dict[str, RewardFunction] = {}
#: Functions of files that this process has been told about.
_NAMED: set[str] = set()


def register(function: RewardFunction) -> str:
    """A name under which a recipe of this process can use a callable as its reward."""
    name = f"{_CALLABLE}{getattr(function, '__name__', type(function).__name__)}"
    _REGISTERED[name] = function
    return name


def load(spec: str, timeout: float | None = TIMEOUT) -> RewardFunction:
    """Return the function of ``package.module:function``, ``path/to/file.py:function``, or of BUILT_IN.

    A file is named on standard error before it is run, once in a process. Raises a one-line UserError for a
    missing file, module or function, for an object that cannot be called, for any exception that the file
    raises on import, and for an import that takes longer than ``timeout`` seconds.
    """
    if spec in BUILT_IN:
        module = importlib.import_module(f"mlx_posttrain.rewards.{BUILT_IN[spec]}")
        return getattr(module, spec)  # type: ignore[no-any-return]
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
            f"{', '.join(BUILT_IN)}{nearest(spec, list(BUILT_IN))}"
        )
    module = _module(where, name, timeout)
    function = getattr(module, name, None)
    if function is None:
        known = [n for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_")]
        raise UserError(
            f"{where} has no function {name!r}{nearest(name, known)} (there are {', '.join(known) or 'none'})"
        )
    if not callable(function):
        raise UserError(f"{spec} is no function but a {type(function).__name__}")
    return function


def bind(function: RewardFunction, args: Mapping[str, Any], name: str) -> RewardFunction:
    """Return the function with its arguments filled in: a recipe's ``args``.

    Those of a stock function are its keyword-only parameters, and their types are checked; a function of the
    user's takes any that it has a parameter for, but not prompts and completions. Raises UserError for an
    unknown argument and for a value of the wrong type.
    """
    if name in BUILT_IN:
        bound = partial(function, **_checked(function, args, name))
        call(bound, [], [], {"completion_ids": []}, name)  # arguments that exclude each other
        return bound
    if not args:
        return function
    parameters = _parameters(function, name)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    reserved = ("prompts", "completions", "completion_ids")
    if "completions" not in parameters:
        reserved += tuple(n for n, p in parameters.items() if p.kind in _BY_POSITION)[:2]
    known = [n for n, p in parameters.items() if p.kind in _BY_NAME and n not in reserved]
    for arg in args:
        if arg in reserved or not (takes_all or arg in known):
            raise UserError(
                f"reward function {name}: it takes no argument {arg!r}{nearest(arg, known)} "
                f"(there are {', '.join(known) or 'none'})"
            )
    return partial(function, **args)


def _checked(function: RewardFunction, args: Mapping[str, Any], name: str) -> dict[str, Any]:
    types = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {
        n: (types[n], ... if p.default is p.empty else p.default)
        for n, p in inspect.signature(function).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    section = create_model(name, __base__=config.Section, **fields)
    checked = config.parse(dict(args), section, f"args of the reward {name}")
    return {n: getattr(checked, n) for n in fields}


def _module(where: str, function: str, timeout: float | None) -> ModuleType:
    path = home(where).absolute()  # as in tracebacks
    try:
        if not where.endswith(".py"):
            found = importlib.util.find_spec(where)
            _name_file(f"{found.origin if found and found.has_location else where}:{function}")
            return limits.within(timeout, lambda: importlib.import_module(where))
        if not path.is_file():
            raise UserError(f"reward function: there is no file {path}")
        _name_file(f"{path}:{function}")
        name = f"mlx_posttrain_user_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        limits.within(timeout, partial(spec.loader.exec_module, module))
        return module
    except (UserError, KeyboardInterrupt):
        raise
    except limits.Expired:
        raise UserError(
            f"reward function: the import of {where} took longer than {timeout:g} s, its `timeout`; raise "
            "that, or look for what it waits for"
        ) from None
    except BaseException as error:  # a script without a main guard may call sys.exit
        raise UserError(
            f"reward function: {where} cannot be imported: {_describe(error, str(path))}"
        ) from None


def _name_file(what: str) -> None:
    if what not in _NAMED:
        _NAMED.add(what)
        log(f"reward: {what} will be run")


def call(
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: Mapping[str, list[Any]],
    name: str,
    timeout: float | None = TIMEOUT,
) -> np.ndarray:
    """Return the function's scores as float64 [R], nan for None.

    timeout: seconds that the call may take, None for any. Raises UserError, with the function's name, when
    they are up, for a column that it needs and the rows lack, an exception inside it, SystemExit too, a
    result that is not a list or has another length, and a score that is not a number of at most MAX_SCORE.
    """
    count = len(completions)
    positional, by_name = _arguments(function, prompts, completions, columns, name)

    def ask() -> Any:
        returned = limits.awaited(function(*positional, **by_name))
        iterable = isinstance(returned, Iterable) and not isinstance(returned, str | bytes | Mapping)
        # without a length it may have no end
        most = None if isinstance(returned, Sized) else count + 1
        return list(islice(returned, most)) if iterable else returned

    try:
        values = limits.within(timeout, ask)
    except limits.Expired:
        raise UserError(
            f"reward function {name}: it took longer than {timeout:g} s, its `timeout`, for "
            f"{count} answer(s); raise that, or look for what it waits for"
        ) from None
    except UserError as error:
        raise UserError(f"reward function {name}: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() would end the run without a word
        inner = function.func if isinstance(function, partial) else function
        code = getattr(inspect.unwrap(inner), "__code__", None)
        raise UserError(f"reward function {name}: {_describe(error, code and code.co_filename)}") from None
    if not isinstance(values, list):
        raise UserError(
            f"reward function {name}: it must return a list with a number or None per answer, "
            f"found {type(values).__name__}"
        )
    if len(values) != count:
        raise UserError(f"reward function {name}: {len(values)} scores for {count} answers")
    scores = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if value is None:
            continue
        try:
            number = None if isinstance(value, str | bytes) else float(value)
        except KeyboardInterrupt:
            raise
        except BaseException:  # of a class of the user's
            number = None
        if number is None:
            raise UserError(
                f"reward function {name}: the score of answer {i + 1} must be a number or None, "
                f"found {_written(value, repr):.60}"
            )
        if not math.isfinite(number):
            raise UserError(
                f"reward function {name}: the score of answer {i + 1} is {number}; return None "
                "where an answer cannot be scored"
            )
        if abs(number) > MAX_SCORE:
            raise UserError(
                f"reward function {name}: the score of answer {i + 1} is {number:g}, beyond {MAX_SCORE:g}: "
                "divide its scores"
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
    parameters = _parameters(function, name)
    positional: list[list[str]] = []
    filled_in = function.keywords if isinstance(function, partial) else {}
    every: dict[str, Any] = dict(columns)
    if "columns" in parameters and parameters["columns"].kind not in _VARIADIC:
        every.setdefault("columns", columns)
    columns = {k: v for k, v in every.items() if k not in filled_in}
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


def rows(count: int, **columns: Sequence[Any] | None) -> Iterator[dict[str, Any]]:
    """Return for each of ``count`` answers a mapping of the columns that are there."""
    there = {name: values for name, values in columns.items() if values is not None}
    return ({name: values[i] for name, values in there.items()} for i in range(count))


def _parameters(function: RewardFunction, name: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise UserError(
            f"reward function {name}: its arguments cannot be read; call it from a Python "
            "function of your own"
        ) from None


def _describe(error: BaseException, file: str | None) -> str:
    """Return the error in one line, with the innermost line of the user's ``file``.

    A line of a library that the file calls is named only where the file has none.
    """
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename not in (__file__, limits.__file__) and not f.filename.startswith("<frozen")
    ]
    frames = [f for f in frames if f.filename == file] or frames
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {(_written(error).splitlines() or ['no message'])[0]}{where}"


def _written(value: Any, how: Callable[[Any], str] = str) -> str:
    """An object of the user's as text, whose methods may raise anything."""
    try:
        return how(value)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return f"a {type(value).__name__} that cannot be shown"


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
