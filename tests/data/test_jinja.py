"""The chat template that travels writes, token by token, what our own templates write."""

from __future__ import annotations

import pytest

from mlx_posttrain.convert import hub
from mlx_posttrain.data.encode import encode, encode_prompts
from mlx_posttrain.data.jinja import as_jinja
from mlx_posttrain.data.templates import TEMPLATES
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.models.tokenizer import load_tokenizer

NAMES = [name for name in TEMPLATES if name != "none"]
ASKED = 'Say {{ "hi" }}\n\tto {content} "them" and 🙂. '
TALK = [("user", ASKED), ("assistant", " Hello. "), ("user", "Again."), ("assistant", "Hello!")]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(hub.resolve("tiny"))


def ids(tokenizer, template, turns, prompt=True):
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("system", [None, " Be brief. "])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_answers_have_our_ids(name, system, tokenizer):
    template = as_jinja(name, system)
    first = [Turn("system", system)] if system else []
    for length in (1, 3):
        turns = [Turn(role, content) for role, content in TALK[:length]]
        wanted = encode_prompts([[*first, *turns]], tokenizer, name)[0]
        assert ids(tokenizer, template, TALK[:length]) == wanted
        given = [Turn("system", "Shout."), *turns]
        wanted = encode_prompts([given], tokenizer, name)[0]
        assert ids(tokenizer, template, [("system", "Shout."), *TALK[:length]]) == wanted
    whole = encode(
        Conversation((*first, *(Turn(*turn) for turn in TALK))), tokenizer, template=name, max_length=512
    )
    assert ids(tokenizer, template, TALK, prompt=False) == list(whole.tokens)


def test_plain_text_stays_as_it_is(tokenizer):
    template = as_jinja("none")
    (wanted,) = encode_prompts([[Turn("user", ASKED)]], tokenizer, templated=False)
    assert ids(tokenizer, template, [("user", ASKED)]) == wanted


def test_what_it_cannot_write_is_an_error_of_the_template(tokenizer):
    template = as_jinja("question")
    with pytest.raises(Exception, match=r"unknown role tool \(there are system, user, assistant\)"):
        ids(tokenizer, template, [("tool", "4")])
    with pytest.raises(Exception, match="content of a message must be text"):
        ids(tokenizer, template, [("user", None)])
