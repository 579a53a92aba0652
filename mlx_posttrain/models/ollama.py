"""An Ollama Modelfile for a GGUF file: its prompt format as a Go template, its ends and its context.

A chat template is a program in Jinja, and Go's templates have another language. What is translated is
therefore what the chat template does: the text that it writes between the messages of conversations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mlx_posttrain.data.tokens import bos_ids

#: Context that a Modelfile asks for at most: Ollama reserves memory for all of it.
MOST_CONTEXT = 8192

#: Begins the line of a Modelfile that says why it has no template.
NO_TEMPLATE = "# no TEMPLATE: "

_ROLES = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
_CONTENTS = ("Qalpha", "Rbeta", "Sgamma", "Tdelta", "Uepsilon", "Vzeta")

_TEMPLATE = (
    "{{ range $i, $message := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    '{{ if eq $i 0 }}{{ if eq .Role "system" }}%(system_first)s{{ else }}%(user_first)s{{ end }}{{ end }}'
    "{{ .Content }}"
    '{{ if eq .Role "system" }}%(system_user)s'
    '{{ else if and (eq .Role "user") $last }}%(user_answer)s'
    '{{ else if eq .Role "user" }}%(user_assistant)s'
    "{{ else if not $last }}%(assistant_user)s"
    "{{ end }}{{ end }}"
)


def modelfile(file: str, tokenizer: Any, template: str | None, ends: Sequence[int], context: int) -> str:
    """Return the Modelfile beside a GGUF file.

    template: the chat template in Jinja; without one a prompt is passed on as it is. ends: the ids that end
    an answer. context: the model's, in tokens. Where the chat template cannot be expressed, a comment says
    so, and Ollama looks for one of its own that resembles the file's.
    """
    lines = [f"FROM ./{file}"]
    try:
        found = "{{ .Prompt }}" if template is None else go_template(tokenizer, template)
    except ValueError as error:
        lines.append(f"{NO_TEMPLATE}{error}")
    else:
        lines.append(f'TEMPLATE """{found}"""')
    lines.append(f"PARAMETER num_ctx {min(context, MOST_CONTEXT)}")
    for end in ends:
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.convert_ids_to_tokens(end), ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def go_template(tokenizer: Any, template: str) -> str:
    """Return a chat template in Ollama's language.

    It writes conversations of text whose questions and answers take turns, perhaps after a system message;
    an answer that comes last is left open, as Ollama continues one. White space around contents stays, which
    many chat templates cut off. Raises ValueError, saying why, where the chat template does more than to
    write fixed text between messages.
    """
    if "strftime_now" in template:
        raise ValueError("the chat template writes the date")
    between: dict[str, str] = {}
    for roles in _ROLES:
        messages = [{"role": role, "content": text} for role, text in zip(roles, _CONTENTS)]
        try:
            rest = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # whatever the template raises
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the chat template refuses {', '.join(roles)}: {reason}") from None
        for place, role in enumerate((*roles, "answer")):
            before, found, after = (rest, "end", "") if role == "answer" else rest.partition(_CONTENTS[place])
            name = f"{roles[place - 1]}_{role}" if place else f"{role}_first"
            if not found or between.setdefault(name, before) != before:
                raise ValueError("the chat template writes a message differently by what stands around it")
            rest = after
    if bos_ids(tokenizer):  # which llama.cpp puts there itself
        for name in ("system_first", "user_first"):
            between[name] = between[name].removeprefix(tokenizer.bos_token)
    if any(mark in text for text in between.values() for mark in ("{{", "}}", '"""')):
        raise ValueError("the chat template writes braces or quotes that a Modelfile cannot hold")
    return _TEMPLATE % between
