"""Parity of engines on small models, published figures by their protocols, and the table."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.data import sources
from mlx_posttrain.models.open import open_model
from mlx_posttrain.verify import anchors, parity
from mlx_posttrain.verify.checks import FAILED, PASSED, SKIPPED, Check, failed
from mlx_posttrain.verify.parity import Measured
from tests.helpers import cli, refused, write_jsonl

ENGINES = engines.available()
TEXTS = [row["output"] for row in sources.load_rows("embedded/tasks", split="train", limit=60)]
TEXTS[7:9] = ["", "A much longer line, with more words than the window of the test has tokens. " * 3]


@pytest.fixture
def measured() -> Measured:
    """What an engine might have computed: logits up to 2, and 16 sampled texts."""
    logits = np.linspace(-2, 2, 24, dtype=np.float32).reshape(1, 4, 6)
    return Measured(logits, 5.0, 0.5, [[1, 2]] * 8, [[3, 4]] * 16)


def test_agreement_holds_up_to_the_tolerances(measured):
    other = dataclasses.replace(
        measured,
        logits=measured.logits + np.float32(1.9e-3),
        loss=5.0 + 4e-4,
        norm=0.5 + 4e-4,
        greedy=[[9, 9], *measured.greedy[1:]],
        sampled=[[9, 9], [9, 9], *measured.sampled[2:]],
    )
    found = parity.agreement("here", other, measured)
    assert [c.verdict for c in found] == [PASSED] * 5
    assert [c.measured for c in found] == ["9.5e-04", "5.000400", "0.500400", "7 equal", "14 equal"]
    assert found[1] == Check("here: loss of a step", "5.000000", "5.000400", "1e-04 of it", PASSED)


@pytest.mark.parametrize(
    ("part", "value", "number"),
    [
        ("logits", np.linspace(-2, 2.01, 24).reshape(1, 4, 6), 0),
        ("logits", np.full((1, 4, 6), np.nan), 0),
        ("loss", 5.0006, 1),
        ("norm", float("nan"), 2),
        ("greedy", [[9, 9]] * 2 + [[1, 2]] * 6, 3),
        ("sampled", [[9, 9]] * 3 + [[3, 4]] * 13, 4),
    ],
)
def test_a_larger_difference_fails_alone(measured, part, value, number):
    found = parity.agreement("here", dataclasses.replace(measured, **{part: value}), measured)
    assert [i for i, c in enumerate(found) if c.verdict == FAILED] == [number]


@pytest.mark.slow
@pytest.mark.skipif(len(ENGINES) < 2, reason="needs both engines")
def test_the_engines_of_this_machine_agree(tmp_path):
    from mlx_posttrain.bench.harness import open_engine

    folders = parity.models(tmp_path)
    assert list(folders) == ["tiny", "random GPT-2", "random Llama"]
    names = [name for name in parity.engine_names() if name != "mlx-gpu"]
    for model, folder in folders.items():
        ours, theirs = (parity.measure(open_engine(name), folder) for name in names)
        found = parity.agreement(model, ours, theirs)
        assert [c.verdict for c in found] == [PASSED] * 5, found
        assert len(ours.sampled) == parity.PROMPTS * parity.SAMPLES
        assert {len(text) for text in ours.greedy + ours.sampled} == {parity.ANSWER}
        assert ours.sampled[0] != ours.sampled[1] and ours.norm > 0


def test_the_random_llama_is_one_to_transformers(tmp_path):
    """A name or shape that is wrong would leave a weight at its first value."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = parity.models(tmp_path)["random Llama"]
    theirs, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    tokens = np.arange(1, 40)[None]
    ours = engines.get(ENGINES[0]).load(Path(folder)).full_logits(tokens)
    with torch.no_grad():
        assert np.abs(theirs(torch.from_numpy(tokens)).logits.numpy() - ours).max() < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_perplexity_is_that_of_the_guide(engine, monkeypatch):
    """Hugging Face's loop over disjoint windows, with transformers' own loss."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(anchors, "WINDOW", 60)
    model, tokenizer, source = open_model("tiny", engine)
    theirs = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(source.folder)("\n\n".join(TEXTS), return_tensors="pt").input_ids
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for begin in range(0, ids.shape[1], 60):
            window = ids[:, begin : begin + 60]
            scored = window.shape[1] - 1
            nll += float(theirs(window, labels=window).loss) * scored
            tokens += scored
    assert ids.shape[1] % 60 > 1 and tokens > 300
    assert anchors.window_perplexity(model, tokenizer, TEXTS) == pytest.approx(
        math.exp(nll / tokens), rel=1e-5
    )


def test_last_words_are_those_that_transformers_writes():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    texts = [
        "I'm sure, said the Scarecrow. I'm not a very good",
        "She said that she had been a great deal of the world",
        "He sat down by the side of the old man, and the old man",
        "the words of this list are hat, donkey, rabbit, hat, donkey",
    ]
    model, tokenizer, source = open_model("tiny", ENGINES[0])
    theirs = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    right = []
    for text in texts:
        before, _, word = text.rpartition(" ")
        start, last = (tokenizer.encode(part) for part in (before, f" {word}"))
        with torch.no_grad():
            best = theirs(torch.tensor([start + last])).logits[0].argmax(-1).tolist()
        right.append(best[len(start) - 1 : -1] == last)
    assert any(right) and not all(right)
    assert anchors.last_word_accuracy(model, tokenizer, texts) == sum(right) / 4


@pytest.fixture
def local_anchors(tmp_path, monkeypatch):
    """The two anchors on the embedded model and files of this machine, with what they measure there."""
    lines = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    words = write_jsonl(tmp_path / "words.jsonl", [{"text": t} for t in TEXTS if len(t.split()) > 1])
    model, tokenizer, _ = open_model("tiny", ENGINES[0])
    perplexity = anchors.window_perplexity(model, tokenizer, TEXTS)
    local = [
        dataclasses.replace(a, model="tiny", source=str(path), config=None, split="train")
        for a, path in zip(anchors.ANCHORS, (lines, words), strict=True)
    ]
    local[0] = dataclasses.replace(local[0], expected=perplexity)
    monkeypatch.setattr(anchors, "ANCHORS", local)
    monkeypatch.setattr(parity, "compare", list)
    return local


def test_the_table_of_anchors_and_the_exit_code(local_anchors, tmp_path, capsys, monkeypatch):
    out = tmp_path / "verify.md"
    assert cli("verify", "--anchors", "--output", str(out)) == 1  # its last words are not GPT-2 124M's
    printed = capsys.readouterr().out
    assert printed == out.read_text()
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert lines[0] == "| check | expected | measured | tolerance | verdict |"
    found = f"{local_anchors[0].expected:.4f}"
    assert lines[2] == f"| GPT-2 124M, perplexity of WikiText-2 | {found} | {found} | ± 0.05 | pass |"
    assert lines[3].startswith("| GPT-2 124M, accuracy on LAMBADA | 0.3256 | 0.")
    assert lines[3].endswith("| ± 0.001 | FAIL |") and len(lines) == 4
    head = printed.partition("| check")[0]
    assert head.startswith("**") and "mlx-posttrain 0." in head and "Python 3." in head
    monkeypatch.setattr(anchors, "ANCHORS", local_anchors[:1])
    assert cli("verify", "--anchors") == 0
    assert cli("verify") == 0


def test_what_cannot_be_had_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(parity, "engine_names", lambda: ["torch-cpu"])
    assert cli("verify", "--anchors") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("| skipped |")]
    assert "torch-cpu alone" in lines[0] and len(lines) == 3
    assert "wikitext" in lines[1] and "offline" in lines[1] and "lambada" in lines[2]
    assert not failed([Check("", "", "", "", SKIPPED), Check("", "", "", "", PASSED)])


@pytest.mark.skipif(not ENGINES, reason="needs an engine")
def test_an_engine_that_breaks_is_a_failed_check(monkeypatch):
    monkeypatch.setattr(parity, "engine_names", lambda: ["torch-cpu", "nonsense"])
    monkeypatch.setattr(
        parity,
        "_in_own_process",
        lambda name, folders: "ImportError: no such library" if name == "nonsense" else {},
    )
    (check,) = parity.compare()
    assert check == Check("nonsense", "computes", "ImportError: no such library", "", FAILED)


@pytest.mark.exhaustive
@pytest.mark.skipif(len(ENGINES) < 2, reason="needs both engines")
def test_the_command_compares_in_processes_of_their_own(capsys):
    assert cli("verify") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("| pass |") for line in lines) == 15 * math.comb(len(parity.engine_names()), 2)


def test_doctor_compares_the_devices_and_gives_a_block(monkeypatch, capsys):
    """With a GPU that agrees, one that does not, none, and one engine alone."""
    from mlx_posttrain import doctor

    monkeypatch.setattr(doctor, "collect", lambda: [doctor.Check("chip", "Apple M9, 8 cores")])
    good = Check("tiny, mlx-gpu against mlx-cpu: logits", "0", "1e-6", "1e-03", PASSED)
    bad = dataclasses.replace(good, measured="2e-1", verdict=FAILED)
    both, cpus = ["mlx-gpu", "mlx-cpu"], ["mlx-cpu", "torch-cpu"]
    asked = []
    for names, checks, code, said in (
        (both, [good, good], 0, "The GPU and the CPU compute the same: 2 of 2 checks hold."),
        (both, [good, bad], 1, f"The GPU and the CPU do NOT compute the same: {good.name}. Train with"),
        (cpus, [good], 0, "There is no GPU; mlx-cpu and torch-cpu compute the same: 1 of 1 checks hold."),
        (["mlx-cpu"], None, 0, "Nothing was compared: mlx-cpu alone"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(parity, "engine_names", lambda names=names: names)
            if checks is not None:
                patched.setattr(
                    parity, "compare", lambda only=None, checks=checks: (asked.append(only), checks)[1]
                )
            assert cli("doctor", "--check") == code
        out = capsys.readouterr().out
        assert out.splitlines()[-1].startswith(said), out
        assert "**Apple M9, 8 cores**" in out and "| check | expected |" in out
    assert asked == ["tiny"] * 3


def test_doctors_block_is_not_json(capfd):
    assert "leave out --json" in refused(capfd, "doctor", "--check", "--json")


def test_devices_are_compared_without_tf32_and_the_variable_is_as_before(monkeypatch):
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    with parity._environment("MLX_ENABLE_TF32", "0"):
        assert parity.os.environ["MLX_ENABLE_TF32"] == "0"
    assert "MLX_ENABLE_TF32" not in parity.os.environ
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    with parity._environment("MLX_ENABLE_TF32", "0"):
        pass
    assert parity.os.environ["MLX_ENABLE_TF32"] == "1"


@pytest.mark.exhaustive
@pytest.mark.skipif(len(ENGINES) < 2, reason="needs both engines")
def test_doctors_check_computes_on_this_machine(capsys):
    assert cli("doctor", "--check") == 0
    assert "checks hold." in capsys.readouterr().out.splitlines()[-1]


def test_a_target_that_cannot_be_written_is_found_first(capfd, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capfd, "verify", "--output", str(tmp_path / "file" / "x.md"))
