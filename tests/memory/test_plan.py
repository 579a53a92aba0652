"""What a plan predicts: counts worked by hand, parts that move as they must, and the peak of real
training.
"""

import gc
import json
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mlx_posttrain import engines, methods
from mlx_posttrain.cli import app
from mlx_posttrain.data.batches import collate
from mlx_posttrain.data.dataset import Dataset, RowCollator
from mlx_posttrain.data.pairs import PairCollator
from mlx_posttrain.data.types import Example, Pair, Preference
from mlx_posttrain.engines import decoding
from mlx_posttrain.engines.base import REFERENCE_HIDDEN, AdamW, AdapterSpec
from mlx_posttrain.errors import UserError
from mlx_posttrain.memory import plan
from mlx_posttrain.memory.footprint import Shape, Training, distinct, shapes
from mlx_posttrain.memory.model_size import Size, adapted, adapter_parameters, size
from mlx_posttrain.methods import ppo, sft
from mlx_posttrain.models.merge import base_folder
from tests.helpers import command, read_jsonl, run_recipe
from tests.random_models import SMALL, random_model


def gpt2() -> Size:
    """GPT-2 124M without its weights."""
    d = 768
    tensors: dict[str, tuple[int, ...]] = {
        "wte.weight": (50257, d),
        "wpe.weight": (1024, d),
        "ln_f.weight": (d,),
        "ln_f.bias": (d,),
    }
    for i in range(12):
        for name, shape in (
            ("attn.c_attn", (d, 3 * d)),
            ("attn.c_proj", (d, d)),
            ("mlp.c_fc", (d, 4 * d)),
            ("mlp.c_proj", (4 * d, d)),
        ):
            tensors |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        tensors |= {f"h.{i}.{ln}.{part}": (d,) for ln in ("ln_1", "ln_2") for part in ("weight", "bias")}
    return Size(12, d, 4 * d, 12, 50257, 1024, "gpt2", tensors)


def test_counts_of_gpt2() -> None:
    assert gpt2().parameters == 124_439_808
    assert adapter_parameters(gpt2(), AdapterSpec(rank=16)) == 1_622_016
    # DoRA: one magnitude for each output of c_attn (2304), attention's c_proj (768) and the MLP's (768), in
    # 12 blocks
    assert adapter_parameters(gpt2(), AdapterSpec(kind="dora", rank=16)) == 1_622_016 + 12 * (
        2304 + 768 + 768
    )


def test_parts_by_hand() -> None:
    batch = Shape(4, 128, 256)
    full = Training("mlx", gpt2(), 124_439_808, False, batches=[batch])
    assert full.weights() == pytest.approx(124_439_808 * 4 / 2**30)
    assert full.optimizer() == 2 * full.weights() == 2 * full.gradients()
    assert full.reference_copy() == 0 and replace(full, reference=True).reference_copy() == full.weights()
    lora = replace(full, trained=1_622_016, adapter=True, reference=True)
    # the same weights are the reference, and the head does not train
    assert lora.reference_copy() == 0 and lora.head() == 0
    assert lora.weights() == pytest.approx((124_439_808 + 1_622_016) * 4 / 2**30)
    four_bits = replace(lora, bits=4)
    packed = 12 * 12 * 768**2  # the linear layers
    assert lora.weights() - four_bits.weights() == pytest.approx(packed * (4 - 0.5 - 0.125) / 2**30)
    half = replace(full, batches=[Shape(2, 128, 128)])
    assert half.activations(half.batches[0]) == pytest.approx(full.activations(batch) / 2)
    assert replace(full, checkpointing=True, engine="torch").activations(batch) < full.activations(batch) / 2


def test_checkpointed_blocks_are_never_lean() -> None:
    """Recomputing whole blocks takes the lean ones off: a larger batch keeps more, also beyond the bound from
    which blocks are lean.
    """
    one = Training("mlx", gpt2(), 124_439_808, False, batches=[], checkpointing=True)
    sizes = [one.activations(Shape(rows, 256, 64)) for rows in range(1, 13)]
    assert sizes == sorted(sizes) and sizes[-1] == pytest.approx(12 * sizes[0])


def test_logits_do_not_grow_with_the_batch() -> None:
    for engine in ("mlx", "torch"):
        training = Training(engine, gpt2(), 124_439_808, False)
        many, few = (
            training.logits(Shape(rows, length, n))
            for rows, length, n in ((64, 1024, 60_000), (8, 128, 1024))
        )
        assert many == pytest.approx(few, rel=0.1) and many < 0.35


def test_rows_that_are_packed_are_counted_once() -> None:
    """Two answers of 4 and 6 tokens to one prompt of 10: with the last token read by nobody 10 + 3 + 5, where
    padding makes 2 x 16.
    """
    prompt = tuple(range(1, 11))
    rows = [
        Example((*prompt, *range(first, first + n)), (False,) * 10 + (True,) * n)
        for first, n in ((20, 4), (40, 6))
    ]
    (padded,), (packed,), (coarse,) = (shapes([collate(rows)], packs) for packs in (None, "torch", "mlx"))
    assert padded == Shape(2, 16, 64) and packed == Shape(2, 16, 64, 18)
    assert coarse == padded  # 64 tokens would be more
    assert distinct([padded, packed, Shape(2, 16, 64, 17)]) == [padded]
    full = Training("torch", gpt2(), 124_439_808, False)
    on_mlx = replace(full, engine="mlx")
    assert (full.packs, on_mlx.packs) == ("torch", "mlx")
    assert replace(full, adapter=True, dropout=True).packs is None
    assert replace(full, checkpointing=True).packs == "torch"
    assert replace(on_mlx, checkpointing=True).packs is None
    assert full.inputs(packed) == pytest.approx(full.inputs(padded) * 18 / 32)
    assert full.forward(packed) < full.forward(padded)
    assert full.activations(packed) < full.activations(padded)
    # as many tokens, but queries, keys, values and what attention returns are there for padded rows too
    assert full.activations(Shape(1, 18, 64)) < full.activations(packed)


def test_torch_adds_the_gradients_of_micro_batches_in_place() -> None:
    one = Training("torch", gpt2(), 124_439_808, False, batches=[Shape(1, 32, 64)])
    several = replace(one, grad_accumulation=True)
    assert several.gradients() == one.gradients() and several.head() == 0 < one.head()
    assert dict(several.phases())["as the backward pass begins"]["gradients"] == several.gradients()
    assert replace(several, engine="mlx").gradients() == 2 * one.gradients()


def test_the_peak_is_the_largest_moment() -> None:
    small = plan.peak(
        "run", Training("mlx", gpt2(), 124_439_808, False, batches=[Shape(1, 32, 64)]), 1, (1, 1)
    )
    large = plan.peak(
        "run", Training("mlx", gpt2(), 124_439_808, False, batches=[Shape(8, 1024, 4096)]), 1, (1, 1)
    )
    assert small.phase == "in the update" and large.phase == "as the backward pass begins"
    assert large.total_gb == pytest.approx(sum(large.parts.values())) and large.total_gb > 2 * small.total_gb


def overrides(less: str) -> tuple[list[str], float]:
    """Of one piece of advice what it changes, and the peak that it promises."""
    text, gb = less.removesuffix(" GB)").split(" (")
    return text.partition(",")[0].split(), float(gb)


@pytest.mark.parametrize("engine", engines.available())
@pytest.mark.parametrize(
    ("recipe", "given", "said"),
    [
        (
            "demo_sft",
            ["data.limit=64"],
            {"train.batch_size=8", "train.gradient_checkpointing=true", "adapter.rank=16"},
        ),
        (
            "demo_lora",
            ["data.limit=64", "adapter.dropout=0.1"],
            {"train.batch_size=8", "train.gradient_checkpointing=true"},
        ),
        (
            "demo_ppo",
            [
                "data.limit=64",
                "critic.kind=separate",
                "critic.lr=1e-4",
                "model=tiny",
                "reward=[{function: exact_answer}]",
            ],
            {"rollout.max_tokens=20", "critic.kind=shared", "critic.lr=null"},
        ),
    ],
)
def test_advice_keeps_its_promises(
    recipe: str, given: list[str], said: set[str], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever follows it is told the peak that it promised, but for rows that fall into other batches."""
    monkeypatch.setitem(plan.PROGRAM, "torch", 0.0)  # beside which the embedded model is nothing
    given = [f"engine={engine}", *given]
    (found,) = methods.plan(methods.load_recipe(recipe, given))
    advice = [overrides(less) for less in found.advice]
    assert said <= {change for changes, _ in advice for change in changes}, found.advice
    for changes, gb in advice:
        (then,) = methods.plan(methods.load_recipe(recipe, [*given, *changes]))
        assert then.total_gb < found.total_gb and then.total_gb < 1.15 * gb + 0.01, changes
        if "max_length" not in changes[0]:  # of rows without a trained token left nothing is trained
            assert then.total_gb > gb / 1.15 - 0.01, changes
        assert ("adapter.dropout=0" in changes) == (
            "train.gradient_checkpointing=true" in changes and recipe == "demo_lora"
        )


@pytest.mark.parametrize(
    ("recipe", "too_long"), [("demo_sft", "cut"), ("demo_sft", "drop"), ("demo_distill", "drop")]
)
def test_a_shorter_length_is_advised_with_what_it_does_to_the_rows(
    recipe: str, too_long: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = 64 if recipe == "demo_sft" else 16  # smaller ones peak where a shorter row changes nothing
    given = ["model=tiny", "data.limit=600", f"train.batch_size={batch}", f"data.too_long={too_long}"]
    (found,) = methods.plan(methods.load_recipe(recipe, given))
    (less,) = [less for less in found.advice if "max_length" in less]
    counts = {fate: int(n) for fate, n in re.findall(r"(cuts|drops) (\d+)", less)}
    rows = int(less.partition(" of ")[2].split()[0])
    assert counts["drops"] <= 0.1 * rows and ("cuts" in counts) == (too_long == "cut")
    capsys.readouterr()
    methods.plan(methods.load_recipe(recipe, [*given, less.split(",")[0]]))
    kept, untrained, long, truncated = map(
        int,
        re.search(
            r"training rows: (\d+) of .*\((\d+) without.* (\d+) too long, (\d+) "
            r"truncated",
            capsys.readouterr().err,
        ).groups(),
    )
    assert (
        kept == rows - counts["drops"]
        and untrained + long == counts["drops"]
        and truncated == counts.get("cuts", 0)
    )


def test_no_length_is_advised_that_most_rows_would_not_survive() -> None:
    settings = methods.load_recipe("demo_sft", ["data.too_long=drop"]).train
    rows = [Example((1,) * 100, (False,) * 99 + (True,))] * 10

    def shorter(rows: list[Example], *given: str) -> tuple[int, str] | None:
        made = Dataset(rows, [], RowCollator(512), settings, 0)
        return plan._shorter(methods.load_recipe("demo_sft", list(given)), made)

    # the answer is the last token
    assert shorter(rows, "data.too_long=drop") is None and shorter(rows) is None
    early = [Example((1,) * 100, (False,) * 9 + (True,) * 91)] * 10
    assert shorter(early, "data.too_long=drop") is None and shorter(early) == (
        56,
        "data.max_length=56, which cuts 10 of 10 rows",
    )
    assert shorter([*early[1:], *rows[:1]]) == (56, "data.max_length=56, which cuts 9 and drops 1 of 10 rows")
    row = Preference(prompt=(), chosen="", rejected="")

    # a long dialogue may do without its oldest turns
    def side(length: int) -> Example:
        return Example((1,) * length, (False,) * (length - 1) + (True,))

    known = [Pair(side(n), side(20), i, row) for i, n in enumerate((30,) * 9 + (100,))]
    pairs = Dataset(known, [], PairCollator(0, 512, score=True), settings, 0)
    assert plan._shorter(methods.load_recipe("demo_reward", ["model=tiny"]), pairs) == (
        56,
        "data.max_length=56, which shortens or drops 1 of 10 pairs",
    )
    packed = methods.load_recipe("00_pretrain_tiny", [])
    texts = Dataset([Example((1,) * 100, (True,) * 100)] * 3, [], RowCollator(512), settings, 0)
    assert packed.data.pack and plan._shorter(packed, texts) == (56, "data.max_length=56")


def test_fewer_rows_are_fewer_only_where_rows_were_the_limit() -> None:
    full, short = Shape(16, 64, 512), Shape(4, 200, 320)
    # a budget of tokens holds the other down
    assert plan._at_most([full, short], 16, 8, None) == [short, Shape(8, 64, 256)]
    assert plan._at_most([short], 16, 8, None) == [short] and plan._at_most([full], 16, 16, None) == [full]
    assert plan._at_most([Shape(8, 64, 64)], 4, 2, None) == [Shape(4, 64, 32)]  # four pairs
    assert plan._at_most([short], 16, 16, 96) == [Shape(4, 96, 154)] and plan._at_most([], 16, 8, None) == []


def test_what_a_model_cannot_follow_is_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual layers of an adapter are not there in every model: that stops no plan of a recipe without
    one.
    """

    def missing(*given: object) -> int:
        raise UserError("adapter.targets: no layer is called q_proj")

    monkeypatch.setattr(plan, "adapter_parameters", missing)
    (found,) = methods.plan(methods.load_recipe("demo_sft", ["data.limit=64"]))
    assert found.advice and not any("adapter" in less for less in found.advice)
    assert plan._fits_groups(gpt2(), 64) and not plan._fits_groups(gpt2(), 512)


@pytest.fixture
def mlx_taken() -> Callable[[Callable[[], object]], float]:
    """GB that a call takes at its peak besides what is there before, by MLX's own account of its arrays.

    The least of two calls: on a busy machine a thread may be late to let an array go.
    """
    mx = pytest.importorskip("mlx.core")

    def once(call: Callable[[], object]) -> float:
        gc.collect()
        mx.clear_cache()
        engines.get("mlx").reset_memory()
        before = mx.get_active_memory()
        call()
        return (mx.get_peak_memory() - before) / 2**30

    return lambda call: min(once(call) for _ in range(2))


def most(phases: Iterable[tuple[str, dict[str, float]]], name: str) -> float:
    return max(sum(parts.values()) for phase, parts in phases if name in phase)


@pytest.mark.parametrize("loss", ["sft", "kl", "kl of kept states"])
@pytest.mark.parametrize(
    ("rows", "length", "trained"), [(8, 512, 8), (64, 32, 8), (16, 64, 32), (32, 64, 46), (64, 64, 32)]
)
def test_prediction_of_an_evaluation_on_mlx(
    rows: int, length: int, trained: int, loss: str, mlx_taken: Callable[..., float]
) -> None:
    """Blocks are the most, or logits, those of one chunk and of several, and a reference's beside them."""
    folder = base_folder("tiny")
    model = engines.get("mlx").load(folder)
    shape = (False,) * (length - trained) + (True,) * trained
    # rows that begin alike would be packed
    batch = collate([Example((row, *(5,) * (length - 1)), shape) for row in range(rows)], 512)
    training = Training(
        "mlx",
        size(folder),
        0,
        True,
        divergence=loss != "sft",
        beside=loss == "kl",
        evaluations=shapes([batch]),
    )
    model.keep_reference()
    if loss == "kl of kept states":
        batch = replace(batch, extra={REFERENCE_HIDDEN: model.reference_hidden(batch)})
    taken = mlx_taken(
        lambda: model.evaluate(sft.loss if loss == "sft" else sft.kl_loss(0.1, "forward"), [batch])
    )
    assert most(training.phases(), "evaluation") == pytest.approx(taken, rel=0.2)


@pytest.mark.parametrize(
    ("prompts", "samples", "length", "tokens", "budget"),
    [(32, 1, 100, 2, 8192), (64, 1, 190, 2, 8192), (8, 4, 30, 30, 8192), (2, 9, 30, 30, 1024)],
)
def test_prediction_of_a_rollout_on_mlx(
    prompts: int, samples: int, length: int, tokens: int, budget: int, mlx_taken: Callable[..., float]
) -> None:
    """Reading prompts is the most, or decoding; the second is two decode batches, the last one four of a
    prompt's samples at a time.
    """
    folder = base_folder("tiny")
    model = engines.get("mlx").load(folder)
    settings = {
        "stop": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": 0,
        "max_tokens": tokens,
        "samples": samples,
        "token_budget": budget,
    }
    taken = mlx_taken(lambda: list(decoding.in_batches(model, [[5] * length] * prompts, **settings)))
    phases = plan._rollout(
        Training("mlx", size(folder), 0, True), [length] * prompts, samples, tokens, budget
    )
    assert most(phases, "rollout") == pytest.approx(taken, rel=0.1)


def test_prompts_that_are_answered_once_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """PPO normalises rewards on 256 prompts and evaluates all held-out ones, which may be larger rollouts
    than those of its steps.
    """
    monkeypatch.setattr(plan, "PROGRAM", {"mlx": 0.0, "torch": 0.0})
    given = [
        "model=tiny",
        "reward=[{function: exact_answer}]",
        "rollout.prompts=1",
        "train.batch_size=1",
        "train.grad_accumulation=1",
    ]
    none = ["data.limit=1", "data.eval_limit=1"]
    for engine in engines.available():
        (alone,), (held_out,), (normalised,) = (
            methods.plan(methods.load_recipe("demo_ppo", [*given, f"engine={engine}", *more]))
            for more in (none, ["data.limit=1"], ["data.limit=256", *none[1:]])
        )
        assert (
            min(held_out.parts["cache"], normalised.parts["cache"]) > 10 * alone.parts.get("cache", 0)
            and "rollout" in held_out.phase
        )
        assert any("rollout.token_budget=" in less for less in held_out.advice)
        assert alone.parts.get("cache", 0) < 0.01
        # the moments come with the first update
        assert normalised.parts["optimizer"] == 0 < held_out.parts["optimizer"]


@pytest.mark.parametrize("engine", engines.available())
def test_held_out_answers_are_measured_at_their_own_length(engine: str) -> None:
    """Few short prompts are trained on; the answers to many long ones are measured together, every prompt of
    them another.
    """
    recipe = methods.load_recipe(
        "demo_ppo",
        ["model=tiny", "reward=[{function: checker}]", "rollout.prompts=1", "rollout.token_budget=512"],
    )
    of = size(base_folder("tiny"))
    alone, short, long = (
        plan._rollouts(
            recipe, engine, of, plan.PromptLengths(10, [10], held_out), [], ppo.algorithm(recipe), "logprobs"
        ).total_gb
        for held_out in ([], [10] * 64, [400] * 64)
    )
    rows = recipe.train.batch_size * 4
    packed = rows * (400 + recipe.rollout.max_tokens) if engine == "torch" else None
    training = Training(engine, of, of.parameters, False, reference=True)
    read = training.forward(Shape(rows, 440, 0, packed))
    assert long == pytest.approx(plan.PROGRAM[engine] + 2 * training.weights() + training.optimizer() + read)
    assert alone < short < long


def test_shorter_answers_are_no_advice_where_longer_prompts_would_follow() -> None:
    for length, offered in ((472, True), (473, False)):
        (found,) = methods.plan(
            methods.load_recipe(
                "demo_ppo",
                ["model=tiny", "reward=[{function: checker}]", f"data.max_length={length}", "data.limit=64"],
            )
        )
        assert any("max_tokens" in less for less in found.advice) == offered


def test_the_reference_reads_training_rows_once_where_their_states_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In batches as large as an evaluation's; in a single epoch they are computed step by step."""
    given = [
        "model=tiny",
        "data.source=embedded/tasks",
        "data.limit=64",
        "data.eval_limit=1",
        "train.batch_size=4",
        "data.clean=null",
    ]
    seen: list[tuple[str, dict[str, float]]] = []
    peak = plan.peak
    monkeypatch.setattr(plan, "peak", lambda *given: (seen.extend(given[-1]), peak(*given))[1])
    for epochs in (1, 2):
        seen.clear()
        (found,) = methods.plan(
            methods.load_recipe("06_kl_sft", [*given, f"train.epochs={epochs}", "engine=auto"])
        )
        assert bool(seen) == (epochs == 2)
    training = Training(found.engine, size(base_folder("tiny")), 0, True)
    read = [training.forward(Shape(16, length, 0)) for length in range(8, 129, 8)]
    assert max(parts["activations"] for _, parts in seen) in read and {name for name, _ in seen} == {
        "as the reference's states are computed"
    }


def test_much_memory_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_posttrain.engines import process

    found = {}
    for gb in (64, 0.01):
        monkeypatch.setattr(process, "memory", lambda gb=gb: (int(gb * 2**30), 0))
        (found[gb],) = methods.plan(methods.load_recipe("demo_sft", ["data.limit=64"]))
    assert "may not fit" not in found[64].line()
    line = found[0.01].line()
    assert (
        "may not fit; with less: train.batch_size=" in line
        and ", or train.gradient_checkpointing=true (" in line
    )
    assert all(f"with less: {less}" in found[64].text() for less in found[64].advice)


def test_the_longest_rows_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_posttrain.engines import process

    recipe = methods.load_recipe("demo_sft", ["data.limit=64", "engine=auto"])
    of = size(base_folder("tiny"))
    training = Training(engines.get("auto").name, of, of.parameters, False)
    for gb, most in ((64, of.context), (0.5, 0)):
        memory = int(gb * 2**30) + int(2**30 * plan.PROGRAM[training.engine])
        monkeypatch.setattr(process, "memory", lambda memory=memory: (memory, 0))
        (found,) = methods.plan(recipe)
        assert found.longest is not None
        tokens, rows = found.longest
        assert rows == recipe.train.batch_size and f"{rows} in a batch: {tokens:,} tokens" in found.text()
        if most:
            assert tokens == most
            continue
        fitting, next_to_it = (
            plan.peak("", replace(training, batches=[Shape(rows, n, rows * n)]), 1, (1, 1)).fits
            for n in (tokens, tokens + plan.ROW_STEP)
        )
        assert 0 < tokens < (of.context or 0) and fitting and not next_to_it


def llama_folder(folder: Path, tied: bool) -> Path:
    """A random Llama with grouped-query attention: 3 layers of width 96, 6 heads, 2 key heads."""
    from safetensors.numpy import save_file

    width, inner, heads, keys, vocabulary = 96, 256, 6, 2, 512
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": 3,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocabulary,
        "eos_token_id": 0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, width)
    square, narrow = (width, width), (width // heads * keys, width)
    for i in range(3):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}self_attn.{n}_proj.weight": shape
            for n, shape in (("q", square), ("k", narrow), ("v", narrow), ("o", square))
        }
        shapes |= {f"{at}mlp.{n}_proj.weight": (inner, width) for n in ("gate", "up")} | {
            f"{at}mlp.down_proj.weight": (width, inner)
        }
        shapes |= {f"{at}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    rng = np.random.default_rng(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = {n: (0.02 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_grouped_queries_and_gates_are_read_from_the_files(tmp_path: Path) -> None:
    of = size(llama_folder(tmp_path / "untied", tied=False))
    assert of.key_width == 32 and of.gated and not of.tied and of.inner == 256
    assert (
        plan.cache(of, 100, "float32") == 2 * plan.cache(of, 100, "bfloat16") == 2 * 3 * 32 * 100 * 4 / 2**30
    )
    tied = size(llama_folder(tmp_path / "tied", tied=True))
    assert tied.tied and of.parameters - tied.parameters == 512 * 96
    gpt = size(base_folder("tiny"))
    assert gpt.key_width == gpt.width and not gpt.gated and gpt.tied


def test_half_the_bytes_in_bfloat16(tmp_path: Path) -> None:
    batch = Shape(4, 128, 256)
    of = size(llama_folder(tmp_path / "llama", tied=True))
    full = Training("mlx", of, of.parameters, False, batches=[batch], reference=True)
    half = replace(full, dtype="bfloat16")
    for part in ("activations", "forward"):
        assert getattr(half, part)(batch) == getattr(full, part)(batch) / 2
    for part in ("weights", "reference_copy", "optimizer", "gradients", "head"):
        assert getattr(half, part)() == getattr(full, part)() / 2
    # the loss is computed in float32, its cached gradients in the model's dtype
    assert full.logits(batch) - half.logits(batch) == pytest.approx(2 * 256 * 512 / 2**30)
    lora = replace(half, trained=1000, adapter=True, adapted=[(96, 96)] * 3)
    assert lora.optimizer() == replace(lora, dtype="float32").optimizer()  # and so are adapters
    assert lora.activations(batch) - replace(lora, adapted=()).activations(batch) == pytest.approx(
        4 * 3 * 4 * 128 * 96 / 2**30
    )


def test_what_dora_keeps_by_hand() -> None:
    batch = Shape(4, 128, 256)
    layers = adapted(gpt2(), AdapterSpec(kind="dora", rank=16))
    assert len(layers) == 36 and layers[:3] == [(768, 2304), (768, 768), (3072, 768)]
    lora = Training("mlx", gpt2(), 1_622_016, True, batches=[batch], adapted=layers)
    dora = replace(lora, dora=True)
    outputs = 12 * (2304 + 768 + 768) * 4 * 128
    assert dora.activations(batch) - lora.activations(batch) == pytest.approx(4 * outputs / 2**30)
    # of a quantised base the weights that it dequantises too: 8 * 768^2 in each block
    assert replace(dora, bits=4).activations(batch) - dora.activations(batch) == pytest.approx(
        4 * 12 * 8 * 768**2 / 2**30
    )


def test_no_head_has_all_logits_at_once() -> None:
    batch = Shape(16, 512, 8192)
    untied = replace(gpt2(), tensors={**gpt2().tensors, "lm_head.weight": (50257, 768)})
    lora = Training("mlx", untied, 1_622_016, True)
    packed = replace(lora, size=replace(untied, packed_bytes=1, packed_head=True))
    assert lora.logits(batch) == replace(lora, bits=4).logits(batch) == packed.logits(batch) < 0.3


def test_long_rows_keep_no_attention_weights() -> None:
    """12 heads: of 1,024 tokens 48 MB of weights a block, of 4,096 768 MB, taken 192 queries at a time."""
    llama = replace(gpt2(), model_type="llama", tensors={"model.layers.0.mlp.gate_proj.weight": (1, 1)})
    one = Training("mlx", llama, 1, True)
    short, long, twice = (one.activations(Shape(1, n, n)) for n in (1024, 4096, 8192))
    width, all_pairs = 4 * short, 4 * 12 * 4096**2 / 2**30
    assert long < width + 5 * all_pairs * 192 / 4096
    assert twice < 2.3 * long
    assert replace(one, engine="torch")._queries(Shape(1, 4096, 1)) == 1


def test_a_guess_is_called_one() -> None:
    known = Training("mlx", gpt2(), 1, True)
    llama = replace(known, size=replace(gpt2(), model_type="llama"))
    assert known.sure and replace(known, dora=True).sure and llama.sure
    other = replace(known, size=replace(gpt2(), model_type="qwen3"))
    for guess in (other, replace(llama, engine="torch"), replace(known, engine="torch", dora=True)):
        assert not guess.sure
        assert "a guess" in plan.peak("run", replace(guess, batches=[Shape(1, 8, 8)]), 1, (1, 1)).text()


def measured(
    folder: Path, mode: str, rows: int, length: int, dtype: str = "float32", shared: int = 0, **more: bool
) -> tuple[float, float]:
    """(predicted, measured) peak in GB of a training step on MLX: full, lora, dora, or a q before those for a
    base of 4 bits. shared: tokens that all rows begin with.
    """
    bits = 4 if mode.startswith("q") else None
    engine = engines.get("mlx")
    gc.collect()  # what earlier tests left would count
    model = engine.load(
        folder,
        dtype=dtype,
        quantize=bits,
        group_size=32,
        gradient_checkpointing=more.get("checkpointing", False),
    )
    of = size(folder)
    training = Training("mlx", of, of.parameters, False, dtype, bits, 32, **more)
    if mode != "full":
        spec = AdapterSpec(kind=mode.lstrip("q"), rank=8)
        model.add_adapter(spec, seed=0)
        trained, layers = adapter_parameters(of, spec), adapted(of, spec)
        training = replace(training, trained=trained, adapter=True, adapted=layers, dora=spec.kind == "dora")
    assert (
        of.parameters + (training.trained if training.adapter else 0),
        training.trained,
    ) == model.parameter_counts()
    rng = np.random.default_rng(0)
    begun = max(shared, length // 4)
    tokens = rng.integers(1, of.vocabulary - 1, (rows, length))
    tokens[:, :shared] = tokens[0, :shared]
    trained_here = (False,) * begun + (True,) * (length - begun)
    batch = collate([Example(tuple(row.tolist()), trained_here) for row in tokens], model.context)
    (shape,) = shapes([batch], training.packs)
    assert (shape.packed is not None) == (shared > 0)
    trainer = engine.trainer(model, AdamW())
    trainer.step(sft.loss, [batch], 1e-4)
    engine.reset_memory()
    trainer.step(sft.loss, [batch], 1e-4)
    predicted = plan.peak("run", replace(training, batches=[shape]), 1, (1, 1)).total_gb
    return predicted, engine.memory()["peak_gb"]


@pytest.mark.parametrize(
    "mode",
    ["full", "lora", "dora", *(pytest.param(m, marks=pytest.mark.exhaustive) for m in ("qlora", "qdora"))],
)
def test_prediction_against_training(mode: str) -> None:
    """MLX counts its own arrays, so the embedded model will do; of torch only a whole process can be
    measured.
    """
    pytest.importorskip("mlx")
    predicted, peak = measured(base_folder("tiny"), mode, 4, 256)
    assert predicted == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(("rows", "length"), [(8, 128), (32, 128)])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_prediction_of_packed_rows(mode: str, rows: int, length: int) -> None:
    """Blocks keep what they did of the packed tokens; the larger batch's are lean."""
    pytest.importorskip("mlx")
    predicted, peak = measured(base_folder("tiny"), mode, rows, length, shared=length // 2)
    assert predicted == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    ("mode", "tied"), [("full", False), ("lora", True), ("dora", True), ("qlora", True), ("qlora", False)]
)
def test_prediction_against_training_of_a_llama(mode: str, tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("mlx")
    predicted, peak = measured(llama_folder(tmp_path / "llama", tied), mode, 8, 128)
    assert predicted == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("mode", ["lora", pytest.param("full", marks=pytest.mark.exhaustive)])
def test_prediction_against_training_of_long_rows(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads of 2,048 tokens, whose attention weights would be 32 MB a block, in chunks of 4 MB."""
    pytest.importorskip("mlx")
    from mlx_posttrain.engines import sizes

    monkeypatch.setattr(sizes, "ATTENTION_ABOVE", 2**24)
    monkeypatch.setattr(sizes, "ATTENTION_CHUNK", 2**22)
    folder = random_model(tmp_path / "llama", {**SMALL, "model_type": "llama", "num_attention_heads": 2})
    predicted, peak = measured(folder, mode, 1, 2048)
    assert predicted == pytest.approx(peak, rel=0.15)


def test_prediction_with_a_packed_head(tmp_path: Path) -> None:
    """A folder as mlx-lm's converter makes it, with many logits."""
    pytest.importorskip("mlx")
    from mlx_posttrain.convert.weights import convert

    random_model(tmp_path / "plain", {**SMALL, "vocab_size": 16_384}, "bfloat16", base_folder("tiny"))
    convert(tmp_path / "plain", tmp_path / "q4", quantize=4)
    predicted, peak = measured(tmp_path / "q4", "lora", 8, 128)
    assert predicted == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    ("mode", "dtype", "checkpointing"),
    [
        pytest.param("full", "bfloat16", False, marks=pytest.mark.exhaustive),
        pytest.param("lora", "bfloat16", False, marks=pytest.mark.exhaustive),
        ("full", "float32", True),
    ],
)
def test_prediction_against_training_in_half_precision_and_with_checkpoints(
    mode: str, dtype: str, checkpointing: bool
) -> None:
    pytest.importorskip("mlx")
    predicted, peak = measured(base_folder("tiny"), mode, 4, 256, dtype, checkpointing=checkpointing)
    assert predicted == pytest.approx(peak, rel=0.2)


KL_SFT = ["model=tiny", "data.source=embedded/tasks", "data.limit=64"]
RUNS = {
    "sft": ("demo_sft", ["data.limit=64", "data.eval_limit=16", "train.steps=3"]),
    "kl": ("06_kl_sft", [*KL_SFT, "train.steps=3"]),
    # the pass that computes the reference's states is the peak
    "kl states": (
        "06_kl_sft",
        [
            *KL_SFT,
            "data.holdout=1",
            "data.eval_limit=1",
            "data.clean=null",
            "adapter.rank=8",
            "train.lr=1e-3",
            "train.batch_size=4",
            "train.gradient_checkpointing=true",
        ],
    ),
    "ppo": (
        "demo_ppo",
        [
            "model=tiny",
            "reward=[{function: checker}]",
            "train.steps=1",
            "rollout.prompts=8",
            "train.batch_size=8",
        ],
    ),
}
QUICK = {("sft", "torch"), ("sft", "mlx")}


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        pytest.param(name, engine, marks=() if (name, engine) in QUICK else pytest.mark.exhaustive)
        for name in RUNS
        for engine in engines.available()
    ],
)
def test_every_run_says_it_first_and_comes_near(name: str, engine: str, tmp_path: Path) -> None:
    """A real run of either engine, in a process of its own, as torch's memory is the process's."""
    recipe, given = RUNS[name]
    settings = [f"engine={engine}", *given, f"output={tmp_path / 'run'}", "sample.count=0"]
    done = subprocess.run(command("run", recipe, *settings), capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    (told,) = [i for i, line in enumerate(lines) if line.startswith("memory: about ")]
    assert told < min(i for i, line in enumerate(lines) if "step 0" in line)
    measured = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    peak = max(m["peak_gb"] for m in measured if "peak_gb" in m)
    assert float(lines[told].split()[2]) == pytest.approx(peak, rel=0.2), lines[told]


def test_quantised_folders_count_what_they_stand_for(tmp_path: Path) -> None:
    pytest.importorskip("mlx")
    from mlx_posttrain.convert.weights import convert

    convert("tiny", tmp_path / "q4", to="mlx", quantize=4)
    of = size(tmp_path / "q4")
    model = engines.get("mlx").load(tmp_path / "q4")
    model.add_adapter(AdapterSpec(rank=4), seed=0)
    trained = adapter_parameters(of, AdapterSpec(rank=4))
    assert (of.parameters + trained, trained) == model.parameter_counts()
    training = Training("mlx", of, trained, True)
    assert training.weights() < 0.5 * replace(training, size=size(base_folder("tiny"))).weights()


def test_targets_that_match_nothing_are_an_error_here_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no layer is called q_proj"):
        methods.plan(methods.load_recipe("demo_lora", ["adapter.targets=[q_proj]", "data.limit=16"]))


def test_an_adapter_to_start_from_decides_its_own_size(tmp_path: Path) -> None:
    engine = engines.get("auto")
    model = engine.load(base_folder("tiny"))
    model.add_adapter(AdapterSpec(rank=3), seed=0)
    model.save(tmp_path / "adapter")
    (found,) = methods.plan(
        methods.load_recipe(
            "demo_lora", [f"adapter.path={tmp_path / 'adapter'}", "adapter.rank=32", "data.limit=16"]
        )
    )
    assert found.trained == model.parameter_counts()[1]


def test_a_size_that_cannot_be_told_stops_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> plan.Plan:
        raise UserError("config.json names no width")

    plan.print_plan(fail)
    assert "memory: not planned: config.json names no width" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyError, RecursionError, AssertionError])
def test_a_defect_of_the_planner_stops_no_run(
    error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that says where; what ends a program is not held up."""

    def fail() -> plan.Plan:
        raise error("of the planner")

    line = fail.__code__.co_firstlineno + 1
    plan.print_plan(fail)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("memory: not planned, by a defect of the planner (")
    assert f"{error.__name__} at test_plan.py:{line}: " in said and "of the planner" in said

    def interrupt() -> plan.Plan:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.print_plan(interrupt)


def test_a_run_goes_on_without_its_plan(
    random_gpt2: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plan, "peak", lambda *given: 1 // 0)
    small = ["train.steps=1", "sample.count=0", "data.holdout=6"]
    given = [f"model={random_gpt2}", f"data.source={rows_file}", f"output={tmp_path / 'run'}", *small]
    assert run_recipe("01_sft", *given)["loss"] > 0
    assert "memory: not planned, by a defect of the planner (ZeroDivisionError" in capsys.readouterr().err


def test_command_line_and_pipeline(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "demo_lora", "data.limit=64", "--json"])
    (found,) = json.loads(done.stdout[done.stdout.index("[") :])
    assert found["steps"] == 4 and found["trained"] < 0.1 * found["parameters"] and found["total_gb"] > 0
    stages = """
method: pipeline
stages:
  sft: {recipe: demo_sft, set: {data.limit: 64}}
  reward: {recipe: demo_reward, set: {model: "{sft}", data.limit: 64}}
  ppo:
    recipe: demo_ppo
    set: {model: "{sft}", reward: [{model: "{reward}"}], critic.kind: separate, data.limit: 64}
"""
    (tmp_path / "all.yaml").write_text(stages)
    plans = methods.plan(methods.load_recipe(str(tmp_path / "all.yaml"), [f"output={tmp_path / 'out'}"]))
    # models that are yet to be made have the size of what they start from
    assert [p.name for p in plans] == ["sft", "reward", "ppo"]
    assert plans[2].parts["critic"] > 0 and plans[2].parts["reward"] > 0
    assert not (tmp_path / "out").exists()


def test_a_report_trains_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("method: report\nruns: {a: tiny}\n")
    with pytest.raises(UserError, match="trains nothing"):
        methods.plan(methods.load_recipe(str(tmp_path / "r.yaml")))


def test_on_metal_the_measure_is_what_metal_advises(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the unused buffers that MLX keeps beside the arrays."""
    from mlx_posttrain.engines import probe

    training = Training("mlx", gpt2(), gpt2().parameters, False, batches=[Shape(8, 256, 2048)])
    elsewhere = plan.peak("x", training, 1, (1, 1))
    facts = {"max_recommended_working_set_size": 8 * 2**30}
    monkeypatch.setattr(probe, "mlx_devices", lambda: probe.Devices(facts, "gpu"))
    found = plan.peak("x", training, 1, (1, 1))
    assert (found.memory_gb, found.metal, elsewhere.metal) == (8, True, False)
    unused = found.parts.pop("unused")
    # what the phase lets go, if that is below a quarter of the working set
    kept = sum(found.parts[part] for part in ("activations", "logits", "gradients"))
    assert unused == pytest.approx(kept) and unused < 2
    assert found.parts == elsewhere.parts
    assert "of Metal's working set of 8 GB)" in found.line()
    assert "Metal advises at most 8.0 GB" in found.text()
    facts["max_recommended_working_set_size"] = 3 * 2**30
    small = plan.peak("x", training, 1, (1, 1))
    assert small.parts["unused"] == 0.75 and "that may not fit" in small.line()
    torch = plan.peak("x", replace(training, engine="torch"), 1, (1, 1))
    assert not torch.metal and "unused" not in torch.parts
