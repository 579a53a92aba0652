"""Every command of the two README pages runs, offline: what they load from the hub lies in the hub's cache,
as ``hf download`` would leave it, and training is cut to a step.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from mlx_posttrain import config, engines, methods, pipeline
from mlx_posttrain.cli import app
from mlx_posttrain.convert import hub
from mlx_posttrain.convert.files import copy_tokenizer
from mlx_posttrain.data import sources
from tests import architectures, test_demo
from tests.helpers import cli, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "recipes" / "README.md")
ENGINES = engines.available()

#: Models of the hub, and what stands for them: the embedded model, or a random one of an architecture.
MODELS = {
    "openai-community/gpt2": "tiny",
    "Qwen/Qwen2.5-0.5B": "qwen2",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2",
}
#: Data sets of the hub: their configuration, and the form of their rows.
DATASETS = {
    "yahma/alpaca-cleaned": ("default", "alpaca"),
    "tatsu-lab/alpaca": ("default", "alpaca"),
    "Anthropic/hh-rlhf": ("default", "dialogues"),
    "openai/gsm8k": ("main", "gsm8k"),
    "open-thoughts/OpenThoughts-114k": ("metadata", "reasoning"),
}
#: Commands that a test of their own runs.
ELSEWHERE = {"demo": test_demo.test_demo_learns_forgets_less_with_kl_reports_and_exports}
#: Commands whose runs tests/pipeline/test_sweep.py and tests/training/test_find_lr.py cut short.
SEVERAL = ("sweep", "--find-lr")
#: Words of commands that train several models, start several processes, or measure a model in every way.
LONG = ("analyze", "report", "bench", "doctor", "journey", "07_rlhf", "07_tradeoff", "08_budget")

TRAINING = [
    "train.steps=1",
    "train.batch_size=2",
    "train.grad_accumulation=1",
    "data.eval_limit=4",
    "sample.count=1",
]
CUT = {  # what cuts a run of a method short, beside that
    "sft": ["sample.max_tokens=4"],
    "preference": ["data.limit=40"],  # the reference reads all of them
    "distill": ["sample.max_tokens=4", "think.questions=2", "think.max_tokens=6"],
    "ppo": ["rollout.prompts=4", "rollout.max_tokens=4"],
    "grpo": ["rollout.prompts=2", "rollout.samples=2", "rollout.max_tokens=4", "train.batch_size=4"],
}
SUITE = [
    "limit=2",
    "max_tokens=4",
    "text_limit=2",
    "continuation=8",
    "samples=1",
    "phrasings=false",
    "last_word_limit=2",
]
OPTIONS = {
    **dict.fromkeys(("eval", "compare", "analyze", "report"), SUITE),
    "chat": ["--max-tokens", "4"],
    "synthesize": ["--max-tokens", "4", "--samples", "1", "--limit", "2"],
    "bench": ["--model", "tiny", "--units", "1", "--rows", "2", "--length", "16", "--batch-size", "2"],
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def commands(page: Path) -> list[list[str]]:
    """The commands of a page, as words: lines of its code blocks, and what stands between backquotes."""
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.S)
    shown = re.findall(r"^    (?:\$ )?(mlx-posttrain .*)$|`(mlx-posttrain\s[^`]+)`", text, re.M)
    return [shlex.split(line or inline, comments=True)[1:] for line, inline in shown]


ALL = list(dict.fromkeys(tuple(words) for page in PAGES for words in commands(page)))


def rows(kind: str, split: str, count: int) -> list[dict[str, Any]]:
    """Rows in the form of a data set, from the embedded ones."""
    pairs = sources.load_rows("embedded/preferences", split=split, limit=count)
    asked = [(f"{row['prompt']} ({i})", row["chosen"]) for i, row in enumerate(pairs)]
    if kind == "dialogues":
        sides = ("chosen", "rejected")
        return [{s: f"\n\nHuman: {r['prompt']}\n\nAssistant: {r[s]}" for s in sides} for r in pairs]
    if kind == "gsm8k":
        return [{"question": q, "answer": f"{a}\n#### {i}"} for i, (q, a) in enumerate(asked)]
    if kind == "reasoning":
        return [{"problem": q, "deepseek_reasoning": f"So {a}", "deepseek_solution": a} for q, a in asked]
    return [{"instruction": q, "input": "", "output": a} for q, a in asked]


def random_model(kind: str, folder: Path) -> Path:
    """A chat model of 2 layers with random weights and the embedded model's tokenizer."""
    case = next(case for case in architectures.CASES if case.kind == kind)
    sized = {**case.settings, "vocab_size": 4096, "max_position_embeddings": 1024}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    architectures.build(architectures.Case(kind, case.about, sized | ends), folder)
    copy_tokenizer(hub.resolve("tiny"), folder)
    tokens = folder / "tokenizer_config.json"
    tokens.write_text(json.dumps(json.loads(tokens.read_text()) | {"chat_template": CHATML}))
    return folder


def download(kind: str, name: str, files: Path) -> None:
    """Put a folder into the hub's cache."""
    from huggingface_hub import constants

    commit = hashlib.sha1(name.encode()).hexdigest()  # datasets tells folders apart by their last part

    entry = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    shutil.copytree(files, entry / "snapshots" / commit)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(commit)


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory):
    """MODELS and DATASETS as downloaded; gone again afterwards, so that other tests find an empty cache."""
    pytest.importorskip("torch")  # transformers makes the random models
    from huggingface_hub import constants

    scratch = tmp_path_factory.mktemp("hub")
    folders = {"tiny": hub.resolve("tiny"), "qwen2": random_model("qwen2", scratch / "qwen2")}
    for name, kind in MODELS.items():
        download("model", name, folders[kind])
    for name, (named, kind) in DATASETS.items():
        folder = scratch / name
        folder.mkdir(parents=True)
        files = [{"split": s, "path": f"{s}.jsonl"} for s in ("train", "test")]
        card = {"configs": [{"config_name": named, "data_files": files}]}
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
        write_jsonl(folder / "train.jsonl", rows(kind, "train", 300))
        write_jsonl(folder / "test.jsonl", rows(kind, "valid", 20))
        download("dataset", name, folder)
    yield
    for entry in Path(constants.HF_HUB_CACHE).glob("*--*"):
        shutil.rmtree(entry)


@pytest.fixture(scope="module")
def desk(tmp_path_factory, hub_cache):
    """The folder that a reader works in: files of their own, and what earlier commands left."""
    folder = tmp_path_factory.mktemp("desk")
    write_jsonl(folder / "rows.jsonl", rows("alpaca", "train", 300))
    write_jsonl(folder / "prompts.jsonl", [{"prompt": r["instruction"]} for r in rows("alpaca", "train", 60)])
    asked = sources.load_rows("embedded/reasoning", split="train", limit=60)
    write_jsonl(folder / "q.jsonl", [{k: r[k] for k in ("question", "answer", "checker")} for r in asked])
    brief = (
        "def brief(prompts, completions, **columns):\n    return [1.0 / (1 + len(c)) for c in completions]\n"
    )
    (folder / "rewards.py").write_text(brief)
    return folder


def cuts(words: Iterable[str]) -> list[str]:
    """What a recipe's settings need besides, so that it takes a moment."""
    name, *settings = words
    chosen = methods.load_recipe(name, settings)
    if chosen.method != "pipeline":
        return [*TRAINING, *CUT.get(chosen.method, [])]
    found = []
    for stage, own in pipeline.stage_recipes(chosen).items():
        of_method = [f"suite.{s}" for s in SUITE]
        if own.method != "report":
            of_method = [*TRAINING, *CUT.get(own.method, [])]
        cell = chosen.stages[stage].cell  # of a grid all runs are cut by the grid's name
        found += [f"{cell.grid if cell else stage}.{s}" for s in of_method]
    return list(dict.fromkeys(found))


def make_runs(words: Iterable[str]) -> None:
    """Train, in a step, the runs that a command takes for granted."""
    text = " ".join(words)
    if words[0] == "run" and "--resume" not in words:
        raw = config.read_yaml(config.shipped()[words[1]])
        text = yaml.safe_dump(config.override(raw, config.settings([w for w in words[2:] if "=" in w])))
        text = re.sub(r"output: .*", "", text)
    for needed in sorted(set(re.findall(r"runs/(?:demo/)?\w+", text))):
        if not Path(needed).exists():
            recipe = needed.removeprefix("runs/").replace("demo/", "demo_")
            make_runs(["run", recipe])
            assert cli("run", recipe, *cuts([recipe]), f"output={needed}") == 0


def parameters() -> list[Any]:
    return [
        pytest.param(
            words, id=" ".join(words)[:60], marks=pytest.mark.exhaustive if set(LONG) & set(words) else ()
        )
        for words in ALL
        if words[0] not in ELSEWHERE and not set(SEVERAL) & set(words)
    ]


def test_no_command_is_overlooked():
    """What is called in code or in a sentence is among the commands, in whichever form it stands there."""
    names = "|".join(get_command(app).commands)
    for page in PAGES:
        text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.S)
        assert len(re.findall(rf"mlx-posttrain\s+(?:{names})\b", text)) == len(commands(page)) >= 15


@pytest.mark.parametrize("words", parameters())
def test_the_command_runs(words, desk, monkeypatch):
    monkeypatch.chdir(desk)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    words = list(words)
    make_runs(words)
    if words[0] == "synthesize":
        Path("traces.jsonl").unlink(missing_ok=True)
    if "data.source=traces.jsonl" in words:  # what a teacher that knows something makes of the questions
        traces = sources.load_rows("embedded/reasoning", split="train", limit=300)
        write_jsonl(
            Path("traces.jsonl"), [{k: r[k] for k in ("question", "thinking", "answer")} for r in traces]
        )
    if words[0] == "validate":  # which refuses a folder that is in use
        shutil.rmtree(f"runs/{words[1]}", ignore_errors=True)
    if "--resume" in words:
        shutil.rmtree(Path(words[-1]) / "final")
    elif words[0] == "run":
        shutil.rmtree("runs/again", ignore_errors=True)
        words += [*cuts(words[1:]), "output=runs/again"]
    assert cli(*words, *OPTIONS.get(words[0], [])) == 0


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_the_path_of_ones_own_model_and_data(kind, desk, tmp_path, monkeypatch):
    """README's "Your own model and data" with another architecture and a CSV that has its own columns."""
    monkeypatch.chdir(tmp_path)
    random_model(kind, Path("mine"))
    with open("rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ask", "reply"])
        writer.writerows((r["instruction"], r["output"]) for r in rows("alpaca", "train", 300))
    own = ["model=mine", "data.source=rows.csv", "data.columns={prompt: ask, completion: reply}"]
    for name in ("01_sft", "02_templates", "03_lora", "03_qlora", "06_kl_sft", "demo_lora"):
        if name == "03_qlora" and "mlx" not in ENGINES:
            continue
        more = ["adapter.group_size=32"] if name == "03_qlora" else []
        more += ["data.families=null", "data.format=auto"] if name == "demo_lora" else []
        words = [name, *own, *more]
        assert cli("run", *words, *cuts(words)) == 0, name
    adapter = json.loads(Path("runs/03_lora/final/adapter_config.json").read_text())
    assert len({target.split(".")[-1] for target in adapter["target_modules"]}) == 7
    for words in (
        ["data", "03_lora", *own],
        ["plan", "03_lora", *own],
        ["export", "runs/03_lora", "--to", "peft"],
        ["export", "runs/03_lora", "--to", "hf", "--merge"],
        ["export", "runs/03_lora", "--to", "mlx-lm"],
        ["compare", "mine", "runs/03_lora", *SUITE],
        ["generate", "runs/03_lora", "--prompt", "Hello", "--max-tokens", "4"],
    ):
        if words[-1] != "mlx-lm" or "mlx" in ENGINES:
            assert cli(*words) == 0, words


@pytest.mark.parametrize("engine", ENGINES)
def test_the_python_of_the_readme_runs(engine, desk, monkeypatch, capsys):
    text = PAGES[0].read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert code.count('"embedded/tasks", ') == 1 and code.count("limit=40") == 1
    small = {s.partition("=")[0]: yaml.safe_load(s.partition("=")[2]) for s in TRAINING}
    code = code.replace('"embedded/tasks", ', f'"embedded/tasks", "engine": {engine!r}, **{small!r}, ')
    suite = ", ".join(s for s in SUITE).replace("false", "False")
    monkeypatch.chdir(desk)
    shutil.rmtree("runs/lora", ignore_errors=True)
    exec(compile(code.replace("limit=40", suite), "README.md", "exec"), {})
    assert "right answers" in capsys.readouterr().out
