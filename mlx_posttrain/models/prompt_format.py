"""A run's prompt format beside its weights: the tokenizer, with the format as its chat template."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlx_posttrain.console import log
from mlx_posttrain.convert.files import TRANSFORMERS_5_TOKENIZERS, copy_tokenizer, read_json, write_json
from mlx_posttrain.data import encode
from mlx_posttrain.data.jinja import as_jinja
from mlx_posttrain.data.types import Turn
from mlx_posttrain.models.source import Source, locate
from mlx_posttrain.models.tokenizer import load_tokenizer, missing_tokens

#: What may stand before a prompt, tried in turn: a tokenizer may put a BOS there, and a mark of a word.
PREFIXES = ("", "{{ bos_token }}", "{{ bos_token + ' ' }}")
PROBE = "Say yes."


def carried_template(source: Source) -> str | None:
    """The template of ours that a run's chat template writes; None where the tokenizer's own stays."""
    packed = ((source.recipe or {}).get("data") or {}).get("pack")
    return None if packed or source.template == "chat" else source.template


def say_other_formats(recipe: Any) -> None:
    """Print which models of a recipe learned in another prompt format than that of its rows.

    That is its model and, of a recipe with rewards, those that score. Models that are no runs have no format,
    packed texts have none, and the template ``chat`` is whatever format a run has made its own.
    """
    if getattr(recipe.data, "pack", False):
        return
    given = [part.template for part in recipe.data.parts.values()]
    names = list(dict.fromkeys(n for one in given for n in ([one] if isinstance(one, str) else one)))
    rewards, judges = getattr(recipe, "reward", ()), getattr(recipe, "judge", ())
    scorers = [*rewards, *judges] if isinstance(rewards, list) else []
    for name in dict.fromkeys([recipe.model, *(entry.model for entry in scorers if entry.model)]):
        source = locate(name)
        learned = source.template
        if learned not in (None, "none") and not any(t in names for t in ("chat", *source.templates)):
            log(
                f"{name} learned in the prompt format {learned!r}, and this recipe's is "
                f"{' and '.join(names)}: data.template={learned} stays in it"
            )


def write_tokenizer(folder: Path, source: Source, tokenizer: Any = None) -> Any:
    """Write the tokenizer of a run's model into a folder, and return it.

    tokenizer: the same with tokens that the run adds, which are then written too.
    """
    own = load_tokenizer(source.tokenizer_folder)
    if tokenizer is None or not missing_tokens(tokenizer, own):
        copy_tokenizer(source.tokenizer_folder, folder)
        return own
    with TemporaryDirectory() as made:
        tokenizer.save_pretrained(made)
        copy_tokenizer(Path(made), folder)
    return tokenizer


def write_prompt_format(folder: Path, source: Source, tokenizer: Any = None) -> None:
    """:func:`write_tokenizer` with the run's prompt format as chat template.

    A run of the template ``chat``, of packed text, and a model that is no run keep the tokenizer's own.
    """
    tokenizer = write_tokenizer(folder, source, tokenizer)
    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = read_json(file) if file.is_file() else {}
    name = carried_template(source)
    if name is not None:
        # transformers would read these instead
        for other in ("chat_template.jinja", "chat_template.json"):
            (folder / other).unlink(missing_ok=True)
        config["chat_template"] = _chat_template(name, source.system, tokenizer)
    if "tokenizer_class" not in config and not (folder / "config.json").is_file():
        # which transformers takes from the model's config.json, and an adapter has none
        own = type(tokenizer).__name__
        generic = own in (*TRANSFORMERS_5_TOKENIZERS, "PreTrainedTokenizerFast")
        config["tokenizer_class"] = "PreTrainedTokenizerFast" if generic else own.removesuffix("Fast")
    if config:
        write_json(file, config)


def own_chat_template(folder: Path) -> str | None:
    """The chat template in a folder's tokenizer files."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    found = read_json(file).get("chat_template") if file.is_file() else None
    return found if isinstance(found, str) else None


def _chat_template(name: str, system: str | None, tokenizer: Any) -> str:
    """The Jinja whose prompts have the ids that the run was trained and is asked with."""
    templated = name != "none"
    turns = [*([Turn("system", system)] if system and templated else []), Turn("user", PROBE)]
    (wanted,) = encode.encode_prompts(
        [turns], tokenizer, name if templated else "instruction", templated=templated
    )
    candidates = [as_jinja(name, system, prefix) for prefix in PREFIXES]
    for candidate in candidates:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROBE}],
            chat_template=candidate,
            add_generation_prompt=True,
            tokenize=False,
        )
        if tokenizer(text, add_special_tokens=False)["input_ids"] == wanted:
            return candidate
    return candidates[0]
