"""Several sources as one set of rows: their shares, their sides, and each row as its source says."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from mlx_posttrain import engines, methods, runs
from mlx_posttrain.config import DataSection, parse
from mlx_posttrain.data import mixture
from mlx_posttrain.data.read import model_facts, read_conversations
from mlx_posttrain.data.split import opening, split_rows
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.source import locate
from mlx_posttrain.training.checks import fingerprint
from tests.helpers import cli, read_jsonl, records, refused, write_jsonl


def asked(*numbers, words="Say"):
    return [{"instruction": f"{words} {n}.", "output": f"The cat said {n}."} for n in numbers]


def chats(*numbers):
    return [
        {"chat": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}!"}]}
        for n in numbers
    ]


def pairs(*numbers):
    return [{"prompt": f"Say {n}.", "chosen": f"The {n}.", "rejected": f"No {n}."} for n in numbers]


@pytest.fixture
def write(tmp_path):
    return lambda name, rows: str(write_jsonl(tmp_path / name, rows))


def section(*entries, **settings):
    return parse({"sources": list(entries), **settings}, DataSection, "data")


def recipe(method, model, data, **settings):
    train = {"steps": 4, "batch_size": 4, "eval_every": 2, "lr": 1e-3}
    raw = {"method": method, "model": str(model), "data": data, "train": train, **settings}
    return methods.parse_recipe(raw, "recipe")


# how many


@pytest.mark.parametrize(
    ("available", "weights", "limit", "found"),
    [
        ([70, 90], [0.7, 0.3], None, [70, 30]),  # the first runs out first
        ([700, 90], [7, 3], None, [210, 90]),
        ([700, 900], [0.7, 0.3], 10, [7, 3]),
        ([700, 3], [1, 1], 100, [3, 3]),  # the limit cannot be met
        ([50, 50, 50], [1, 1, 1], 10, [4, 3, 3]),  # the largest remainders, and first come first
        ([10, 30], None, None, [10, 30]),
        ([10, 30], None, 8, [2, 6]),  # in proportion
        ([10, 30], None, 99, [10, 30]),
        ([1, 99], [0.1, 0.9], None, [1, 9]),  # 1 / 0.1 is 10 whatever its last bit
    ],
)
def test_shares_are_of_whole_rows_that_are_there(available, weights, limit, found):
    assert mixture.counts(available, weights, limit) == found


def test_every_stretch_of_a_mixture_has_its_shares():
    mixed = mixture.interleave([["a"] * 70, ["b"] * 30, []])
    assert len(mixed) == 100
    for begin in range(0, 90, 10):
        assert 6 <= mixed[begin : begin + 10].count("a") <= 8
    numbers = mixture.interleave([range(7), range(100, 103)])
    assert [n for n in numbers if n < 100] == [*range(7)]  # those of a source stay in order


def test_a_limited_mixture_has_that_many_rows_though_some_are_dropped(write, capfd):
    empty = [{**row, "output": ""} for row in asked(*range(1000, 1005))]
    a, b = write("a.jsonl", empty + asked(*range(100))), write("b.jsonl", asked(*range(100, 200)))
    data = section({"source": a, "weight": 3}, {"source": b, "weight": 1}, limit=40, holdout=0)
    train, held_out = split_rows(data, 0, read_conversations)
    assert mixture.tally(data, train, held_out) == {
        "a": {"train": 30, "held_out": 0},
        "b": {"train": 10, "held_out": 0},
    }
    assert [row.source for row in train[:4]].count("a") == 3
    assert "mixture of 40 rows: 30 of a (75.0%), 10 of b (25.0%)\n" in capfd.readouterr().err


def test_a_mixture_is_as_large_as_its_scarcest_source_allows_and_says_so(write, capfd):
    a, b = write("a.jsonl", asked(*range(60))), write("b.jsonl", asked(*range(100, 106)))
    data = section({"source": a, "weight": 0.8}, {"source": b, "weight": 0.2}, holdout=0)
    train, _ = split_rows(data, 0, read_conversations)
    assert [len([row for row in train if row.source == name]) for name in "ab"] == [24, 6]
    said = capfd.readouterr().err
    assert "mixture of 30 rows: 24 of a (80.0%), 6 of b (20.0%); b has no more for its share" in said
    every, _ = split_rows(section({"source": a}, {"source": b, "limit": 4}, holdout=0), 0, read_conversations)
    assert len(every) == 64 and "for its share" not in capfd.readouterr().err


def test_shuffling_draws_other_rows_by_seed(write):
    a, b = write("a.jsonl", asked(*range(60))), write("b.jsonl", asked(*range(100, 160)))
    data = section({"source": a, "weight": 1}, {"source": b, "weight": 1, "shuffle": True}, limit=20)

    def drawn(seed):
        train, held_out = split_rows(data, seed, read_conversations)
        return {
            name: sorted(row.turns[0].content for row in [*train, *held_out] if row.source == name)
            for name in "ab"
        }

    assert drawn(1) == drawn(1)
    assert drawn(1)["a"] == drawn(2)["a"] and drawn(1)["b"] != drawn(2)["b"]


# sides


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("own", ["", "a", "ab"], ids=["all set aside", "one has a split", "both have"])
def test_a_question_is_on_one_side_whatever_sources_it_comes_from(own, seed, write, tmp_path):
    sources = []
    for name, numbers in (("a", range(60)), ("b", range(40, 100)), ("c", range(50, 80))):
        if name in own:
            (tmp_path / name).mkdir()
            write(f"{name}/train.jsonl", asked(*[n for n in numbers if n % 10]) * 2)
            write(f"{name}/test.jsonl", asked(*[n for n in numbers if n % 10 == 0]))
            sources.append({"source": str(tmp_path / name), "eval_split": "test"})
        else:
            sources.append({"source": write(f"{name}.jsonl", asked(*numbers) * 2)})
    train, held_out = split_rows(section(*sources, holdout=0.2), seed, read_conversations)
    assert not {opening(row) for row in train} & {opening(row) for row in held_out}
    assert {row.source for row in train} == {row.source for row in held_out} == {*"abc"}
    if not own:  # nothing is lost, and about a fifth of each source is held out
        assert len(train) + len(held_out) == 2 * (60 + 60 + 30)
        for name, rows in (("a", 120), ("b", 120), ("c", 60)):
            assert 0.1 * rows <= sum(row.source == name for row in held_out) <= 0.5 * rows


def test_rows_whose_question_another_source_holds_out_are_dropped_where_both_have_splits(
    write, tmp_path, capfd
):
    for name, train, test in (("a", range(10), [10, 11]), ("b", range(10, 20), [20])):
        (tmp_path / name).mkdir()
        write(f"{name}/train.jsonl", asked(*train))
        write(f"{name}/test.jsonl", asked(*test))
    data = section(*({"source": str(tmp_path / name)} for name in "ab"), eval_split="test")
    train, held_out = split_rows(data, 0, read_conversations)
    assert len(train) == 18 and len(held_out) == 3
    assert "b: 2 rows dropped: another source holds their question out" in capfd.readouterr().err


# each row as its source says


def test_each_source_has_its_own_columns_template_and_system_prompt(write, random_gpt2):
    a, b = write("a.jsonl", asked(*range(8))), write("b.jsonl", chats(*range(10, 18)))
    data = {
        "sources": [
            {"source": a, "system": "Be kind."},
            {"source": b, "columns": {"messages": "chat"}, "template": "question", "name": "talk"},
        ],
        "template": "plain",
        "holdout": 0.25,
    }
    made = recipe("sft", random_gpt2, data)
    facts = model_facts(random_gpt2)
    dataset = methods.get("sft").make_dataset(made, facts)
    texts = {item.source: facts.tokenizer.decode(item.tokens) for item in dataset.train}
    alone = {}
    for name, settings in (
        ("a", {"source": a, "system": "Be kind.", "template": "plain"}),
        ("talk", {"source": b, "columns": {"messages": "chat"}, "template": "question"}),
    ):
        one = methods.get("sft").make_dataset(recipe("sft", random_gpt2, {**settings, "holdout": 0}), facts)
        alone[name] = {example.tokens for example in one.train}
    assert texts.keys() == alone.keys() and "Be kind." in texts["a"] and "Be kind." not in texts["talk"]
    assert all(item.tokens in alone[item.source] for item in [*dataset.train, *dataset.held_out])
    assert len(dataset.train) == 12 and len(dataset.held_out) == 4


@pytest.mark.parametrize("method", ["reward", "preference", "kto"])
def test_pairs_of_several_sources_have_their_own_templates(method, write, random_gpt2):
    a, b = write("a.jsonl", pairs(*range(8))), write("b.jsonl", pairs(*range(6, 14)))
    data = {"sources": [{"source": a}, {"source": b, "template": "question"}], "holdout": 0.25}
    facts = model_facts(random_gpt2)
    dataset = methods.get(method).make_dataset(recipe(method, random_gpt2, data), facts)
    for item in [*dataset.train, *dataset.held_out]:
        text = facts.tokenizer.decode(dataset.collate.examples(item)[0].tokens)
        assert text.startswith("Question: ") == (item.source == "b"), text
    both = [[item for item in part if item.source == "b"] for part in (dataset.train, dataset.held_out)]
    assert all(both)
    # the prompt that both sources have is one prompt, and on one side
    assert not {i.row.prompt for i in dataset.train} & {i.row.prompt for i in dataset.held_out}
    numbers = {(i.row.prompt, i.prompt) for i in dataset.train}
    assert len(numbers) == len({i.row.prompt for i in dataset.train})


@pytest.mark.parametrize("engine", engines.available())
def test_held_out_loss_of_a_mixture_is_that_of_its_rows_and_of_each_source(engine, write, random_gpt2):
    """The whole is the mean over all tokens, a source's the mean over its own."""
    from mlx_posttrain.training.rows import RowLearner

    a, b = write("a.jsonl", asked(*range(9))), write("b.jsonl", asked(*range(20, 50), words="Tell me then"))
    made = recipe("sft", random_gpt2, {"sources": [{"source": a}, {"source": b}], "holdout": 0.4})
    sft, on = methods.get("sft"), engines.get(engine)
    dataset, model = sft.make_dataset(made, model_facts(random_gpt2)), on.load(random_gpt2)
    found = RowLearner(on, model, sft.loss(made), dataset).evaluate()
    for name, items in (
        ("loss", dataset.held_out),
        *((f"loss/{n}", [i for i in dataset.held_out if i.source == n]) for n in "ab"),
    ):
        batch = dataset.collate(items, {})
        nll = -np.concatenate(model.token_logprobs([batch]))[batch.mask > 0]
        assert found[name] == pytest.approx(nll.mean(), rel=1e-5)
    assert abs(found["loss/a"] - found["loss/b"]) > 1e-3


def test_prompts_of_rollouts_are_mixed_too(write, random_gpt2):
    from mlx_posttrain.rl import prompts
    from mlx_posttrain.rl.evaluation import score_by_source
    from mlx_posttrain.rl.rollouts import Completion

    a, b = write("a.jsonl", asked(*range(12))), write("b.jsonl", [{"prompt": f"Tell {n}"} for n in range(8)])
    data = section(
        {"source": a, "weight": 1}, {"source": b, "weight": 1, "system": "Be kind."}, template="question"
    )
    facts = model_facts(random_gpt2)
    train, held_out = prompts.read(data, facts.tokenizer, 64, 8, seed=0)
    assert sorted(p.source for p in [*train, *held_out]) == ["a"] * 8 + ["b"] * 8
    assert all(("Be kind." in facts.tokenizer.decode(p.tokens)) == (p.source == "b") for p in train)
    mixed = [next(p for p in train if p.source == name) for name in "aab"]
    completions = [Completion(p, (1,), "x", np.zeros(1), True, 0) for p in mixed]
    assert score_by_source(completions, np.array([1.0, 2.0, 5.0])) == {"score/a": 1.5, "score/b": 5.0}
    assert score_by_source(completions, np.array([1.0, np.nan, np.nan])) == {"score/a": 1.0}


# runs


def test_a_run_on_a_mixture_resumes_exactly_and_both_engines_get_the_same_rows(
    write, random_gpt2, tmp_path, capfd
):
    a, b = write("a.jsonl", asked(*range(20))), write("b.jsonl", chats(*range(10, 40)))
    entries = f"[{{source: {a}, weight: 0.6}}, {{source: {b}, columns: {{messages: chat}}, weight: 0.4}}]"
    more = [
        "data.source=null",
        "data.limit=30",
        "engine=torch",
        f"model={random_gpt2}",
        "data.template=plain",
    ]
    more += ["train.steps=6", "train.batch_size=3", "train.save_every=2", "train.eval_every=3"]
    more += ["sample.count=2", "sample.max_tokens=2", "train.select=last"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli("run", "01_sft", f"data.sources={entries}", f"output={whole}", *more) == 0
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "final")
    shutil.rmtree(broken / "checkpoints" / "step-000006")
    assert cli("run", "--resume", str(broken)) == 0
    assert records(broken) == records(whole)

    evaluated = [r for r in read_jsonl(whole / "metrics.jsonl") if "eval/loss" in r]
    assert len(evaluated) == 3 and all({"eval/loss/a", "eval/loss/b"} <= r.keys() for r in evaluated)
    result = json.loads((whole / "result.json").read_text())
    assert result["loss/a"] == evaluated[-1]["eval/loss/a"]
    card = (whole / "card.md").read_text()
    assert "- a: source a.jsonl, weight 0.6; 16 rows trained on, 2 held out" in card
    assert "held-out loss of b" in card
    assert locate(whole).template == "plain"

    made = methods.parse_recipe(runs.reopen(whole)[1], "recipe")
    prints = []
    for engine in engines.available():
        made.engine = engine
        dataset = methods.get("sft").make_dataset(made, model_facts(random_gpt2))
        prints.append(fingerprint(dataset, dataset.evaluation()))
    assert all(one == prints[0] for one in prints)

    capfd.readouterr()
    assert cli("data", str(whole / "recipe.yaml"), "--rows", "3") == 0
    shown = capfd.readouterr().out
    assert "--- 1 of a: " in shown and "; 16 of a (59.3%), 11 of b (40.7%)" in shown
    assert cli("data", str(whole / "recipe.yaml"), "--json") == 0
    *rows, totals = map(json.loads, capfd.readouterr().out.splitlines())
    assert [row["source"] for row in rows].count("a") == 16 and totals["sources"] == {"a": 16, "b": 11}


# mistakes


def test_mistakes_in_a_mixture_are_one_line(write, random_gpt2, tmp_path, capfd):
    a, p = write("a.jsonl", asked(*range(9))), write("p.jsonl", pairs(*range(9)))
    base = ["run", "01_sft", f"model={random_gpt2}", f"output={tmp_path / 'run'}"]
    none = "data.source=null"
    for settings, message in (
        ([f"data.sources=[{{source: {a}, colums: {{}}}}]", none], "did you mean 'data.sources.0.columns'?"),
        ([f"data.sources=[{{source: {a}, path: x}}]", none], "did you mean 'data.sources.source'?"),
        ([f"data.sources=[{{source: {a}, weight: 0}}]", none], "'data.sources.0.weight'"),
        ([f"data.sources=[{{source: {a}}}]", f"data.source={a}"], "source=null where a recipe has it"),
        ([none], "'data': source is missing"),
        (["data.sources=[]", none], "sources is empty"),
        ([f"data.sources=[{{source: {a}, weight: 1}}, {{source: {p}}}]", none], "p.jsonl has no weight"),
        ([f"data.sources=[{{source: {a}, name: x}}, {{source: {p}, name: x}}]", none], "two are called 'x'"),
        ([f"data.sources=[{{source: {a}, eval_split: train}}]", none], "split and eval_split are both"),
        ([f"data.sources=[{{source: {a}}}, {{source: {p}}}]", none], "p.jsonl: these are preference rows"),
        (
            [f"data.sources=[{{source: {a}, weight: 99}}, {{source: {a}, weight: 1}}]", none],
            "a-2 gives none of",
        ),
    ):
        assert message in refused(capfd, *base, *settings), settings
    assert not (tmp_path / "run").exists()


def test_sources_are_called_by_the_last_part_of_their_names():
    entries = [
        "tatsu-lab/alpaca",
        "rows.jsonl",
        "/x/rows.jsonl.gz",
        "embedded/tasks",
        {"source": "y", "name": "alpaca-2"},
    ]
    data = section(*(one if isinstance(one, dict) else {"source": one} for one in [*entries, "z/alpaca"]))
    assert list(data.parts) == ["alpaca", "rows", "rows-2", "tasks", "alpaca-2", "alpaca-3"]


@pytest.mark.parametrize("method", ["distill", "pretrain"])
def test_methods_that_need_one_template_or_source_say_so(method):
    data = {"sources": [{"source": "a.jsonl"}, {"source": "b.jsonl", "template": "question"}]}
    with pytest.raises(UserError, match=r"asked alike|one data\.source"):
        recipe(method, "tiny", data)
