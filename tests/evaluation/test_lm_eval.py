"""lm-evaluation-harness on our models: against its model for transformers, by hand, and on tasks offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from mlx_posttrain import engines
from mlx_posttrain.convert import hub
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import likelihood
from mlx_posttrain.evaluation.lm_eval import MLXPosttrainLM

CONTEXT = 64
PAIRS = [
    ("The cat sat on the", " mat"),
    ("The cat sat on the ", "mat and slept"),  # the space moves to the continuation
    ("Question: what is red?\n", "a rose"),
    ("", "Once upon a time"),
    ("", "<|endoftext|>Once upon"),
    ("<|endoftext|>Once", " upon a time"),
    ("word " * 200, "and the end"),  # longer than the context: cut on the left
    ("The cat sat on the", " moon, which was made of old cheese"),
    ("The cat sat on the", " mat"),  # the same again
    ("Once", " upon a time, there was a little girl named"),
]


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["mlx", "torch"])
def lm(request: pytest.FixtureRequest) -> MLXPosttrainLM:
    if request.param not in engines.available():
        pytest.skip(f"{request.param} is not installed")
    return MLXPosttrainLM("tiny", engine=request.param, batch_size=3, max_length=CONTEXT)


@pytest.fixture(scope="module")
def hf() -> Any:
    """The harness's own model for transformers, on the same weights."""
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = hub.resolve("tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Its cache treats requests as equal whose tokens differ in the last one only, wherever the context ends;
    # PAIRS has such requests.
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=2,
        max_length=CONTEXT,
        device="cpu",
        logits_cache=False,
    )


def test_likelihoods_are_those_of_the_harness(lm, hf):
    ours, theirs = (m.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) for m in (lm, hf))
    assert np.allclose([a[0] for a in ours], [b[0] for b in theirs], rtol=1e-5, atol=1e-4)
    assert [a[1] for a in ours] == [bool(b[1]) for b in theirs]
    # the same request, in another batch
    assert ours[0][1] == ours[8][1] and abs(ours[0][0] - ours[8][0]) < 1e-5


def test_likelihood_by_hand(lm):
    """Log-softmax over the vocabulary by position; a greedy continuation is reported as greedy."""
    tokenizer, model = lm.tokenizer, lm.model
    context = tokenizer.encode("Once upon a")
    (answer,) = model.generate([context], max_tokens=4, stop=None)
    greedy = tokenizer.decode(answer.tokens)
    assert tokenizer.encode("Once upon a" + greedy) == context + answer.tokens, (
        "choose a context whose answer encodes back"
    )
    found = lm.loglikelihood(
        requests("loglikelihood", [("Once upon a", greedy), ("Once upon a", greedy + " zebra")]),
        disable_tqdm=True,
    )
    logits = model.full_logits(np.array([context + answer.tokens]))[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = sum(logprobs[len(context) - 1 + i, token] for i, token in enumerate(answer.tokens))
    assert abs(found[0][0] - expected) < 1e-4
    assert found[0][1] is True and found[1][1] is False


def test_the_order_of_requests_and_their_batches_do_not_matter(lm):
    together = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    reversed_order = lm.loglikelihood(requests("loglikelihood", PAIRS[::-1]), disable_tqdm=True)[::-1]
    alone = [lm.loglikelihood(requests("loglikelihood", [pair]), disable_tqdm=True)[0] for pair in PAIRS]
    for other in (reversed_order, alone):
        assert np.allclose([a[0] for a in together], [b[0] for b in other], rtol=1e-5, atol=1e-4)
        assert [a[1] for a in together] == [b[1] for b in other]


def test_rolling(lm, hf):
    texts = likelihood.embedded_texts()[:3]
    short = " ".join(texts[0].split()[:30])
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in [*texts, short, ""]]))
    assert np.allclose(
        found[:4],
        hf.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in [*texts, short]]), True),
        rtol=1e-5,
    )
    assert len(lm.tok_encode(texts[0])) > CONTEXT >= len(lm.tok_encode(short)), (
        "one text of several windows, and one of a single window"
    )
    assert found[3] == pytest.approx(
        -likelihood.base_text_loss(lm.model, lm.tokenizer, [short], window=CONTEXT).nll[0], rel=1e-5
    )
    assert found[4] == 0.0


def test_continuations(lm, hf):
    settings = [
        {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        # greedy in spite of the temperature
        {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7},
        {"until": [" the", ","], "max_gen_toks": 20},
        {"until": ".", "max_new_tokens": 6, "temperature": 0.0},
    ]
    contexts = ["Once upon a time", "The cat sat on the mat and", "word " * 200 + "\nThe dog", "A"]
    found = lm.generate_until(requests("generate_until", [(c, dict(s)) for s in settings for c in contexts]))
    assert found[:4] == found[4:8]
    assert not any(mark in text for text in found[8:12] for mark in (" the", ","))
    assert len(set(found)) > 4
    # One row at a time: the harness pads a batch on the left without shifting GPT-2's positions, so that its
    # texts depend on the batch.
    theirs = [
        hf.generate_until([r], disable_tqdm=True)[0]
        for r in requests("generate_until", [(c, dict(s)) for s in settings for c in contexts])
    ]
    assert found == theirs


def test_sampling(lm):
    settings = {
        "until": [],
        "max_gen_toks": 10,
        "do_sample": True,
        "temperature": 1.5,
        "top_p": 0.9,
        "top_k": 0,
    }
    repeated = requests("generate_until", [("Once upon a time", settings)] * 4 + [("", settings)])
    found = lm.generate_until(repeated)
    assert len(set(found)) > 2 and found == lm.generate_until(repeated)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"max_gen_toks": CONTEXT}, "max_gen_toks"),
        ({"max_gen_toks": 0}, "max_gen_toks"),
    ],
)
def test_unsupported_decoding_settings_are_refused(lm, settings, words):
    with pytest.raises(UserError, match=words):
        lm.generate_until(requests("generate_until", [("Once", settings)]))


def test_impossible_lengths_are_refused(lm):
    with pytest.raises(UserError, match="context"):
        MLXPosttrainLM("tiny", engine=engines.available()[0], max_length=10_000)
    with pytest.raises(UserError, match="does not fit"):
        lm.loglikelihood(requests("loglikelihood", [("a", " word" * 200)]), disable_tqdm=True)


def test_questions_use_the_template_of_training(lm):
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Name a colour."},
    ]
    assert lm.apply_chat_template(history) == "HiHello<|endoftext|>Name a colour.", (
        "a plain model takes turns as they are"
    )
    assert lm.chat_template(False) is None and lm.chat_template(True)
    begun = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "It is"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "Name a colour.It is"


def test_a_run_is_prompted_in_its_own_template(random_gpt2, rows_file, tmp_path):
    from mlx_posttrain import methods

    settings = [
        f"model={random_gpt2}",
        f"data.source={rows_file}",
        f"output={tmp_path / 'run'}",
        "train.steps=1",
        "sample.count=0",
    ]
    chosen = methods.load_recipe(
        "01_sft", [*settings, f"engine={engines.available()[0]}", "data.template=plain", "adapter.rank=2"]
    )
    methods.run(chosen)
    lm = MLXPosttrainLM(str(tmp_path / "run"), engine=engines.available()[0], max_gen_toks=8)
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Go on."},
    ]
    assert lm.apply_chat_template(history) == (
        "Instruction: Hi\n\nResponse: Hello<|endoftext|>\n\nInstruction: Go on.\n\nResponse:"
    )
    begun = lm.apply_chat_template(
        [*history[:1], {"role": "assistant", "content": "Well"}], add_generation_prompt=False
    )
    assert begun == "Instruction: Hi\n\nResponse: Well"
    assert lm.chat_template(True) == "plain" and "plain" in lm.tokenizer_name


def task(folder: Path, name: str, rows: list[dict], **settings: Any) -> dict[str, Any]:
    """A task over a local file, which needs no network."""
    data = folder / f"{name}.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **settings,
    }


def test_the_harness_knows_it_by_name():
    from lm_eval.api.registry import get_model

    unset = {"batch_size": None, "max_batch_size": None, "device": None}  # what simple_evaluate adds
    lm = get_model("mlx-posttrain").create_from_arg_string(
        f"pretrained=tiny,engine={engines.available()[0]},max_length=64", unset
    )
    assert isinstance(lm, MLXPosttrainLM) and lm.max_length == 64


@pytest.mark.exhaustive
@pytest.mark.parametrize("lm", ["mlx", "torch"], indirect=True)
def test_whole_tasks_offline(lm, tmp_path):
    """Multiple choice, perplexity and continuations through ``lm_eval.simple_evaluate``."""
    import lm_eval

    stories = [
        ("Once upon a", " time", " zebra"),
        ("The little girl was very", " happy", " plus"),
        ("He went to the", " park", " which"),
    ]
    choices = task(
        tmp_path,
        "choices",
        [{"q": q, "choices": [bad, good], "gold": 1} for q, good, bad in stories],
        output_type="multiple_choice",
        doc_to_text="{{q}}",
        doc_to_choice="choices",
        doc_to_target="gold",
        target_delimiter="",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    texts = task(
        tmp_path,
        "texts",
        [{"text": t} for t in likelihood.embedded_texts()[:2]],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    repeat = task(
        tmp_path,
        "repeat",
        [{"q": "Once upon a", "a": "time"}],
        output_type="generate_until",
        doc_to_text="{{q}}",
        doc_to_target="{{a}}",
        generation_kwargs={"until": [",", "."], "max_gen_toks": 4, "do_sample": False},
        metric_list=[{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}],
    )
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[choices, texts, repeat], bootstrap_iters=0, log_samples=True
    )
    likelihoods = [[float(r[0][0]) for r in s["resps"]] for s in found["samples"]["choices"]]
    assert found["results"]["choices"]["acc,none"] == np.mean([np.argmax(row) == 1 for row in likelihoods])
    for (question, good, bad), row in zip(stories, likelihoods, strict=True):
        direct = lm.loglikelihood(
            requests("loglikelihood", [(question, bad), (question, good)]), disable_tqdm=True
        )
        assert np.allclose(row, [d[0] for d in direct], atol=1e-4)
    nll = -np.sum(
        lm.loglikelihood_rolling(
            requests("loglikelihood_rolling", [(t,) for t in likelihood.embedded_texts()[:2]])
        )
    )
    size = sum(len(t.encode()) for t in likelihood.embedded_texts()[:2])
    assert found["results"]["texts"]["bits_per_byte,none"] == pytest.approx(nll / size / np.log(2), rel=1e-5)
    (sample,) = found["samples"]["repeat"]
    assert (
        sample["resps"][0][0]
        == lm.generate_until(requests("generate_until", [("Once upon a", repeat["generation_kwargs"])]))[0]
    )


def test_without_the_harness_one_line_says_so(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['lm_eval'] = None\n")
    code = (
        "from mlx_posttrain.errors import UserError\ntry:\n    import "
        "mlx_posttrain.evaluation.lm_eval\nexcept UserError as e:\n    print(e)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stdout == "lm-evaluation-harness is not installed: pip install lm-eval\n", done.stderr
