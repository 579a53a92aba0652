"""Every shipped recipe is read, and runs for a step on the tiny model with the embedded data; the README's
commands parse.
"""

from __future__ import annotations

import json
import re
import shlex

import pytest

from mlx_posttrain import config, engines, methods
from mlx_posttrain.convert import hub
from mlx_posttrain.rewards import functions
from tests.helpers import read_jsonl, records, write_jsonl

SHIPPED = sorted(config.shipped())
DEFAULTS: dict[str, dict] = {
    "07_reward": {
        "train.lr": 1e-5,
        "train.epochs": 1,
        "data.limit": 5000,
        "data.source": "Anthropic/hh-rlhf",
    },
    "07_ppo": {
        "train.steps": 150,
        "kl.beta": 0.5,
        "train.lr": 5e-6,
        "ppo.epochs": 2,
        "train.batch_size": 4,
        "train.grad_accumulation": 4,
        "train.max_grad_norm": 0.5,
        "data.limit": 300,
    },
    "01_sft": {
        "train.lr": 2e-5,
        "train.schedule": "cosine",
        "train.warmup": 0.1,
        "model": "openai-community/gpt2",
        "data.source": "embedded/qa",
    },
    "02_templates": {"train.lr": 1e-5, "data.source": "yahma/alpaca-cleaned", "data.limit": 200},
    "03_lora": {
        "train.lr": 1e-4,
        "adapter.rank": 16,
        "adapter.alpha": 32,
        "adapter.dropout": 0.1,
        "data.limit": 200,
        "data.source": "yahma/alpaca-cleaned",
    },
    "03_qlora": {"train.lr": 1e-4, "adapter.quantize": 4, "data.limit": 200},
    "06_kl_sft": {
        "train.lr": 2e-5,
        "train.epochs": 2,
        "kl.beta": 0.1,
        "data.clean.keep": 3000,
        "data.source": "tatsu-lab/alpaca",
    },
}


def test_the_learning_path_is_shipped():
    assert set(DEFAULTS) <= set(SHIPPED) and {
        "00_pretrain_tiny",
        "08_distill",
        "08_budget",
        "journey",
        "demo_sft",
        "demo_lora",
        "demo_kl",
    } <= set(SHIPPED)


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_defaults(name):
    chosen = methods.load_recipe(name)
    for key, value in DEFAULTS[name].items():
        found = chosen
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, key
    assert chosen.output == f"runs/{name}"


def test_five_templates():
    from mlx_posttrain.data.templates import FIVE

    assert methods.load_recipe("02_templates").data.template == list(FIVE)


SMALL = {  # what makes a recipe of a method run within seconds, offline
    "sft": [
        "model=tiny",
        "data.source=embedded/tasks",
        "data.format=auto",
        "data.limit=200",
        "data.eval_limit=8",
        "train.steps=1",
        "sample.max_tokens=4",
    ],
    "reward": [
        "model=tiny",
        "data.source=embedded/preferences",
        "data.eval_split=valid",
        "data.limit=60",
        "data.eval_limit=8",
        "train.steps=1",
    ],
    "ppo": [
        "model=tiny",
        "reward=[{function: checker}]",
        "data.source=embedded/tasks",
        "data.eval_split=valid",
        "data.limit=60",
        "data.eval_limit=4",
        "train.steps=1",
        "train.batch_size=4",
        "train.grad_accumulation=1",
        "rollout.prompts=4",
        "rollout.max_tokens=8",
        "critic.kind=shared",
    ],
    "grpo": [
        "model=tiny",
        "reward=[{function: checker}]",
        "data.source=embedded/tasks",
        "data.config=null",
        "data.format=auto",
        "data.template=question",
        "data.system=null",
        "data.prompt=null",
        "data.eval_split=valid",
        "data.limit=60",
        "data.eval_limit=4",
        "train.steps=1",
        "train.batch_size=4",
        "train.grad_accumulation=2",
        "rollout.prompts=2",
        "rollout.samples=4",
        "rollout.max_tokens=8",
        "grpo.overlong_buffer=null",
    ],
    "distill": [
        "model=tiny",
        "data.source=embedded/reasoning",
        "data.config=null",
        "data.limit=40",
        "data.max_length=128",
        "data.eval_limit=4",
        "data.system=null",
        "train.steps=1",
        "train.batch_size=4",
        "train.grad_accumulation=1",
        "think.questions=2",
        "think.max_tokens=8",
        "sample.max_tokens=4",
    ],
}
SHOWN = {
    "sft": {"prompt", "answer", "wanted"},
    "reward": {"chosen", "rejected", "chosen_score"},
    "ppo": {"prompt", "answer", "score"},
    "grpo": {"prompt", "answer", "score", "rewards"},
    "distill": {"prompt", "answer", "wanted"},
}


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in SHIPPED
        if not n.startswith("00") and config.read_yaml(config.shipped()[n])["method"] in SMALL
    ],
)
@pytest.mark.parametrize("engine", engines.available())
def test_runs_on_the_tiny_model(name, engine, tmp_path):
    if engine == "torch" and name == "03_qlora":
        pytest.skip("quantised training is MLX's")
    hub.resolve("tiny")
    method = config.read_yaml(config.shipped()[name])["method"]
    chosen = methods.load_recipe(name, [*SMALL[method], f"output={tmp_path / 'run'}", f"engine={engine}"])
    result = methods.run(chosen)
    assert 0 <= result["accuracy"] <= 1 if method in ("ppo", "grpo") else 0 < result["loss"] < 20
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert samples and {"step", *SHOWN[method]} <= set(samples[0])
    assert (tmp_path / "run" / "card.md").read_text().startswith("---")


def test_rlhf_in_one_command(tmp_path):
    """SFT, reward model and PPO as one pipeline, on the tiny model with real pairs' format, then the policy
    answers.
    """
    tiny = {"sft": "sft", "reward": "reward", "ppo": "ppo"}
    settings = [
        f"{stage}.{s}"
        for stage, method in tiny.items()
        for s in SMALL[method]
        if not s.startswith(("model=", "reward="))
    ]
    chosen = methods.load_recipe(
        "07_rlhf",
        [
            f"output={tmp_path / 'run'}",
            "sft.model=tiny",
            "sft.data.format=auto",
            "sft.data.template=question",
            "reward.data.template=question",
            "ppo.data.template=question",
            *settings,
        ],
    )
    results = methods.run(chosen)
    assert list(results) == ["sft", "reward", "ppo"]
    assert all((tmp_path / "run" / stage / "final").is_dir() for stage in tiny)
    from mlx_posttrain import load

    for folder in ("run/ppo", "run"):  # a pipeline answers as its last language model
        assert next(load(tmp_path / folder).answers(["Hello"], max_tokens=3))["tokens"] <= 3


@pytest.mark.exhaustive
def test_the_journey_in_one_command(tmp_path):
    """All eight stages and the report, on the tiny model: the shipped recipe, its stages cut short."""
    methods_of = {
        "sft": "sft",
        "templates": "sft",
        "lora": "sft",
        "kl": "sft",
        "reward": "reward",
        "judge": "reward",
        "ppo": "ppo",
        "dpo": "reward",  # cut short as what learns from the same pairs
        "distill": "distill",
    }
    settings = [
        f"{stage}.{s}"
        for stage, method in methods_of.items()
        for s in SMALL[method]
        if not s.startswith("reward=")
    ]
    later = ("reward", "judge", "ppo", "dpo")  # which start from earlier stages
    settings = [s for s in settings if s not in [f"{stage}.model=tiny" for stage in later]]
    suite = ["limit=4", "max_tokens=6", "text_limit=3", "continuation=12", "samples=2"]
    chosen = methods.load_recipe(
        "journey",
        [
            f"output={tmp_path / 'run'}",
            *settings,
            "ppo.reward=[{model: '{reward}'}]",
            "reward.data.template=instruction",
            "judge.data.template=instruction",
            "kl.data.clean=null",
            *(f"report.suite.{s}" for s in suite),
        ],
    )
    results = methods.run(chosen)
    assert list(results) == [*methods_of, "report"]
    page = (tmp_path / "run" / "report" / "final" / "report.html").read_text()
    assert all(f">{name}<" in page or f" {name}" in page for name in methods_of)
    numbers = json.loads((tmp_path / "run" / "report" / "final" / "report-comparison.json").read_text())
    assert [m["name"] for m in numbers["models"]] == [
        "base",
        "sft",
        "templates",
        "lora",
        "kl",
        "ppo",
        "dpo",
        "distill",
    ]
    assert "wins" in numbers["models"][1]["figures"] or "score" in numbers["models"][1]["figures"]
    # Each is asked as it was trained, and judged by a reward model that trained none of them.
    assert [m["template"] for m in numbers["models"]] == ["instruction"] * 5 + [
        "dialogue",
        "dialogue",
        "chatml",
    ]
    assert "judge, on which none of these runs was trained" in page
    assert any("judge" in key for record in records(tmp_path / "run" / "ppo") for key in record)


def test_the_trade_off_compares_like_with_like():
    """Four penalties, three seeds; nothing else differs between the runs."""
    from mlx_posttrain.pipeline import stage_recipes

    stages = stage_recipes(methods.load_recipe("07_tradeoff"))
    runs = {name: own.model_dump() for name, own in stages.items() if own.method == "ppo"}
    assert sorted((own["kl"]["beta"], own["seed"]) for own in runs.values()) == [
        (b, s) for b in (0.05, 0.2, 0.3, 0.5) for s in (0, 1, 2)
    ]
    for own in runs.values():
        own["kl"].pop("beta"), own.pop("seed"), own.pop("output")
    assert all(own == next(iter(runs.values())) for own in runs.values())
    assert stages["reward"].seed != stages["judge"].seed


def test_the_budget_compares_like_with_like():
    """Traces, answers and as many tokens of answers: of one seed nothing else differs between the runs."""
    from mlx_posttrain.pipeline import stage_recipes

    stages = {name: own.model_dump() for name, own in stage_recipes(methods.load_recipe("08_budget")).items()}
    stages.pop("report")
    assert [own["seed"] for own in stages.values()] == [0, 1, 2] * 3
    kinds = [(own["data"].pop("format"), own["data"].pop("limit")) for own in stages.values()]
    assert (
        kinds
        == [("reasoning", 16000)] * 3 + [("question_answer", 16000)] * 3 + [("question_answer", 35200)] * 3
    )
    for own in stages.values():
        for key in ("seed", "output", "description", "think"):
            own.pop(key)
    assert all(own == stages["traces_seed_0"] for own in stages.values())


@pytest.mark.parametrize("recipe", ["06_lessons", "07_lessons", "08_budget"])
def test_gains_compare_seed_with_seed(recipe):
    """Every question is asked of three pairs of runs, each of one seed, and of no run twice."""
    from mlx_posttrain.pipeline import stage_recipes

    stages = stage_recipes(methods.load_recipe(recipe))
    report = stages["report"]
    assert report.gains
    for gain in report.gains.values():
        pairs = gain.spread(list(report.runs))
        assert [(a[-6:], b[-6:]) for a, b in pairs] == [(f"seed={s}",) * 2 for s in (0, 1, 2)]
        folders = [[report.runs[run] for run in pair] for pair in pairs]
        assert len({folder for pair in folders for folder in pair}) == 6


def test_the_lessons_compare_like_with_like():
    """Runs of a seed differ in what their question is about, and all but the small set see as many rows."""
    from mlx_posttrain.pipeline import stage_recipes

    runs = {
        name: own.model_dump()
        for name, own in stage_recipes(methods.load_recipe("06_lessons")).items()
        if own.method == "sft" and own.seed == 1
    }
    standard = runs["rate_lr_0_0015_seed_1"]

    def differences(a, b, path=""):
        if isinstance(a, dict) and isinstance(b, dict):
            return {d for k in a | b for d in differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)}
        return set() if a == b else {path}

    expected = {
        "rate_lr_2e_05_seed_1": {"train.lr"},
        "cold_seed_1": {"train.warmup"},
        "five_seed_1": {"data.template", "data.max_length"},
        "mix_seed_1": {"data.source", "data.families", "data.sources"},
        "kl_seed_1": {"kl"},
    }
    for name, keys in expected.items():
        assert differences(runs[name], standard) - {"output", "description"} == keys, name
    few = {"few_good_seed_1": {"data.format"}, "many_mixed_seed_1": {"data.limit", "train.epochs"}}
    for name, keys in few.items():
        assert differences(runs[name], runs["few_mixed_seed_1"]) - {"output", "description"} == keys, name
    assert differences(runs["many_filtered_seed_1"], runs["many_mixed_seed_1"]) == {
        *("output", "description", "data.limit", "data.clean")
    }
    seen = {
        (own["data"]["clean"] or {"keep": own["data"]["limit"]})["keep"] * own["train"]["epochs"]
        for own in runs.values()
    }
    assert seen == {3000}


def test_the_lessons_of_ppo_compare_like_with_like():
    from mlx_posttrain.pipeline import stage_recipes

    stages = stage_recipes(methods.load_recipe("07_lessons"))
    runs = {name: own for name, own in stages.items() if own.method == "ppo" and own.seed == 2}
    assert len(runs) == 8
    assert {own.train.steps for name, own in runs.items() if name.startswith("steps_")} == {30, 100, 150, 300}
    fixed = runs["steps_steps_100_seed_2"].model_dump(exclude={"output", "description"})
    for name, key in {"falling": "kl", "from_middle": "reward", "from_biased": "reward"}.items():
        other = runs[f"{name}_seed_2"].model_dump(exclude={"output", "description"})
        assert [k for k in fixed if fixed[k] != other[k]] == [key], name
    falling = runs["falling_seed_2"].kl
    assert (falling.beta + falling.final) / 2 == fixed["kl"]["beta"]
    pairs = {name: stages[name].data.limit for name in ("large", "middle", "small", "biased")}
    assert pairs == {"large": 16000, "middle": 4000, "small": 1000, "biased": 16000}


def test_methods_of_preference_compare_like_with_like():
    """Six settings and three seeds each, from one model on the same pairs, judged on questions of its own."""
    from mlx_posttrain.evaluation import choice
    from mlx_posttrain.pipeline import stage_recipes

    stages = stage_recipes(methods.load_recipe("09_versus"))
    grids = {}
    for name, own in stages.items():
        grids.setdefault(name.split("_")[0], []).append(own)
    tried = [grids[name] for name in ("dpo", "ipo", "orpo", "simpo", "kto", "ppo")]
    assert [len(grid) for grid in tried] == [18] * 6
    for grid in tried:
        settings = [str(own.model_dump(exclude={"output", "seed"})) for own in grid]
        assert [settings.count(one) for one in settings] == [3] * 18 and {own.seed for own in grid} == {
            0,
            1,
            2,
        }
        assert {own.model for own in grid} == {grids["reward"][0].model} == {grid[0].model}
    reward, judge = stages["reward"], stages["judge"]
    # the others learn from the reward model's pairs; the judge's are others
    for own in [own for grid in tried[:5] for own in grid]:
        assert (own.data.source, own.data.families) == (reward.data.source, reward.data.families)
        assert own.data.limit == reward.data.limit and own.train.select == "last"
    assert judge.seed not in {own.seed for grid in tried for own in grid} | {reward.seed}
    first, second = stages["tried"], stages["report"]
    assert second.suite.skip == first.suite.limit and second.choose.report == first.output
    shown = [*choice.names(list(second.runs)), *second.best_of["Best of 8"].labels("Best of 8")]
    for gain in second.gains.values():
        assert [(a[-6:], b[-6:]) for a, b in gain.spread(shown)] == [(f"seed={s}",) * 2 for s in (0, 1, 2)]


def test_the_methods_of_reinforcement_learning_compare_like_with_like():
    """Three seeds of each; the critic's run differs in its method's own keys only."""
    from mlx_posttrain.pipeline import stage_recipes

    stages = stage_recipes(methods.load_recipe("10_learning"))
    presets = [(own.grpo.preset, own.seed) for own in stages.values() if own.method == "grpo"]
    names = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp")
    assert sorted(presets) == sorted((name, seed) for name in names for seed in (0, 1, 2))
    runs = [own.model_dump() for own in stages.values() if own.method in ("grpo", "ppo")]
    assert len(runs) == 18
    for key in ("model", "adapter", "reward", "data"):
        assert all(own[key] == runs[0][key] for own in runs), key
    for part, keys in {
        "rollout": ("prompts", "samples", "max_tokens", "temperature", "missing_eos_penalty"),
        "train": ("steps", "batch_size", "grad_accumulation", "lr", "schedule"),
        "kl": ("beta",),
    }.items():
        for key in keys:
            assert all(own[part][key] == runs[0][part][key] for own in runs), (part, key)


@pytest.mark.exhaustive
def test_the_budget_in_one_command(tmp_path):
    """The shipped recipe, cut short: nine runs, and paired gains over questions and seeds in the report."""
    names = ("traces", "answers", "tokens")
    small = ["data.limit=16", "data.eval_limit=4", "train.batch_size=8", "train.steps=1", "sample.count=0"]
    chosen = methods.load_recipe(
        "08_budget",
        [
            f"output={tmp_path / 'run'}",
            *(f"{name}.{s}" for name in names for s in small),
            "traces.think.questions=2",
            "report.suite.limit=4",
            "report.suite.think_tokens=8",
            "report.suite.max_tokens=8",
            "report.suite.text_limit=2",
        ],
    )
    methods.run(chosen)
    final = tmp_path / "run" / "report" / "final"
    told = {f["question"]: f for f in json.loads((final / "report-findings.json").read_text())}
    for on in ("the same rows and steps", "as many tokens"):
        found = told[f"Are traces worth more than answers only, on {on}?"]
        assert (
            len(found["figures"]["each"]) == 3
            and len(found["figures"]["over_seeds"]) == 3
            and "over 3 seeds" in found["sentence"]
        )
        assert found["sentence"] in (final / "report.txt").read_text()


@pytest.mark.parametrize("name", ["02_templates", "03_lora", "06_kl_sft"])
def test_runs_on_local_files(name, random_gpt2, shared, tmp_path):
    chosen = methods.load_recipe(
        name,
        [
            f"model={random_gpt2}",
            f"data.source={shared / 'data' / 'instruct' / 'short-tasks.jsonl'}",
            "data.max_length=64",
            "data.eval_limit=8",
            "data.holdout=20",
            f"output={tmp_path / 'run'}",
            "train.steps=1",
            "sample.count=0",
        ],
    )
    assert methods.run(chosen)["loss"] > 0


@pytest.mark.parametrize("engine", engines.available())
def test_pretraining_learns_from_random_weights(engine, tmp_path):
    """Twenty sentences, a few dozen steps: the loss falls far below that of guessing."""
    sentences = [
        f"the {a} {b} sees the {c}."
        for a in ("big", "small")
        for b in ("cat", "dog", "cow")
        for c in ("moon", "sun", "hill")
    ]
    rows = ({"text": " ".join(sentences[i:] + sentences[:i])} for i in range(18))
    texts = write_jsonl(tmp_path / "texts.jsonl", rows)
    chosen = methods.load_recipe(
        "00_pretrain_tiny",
        [
            f"data.source={texts}",
            f"output={tmp_path / 'run'}",
            f"engine={engine}",
            "pretrain.vocab_size=300",
            "pretrain.layers=2",
            "pretrain.width=48",
            "pretrain.heads=2",
            "pretrain.context=64",
            "data.max_length=64",
            "data.holdout=2",
            "train.epochs=20",
            "train.warmup=5",
            "train.lr=5e-3",
            "train.eval_every=20",
        ],
    )
    result = methods.run(chosen)
    first = records(tmp_path / "run")[0]["eval/loss"]
    assert first == pytest.approx(5.7, abs=0.2)  # ln 300
    assert result["loss"] < 1.5


def offline() -> list[list[str]]:
    """The commands for the embedded model in the first lines of recipes, but for those of a whole
    pipeline.
    """
    lines = [
        line.lstrip("# ") for path in config.shipped().values() for line in path.read_text().splitlines()
    ]
    return [
        shlex.split(re.split(r"\s{2,}", line)[0])[2:]
        for line in lines
        if re.match(
            r"mlx-posttrain run "
            r".* model=tiny",
            line,
        )
    ]


@pytest.mark.parametrize("words", offline(), ids=lambda words: words[0])
def test_offline_commands_find_their_model_and_data(words):
    chosen = methods.load_recipe(words[0], words[1:])
    (found,) = methods.plan(chosen)
    for entry in chosen.reward if words[0] == "07_ppo" else []:
        functions.load(entry.function)
    assert found.steps and found.parameters < 4e6


def test_every_stage_that_trains_on_gpt2_has_an_offline_command():
    assert {
        "01_sft",
        "02_templates",
        "03_lora",
        "03_qlora",
        "06_kl_sft",
        "07_reward",
        "07_ppo",
        "08_distill",
    } <= {words[0] for words in offline()}


def test_the_commands_in_recipes_and_readme_parse(root):
    """Commands shown to people are ones that exist: recipe, keys and options."""
    texts = [p.read_text() for p in config.shipped().values()] + [
        p.read_text() for p in (root / "README.md", root / "recipes" / "README.md") if p.is_file()
    ]
    commands = [
        m
        for text in texts
        for m in re.findall(
            r"mlx-posttrain "
            r"(?:run|sweep|export|generate|chat|convert|doctor|demo|recipes|keys|eval|compare|analyze|report|synthesize)[^\n`]*",
            text,
        )
    ]
    assert len(commands) > 8
    from typer.main import get_command

    from mlx_posttrain.cli import app

    known = get_command(app).commands
    for command in commands:
        words = shlex.split(re.split(r"\s{2,}|\s#|\)", command)[0], comments=True)[1:]
        context = known[words[0]].make_context(words[0], words[1:], resilient_parsing=True)
        assert context is not None
        if words[0] == "run" and "--resume" not in words and not words[1].isupper():
            methods.load_recipe(words[1], [w for w in words[2:] if "=" in w and "..." not in w])
