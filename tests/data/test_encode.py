"""Token ids and masks, checked by hand with GPT-2's vocabulary where available and with a small one."""

from pathlib import Path
from typing import Any

import pytest

from mlx_posttrain.data.encode import (
    EncodingReport,
    bos_ids,
    encode,
    encode_all,
    encode_each,
    encode_prompts,
    pack,
    try_prompts,
)
from mlx_posttrain.data.templates import FIVE, TEMPLATES, render
from mlx_posttrain.data.types import Conversation, Example, Turn
from mlx_posttrain.errors import UserError

TEXTS = [
    "### Instruction:\nWhat is the capital of France?\n\n### Response:\nParis is the capital of France.",
    "Question: What is two and two?\n\nAnswer: Four. Instruction: User: Assistant: Response:",
    "What is the weather like? It is fine.\n\n" * 3,
]


def make_tokenizer(**special: Any) -> Any:
    """Return a byte-level BPE tokenizer of 400 entries, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **(special or {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"})
    )


@pytest.fixture(scope="module")
def tiny() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def gpt2() -> Any:
    folder = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizer" / "gpt2"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def talk(*contents: str, **options: Any) -> Conversation:
    """Return a conversation of alternating turns that ends with an answer."""
    roles = ["user", "assistant"] * len(contents)
    return Conversation(tuple(Turn(r, c) for r, c in zip(roles[len(contents) % 2 :], contents)), **options)


def trained(example: Any) -> list[int]:
    return [t for t, is_trained in zip(example.tokens, example.trained) if is_trained]


EOS = 50256
MARKS = {"instruction": [21017, 46486, 25, 198], "response": [198, 198, 21017, 18261, 25, 198]}


def test_ids_of_gpt2(gpt2: Any) -> None:
    row = talk("Hello world", "Paris", extra={"id": 3})
    example = encode(row, gpt2, max_length=64)
    assert example is not None
    prompt = MARKS["instruction"] + [15496, 995] + MARKS["response"]
    assert list(example.tokens) == [*prompt, 40313, EOS]
    assert list(example.trained) == [False] * len(prompt) + [True, True]
    assert example.extra == {"id": 3}
    # After a mark that ends in a colon, the answer is the word with its space, as in ordinary text.
    example = encode(row, gpt2, template="question", max_length=64)
    assert example is not None
    assert list(example.tokens) == [24361, 25, 18435, 995, 198, 198, 33706, 25, 6342, EOS]
    assert trained(example) == [6342, EOS]
    assert gpt2.decode(trained(example)[:-1]).strip() == "Paris"


def test_ids_of_gpt2_for_several_turns(gpt2: Any) -> None:
    row = talk("Hello world", "Paris", "Hello world", "Paris")
    one = MARKS["instruction"] + [15496, 995] + MARKS["response"] + [40313, EOS]
    expected = [*one, 198, 198, *one]
    last, every, whole = (
        encode(row, gpt2, max_length=64, train_on=t) for t in ("completion", "assistant", "all")
    )  # type: ignore[arg-type]
    assert last and every and whole
    assert list(last.tokens) == list(every.tokens) == list(whole.tokens) == expected
    assert [i for i, t in enumerate(last.trained) if t] == [len(expected) - 2, len(expected) - 1]
    assert [i for i, t in enumerate(every.trained) if t] == [12, 13, len(expected) - 2, len(expected) - 1]
    assert whole.trained == (False, *[True] * (len(expected) - 1))


def test_exact_text(gpt2: Any) -> None:
    example = encode(talk("Hello", " world", templated=False), gpt2, template="instruction", max_length=9)
    assert example is not None
    assert (example.tokens, example.trained) == ((15496, 995, EOS), (False, True, True))
    # a text row starts as generation from nothing does, and all of the text is trained
    for row in (talk("Hello world", templated=False), talk("", "Hello world", templated=False)):
        example = encode(row, gpt2, max_length=9)
        assert example is not None
        assert (example.tokens, example.trained) == ((EOS, 15496, 995, EOS), (False, True, True, True))
        assert encode(row, gpt2, max_length=3) == Example((EOS, 15496, 995), (False, True, True))
    assert encode_prompts([(Turn("user", ""),)], gpt2, templated=False) == [[EOS]]


def test_a_row_without_a_prompt_starts_like_generation_from_nothing(tiny: Any) -> None:
    other = make_tokenizer(eos_token="<|endoftext|>", bos_token="<s>")  # has a BOS and begins no text with it
    for tok, start in ((tiny, tiny.eos_token_id), (with_bos(), 1), (other, 0)):
        nothing = (Turn("user", ""),)
        for name, row in (("plain", talk("It is.", templated=False)), ("none", talk("", "It is."))):
            (prompt,) = encode_prompts([nothing], tok, name, templated=row.templated)
            example = encode(row, tok, template=name, max_length=99)
            assert prompt == [start] and example is not None
            assert example.tokens[0] == start and example.trained == (
                False,
                *[True] * (len(example.tokens) - 1),
            )
            assert tok.decode(example.tokens[1:-1]).strip() == "It is."
        (begun,) = encode_prompts([nothing], tok, templated=False, answer="It")
        assert list(encode(talk("It is.", templated=False), tok, max_length=99).tokens[: len(begun)]) == begun  # type: ignore[union-attr]
        # a row with a prompt starts as before
        example = encode(talk("What", " is", templated=False), tok, max_length=99)
        assert example is not None
        assert (example.tokens[0] == start) == (start == 1)


def test_an_assistant_that_begins_is_a_row_without_a_prompt(tiny: Any) -> None:
    row = talk("It is.", "What?", "It is fine.")
    example = encode(row, tiny, template="none", max_length=99, train_on="assistant")
    assert example is not None and example.tokens[0] == tiny.eos_token_id
    assert tiny.decode(trained(example)) == " It is.<|endoftext|> It is fine.<|endoftext|>"


def test_truncation(gpt2: Any) -> None:
    row = talk("Hello", " world" * 5, templated=False)  # 1 + 5 + EOS
    whole = encode(row, gpt2, max_length=7)
    assert whole is not None and whole.tokens[-1] == EOS
    cut = encode(row, gpt2, max_length=6)
    assert cut is not None
    # it did not end here: no EOS
    assert (cut.tokens, cut.trained) == ((15496, *[995] * 5), (False, *[True] * 5))
    assert encode(row, gpt2, max_length=6, truncate="drop") is None
    long_prompt = talk("Hello" + " world" * 5, " world", templated=False)
    assert encode(long_prompt, gpt2, max_length=6) is None  # nothing left to train
    assert encode(long_prompt, gpt2, max_length=7) is not None


def test_report_counts(gpt2: Any) -> None:
    def raw(prompt: str, answer: str) -> Conversation:
        return talk(prompt, answer, templated=False)

    rows = [
        raw("Hello", " world"),
        raw("Hello", " world" * 9),
        raw("Hello" + " world" * 9, " world"),
        raw("Hello", "  "),
    ]
    examples, report = encode_all(rows, gpt2, max_length=5)
    assert report == EncodingReport(
        total=4, kept=2, dropped_no_target=2, dropped_long=0, truncated=1, tokens=3 + 5, trained_tokens=2 + 4
    )
    assert [len(e.tokens) for e in examples] == [3, 5]
    assert (
        str(report)
        == "2 of 4 rows kept (2 without a trained token, 0 too long, 1 truncated), 8 tokens, 6 trained"
    )
    _, report = encode_all(rows, gpt2, max_length=5, truncate="drop")
    assert report == EncodingReport(
        total=4, kept=1, dropped_no_target=1, dropped_long=2, truncated=0, tokens=3, trained_tokens=2
    )
    with pytest.raises(
        UserError,
        match=r"no row left to train on: 0 of 2 rows kept .2 without.*raise the "
        r"maximum length .5",
    ):
        encode_all(rows[2:], gpt2, max_length=5)
    with pytest.raises(UserError, match="no row left to train on: 0 of 0"):
        encode_all([], gpt2, max_length=5)


ODD = [
    talk("What is this?", "It is fine."),
    talk("héllo 日本 \U0001f600", "na\u0308ive\u2028line\u00a0end"),
    talk("tabs\tand  spaces \n\n\n x", "  code:\n\n    return {x}\r\n  "),
    talk("a", "b", "c", "d", "e", "f"),
    talk("\u200b", "0"),
]


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("templated", [True, False])
def test_decoding_gives_the_rendered_text(tiny: Any, name: str, templated: bool) -> None:
    for row in ODD:
        row = Conversation(row.turns, templated)
        example = encode(row, tiny, template=name, max_length=9999, train_on="assistant")
        assert example is not None
        segments = render(row, name)
        expected = "".join(s.text + ("<|endoftext|>" if s.closes else "") for s in segments)
        assert tiny.decode(example.tokens, clean_up_tokenization_spaces=False) == expected
        answers = [
            turn.content.strip() if templated else turn.content
            for turn in row.turns
            if turn.role == "assistant"
        ]
        decoded = tiny.decode(trained(example), clean_up_tokenization_spaces=False).split("<|endoftext|>")[
            :-1
        ]
        assert [d.strip() for d in decoded] == [a.strip() for a in answers]


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("templated", [True, False])
@pytest.mark.parametrize("which", ["tiny", "bos"])
def test_the_prompt_of_generation_is_the_prefix_of_training(
    tiny: Any, name: str, templated: bool, which: str
) -> None:
    tok = tiny if which == "tiny" else with_bos()
    prompts = encode_prompts([row.turns[:-1] for row in ODD], tok, name, templated=templated)
    for row, prompt in zip(ODD, prompts):
        example = encode(Conversation(row.turns, templated), tok, template=name, max_length=9999)
        assert example is not None
        assert list(example.tokens[: len(prompt)]) == prompt
        assert not any(example.trained[: len(prompt)])
        assert all(example.trained[len(prompt) :])


def with_bos() -> Any:
    """Return a tokenizer that begins every text with <s>, as Llama's does."""
    from tokenizers import processors

    tok = make_tokenizer(eos_token="<|endoftext|>", bos_token="<s>")
    start = tok.convert_tokens_to_ids("<s>")
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    return tok


def test_bos_where_the_tokenizer_adds_one(tiny: Any) -> None:
    tok = with_bos()
    bos = tok.bos_token_id
    assert bos_ids(tok) == [bos]
    assert bos_ids(tiny) == []
    example = encode(talk("a", "b", "c", "d"), tok, max_length=999)
    assert example is not None
    assert example.tokens.count(bos) == 1 and example.tokens[0] == bos
    example = encode(talk("text", templated=False), tok, max_length=999)
    assert example is not None
    # with BOS before it even the first token has a target
    assert example.trained == (False, *[True] * (len(example.tokens) - 1))
    # a chat template writes its own
    each = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tok.chat_template = "<s>" + each + "{% if add_generation_prompt %}<assistant>{% endif %}"
    chat = encode(talk("a", "b"), tok, template="chat", max_length=999)
    assert chat is not None
    assert chat.tokens.count(bos) == 1
    assert list(chat.tokens[:-2]) == encode_prompts([talk("a", "b").turns[:1]], tok, "chat")[0]


def test_chat_template_eos_once(tiny: Any) -> None:
    tok = make_tokenizer(eos_token="<|im_end|>")
    tok.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    row = talk("What?", "Fine.", "a", "It is.")
    example = encode(row, tok, template="chat", max_length=999, train_on="assistant")
    assert example is not None
    assert tok.decode(trained(example)) == "Fine.<|im_end|>It is.<|im_end|>"
    assert example.tokens.count(tok.eos_token_id) == 4
    prompt = encode_prompts([row.turns[:-1]], tok, "chat")[0]
    assert prompt == tok.apply_chat_template(
        [t._asdict() for t in row.turns[:-1]], add_generation_prompt=True, return_dict=False
    )
    assert list(example.tokens[: len(prompt)]) == prompt


def test_the_template_depends_on_the_row_and_not_on_its_position(tiny: Any) -> None:
    rows = [talk(f"question {i}", "It is.") for i in range(60)]
    examples, _ = encode_all(rows, tiny, templates=FIVE, max_length=256, seed=1)
    few, _ = encode_all(rows[:7], tiny, templates=FIVE, max_length=256, seed=1)
    back, _ = encode_all(rows[::-1], tiny, templates=FIVE, max_length=256, seed=1)
    other, _ = encode_all(rows, tiny, templates=FIVE, max_length=256, seed=2)
    assert few == examples[:7]
    assert back[::-1] == examples
    assert other != examples
    beginnings = {tiny.decode(e.tokens)[:6] for e in examples}
    assert beginnings == {"### In", "Instru", "<|im_s", "Questi", "User: "}


def test_all_at_once_equals_one_by_one(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_posttrain.data import encode as module

    monkeypatch.setattr(module, "CHUNK", 2)
    examples, report = encode_all(ODD, tiny, max_length=40)
    assert examples == [e for e in (encode(row, tiny, max_length=40) for row in ODD) if e]
    assert report.kept == len(examples)
    assert report.tokens == sum(len(e.tokens) for e in examples)


def test_prompts(gpt2: Any) -> None:
    ask = [(Turn("user", "Hello world"),), (Turn("user", ""),)]
    # after EOS any text may begin
    assert encode_prompts(ask, gpt2, templated=False) == [[15496, 995], [EOS]]
    with pytest.raises(
        UserError,
        match=r"prompt 2 \('Hello world Hello .* Hell\.\.\.'\) has 28 tokens, "
        r"more than the 20 that fit",
    ):
        encode_prompts([ask[0], (Turn("user", "Hello world " * 9),)], gpt2, max_length=20)
    assert encode_prompts([], gpt2) == []


def test_pack(gpt2: Any) -> None:
    rows = pack(["Hello world", " \n", "Hello", " world world world"], gpt2, 3)
    # each document but the first follows an EOS
    assert [r.tokens for r in rows] == [(15496, 995, EOS), (15496, EOS, 995), (995, 995, EOS)]
    assert {r.trained for r in rows} == {(False, True, True)}
    # the remainder is not used
    assert [r.tokens for r in pack(["Hello world", "Hello"], gpt2, 4)] == [(15496, 995, EOS, 15496)]
    with pytest.raises(UserError, match="2 tokens in all, too few for one example of 8"):
        pack(["Hello"], gpt2, 8)
    with pytest.raises(UserError, match="at least 2 tokens"):
        pack(["Hello"], gpt2, 1)


def test_faults(tiny: Any) -> None:
    with pytest.raises(UserError, match="no EOS token"):
        encode(ODD[0], make_tokenizer(bos_token="<s>"), max_length=9)
    with pytest.raises(UserError, match="max_length 1"):
        encode(ODD[0], tiny, max_length=1)
    with pytest.raises(UserError, match="truncate 'prompt'"):
        encode(ODD[0], tiny, max_length=9, truncate="prompt")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean 'plain'"):
        encode_all(ODD, tiny, templates=["plane"], max_length=9)
    with pytest.raises(UserError, match="name at least one"):
        encode_all(ODD, tiny, templates=[], max_length=9)


STRICT = (  # as many chat models': the user begins, and turns alternate
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BEGUN = (Turn("assistant", "Hello."), Turn("user", "What?"), Turn("assistant", "It is."))
REFUSAL = "the tokenizer's chat template refuses the turns ['assistant']: Conversation roles must alternate"


def test_a_row_that_the_chat_template_refuses_is_dropped_and_counted() -> None:
    tok = make_tokenizer()
    tok.chat_template = STRICT
    good = [talk("What?", "Fine."), talk("a", "b", "c", "It is.")]
    rows = [good[0], Conversation(BEGUN), good[1], Conversation(BEGUN)]
    examples, report = encode_all(rows, tok, templates=["chat"], max_length=99)
    assert examples == [encode(row, tok, template="chat", max_length=99) for row in good]
    assert (report.total, report.kept, report.dropped_refused) == (4, 2, 2)
    assert str(report).endswith(f"trained; 2 dropped: {REFUSAL}")
    with pytest.raises(UserError, match=r"0 of 1 rows kept .*; choose another data.template"):
        encode_all(rows[1:2], tok, templates=["chat"], max_length=99)
    outcomes = encode_each(rows, tok, templates=["chat"], max_length=99)
    assert [o.kind for o in outcomes] == ["", "refused", "", "refused"]
    # a prompt is named, or answered by why it cannot be asked
    asked = [row.turns[:-1] for row in rows]
    assert [isinstance(ids, UserError) for ids in try_prompts(asked, tok, "chat")] == [False, True] * 2
    with pytest.raises(UserError, match=r"prompt 2 \('What\?'\): the tokenizer's chat template refuses"):
        encode_prompts(asked, tok, "chat")


def test_a_row_that_a_template_spoils_is_named() -> None:
    tok = make_tokenizer()
    tok.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '>' if add_generation_prompt }}"
    rows = [talk("What?", "Fine.", templated=False), talk("What is two?", "Four.")]
    with pytest.raises(
        UserError, match=r"row 2 \('Four.'\): .* writes a prompt differently once it is answered"
    ):
        encode_all(rows, tok, templates=["chat"], max_length=99)


def test_rows_whose_earlier_thoughts_the_chat_template_leaves_out_are_counted() -> None:
    tok = make_tokenizer()
    tok.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    thought = "<think>\nIt is\n</think>\nfine."
    rows = [talk("a", thought, "b", thought), talk("a", "b", "c", thought), talk("a", thought)]
    _, report = encode_all(rows, tok, templates=["chat"], max_length=99)
    assert (report.kept, report.thoughtless) == (3, 1)
    assert str(report).endswith("; 1 without earlier thoughts, which the chat template leaves out")
    _, report = encode_all(rows, tok, max_length=99)
    assert report.thoughtless == 0
