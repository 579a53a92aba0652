"""What people type who come from another tool, wrong commands and options, gets a line that helps."""

from __future__ import annotations

import contextlib
import difflib
import shlex
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from mlx_posttrain.errors import UserError
from mlx_posttrain.methods import METHODS

#: Other tools' names for a command of ours.
OTHER_NAMES = {
    **dict.fromkeys(("train", "finetune", "fine-tune", "finetuning", "lora", "tune"), "run"),
    **dict.fromkeys(("evaluate", "test"), "eval"),
    **dict.fromkeys(("fuse", "merge"), "export"),
    **dict.fromkeys(("infer", "predict", "complete"), "generate"),
    **dict.fromkeys(("list", "ls"), "recipes"),
    **dict.fromkeys(("benchmark",), "bench"),
    **dict.fromkeys(("server", "serve"), "export"),
}


class Commands(TyperGroup):
    """The commands; one that does not exist is answered with the one that is meant."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name)
        if found is not None:
            return found
        raise UserError(f"there is no command {cmd_name!r}; {self._instead(ctx, cmd_name)}")

    def _instead(self, ctx: Any, name: str) -> str:
        from mlx_posttrain import config

        shipped = config.shipped()
        recipes = [recipe for recipe in shipped if recipe == name or recipe.endswith(f"_{name}")]
        if name in METHODS:
            recipes += [
                recipe for recipe, path in shipped.items() if config.read_yaml(path)["method"] == name
            ]
        if recipes:
            return _to_train(recipes[0])
        known = self.list_commands(ctx)
        near = OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, known, 1)), None)
        if near == "run":
            return _to_train("01_sft")
        return f"did you mean {near!r}?" if near else f"there are {', '.join(known)}"


class Prompts(TyperCommand):
    """A command whose prompts are options: one in the place of an argument is answered with the option."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        ctx.allow_extra_args = True
        typed = list(args)  # which parsing takes from
        further = super().parse_args(ctx, args)
        if ctx.args and not ctx.resilient_parsing:
            words = list(ctx.args)
            before = typed[max(0, typed.index(words[0]) - 2) :][:2]
            if len(before) == 2 and before[0] == "--prompt" and not any("=" in word for word in words):
                words = [" ".join([before[1], *words])]  # one prompt without quotes
            elif not any(set(word) & set(" =/") for word in words):
                words = [" ".join(words)]
            given = " ".join(f"--prompt {shlex.quote(word)}" for word in words)
            raise UserError(f"prompts are options: {given}")
        return further


class Settings(TyperCommand):
    """A command whose settings are words, key=value: an option in their place is answered with the key."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        known = {"-h", "--help", *(name for p in self.params for name in (*p.opts, *p.secondary_opts))}
        for arg, following in zip(args, [*args[1:], ""], strict=True):
            name, equals, value = arg.partition("=")
            if name.startswith("--") and len(name) > 2 and name not in known:
                value = value if equals else following
                value = "VALUE" if not value or value.startswith("-") else value
                key = _key(name[2:].replace("-", "_"), args)
                here = f", here {key}={value}" if key else ""
                raise UserError(
                    f"there is no option {name}: settings are written key=value{here}; "
                    "`mlx-posttrain keys` lists them"
                )
        return super().parse_args(ctx, args)


def _key(name: str, args: list[str]) -> str | None:
    """The key of the recipe in ``args`` that ``name`` means; None where none is like it."""
    from mlx_posttrain import config, methods

    method = "sft"
    with contextlib.suppress(UserError):  # no recipe, or none that can be read: said once the option is right
        recipe = next((arg for arg in args if not arg.startswith("-") and "=" not in arg), "")
        method = str(config.read_yaml(config.find_recipe(recipe)).get("method"))
    known = methods.get(method if method in METHODS else "sft").Recipe
    return next(iter(config.meant(known, name, close=True)), None)


def _to_train(recipe: str) -> str:
    return f"to train, run a recipe: `mlx-posttrain run {recipe}`; `mlx-posttrain recipes` lists them"
