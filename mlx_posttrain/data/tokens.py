"""Token ids: those with a meaning, and those of pieces of text by where in a row each piece stands.

Tokenizers in the manner of SentencePiece (Llama 2, TinyLlama, Mistral 0.1) put "▁", the mark between words,
before every text that they are given, and older ones behind special tokens too. An answer tokenised alone
would begin with a mark that the joint text does not have. So each piece gets the ids that it has in the joint
text: at the beginning of a row, behind an end of text, or behind other text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from mlx_posttrain.data.types import END_THINK, THINK
from mlx_posttrain.errors import UserError

Place = Literal["beginning", "end", "text"]

#: Texts that stand for those before a piece, tried in turn: each is a token that few texts can merge with.
STAND_INS = ("\n", ":", "}", "z")


#: Characters that are tokenised at a time, where a text is not longer by itself.
PART = 1_000_000


def eos_id(tokenizer: Any) -> int:
    """Return the id of the end-of-text token. Raises UserError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no EOS token, so no answer could end; set eos_token in its "
            "tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def bos_ids(tokenizer: Any) -> list[int]:
    """Return ``[bos]`` if the tokenizer begins every text with it by default, else ``[]``."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    plain, default = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return [int(bos)] if default[:1] == [bos] and plain[:1] != [bos] else []


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end a text in generation: EOS, and the others that the model's folder lists.

    Chat models end a turn with a token that is not their tokenizer's EOS (Llama 3, Gemma); see
    models/tokenizer.py, load_tokenizer, which notes them.
    """
    return tuple(dict.fromkeys((eos_id(tokenizer), *getattr(tokenizer, "stop_token_ids", ()))))


def start_ids(tokenizer: Any) -> list[int]:
    """Return the one token that a text without a prompt follows: BOS as in :func:`bos_ids`, else EOS.

    An EOS ends the text before, as in GPT-2's own training.
    """
    return bos_ids(tokenizer) or [eos_id(tokenizer)]


def written_specials(tokenizer: Any, rows: Iterable[Iterable[str]]) -> tuple[int, str]:
    """Return in how many rows of texts a special token is written out, and the first such token ("" in none).

    The marks around a thought do not count: they are meant.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = sorted({*added, *tokenizer.all_special_tokens} - {THINK, END_THINK}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    found = [next(filter(None, map(pattern.search, row)), None) for row in rows]
    return sum(match is not None for match in found), next((match[0] for match in found if match), "")


def tokenise(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text by itself, without special tokens that it does not have written in it."""
    # verbose=False: no warning about texts longer than the model's context; they are truncated and counted
    # by the caller.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return [ids for part in _parts(texts) for ids in tokenizer(part, **options)["input_ids"]]


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in order, as many at a time as have PART characters together: a token takes far more memory."""
    part: list[str] = []
    characters = 0
    for text in texts:
        characters += len(text)
        if part and characters > PART:
            yield part
            part, characters = [], len(text)
        part.append(text)
    if part:
        yield part


def tokenise_pieces(
    tokenizer: Any, pieces: Iterable[tuple[str, Place]]
) -> dict[tuple[str, Place], list[int]]:
    """The ids of each (text, what stands before it), every distinct piece tokenised once.

    "end" is the tokenizer's EOS. The ids of a piece never depend on what the text before it is, so those of a
    prompt do not change when it is answered. They are those of the joint text except where the tokenizer
    would make one token of the end of a piece and the beginning of the next.
    """
    distinct = list(dict.fromkeys(pieces))
    before: dict[Place, Sequence[str]] = {"beginning": (), "end": (tokenizer.eos_token,), "text": STAND_INS}
    found: dict[tuple[str, Place], list[int]] = {}
    for place, stand_ins in before.items():
        texts = [text for text, where in distinct if where == place]
        if texts and (
            place == "beginning" or _behind(tokenizer, ["a"], stand_ins) == tokenise(tokenizer, ["a"])
        ):
            ids = tokenise(tokenizer, texts)
        else:
            ids = _behind(tokenizer, texts, stand_ins)
        found |= {(text, place): row for text, row in zip(texts, ids, strict=True)}
    return found


def _behind(tokenizer: Any, texts: Sequence[str], stand_ins: Sequence[str]) -> list[list[int]]:
    """The ids of each text behind the first of ``stand_ins`` that keeps its own ids there.

    Alone where none does.
    """
    found: list[list[int]] = [[] for _ in texts]
    waiting = list(range(len(texts)))
    for stand_in in stand_ins:
        (before,) = tokenise(tokenizer, [stand_in])
        if stand_in not in tokenizer.decode(before):  # a normaliser removed it
            continue
        merged = []
        for i, ids in zip(waiting, tokenise(tokenizer, [stand_in + texts[i] for i in waiting]), strict=True):
            if ids[: len(before)] == before:
                found[i] = ids[len(before) :]
            else:
                merged.append(i)
        waiting = merged
    for i, ids in zip(waiting, tokenise(tokenizer, [texts[i] for i in waiting]), strict=True):
        found[i] = ids
    return found


def tokenise_joint(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[tuple[list[int], list[int]]]:
    """For each row of pieces the ids of the joint text, and the number of the piece each token belongs to.

    A token that begins in one piece and ends in the next belongs to the next.
    """
    found: list[tuple[list[int], list[int]]] = []
    for part in _parts(["".join(row) for row in rows]):
        encoded = tokenizer(
            part,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            row = rows[len(found)]
            ends = np.cumsum([len(piece) for piece in row])
            owner = np.searchsorted(ends, [end for _, end in offsets], side="left")
            found.append((list(ids), np.minimum(owner, len(row) - 1).tolist()))
    return found
