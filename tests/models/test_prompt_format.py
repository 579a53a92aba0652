"""The chat template of tokenizers that begin a text with BOS, or with a mark between words."""

from __future__ import annotations

import pytest

from mlx_posttrain.data.encode import encode_prompts
from mlx_posttrain.data.types import Turn
from mlx_posttrain.models.prompt_format import _chat_template
from tests.data.test_tokens import byte_level, prefixing

TOKENIZERS = {
    "byte-level": lambda: byte_level(bos=False),
    "byte-level with BOS": lambda: byte_level(bos=True),
    **{kind: (lambda kind=kind: prefixing(kind)) for kind in ("legacy", "first", "always", "never")},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ["question", "none"])
def test_a_prompt_has_the_ids_it_is_asked_with(name, kind):
    tokenizer = TOKENIZERS[kind]()
    template = _chat_template(name, None, tokenizer)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=False,
    )
    turns = [[Turn("user", "What is the capital of France?")]]
    plain = {"templated": False} if name == "none" else {"template": name}
    assert (
        tokenizer(text, add_special_tokens=False)["input_ids"] == encode_prompts(turns, tokenizer, **plain)[0]
    )
