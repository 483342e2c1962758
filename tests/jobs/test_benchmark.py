"""The latency harness: its clock against torch's clock, its statistics, its modes, and a benchmark that resumes."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import small_transformers
import torch
import unets
from small_model import write_pipeline
from torch.utils.benchmark import Timer
from typer.testing import CliRunner

import prunekit as pk
from prunekit.cli import app
from prunekit.core.registry import denoiser_of
from prunekit.jobs.bench.bench_job import bench
from prunekit.jobs.bench.bench_models import choose, random_pipeline, random_unet
from prunekit.jobs.bench.bench_recipe import BenchRecipe, BenchRecipeError, load_bench_recipe, reduced
from prunekit.jobs.bench.bench_rows import Piece, Subject, row_of
from prunekit.jobs.bench.bench_table import markdown
from prunekit.jobs.bench.modes import in_mode, refill
from prunekit.jobs.bench.runner import Bench
from prunekit.jobs.bench.workloads import denoiser_calls
from prunekit.measuring import clock
from prunekit.measuring.clock import peak_memory, timed_inputs
from prunekit.measuring.interleaved import WarmUp, measure, paired_ratio
from prunekit.methods.budget import unaligned
from prunekit.models import load_unet_on_meta

RECIPE = Path(__file__).parents[2] / "recipes" / "bench_sd21_768.yaml"
CPU = torch.device("cpu")
QUICK = WarmUp(max_seconds=1.0)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# the statistics


@pytest.mark.parametrize(("count", "low", "high"), [(1, 1, 1), (5, 1, 5), (9, 2, 8), (30, 10, 21), (100, 40, 61)])
def test_the_interval_of_a_median_is_the_binomial_one(count, low, high):
    ratio = paired_ratio(range(count, 0, -1), [1] * count)
    assert (ratio.low, ratio.high, ratio.count) == (low, high, count)
    assert ratio.value == (count + 1) / 2


def test_the_interval_covers_the_true_median():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(300):
        ratio = paired_ratio((1 + 0.1 * torch.randn(15, generator=generator)).tolist(), [1.0] * 15)
        covered += ratio.low <= 1 <= ratio.high
    assert covered >= 0.93 * 300


def test_quantiles_are_numpys():
    arm = measure({"sum": lambda: sum(range(1000))}, repeats=20, warm_up=QUICK).arms["sum"]
    exact = torch.tensor(arm.seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64))
    assert [arm.p50, arm.p90, arm.p99] == pytest.approx(exact.tolist())
    assert arm.count == 20


# the clock


def waits(milliseconds):
    """Return a function that sleeps, because a busy machine changes its duration little."""
    return lambda: time.sleep(milliseconds / 1000)


def test_it_agrees_with_torchs_own_timer():
    one = waits(3)
    pairs = []
    for _ in range(5):  # a busy machine may disturb one of the two, but not every time
        measured = measure({"one": one, "four": waits(12)}, repeats=15, warm_up=QUICK)
        theirs = Timer("one()", globals={"one": one}).blocked_autorange(min_run_time=0.3).median
        within = 0.3 + measured.noise.distance
        pairs.append((measured.arms["one"].p50 / theirs, measured.ratio("four").value / 4, within))
        if pairs[-1][:2] == pytest.approx((1, 1), rel=within):
            break
    else:
        raise AssertionError(pairs)
    assert measured.calls >= 1 and any("noise floor" in line for line in measured.lines())


def test_samples_before_it_has_settled_do_not_count():
    calls = 0

    def slow_at_first():
        nonlocal calls
        calls += 1
        time.sleep(0.002 + 0.05 * 0.6**calls)

    measured = measure({"it": slow_at_first}, repeats=5)
    assert measured.is_warm and measured.warmup_rounds > 8 and measured.arms["it"].p50 < 0.004
    calls = 0
    assert not measure({"it": slow_at_first}, repeats=1, warm_up=WarmUp(max_rounds=3)).is_warm


def test_arms_take_turns():
    order = []
    arms = {name: (lambda name=name: (order.append(name), time.sleep(3e-4))) for name in ("a", "b")}
    measure(arms, repeats=40, warm_up=WarmUp(max_rounds=1))
    rounds = [tuple(order[i : i + 3]) for i in range(len(order) - 120, len(order), 3)]
    assert all(sorted(names) == ["a", "a", "b"] for names in rounds)
    assert len(set(rounds)) == 3
    assert all(first == second[::-1] for first, second in zip(rounds[::2], rounds[1::2], strict=True))


def test_peak_memory_is_of_the_call():
    kept = torch.ones(1 << 24)  # 64 MB that are allocated before
    peak = peak_memory(lambda: torch.ones(1 << 24) + kept, CPU)
    if peak is None:
        pytest.skip("this system does not tell")
    assert 0.9 * 2 * kept.nbytes < peak < 1.3 * 2 * kept.nbytes


@pytest.mark.parametrize("status", ["", "VmRSS: 1 kB\n"])  # neither size is reported, or no peak after the call
def test_peak_memory_is_unknown_where_the_system_does_not_tell(status, tmp_path, monkeypatch):
    (tmp_path / "status").write_text(status)
    monkeypatch.setattr(clock, "STATUS", tmp_path / "status")
    monkeypatch.setattr(clock, "RESET", tmp_path / "reset")
    assert peak_memory(lambda: None, CPU) is None
    monkeypatch.setattr(clock, "RESET", tmp_path / "nowhere" / "reset")
    assert peak_memory(lambda: None, CPU) is None


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(ValueError, match="nothing to time"):
        measure({})
    with pytest.raises(ValueError, match="repeats=0"):
        measure({"it": int}, repeats=0)
    with pytest.raises(ValueError, match="choose cpu or cuda"):
        measure({"it": int}, device="meta")
    with pytest.raises(ValueError, match="no arm 'b'; the arms are a"):
        measure({"a": int}, repeats=1, warm_up=WarmUp(max_rounds=1)).ratio("b")


@needs_cuda
def test_cuda_times_agree_with_tritons():
    do_bench = pytest.importorskip("triton.testing").do_bench
    a = torch.randn(2048, 2048, device="cuda")
    ours = measure({"it": lambda: a @ a}, device="cuda").arms["it"].p50
    assert ours == pytest.approx(1e-3 * do_bench(lambda: a @ a, return_mode="median"), rel=0.15)


# the modes


@pytest.mark.long
@pytest.mark.parametrize("shape", unets.SHAPES)
def test_every_region_of_a_pruned_unet_is_compiled_as_one_graph(shape):
    dense = unets.build(shape)
    unet = pk.slice_unet(dense, pk.discover(dense, "all").random(0.6, seed=1)).requires_grad_(False)
    inputs = timed_inputs(unet, 1, 16, 7)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        eager = unet(**inputs).sample
        with in_mode(unet, "compiled", inputs, backend=backend):
            assert unets.relative_error(unet(**inputs).sample, eager) < 1e-5
            made = len(graphs)
            unet(**inputs)
            assert len(graphs) == made  # nothing is compiled again
        assert made == len(denoiser_of(unet).regions(unet)) > 8  # more than torch's limit of recompilations
        assert torch.equal(unet(**inputs).sample, eager)
        assert all(module._compiled_call_impl is None for module in unet.modules())


def test_modes_that_cannot_be_are_refused():
    unet = unets.build("sd1")
    with pytest.raises(ValueError, match="choose eager, compiled or cuda_graph"), in_mode(unet, "fast", {}):
        pass
    with pytest.raises(ValueError, match="needs a CUDA device"), in_mode(unet, "cuda_graph", {}):
        pass


@pytest.mark.parametrize("family", ["sd2", "sdxl", "sd35", "flux", "qwen_image"])
def test_a_graphs_call_takes_the_values_of_another(family):
    model = unets.build(family) if family in unets.SHAPES else small_transformers.build(family)
    static, other = (timed_inputs(model, 2, 8, 5, seed=seed).map(torch.Tensor.clone) for seed in (0, 1))
    assert not torch.equal(next(static.tensors()), next(other.tensors()))
    refill(static, {**other, "return_dict": False})
    assert all(torch.equal(a, b) for a, b in zip(static.tensors(), other.tensors(), strict=True))


@needs_cuda
@pytest.mark.parametrize("shape", unets.SHAPES)
def test_a_cuda_graph_gives_the_eager_output(shape):
    unet = unets.build(shape).requires_grad_(False).cuda()
    inputs, others = (timed_inputs(unet, 2, 16, 7, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        eager = unet(**others).sample
        with in_mode(unet, "cuda_graph", inputs):
            assert unets.relative_error(unet(**others, return_dict=False)[0], eager) < 1e-4
        assert torch.equal(unet(**others).sample, eager)


# the recipe


def test_the_shipped_recipe():
    recipe = load_bench_recipe(RECIPE)
    budgets = {name: config.budget for name, config in recipe.architectures.items()}
    assert {0.85, 0.78, 0.66, 0.64} <= set(budgets.values()) and recipe.resolution == 768 and recipe.steps == 25
    unet_cells = [cell for cell in recipe.cells if cell.workload == "unet" and cell.architectures is None]
    assert {(cell.dtype, cell.mode) for cell in unet_cells} == {("bfloat16", "compiled"), ("float32", "eager")}
    assert all(cell.repeats >= 30 for cell in unet_cells)
    small = reduced(recipe)
    assert small.resolution == 256 and small.batch == 1 and {cell.mode for cell in small.cells} == {"eager"}
    unet = load_unet_on_meta("sd-2.1")
    for config in recipe.architectures.values():
        first, cost = choose(config, unet, 96, 77, recipe.seed)
        assert cost.dense_macs == 1_074_552_872_960 and config.budget - 1e-2 < cost.ratio(first) <= config.budget
        assert choose(config, unet, 96, 77, recipe.seed)[0] == first
        assert (config.choose == "depth") == (len(first.removed()) >= 10)
        assert config.align is None or not unaligned(first, config.align)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cells=[{workload: unet, mode: fast}]", "cells.0.mode"),
        ("modle=x", "modle"),
        ("architectures.dense={budget: 0.5}", "always there"),
        ("architectures.a={}", "either a budget or a path"),
        ("architectures.a={path: folder, align: 8}", "align goes with a budget"),
        ("cells=[{workload: unet, architectures: [b]}]", "'b'; there are dense, mixed_0.85"),
        ("job=prune", "it has no job: bench"),
    ],
)
def test_a_wrong_recipe_is_one_line(change, message):
    with pytest.raises(BenchRecipeError) as error:
        load_bench_recipe(RECIPE, [change])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_random_weights_give_a_whole_pipeline_of_sd1s_sizes():
    unet = unets.build("sd1", cross_attention_dim=768)
    pipeline = random_pipeline(unet, 0)
    assert sum(p.numel() for p in pipeline.text_encoder.parameters()) == 123_060_480  # the size of CLIP ViT-L/14's
    assert denoiser_calls(pipeline, 25) == 26
    with pytest.raises(ValueError, match="no text encoder is known"):
        random_pipeline(unets.build("sdxl"), 0)


def test_random_weights_keep_activations_in_range(monkeypatch):
    monkeypatch.setattr("prunekit.jobs.bench.bench_models.load_unet_on_meta", lambda model: unets.build("sd2", "meta"))
    unet, again = (random_unet("small", CPU, torch.float32, 0) for _ in range(2))
    with torch.no_grad():
        output = unet(**timed_inputs(unet, 1, 16, 7)).sample
    assert output.isfinite().all() and 1e-2 < output.std() < 1e2
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), again.parameters(), strict=True))


# the rows


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    content = {
        "job": "bench",
        "name": "small",
        "model": str(write_pipeline(folder / "model", layers=1)),
        "weights": "own",
        "device": "cpu",
        "resolution": 64,
        "guidance": 2.0,
        "steps": 2,
        "warmup_seconds": 0.05,
        "architectures": {"mixed": {"budget": 0.6}, "depth": {"budget": 0.7, "choose": "depth"}},
        "cells": [
            {"workload": "unet", "repeats": 3},
            {"workload": "unet", "repeats": 3, "dtype": "bfloat16", "memory_format": "channels_last"},
            {"workload": "sampling", "repeats": 2, "architectures": ["dense", "mixed"]},
            {"workload": "image", "repeats": 2, "architectures": ["mixed"]},
        ],
    }
    return BenchRecipe.model_validate(content)


@pytest.mark.long
def test_a_benchmark_goes_on_where_it_stopped(recipe, tmp_path):
    said = []
    work = Bench(recipe, tmp_path, said.append)
    assert work.run(minutes=0) is False and len(work.missing()) == len(work.pieces) == 9
    assert work.run() is True and not work.missing() and len(said) == 2 + 9
    rows = work.rows()
    assert [row["architecture"] for row in rows[:3]] == ["dense", "mixed", "depth"]
    for row in rows:
        assert row["p50"] <= row["p90"] <= row["p99"] and row["is_finite"] and row["peak_bytes"] != 0
        assert row["environment"]["torch"] == torch.__version__ and row["environment"]["threads"]
        assert row["unet_batch"] == 2 and row["unet_calls"] == (1 if row["workload"] == "unet" else 3)
        if row["architecture"] == "dense":
            assert row["latency_ratio"] is None and row["macs_ratio"] == 1
        else:
            assert row["latency_per_mac"] == pytest.approx(row["latency_ratio"]["value"] / row["macs_ratio"])
    times = {path: path.stat().st_mtime_ns for path in work.folder.glob("*.json")}
    changed = recipe.model_copy(deep=True)
    changed.cells[3].repeats = 1
    again = Bench(changed, tmp_path, said.append)
    assert [piece.title for piece in again.missing()] == ["mixed: image, float32, eager"]
    assert again.run() is True
    assert times.items() <= {path: path.stat().st_mtime_ns for path in work.folder.glob("*.json")}.items()
    page = markdown(rows, recipe)
    assert page.count("\n| mixed |") == 4 and "noise floor" in page
    path = next(iter(times))
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "environment": {**row["environment"], "torch": "1.0"}}))
    assert len(work.missing()) == 1  # figures of another version are measured again


def test_what_lost_macs_and_no_time_is_flagged(recipe):
    dense = Subject("dense", 100, 10, "a")
    same = Subject("same", 60, 10, "b")
    piece = Piece(recipe, recipe.cells[0], same, dense)
    arms = {"dense": waits(2), "same": waits(2)}
    facts = {"unet_calls": 1, "peak_bytes": None, "weight_bytes": 1, "is_finite": True}
    here = {"device": "here"}
    row = row_of(piece, measure(arms, 15, warm_up=QUICK), facts, here)
    assert row["not_faster"] and row["latency_per_mac"] > 1.2
    faster = {**arms, "dense": waits(8)}
    assert not row_of(piece, measure(faster, 15, warm_up=QUICK), facts, here)["not_faster"]
    more = dataclasses.replace(piece, subject=dataclasses.replace(same, macs=100))
    assert not row_of(more, measure(arms, 15, warm_up=QUICK), facts, here)["not_faster"]


def test_the_command(recipe, tmp_path):
    recipe_file = tmp_path / "small.yaml"
    content = recipe.model_dump(mode="json")
    recipe_file.write_text(json.dumps({**content, "cells": content["cells"][:1]}))
    arguments = ["bench", recipe_file, "steps=1", "--output", tmp_path / "out"]
    stopped = CliRunner().invoke(app, [str(argument) for argument in [*arguments, "--minutes", 0]])
    assert stopped.exit_code == 0 and "rows are missing" in stopped.output, stopped.output
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0 and "mixed" in result.output and "of dense" in result.output, result.output
    assert (tmp_path / "out" / "table.md").read_text().count("\n| ") == 2 + 3
    wrong = CliRunner().invoke(app, ["bench", str(tmp_path / "no.yaml")])
    assert wrong.exit_code == 1 and wrong.stderr.startswith("prunekit: no recipe at")


def test_a_runs_experts_are_timed(recipe, tmp_path):
    run = tmp_path / "run"
    (run / "methods").mkdir(parents=True)
    (run / "recipe.yaml").write_text(json.dumps({"model": recipe.model, "evaluation": {"guidance": 3.0, "steps": 1}}))
    with pytest.raises(ValueError, match="no finished expert"):
        bench(run)
    from prunekit.models import load_pipeline

    unet = load_pipeline(recipe.model).unet
    expert = pk.slice_unet(unet, pk.discover(unet).random(0.6))
    expert.save_pretrained(run / "methods" / "norm" / "experts" / "0" / "unet")
    path, made, rows, is_done = bench(run, minutes=0.001, say=lambda text: None)
    assert made.guidance == 3.0 and list(made.architectures) == ["norm_0"] and not is_done
    assert path == run / "bench" / "table.md" and all(row["architecture"] in ("dense", "norm_0") for row in rows)
