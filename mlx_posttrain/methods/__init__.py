"""The training methods, one file each, and METHODS, the table of them that everything else reads.

A module of this folder that has a ``METHOD`` (training/method.py) is in the table; to add a method, write its
file. ``pipeline`` is several recipes in order, and an entry like the others.
"""

from __future__ import annotations

import difflib
import pkgutil
import re
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_posttrain.errors import UserError

if TYPE_CHECKING:  # the command line's help reads the names, and must answer at once
    from mlx_posttrain.training.loop import Callbacks
    from mlx_posttrain.training.method import Method, Resume

_ELSEWHERE = {"pipeline": "mlx_posttrain.pipeline"}


class _Table(MutableMapping[str, "Method"]):
    """Methods by name, in alphabetical order; a module is imported when its method is first asked for."""

    def __init__(self) -> None:
        names = sorted(m.name for m in pkgutil.iter_modules(__path__))
        self._modules = {name: f"{__name__}.{name}" for name in names} | _ELSEWHERE
        self._known: dict[str, Method] = {}

    def __getitem__(self, name: str) -> Method:
        if name not in self._known:
            self._known[name] = import_module(self._modules[name]).METHOD
        return self._known[name]

    def __setitem__(self, name: str, method: Method) -> None:
        self._known[name] = method

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._modules, **self._known})

    def __len__(self) -> int:
        return len({**self._modules, **self._known})


METHODS: MutableMapping[str, Method] = _Table()


def get(name: str) -> Method:
    """A method by name. Raises UserError for an unknown name, naming the nearest."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"methods: {', '.join(METHODS)}"
        raise UserError(f"unknown method {name!r}; {hint}")
    return METHODS[name]


def find_keys(words: str) -> list[str]:
    """The keys of all methods that have each of some words in their name or begin one of their description.

    A line each, with the methods that have it; keys that have the words in their name come first.
    """
    from mlx_posttrain import config

    each = words.lower().split()
    begins = [re.compile(rf"\b{re.escape(word)}", re.IGNORECASE) for word in each]
    found: dict[tuple[str, str], list[str]] = {}
    for name, method in METHODS.items():
        for key, _, description in config.describe(method.Recipe):
            if all(
                word in key or begin.search(description) for word, begin in zip(each, begins, strict=True)
            ):
                found.setdefault((key, description), []).append(name)
    training = [name for name, method in METHODS.items() if method.trains_on is not None]
    return [
        f"{key} ({'every method that trains' if names == training else ', '.join(names)}): {description}"
        for (key, description), names in sorted(
            found.items(), key=lambda one: not all(word in one[0][0] for word in each)
        )
    ]


def load_recipe(name: str, overrides: list[str] | Mapping[str, Any] | None = None) -> Any:
    """Read a recipe file or a shipped recipe, apply overrides, and check it against its method's recipe.

    Raises UserError for a missing file, broken YAML, an unknown method, an unknown key (naming the nearest)
    or a wrong value. What a shipped recipe says of its own rows does not hold for another ``data.source``.
    """
    from mlx_posttrain import config, source_keys

    path = config.find_recipe(name)
    if not isinstance(overrides, Mapping):
        overrides = config.settings(overrides or [])
    raw = config.read_yaml(path)
    dropped: dict[str, Any] = {}
    own, several = source_keys.named(raw), overrides.get("data.sources") is not None
    source = "the mixture" if several else overrides.get("data.source")
    if source is not None and source_keys.is_shipped(path):
        raw, dropped = source_keys.without_them(raw, str(source), limited="data.limit" in overrides)
        if several:
            raw = config.override(raw, {"data.source": None})
    raw = config.override(raw, overrides)
    recipe = parse_recipe(raw, path.name, folder=path.parent, output=f"runs/{path.stem}")
    if dropped:
        source_keys.say(path.stem, own, source, dropped, recipe.data)
    return recipe


def parse_recipe(raw: dict[str, Any], where: str, **options: Any) -> Any:
    """A recipe from its keys, checked against its method's class.

    options: see config.parse; ``output`` is the run directory if none is named.

    A run's own recipe.yaml can be run again: what it says of the machine is left out.
    """
    from mlx_posttrain import config
    from mlx_posttrain.convert.files import home

    output = options.pop("output", None)
    raw = {key: value for key, value in raw.items() if key not in config.FACTS}
    if "method" not in raw:
        near = difflib.get_close_matches("method", [str(k) for k in raw], n=1, cutoff=0.6)
        hint = f" ({near[0]!r} is not a key; did you mean 'method'?)" if near else ""
        raise UserError(f"{where}: the key 'method' is missing{hint}; methods: {', '.join(METHODS)}")
    recipe: Any = config.parse(raw, get(str(raw["method"])).Recipe, where, **options)
    if recipe.output is None:
        recipe.output = output
    if recipe.output is not None:
        recipe.output = str(home(recipe.output))
    return recipe


def run(
    recipe: Any, resume: Resume = False, callbacks: Callbacks | None = None, method: Method | None = None
) -> dict[str, Any]:
    """Run a recipe to the end; returns its figures. Raises UserError for every foreseeable failure.

    method: in place of the one that the recipe names, with another loss for instance.
    """
    from mlx_posttrain.training import setup

    method = method or get(recipe.method)
    if method.run is not None:
        return method.run(recipe, resume, callbacks)
    return setup.train(method, recipe, resume, callbacks)


def plan(recipe: Any) -> list[Any]:
    """What a recipe would take, or each stage of a pipeline that trains: a list of memory.plan.Plan.

    Reads the data; loads no weights and writes nothing. Raises UserError as running the recipe does.
    """
    from mlx_posttrain.training import setup

    method = get(recipe.method)
    if method.plan is not None:
        return list(method.plan(recipe))
    if method.trains_on is None:
        raise UserError(f"{recipe.method} trains nothing, so there is nothing to plan")
    return setup.plan(method, recipe)


def validate(recipe: Any) -> list[str]:
    """Check what running a recipe would check before its first step; returns what was found, in lines.

    Reads the data and imports reward functions; loads no weights and writes nothing. Raises UserError for the
    first thing that would end the run.
    """
    from mlx_posttrain.training import setup

    method = get(recipe.method)
    if method.trains_on is not None:
        return setup.validate(method, recipe)
    planned = plan(recipe) if method.plan is not None else []
    return [f"{recipe.method}: every key is known", *(p.text().splitlines()[0] for p in planned)]
