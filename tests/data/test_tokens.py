"""A row's ids are those of its joint text, and under "chat" Hugging Face's, for two kinds of tokenizer.

Byte-level BPE (GPT-2, Llama 3, Qwen), with and without a BOS; and tokenizers that put "▁" before a text
(Llama 2, TinyLlama, Mistral 0.1): older ones before every text between special tokens, newer ones before the
first.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mlx_posttrain.data.encode import encode, encode_all, encode_prompts, pack
from mlx_posttrain.data.pairs import encode_pairs
from mlx_posttrain.data.read import torn_prompts
from mlx_posttrain.data.templates import TEMPLATES, render
from mlx_posttrain.data.tokens import tokenise, tokenise_joint, tokenise_pieces, written_specials
from mlx_posttrain.data.types import Conversation, Preference, Turn
from mlx_posttrain.evaluation.likelihood import last_words

TEXTS = [
    "### Instruction:\nWhat is the capital of France?\n\n### Response:\nParis is the capital of France.",
    "[INST] What is it? [/INST] It is fine. Hello world.\n\nQuestion: Hens?\n\nAnswer: Paris\n\n",
] * 4
MARKS = ["<|im_start|>", "<|im_end|>"]


def prefixing(kind: str) -> Any:
    """A byte-fallback BPE whose texts begin with "▁": Prepend as Llama 2's, or Metaspace by its scheme.

    "llama" is transformers' own class with the same vocabulary; "never" prepends nothing.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    names = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=[*names, *bytes_], show_progress=False)
    trained.train_from_iterator([line for text in TEXTS for line in text.split("\n")], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "llama":
        tok: Any = LlamaTokenizer(vocab=model["vocab"], merges=merges, **special)
    else:
        core = Tokenizer(
            models.BPE(
                vocab=model["vocab"], merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
            )
        )
        if kind == "legacy":
            core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tok = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tok.add_special_tokens({"additional_special_tokens": MARKS})
    start = tok.convert_tokens_to_ids("<s>")
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    return tok


def byte_level(bos: bool, prefix_space: bool = False) -> Any:
    """A byte-level BPE, whose texts begin with <s> if ``bos``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=460, special_tokens=["<s>", "</s>", *MARKS], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


PREFIXING = ["legacy", "llama", "first", "always", "never"]
ALL = {
    **{kind: lambda kind=kind: prefixing(kind) for kind in PREFIXING},
    "byte-level": lambda: byte_level(False),
    "byte-level, bos": lambda: byte_level(True),
    "byte-level, prefix space": lambda: byte_level(True, prefix_space=True),
}
_MADE: dict[str, Any] = {}


@pytest.fixture(params=ALL)
def tok(request: pytest.FixtureRequest) -> Any:
    if request.param not in _MADE:
        _MADE[request.param] = ALL[request.param]()
    made = _MADE[request.param]
    made.chat_template = None
    return made


ROWS = [
    (Turn("user", "What is it?"), Turn("assistant", "It is fine.")),
    (Turn("user", "héllo 日本"), Turn("assistant", "\U0001f600 naïve")),
    (
        Turn("system", "Be kind."),
        Turn("user", "Hens?"),
        Turn("assistant", "Paris"),
        Turn("user", "  the capital of  France?\n\nfine"),
        Turn("assistant", "It is\n\nthe capital."),
    ),
]


def ids(tok: Any, text: str) -> list[int]:
    """What Hugging Face gives for a whole text."""
    return tok(text)["input_ids"]


def spelled(tok: Any, tokens: Any) -> list[str]:
    return tok.convert_ids_to_tokens(list(tokens))


def test_ids_of_llama_spelled_out() -> None:
    tok = prefixing("legacy")
    row = Conversation((Turn("user", "Hens?"), Turn("assistant", "Paris")))
    example = encode(row, tok, template="question", max_length=99)
    assert example is not None
    assert spelled(tok, example.tokens)[-2:] == ["▁Paris", "</s>"] and example.answer_start == -2 % len(
        example.tokens
    )
    assert tok.decode(example.tokens[:-2]).endswith("Answer:")  # and not "Answer: "
    # behind a newline an answer's first word has no mark
    example = encode(row, tok, template="instruction", max_length=99)
    assert example is not None
    answer = spelled(tok, [t for t, on in zip(example.tokens, example.trained, strict=True) if on])
    assert "".join(answer) == "Paris</s>" and "▁" not in "".join(answer)


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("templated", [True, False])
def test_a_row_has_the_ids_of_its_joint_text(tok: Any, name: str, templated: bool) -> None:
    """No token of these tokenizers crosses a boundary here, so the ids equal those of one tokenisation."""
    for turns in ROWS:
        row = Conversation(turns, templated)
        segments = render(row, name)
        example = encode(row, tok, template=name, max_length=999, train_on="assistant")
        assert example is not None
        assert list(example.tokens) == ids(tok, "".join(s.text + "</s>" * s.closes for s in segments))
        (prompt,) = encode_prompts([turns[:-1]], tok, name, templated=templated)
        assert list(example.tokens[: len(prompt)]) == prompt and all(example.trained[len(prompt) :])
        trained = tok.decode([t for t, on in zip(example.tokens, example.trained, strict=True) if on])
        answers = [t.content.strip() for t in turns if t.role == "assistant"]
        assert [text.strip() for text in trained.split("</s>")] == [*answers, ""]
        cut = encode(row, tok, template=name, max_length=len(prompt) + 1)
        assert cut is not None and cut.tokens == example.tokens[: len(prompt) + 1]


#: Templates of chat models: Llama 2's with its BOS; the same without one; ChatML, whose end is not EOS.
LLAMA = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BARE = (  # an answer directly behind a special token
    "{% for m in messages %}{{ '<|im_start|>' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
CHATS = {
    "llama": "{{ bos_token }}" + LLAMA,
    "llama, no bos": LLAMA,
    "zephyr": ZEPHYR,
    "zephyr, bos": "{{ bos_token }}" + ZEPHYR,
    "chatml": CHATML,
    "bare": BARE,
}


@pytest.mark.parametrize("template", CHATS)
@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_chat_ids_are_those_of_hugging_face(tok: Any, template: str, train_on: Any) -> None:
    tok.chat_template = CHATS[template]
    for turns in ROWS:
        messages = [{"role": t.role, "content": t.content} for t in turns]
        whole = tok.apply_chat_template(messages, return_dict=False)
        example = encode(Conversation(turns), tok, template="chat", max_length=999, train_on=train_on)
        assert example is not None
        # what follows the last answer's own EOS is left out; where the template writes none it is added
        found = list(example.tokens)
        if template == "chatml":
            assert found == [*whole, tok.eos_token_id]
        else:
            assert found == whole[: len(found)] and found[-1] == tok.eos_token_id
            assert len(whole) - len(found) <= 2
        assert found.count(tok.bos_token_id) == template.endswith(("llama", ", bos"))
        prompt = tok.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert encode_prompts([turns[:-1]], tok, "chat") == [prompt]
        assert found[: len(prompt)] == prompt
        on = np.array(example.trained)
        assert on[len(prompt) :].all() and not on[0]
        if train_on == "completion":
            assert not on[: len(prompt)].any()
        if train_on == "all":
            assert on[1:].all()
        if train_on == "assistant":
            end = "<|im_end|>" if template == "chatml" else "</s>"
            texts = tok.decode(np.array(found)[on]).split(end)
            answers = [t.content for t in turns if t.role == "assistant"]
            assert [text.strip() for text in texts[: len(answers)]] == answers
        assert torn_prompts([Conversation(turns)], tok) == 0


def test_both_sides_of_a_pair_have_the_ids_of_its_prompt(tok: Any) -> None:
    tok.chat_template = CHATS["zephyr, bos"]
    rows = [Preference(turns[:-1], turns[-1].content, "Hello world.") for turns in ROWS]
    for name in ("question", "chat"):
        made, report = encode_pairs(rows, tok, template=name, max_length=999)
        assert report.kept == len(rows)
        for row, pair in zip(rows, made, strict=True):
            (prompt,) = encode_prompts([row.prompt], tok, name)
            for side, text in ((pair.chosen, row.chosen), (pair.rejected, row.rejected)):
                assert list(side.tokens[: len(prompt)]) == prompt and side.answer_start == len(prompt)
                assert tok.decode(side.tokens[len(prompt) : -1]).strip() == text


def test_documents_are_packed_with_the_ids_of_each(tok: Any) -> None:
    texts = ["Paris is the capital.", "It is fine."]
    stream = [token for text in texts for token in (*ids(tok, text), tok.eos_token_id)]
    (example,) = pack(texts, tok, len(stream))
    assert list(example.tokens) == stream


def test_an_answer_that_is_begun_has_the_ids_it_has_in_training(tok: Any) -> None:
    row = Conversation((Turn("user", "Hens?"), Turn("assistant", "Paris is the capital.")))
    tok.chat_template = CHATS["zephyr, bos"]
    for name in ("question", "instruction", "chat"):
        (prompt,) = encode_prompts([row.turns[:1]], tok, name, answer="Paris is")
        example = encode(row, tok, template=name, max_length=99)
        assert example is not None and list(example.tokens[: len(prompt)]) == prompt
        text = tok.decode(prompt)
        assert text.endswith("Paris is")


def test_what_would_merge_across_a_boundary() -> None:
    """Of GPT-2's kind: two newlines at the end of a prompt are one token, and before a word two."""
    tok = byte_level(False)
    joint, alone = (tokenise(tok, [text])[0] for text in ("a\n\nParis", "a\n\n"))
    assert joint[: len(alone)] != alone
    # a prompt keeps its ids
    example = encode(
        Conversation((Turn("user", "a\n\n"), Turn("assistant", "Paris")), False), tok, max_length=9
    )
    assert example is not None and list(example.tokens[: len(alone)]) == alone
    assert example.answer_start == len(alone)
    # under a chat template the rendered text decides, and it is found out
    tok.chat_template = (
        "{% for m in messages %}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\n\n' }}{% endfor %}"
    )
    row = Conversation((Turn("user", "a"), Turn("assistant", "Paris")))
    example = encode(row, tok, template="chat", max_length=9)
    assert example is not None
    assert list(example.tokens) == [*joint, tok.eos_token_id]
    assert list(example.tokens) == tok.apply_chat_template(
        [t._asdict() for t in row.turns], return_dict=False
    )
    assert torn_prompts([row], tok) == 1


def test_a_token_across_a_boundary_belongs_to_the_later_side() -> None:
    tok = byte_level(False)
    ((found, owner),) = tokenise_joint(tok, [["Par", "is"]])
    assert spelled(tok, found) == ["Paris"] and owner == [1]
    ((_, owner),) = tokenise_joint(tok, [["a ", "", " b"]])
    assert owner[0] == 0 and owner[-1] == 2
    assert tokenise_joint(tok, []) == []


def test_a_piece_that_merges_with_a_stand_in_gets_the_next() -> None:
    """Two newlines are one token here, so a colon stands before the second instead of a newline."""
    tok = byte_level(False, prefix_space=True)
    assert spelled(tok, tokenise(tok, ["\n\n"])[0]) == ["Ġ", "ĊĊ"]
    pieces = tokenise_pieces(tok, [("\n", "text"), ("fine", "text"), ("fine", "beginning")])
    assert spelled(tok, pieces["\n", "text"]) == ["Ċ"]
    assert spelled(tok, pieces["fine", "beginning"]) == ["Ġfine"]
    assert tok.decode(pieces["fine", "text"]) == "fine"


def test_all_at_once_equals_one_by_one(tok: Any) -> None:
    """All at once as one by one, in the order of the rows."""
    tok.chat_template = CHATS["llama"]
    rows = [Conversation(turns, templated) for turns in ROWS for templated in (True, False)]
    examples, _ = encode_all(rows, tok, templates=["chat"], max_length=999)
    assert examples == [encode(row, tok, template="chat", max_length=999) for row in rows]


def test_a_last_word_has_the_ids_it_has_in_its_text(tok: Any) -> None:
    class Model:
        context = None

        def apply(self, function: Any, batches: Any) -> Any:
            (self.batch,) = batches
            return ({"logprobs": np.zeros(len(self.batch.index)), "top": self.batch.target},)

    model, text = Model(), "What is the capital of France"
    last_words(model, tok, [text])
    whole = ids(tok, text)
    scored = int(model.batch.mask.sum())
    inputs, targets = model.batch.tokens[0, : len(whole) - 1], model.batch.target[:scored]
    assert [*inputs.tolist(), targets[-1]] == whole
    assert tok.decode(targets).strip() == "France"


def test_rows_with_special_tokens_in_their_text_are_counted(tok: Any) -> None:
    rows = [
        ["What?", "It is."],
        ["What is </s>?", "<|im_end|>"],
        ["What?", "a<|im_start|>b"],
        ["<think>", "<"],
    ]
    assert written_specials(tok, rows) == (2, "</s>")
    assert written_specials(tok, rows[:1]) == (0, "") == written_specials(tok, [])
