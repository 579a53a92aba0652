"""Our templates as Jinja chat templates, which other programs read from a tokenizer."""

from __future__ import annotations

import json

from mlx_posttrain.data.templates import EXACT, TEMPLATES

#: What only a template of :func:`as_jinja` says.
_ROLES = "' (there are system, user, assistant)') }}"


def is_ours(chat_template: str) -> bool:
    """Return whether :func:`as_jinja` wrote a tokenizer's chat template."""
    return _ROLES in chat_template


def as_jinja(name: str, system: str | None = None, prefix: str = "") -> str:
    """Return the chat template that writes messages as ``render`` and ``render_prompt`` do.

    name: one of ``TEMPLATES``; "none" keeps the text of the messages exactly. system: the prompt of
    conversations that bring none. prefix: Jinja that stands before everything, for a BOS. A role that the
    template does not know, and a content that is no text, are errors of the template.
    """
    template, trim = (EXACT, "") if name == "none" else (TEMPLATES[name], " | trim")
    opening = prefix + _text(template.opening)
    if system and name != "none":
        default = _text(template.system.replace("{content}", system.strip()))
        opening += f"{{% if not messages or messages[0]['role'] != 'system' %}}{default}{{% endif %}}"
    answer = _text(template.assistant + template.lead) + f"{{{{ message['content']{trim} + eos_token }}}}"
    return (
        f"{opening}{{% for message in messages %}}"
        "{% if message['content'] is not string %}"
        "{{ raise_exception('the content of a message must be text') }}{% endif %}"
        f"{{% if loop.index0 and messages[loop.index0 - 1]['role'] == 'assistant' %}}{_text(template.after)}"
        "{% endif %}"
        f"{{% if message['role'] == 'assistant' %}}{answer}"
        f"{{% elif message['role'] == 'user' %}}{_around(template.user, trim)}"
        f"{{% elif message['role'] == 'system' %}}{_around(template.system, trim)}"
        "{% else %}{{ raise_exception('unknown role ' + message['role'] + "
        f"{_ROLES}{{% endif %}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        f"{{% if messages and messages[-1]['role'] == 'assistant' %}}{_text(template.after)}{{% endif %}}"
        f"{_text(template.assistant)}{{% endif %}}"
    )


def _text(text: str) -> str:
    """A text as a Jinja expression; plain text would lose a newline behind a block."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _around(pattern: str, trim: str) -> str:
    before, _, after = pattern.partition("{content}")
    return f"{_text(before)}{{{{ message['content']{trim} }}}}{_text(after)}"
