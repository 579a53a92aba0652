"""A chat template is a program of somebody else's: it ends, and takes no more than a text needs."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from mlx_posttrain.data import rendering
from mlx_posttrain.data.templates import render_prompt
from mlx_posttrain.data.types import Turn
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.source import locate
from mlx_posttrain.models.tokenizer import load_tokenizer

LOOP = "{% for i in range(99999) %}"
ENDLESS = LOOP * 3 + "{% endfor %}" * 3
DOUBLING = (
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
)
AT_ONCE = "{{ 'a' * 100000000000 }}"


@pytest.fixture
def tokenizer():
    return load_tokenizer(locate("tiny").folder)


@pytest.mark.parametrize("template", [ENDLESS, DOUBLING, AT_ONCE], ids=["time", "doubling", "at once"])
@pytest.mark.parametrize("where", ["main thread", "another thread"])
def test_a_template_without_end_is_refused(template, where, tokenizer, monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    monkeypatch.setattr(rendering, "MEMORY", 2**28)
    tokenizer.chat_template = template
    outcome = SimpleNamespace(error=None)

    def render() -> None:
        try:
            render_prompt([Turn("user", "Hello")], "chat", tokenizer)
        except UserError as error:
            outcome.error = error

    begun = time.monotonic()
    if where == "main thread":
        render()
    else:
        thread = threading.Thread(target=render)
        thread.start()
        thread.join()
    assert time.monotonic() - begun < 15  # an endless one would not end at all
    assert "choose another template" in str(outcome.error) and "\n" not in str(outcome.error)


def test_a_template_that_ends_is_not_disturbed(tokenizer, monkeypatch):
    """Nothing is raised later either, in the time that it could have taken."""
    monkeypatch.setattr(rendering, "SECONDS", 0.05)
    assert rendering.bounded(lambda: "text") == "text"
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    with pytest.raises(KeyError):
        rendering.bounded(lambda: {}["x"])
    assert not rendering._deadlines


def test_a_text_beyond_the_bound(monkeypatch):
    monkeypatch.setattr(rendering, "CHARACTERS", 10)
    assert rendering.bounded(lambda: "a" * 10) == "a" * 10
    with pytest.raises(UserError, match="broken or hostile"):
        rendering.bounded(lambda: "a" * 11)
