"""What a plan predicts: counts worked by hand, parts that move as they must, and the peak of real training."""

import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mlx_posttrain import engines, loading, plan
from mlx_posttrain import recipe as recipes
from mlx_posttrain.cli import app
from mlx_posttrain.data.batches import collate
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import AdamW, AdapterSpec
from mlx_posttrain.errors import UserError
from mlx_posttrain.methods import sft


def gpt2() -> plan.Size:
    """GPT-2 124M without its weights."""
    d = 768
    tensors: dict[str, tuple[int, ...]] = {"wte.weight": (50257, d), "wpe.weight": (1024, d), "ln_f.weight": (d,), "ln_f.bias": (d,)}
    for i in range(12):
        for name, shape in (("attn.c_attn", (d, 3 * d)), ("attn.c_proj", (d, d)), ("mlp.c_fc", (d, 4 * d)), ("mlp.c_proj", (4 * d, d))):
            tensors |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        tensors |= {f"h.{i}.{ln}.{part}": (d,) for ln in ("ln_1", "ln_2") for part in ("weight", "bias")}
    return plan.Size(12, d, 4 * d, 12, 50257, 1024, "gpt2", tensors)


def test_counts_of_gpt2() -> None:
    assert gpt2().parameters == 124_439_808
    assert plan.adapter_parameters(gpt2(), AdapterSpec(rank=16)) == 1_622_016
    # DoRA: one magnitude for each output of c_attn (2304), attention's c_proj (768) and the MLP's (768), in 12 blocks
    assert plan.adapter_parameters(gpt2(), AdapterSpec(kind="dora", rank=16)) == 1_622_016 + 12 * (2304 + 768 + 768)


def test_parts_by_hand() -> None:
    batch = plan.Shape(4, 128, 256)
    full = plan.Training("mlx", gpt2(), 124_439_808, False, batches=[batch])
    assert full.weights() == pytest.approx(124_439_808 * 4 / 2**30)
    assert full.optimizer() == 2 * full.weights() == 2 * full.gradients()
    assert full.reference_copy() == 0 and replace(full, reference=True).reference_copy() == full.weights()
    lora = replace(full, trained=1_622_016, adapter=True, reference=True)
    assert lora.reference_copy() == 0 and lora.head() == 0  # the same weights are the reference, and the head does not train
    assert lora.weights() == pytest.approx((124_439_808 + 1_622_016) * 4 / 2**30)
    four_bits = replace(lora, bits=4)
    packed = 12 * 12 * 768**2  # the linear layers
    assert lora.weights() - four_bits.weights() == pytest.approx(packed * (4 - 0.5 - 0.125) / 2**30)
    half = replace(full, batches=[plan.Shape(2, 128, 128)])
    assert half.activations(half.batches[0]) == pytest.approx(full.activations(batch) / 2)
    assert replace(full, checkpointing=True, engine="torch").activations(batch) < full.activations(batch) / 2


def test_checkpointed_blocks_are_never_lean() -> None:
    """Recomputing whole blocks takes the lean ones off: a larger batch keeps more, also beyond the bound from which blocks are lean."""
    one = plan.Training("mlx", gpt2(), 124_439_808, False, batches=[], checkpointing=True)
    sizes = [one.activations(plan.Shape(rows, 256, 64)) for rows in range(1, 13)]
    assert sizes == sorted(sizes) and sizes[-1] == pytest.approx(12 * sizes[0])


def test_logits_do_not_grow_with_the_batch() -> None:
    training = plan.Training("mlx", gpt2(), 124_439_808, False)
    assert training.logits(plan.Shape(64, 1024, 60_000)) == training.logits(plan.Shape(8, 128, 1024)) < 0.2


def test_the_peak_is_the_largest_moment() -> None:
    small = plan.peak("run", plan.Training("mlx", gpt2(), 124_439_808, False, batches=[plan.Shape(1, 32, 64)]), 1, (1, 1))
    large = plan.peak("run", plan.Training("mlx", gpt2(), 124_439_808, False, batches=[plan.Shape(8, 1024, 4096)]), 1, (1, 1))
    assert small.phase == "in the update" and large.phase == "as the backward pass begins"
    assert large.total_gb == pytest.approx(sum(large.parts.values())) and large.total_gb > 2 * small.total_gb


def test_much_memory_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_posttrain import doctor

    training = plan.Training("mlx", gpt2(), 124_439_808, False, batches=[plan.Shape(8, 256, 512)])
    monkeypatch.setattr(doctor, "memory", lambda: (64 * 2**30, 0))
    assert "may not fit" not in plan.peak("run", training, 1, (1, 1)).line()
    monkeypatch.setattr(doctor, "memory", lambda: (3 * 2**30, 0))
    line = plan.peak("run", training, 1, (1, 1)).line()
    assert "may not fit" in line and "train.batch_size" in line and "train.gradient_checkpointing=true" in line


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_prediction_against_training(adapter: bool) -> None:
    """MLX counts its own arrays, so the embedded model will do; of torch only a whole process can be measured."""
    pytest.importorskip("mlx")
    folder = loading.base_folder("tiny")
    gc.collect()  # what earlier tests left would count
    engine = engines.get("mlx")
    model = engine.load(folder)
    of = plan.size(folder)
    trained = of.parameters
    if adapter:
        model.add_adapter(AdapterSpec(rank=8), seed=0)
        trained = plan.adapter_parameters(of, AdapterSpec(rank=8))
    assert (of.parameters + (trained if adapter else 0), trained) == model.parameter_counts()
    rng = np.random.default_rng(0)
    row = Example(tuple(rng.integers(1, 4000, 256).tolist()), (False,) * 64 + (True,) * 192)
    batch = collate([row] * 16, model.context)
    trainer = engine.trainer(model, AdamW())
    trainer.step(sft.loss, [batch], 1e-4)
    engine.reset_memory()
    trainer.step(sft.loss, [batch], 1e-4)
    predicted = plan.peak("run", plan.Training("mlx", of, trained, adapter, batches=plan.shapes([batch])), 1, (1, 1)).total_gb
    assert predicted == pytest.approx(engine.memory()["peak_gb"], rel=0.3)


@pytest.mark.parametrize("engine", engines.available())
def test_every_run_says_it_first_and_comes_near(engine: str, tmp_path: Path) -> None:
    """A real run of either engine, in a process of its own, as torch's memory is the process's."""
    command = [
        sys.executable,
        "-m",
        "mlx_posttrain",
        "run",
        "demo_sft",
        f"engine={engine}",
        "data.limit=64",
        "data.eval_limit=16",
        "train.steps=3",
    ]
    done = subprocess.run([*command, f"output={tmp_path / 'run'}", "sample.count=0"], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    (told,) = [i for i, line in enumerate(lines) if line.startswith("memory: about ")]
    assert told < min(i for i, line in enumerate(lines) if "step 0" in line)
    measured = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    peak = max(m["peak_gb"] for m in measured if "peak_gb" in m)
    assert float(lines[told].split()[2]) == pytest.approx(peak, rel=0.3), lines[told]


def test_quantised_folders_count_what_they_stand_for(tmp_path: Path) -> None:
    pytest.importorskip("mlx")
    from mlx_posttrain.convert.weights import convert

    convert("tiny", tmp_path / "q4", to="mlx", quantize=4)
    of = plan.size(tmp_path / "q4")
    model = engines.get("mlx").load(tmp_path / "q4")
    model.add_adapter(AdapterSpec(rank=4), seed=0)
    trained = plan.adapter_parameters(of, AdapterSpec(rank=4))
    assert (of.parameters + trained, trained) == model.parameter_counts()
    training = plan.Training("mlx", of, trained, True)
    assert training.weights() < 0.5 * replace(training, size=plan.size(loading.base_folder("tiny"))).weights()


def test_targets_that_match_nothing_are_an_error_here_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no layer is called q_proj"):
        plan.of_recipe(recipes.load("demo_lora", ["adapter.targets=[q_proj]", "data.limit=16"]))


def test_an_adapter_to_start_from_decides_its_own_size(tmp_path: Path) -> None:
    engine = engines.get("auto")
    model = engine.load(loading.base_folder("tiny"))
    model.add_adapter(AdapterSpec(rank=3), seed=0)
    model.save(tmp_path / "adapter")
    (found,) = plan.of_recipe(recipes.load("demo_lora", [f"adapter.path={tmp_path / 'adapter'}", "adapter.rank=32", "data.limit=16"]))
    assert found.trained == model.parameter_counts()[1]


def test_a_size_that_cannot_be_told_stops_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> plan.Plan:
        raise UserError("config.json names no width")

    plan.tell(fail)
    assert "memory: not planned: config.json names no width" in capsys.readouterr().err


def test_command_line_and_pipeline(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "demo_lora", "data.limit=64", "--json"])
    (found,) = json.loads(done.stdout[done.stdout.index("[") :])
    assert found["steps"] == 4 and found["trained"] < 0.1 * found["parameters"] and found["total_gb"] > 0
    stages = """
method: pipeline
stages:
  sft: {recipe: demo_sft, set: {data.limit: 64}}
  reward: {recipe: demo_reward, set: {model: "{sft}", data.limit: 64}}
  ppo: {recipe: demo_ppo, set: {model: "{sft}", reward: [{model: "{reward}"}], data.limit: 64}}
"""
    (tmp_path / "all.yaml").write_text(stages)
    plans = plan.of_recipe(recipes.load(str(tmp_path / "all.yaml"), [f"output={tmp_path / 'out'}"]))
    assert [p.name for p in plans] == ["sft", "reward", "ppo"]  # models that are yet to be made have the size of what they start from
    assert plans[2].parts["critic"] > 0 and plans[2].parts["reward"] > 0
    assert not (tmp_path / "out").exists()


def test_a_report_trains_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("method: report\nruns: {a: tiny}\n")
    with pytest.raises(UserError, match="trains nothing"):
        plan.of_recipe(recipes.load(str(tmp_path / "r.yaml")))
