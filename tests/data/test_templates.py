"""The text of every template, which parts are trained, and that a prompt is a prefix of its training row."""

import re
from collections import Counter
from typing import Any

import pytest

from mlx_posttrain.config import DataSection
from mlx_posttrain.data.templates import (
    FIVE,
    NAMES,
    TEMPLATES,
    Segment,
    check_name,
    choose,
    render,
    render_prompt,
)
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.errors import UserError

ONE = (Turn("user", "Add 2 and 3."), Turn("assistant", "5"))
MANY = (
    Turn("system", "Be kind."),
    Turn("user", "Hi {x}"),
    Turn("assistant", " Hello. \n"),
    Turn("user", "Bye?"),
    Turn("assistant", "Bye."),
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A template like those of reasoning models: it drops the thoughts of all but the last answer.
FORGETFUL = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{{ m.content if loop.last or m.role == 'user' else m.content.split('</think>')[-1] }}{{ '<end>' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# The mark before a generated answer differs from the one before a given answer.
CHANGING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt "
    "%}<ai>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML
)


def tokenizer(chat_template: str | None, eos: str = "<|im_end|>") -> Any:
    """Return a byte-level tokenizer with only the special tokens of ChatML: rendering needs no more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos)
    made.chat_template = chat_template
    return made


def text(segments: list[Segment], eos: str = "$") -> str:
    return "".join(s.text + (eos if s.closes else "") for s in segments)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("instruction", "### Instruction:\nAdd 2 and 3.\n\n### Response:\n|5$"),
        ("plain", "Instruction: Add 2 and 3.\n\nResponse:| 5$"),
        ("chatml", "<|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n|5$"),
        ("question", "Question: Add 2 and 3.\n\nAnswer:| 5$"),
        ("dialogue", "User: Add 2 and 3.\n\nAssistant:| 5$"),
        ("none", "Add 2 and 3.| 5$"),
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes "
            "the request.\n\n"
            "### Instruction:\nAdd 2 and 3.\n\n### Response:\n|5$",
        ),
    ],
)
def test_one_turn(name: str, expected: str) -> None:
    prompt, answer = (
        expected.split("|5$" if "|5$" in expected else "| 5$")[0],
        expected.rsplit("|", 1)[1][:-1],
    )
    assert render(Conversation(ONE), name) == [Segment(prompt, False), Segment(answer, True, closes=True)]
    assert render_prompt(ONE[:1], name) == [Segment(prompt, False)]


def test_the_five_formats() -> None:
    assert len(set(FIVE)) == 5
    assert set(FIVE) < set(NAMES)
    # a space belongs to the answer
    assert not any(TEMPLATES[name].assistant.endswith(" ") for name in NAMES if name != "chat")


def test_several_turns_and_system() -> None:
    segments = render(Conversation(MANY), "instruction")
    assert text(segments) == (
        "Be kind.\n\n### Instruction:\nHi {x}\n\n### Response:\nHello.$\n\n### Instruction:\nBye?\n\n### "
        "Response:\nBye.$"
    )
    assert [s.trained for s in segments] == [False, False, False, True]
    segments = render(Conversation(MANY), "dialogue", train_on="assistant")
    assert (
        text(segments) == "Be kind.\n\nUser: Hi {x}\n\nAssistant: Hello.$\n\nUser: Bye?\n\nAssistant: Bye.$"
    )
    assert [s.trained for s in segments] == [False, True, False, True]
    segments = render(Conversation(MANY), "chatml", train_on="all")
    assert text(segments) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi "
        "{x}<|im_end|>\n<|im_start|>assistant\nHello.$\n"
        "<|im_start|>user\nBye?<|im_end|>\n<|im_start|>assistant\nBye.$"
    )
    assert all(s.trained for s in segments)


def test_text_that_is_not_templated_is_kept_exactly() -> None:
    exact = Conversation((Turn("user", " a {content} "), Turn("assistant", " b\r\n")), templated=False)
    assert render(exact, "instruction") == [
        Segment(" a {content} ", False),
        Segment(" b\r\n", True, closes=True),
    ]
    assert render_prompt(exact.turns[:1], "instruction", templated=False) == [Segment(" a {content} ", False)]
    assert render(Conversation((Turn("assistant", "x"),), templated=False)) == [
        Segment("x", True, closes=True)
    ]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "chat"])
@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
@pytest.mark.parametrize("templated", [True, False])
def test_a_prompt_is_the_beginning_of_its_training_row(name: str, train_on: Any, templated: bool) -> None:
    for turns in (ONE, MANY, (Turn("user", "ü\n\n "), Turn("assistant", "日本"))):
        row = render(Conversation(turns, templated=templated), name, train_on=train_on)
        asked = render_prompt(turns[:-1], name, templated=templated)
        assert [(s.text, s.closes) for s in asked] == [(s.text, s.closes) for s in row[:-1]]
        assert not any(s.trained for s in asked)
        assert row[-1].trained


def test_an_empty_answer_is_no_target() -> None:
    for train_on in ("completion", "assistant", "all"):
        for name in ("instruction", "plain"):
            segments = render(Conversation((*ONE[:1], Turn("assistant", " \n"))), name, train_on=train_on)  # type: ignore[arg-type]
            assert not any(s.trained for s in segments)


def test_chat_template_with_its_own_eos() -> None:
    tok = tokenizer(CHATML)
    segments = render(Conversation(MANY), "chat", tok, train_on="assistant")
    whole = tok.apply_chat_template([t._asdict() for t in MANY], tokenize=False)
    # its EOS ends the row: the newline after it is not predicted
    assert text(segments) + "\n" == whole
    assert [s.text for s in segments if s.trained] == [" Hello. \n<|im_end|>", "Bye.<|im_end|>"]
    assert not any(s.closes for s in segments)
    assert [s[0] for s in render_prompt(MANY[:-1], "chat", tok)] == [s.text for s in segments[:-1]]
    assert text(render_prompt(MANY[:-1], "chat", tok)) == tok.apply_chat_template(
        [t._asdict() for t in MANY[:-1]], tokenize=False, add_generation_prompt=True
    )


def test_chat_template_without_eos_gets_one_at_the_end() -> None:
    segments = render(
        Conversation(MANY), "chat", tokenizer(CHATML, eos="<|endoftext|>"), train_on="assistant"
    )
    assert [(s.text, s.closes) for s in segments if s.trained] == [
        (" Hello. \n<|im_end|>\n", False),
        ("Bye.<|im_end|>\n", True),
    ]


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_only_what_follows_a_turns_own_end_is_left_out(eos: str) -> None:
    """An end of text within an answer is not the answer's end."""
    tok = tokenizer(CHATML, eos=eos)
    contents = [f"The token {eos} ends a text.", f"{eos} is it.", f"It is {eos}"]
    turns = [Turn("user", f"What is {eos}?"), Turn("assistant", "")]
    for content in contents:
        row = Conversation((turns[0], Turn("assistant", content)))
        *_, answer = render(row, "chat", tok)
        own = "<|im_end|>" if eos == "<|im_end|>" else "<|im_end|>\n"
        assert answer == Segment(content + own, True, closes=eos == "<|endoftext|>")
    both = Conversation((turns[0], Turn("assistant", contents[0]), turns[0], Turn("assistant", contents[1])))
    trained = [s.text for s in render(both, "chat", tok, train_on="assistant") if s.trained]
    assert [t.split("<|im_end|>\n")[0].removesuffix("<|im_end|>") for t in trained] == [
        content.removesuffix("<|im_end|>") for content in contents[:2]
    ]


def test_a_turn_ends_at_any_end_that_the_model_lists() -> None:
    """As Gemma's: the tokenizer's EOS is never written, and generation stops at the turn's end."""
    tok = tokenizer(CHATML, eos="<|endoftext|>")
    tok.stop_token_ids = (tok.convert_tokens_to_ids("<|im_end|>"), 10**6)
    segments = render(Conversation(MANY), "chat", tok, train_on="assistant")
    assert [s for s in segments if s.trained] == [
        Segment(" Hello. \n<|im_end|>", True),
        Segment("Bye.<|im_end|>", True),
    ]
    # a template that rewrites an answer still ends it
    tok.chat_template = CHATML.replace("m.content", "m.content | upper")
    assert render(Conversation(ONE), "chat", tok)[-1].text == "5<|im_end|>"


def test_chat_template_of_an_answer_that_begins() -> None:
    tok = tokenizer("{{ 'sys ' }}" + CHATML)
    turns = (Turn("assistant", "Hello."), Turn("user", "Hi"), Turn("assistant", "Bye."))
    segments = render(Conversation(turns), "chat", tok, train_on="assistant")
    assert text(segments) + "\n" == tok.apply_chat_template([t._asdict() for t in turns], tokenize=False)
    assert [s.text for s in segments if s.trained] == ["Hello.<|im_end|>", "Bye.<|im_end|>"]
    assert segments[0].text == "sys <|im_start|>assistant\n"


def test_chat_template_that_rewrites_earlier_answers() -> None:
    tok = tokenizer(FORGETFUL)
    turns = (
        Turn("user", "a"),
        Turn("assistant", "<think>x</think>b"),
        Turn("user", "c"),
        Turn("assistant", "<think>y</think>d"),
    )
    segments = render(Conversation(turns), "chat", tok)
    assert segments == [
        Segment("<user>a<end><assistant>b<end><user>c<end><assistant>", False),
        Segment("<think>y</think>d<end>", True, closes=True),
    ]
    assert render_prompt(turns[:-1], "chat", tok) == segments[:1]
    with pytest.raises(UserError, match="rewrites earlier answers"):
        render(Conversation(turns), "chat", tok, train_on="assistant")


def test_chat_template_faults() -> None:
    with pytest.raises(UserError, match=r"has no chat template; choose another template \(instruction, "):
        render(Conversation(ONE), "chat", tokenizer(None))
    with pytest.raises(
        UserError,
        match=r"writes a prompt differently once it is answered \('<ai>' became "
        r"'\[assistant\]5'\)",
    ):
        render(Conversation(ONE), "chat", tokenizer(CHANGING))
    with pytest.raises(UserError, match=r"refuses the turns \['system', .*System role not supported"):
        render(Conversation(MANY), "chat", tokenizer(NO_SYSTEM))


def test_faults() -> None:
    with pytest.raises(UserError, match="unknown template 'instructions'; did you mean 'instruction'"):
        render(Conversation(ONE), "instructions")
    with pytest.raises(UserError, match="train_on 'prompt'"):
        render(Conversation(ONE), train_on="prompt")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="must end with an assistant turn"):
        render(Conversation(ONE[:1]))
    with pytest.raises(UserError, match="must end with a user turn"):
        render_prompt(ONE)
    with pytest.raises(UserError, match="unknown role 'tool'"):
        render(Conversation((Turn("tool", "x"), *ONE)))


def test_choose_depends_on_the_row_and_the_seed_only() -> None:
    keys = [(Turn("user", f"question {i}"),) for i in range(2000)]
    chosen = {key: choose(FIVE, key, 0) for key in keys}
    assert all(choose(FIVE, key, 0) == chosen[key] for key in reversed(keys))
    counts = Counter(chosen.values())
    assert set(counts) == set(FIVE)
    assert all(abs(n - 400) < 4 * 18 for n in counts.values())  # binomial: sd 17.9
    assert sum(choose(FIVE, key, 1) == chosen[key] for key in keys) == pytest.approx(400, abs=72)
    # in every process
    assert [choose(FIVE, f"row {i}", 0) for i in range(4)] == ["instruction", "plain", "question", "plain"]
    assert choose(["plain"], "x", 3) == "plain"


QWEN = (  # Qwen 3's way: a thought under its own key, or in the content, and only behind the last question
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].strip() %}{% endif %}"
    "{% if thought and loop.index0 > ns.last %}"
    "{% set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GPT_OSS = CHATML.replace("m.content", "('[' + m.thinking + ']' if m.thinking else '') + m.content")
OPENS = CHATML.replace("assistant\n'", "assistant\n<think>\n'")  # the prompt begins the thought
CUTS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")  # as DeepSeek-R1's
THOUGHTS = (
    Turn("user", "a"),
    Turn("assistant", "<think>\nFirst.\n</think>\nb"),
    Turn("user", "c"),
    Turn("assistant", "<think>\nSecond, slowly.\n</think>\nd"),
)


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (QWEN, "<think>\nSecond, slowly.\n</think>\n\nd<|im_end|>"),
        (CHATML, "<think>\nSecond, slowly.\n</think>\nd<|im_end|>"),
        (GPT_OSS, "[Second, slowly.]d<|im_end|>"),
        (OPENS, "Second, slowly.\n</think>\nd<|im_end|>"),
    ],
    ids=["qwen", "chatml", "gpt-oss", "opens"],
)
def test_a_thought_is_given_as_the_chat_template_reads_it(template: str, answer: str) -> None:
    tok = tokenizer(template)
    *_, last = render(Conversation(THOUGHTS), "chat", tok)
    assert last == Segment(answer, True)
    # as transformers renders messages with the thought under its own key
    if template == QWEN:
        messages = [{"role": t.role, "content": t.content} for t in THOUGHTS]
        messages[1] |= {"content": "b", "reasoning_content": "First."}
        messages[3] |= {"content": "d", "reasoning_content": "Second, slowly."}
        whole = tok.apply_chat_template(messages, tokenize=False)
        assert "First." not in whole
        assert text(render(Conversation(THOUGHTS), "chat", tok)) + "\n" == whole


def test_a_chat_template_that_leaves_out_a_trained_thought_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"leaves out 'Second, slowly.' of an answer .* choose another template"
    ):
        render(Conversation(THOUGHTS), "chat", tokenizer(CUTS))
    # white space does not count, and what is not trained may be left out
    spaced = (*THOUGHTS[:3], Turn("assistant", "d   e\n\n f"))
    tok = tokenizer(CUTS.replace("[-1]", "[-1].split() | join(' ')"))
    assert render(Conversation(spaced), "chat", tok)[-1].text == "d e f<|im_end|>"
    dropped = Conversation((*THOUGHTS[:3], THOUGHTS[3]._replace(trained=False)))
    assert not any(s.trained for s in render(dropped, "chat", tokenizer(CUTS)))


@pytest.mark.parametrize("name", ["question", "chat"])
def test_an_answer_that_is_not_trained(name: str) -> None:
    tok = tokenizer(CHATML)
    turns = (*MANY[1:2], MANY[2]._replace(trained=False), *MANY[3:])
    every = render(Conversation(turns), name, tok, train_on="assistant")
    assert [s.text.strip() for s in every if s.trained] == ["Bye." + "<|im_end|>" * (name == "chat")]
    whole = render(Conversation(turns), name, tok, train_on="all")
    assert [s.trained for s in whole] == [True, False, True, True]
    last = Conversation((*turns[:-1], turns[-1]._replace(trained=False)))
    for train_on in ("completion", "assistant"):
        assert not any(s.trained for s in render(last, name, tok, train_on=train_on))  # type: ignore[arg-type]
    # and its mark changes no text
    same = render(Conversation(MANY[1:]), name, tok)
    assert [s[0] for s in same] == [s[0] for s in every]
    assert repr(turns[0]) == "Turn(role='user', content='Hi {x}')"


def test_a_template_that_rewrites_answers_that_are_not_trained_is_no_matter() -> None:
    turns = (THOUGHTS[0], THOUGHTS[1]._replace(trained=False), *THOUGHTS[2:])
    segments = render(Conversation(turns), "chat", tokenizer(FORGETFUL), train_on="assistant")
    assert [s.trained for s in segments] == [False, True]


def test_wording_in_place_of_a_name_is_told_where_it_goes() -> None:
    with pytest.raises(
        UserError, match=r"no template's name \(there are instruction, .*, chat\); in a recipe, wording"
    ) as e:
        check_name("Q: {question}\nA:")
    assert "'data.prompt=\"Q: {question}\\nA: \"'" in str(e.value)
    described = DataSection.model_fields["template"].description or ""
    assert all(re.search(rf"\b{name}\b", described.partition(":")[2]) for name in NAMES)
