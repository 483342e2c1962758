"""Budgets in latency: tables are stored, reused and refused; the cost model is exact and soft, and budgets are met."""

import json
import time

import pytest
import torch
import yaml
from small_data import encoded_for, stub
from small_methods import SMALL, weights_of
from small_model import TRAINING, write_world
from small_transformers import CONFIGS
from small_transformers import build as build_transformer
from unets import build, inputs

import prunekit as pk
from prunekit.core.registry import denoiser_of, latent_size
from prunekit.denoisers.unet.walk import walk
from prunekit.jobs.recipe import load_recipe
from prunekit.jobs.run import start
from prunekit.measuring.latency_model import LatencyModel, least_from
from prunekit.measuring.latency_table import LatencyTable, LayerTimes, conditions_of
from prunekit.measuring.layer_times import in_place, layer_seconds, measure_table
from prunekit.methods import PruneSettings, get, names, select
from prunekit.methods.base import budget_cost
from prunekit.methods.latency_budget import LatencySettings, latency_model
from prunekit.models import load_pipeline

SIZE, TEXT, BATCH = (8, 8), 7, 2


@pytest.fixture(scope="module")
def unet():
    unet = build("sd2")
    unet.register_to_config(sample_size=SIZE[0])
    return unet


@pytest.fixture(scope="module")
def table(unet):
    """Return a table in which odd numbers of units take 1.5 times as long, as with some kernels."""
    groups = {group.path: group.size for group in pk.discover(unet, "none").width_groups}
    layers = {}
    for index, site in enumerate(site for site in walk(unet) if site.kind != "block"):
        kept, unit = range(groups.get(site.path, 0) + 1), 1000 + 37 * index
        times = [5000 + 10 * unit * count * (2 + count % 2) for count in kept]
        layers[site.path] = LayerTimes(site.kind, kept[-1], tuple(kept), tuple(times))
    return LatencyTable(conditions_of(unet, SIZE, TEXT, BATCH, torch.float32), 100_000, layers)


@pytest.fixture(scope="module")
def model(unet, table):
    return LatencyModel(unet, pk.CostModel(unet, pk.discover(unet, "blocks"), SIZE, TEXT), table)


@pytest.fixture(scope="module")
def file(table, tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "table.json"
    path.write_text(json.dumps(table.to_dict()))
    return path


def test_a_measured_table_has_every_layer_and_survives_saving(unet):
    table = measure_table(unet, SIZE, TEXT, BATCH, widths=4, seconds=0.05)
    table.refuse(conditions_of(unet, SIZE, TEXT, BATCH, torch.float32))
    sites = {site.path: site.kind for site in walk(unet) if site.kind != "block"}
    assert {path: layer.kind for path, layer in table.layers.items()} == sites
    groups = {group.path: group.size for group in pk.discover(unet, "none").width_groups}
    for path, layer in table.layers.items():
        curve = layer.curve()
        assert layer.units == groups.get(path, 0) and len(curve) == layer.units + 1
        assert [curve[kept] for kept in layer.kept] == list(layer.nanoseconds)
    assert table.dense > table.rest >= 0
    again = LatencyTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again == table and again.digest == table.digest


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"flux", "flux2"}))
def test_a_transformer_has_a_table_too(name):
    transformer = build_transformer(name)
    size = SIZE if name in ("qwen_image", "z_image", "wan") else latent_size(transformer)  # their default is large
    own = measure_table(transformer, size, TEXT, batch=1, widths=2, seconds=0.01)
    layers = [layer for layer in denoiser_of(transformer).layers(transformer) if layer.path]
    assert {path: times.kind for path, times in own.layers.items()} == {layer.path: layer.kind for layer in layers}
    assert all(times.full > 0 for times in own.layers.values()) and 0 <= own.rest < own.dense
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in transformer.modules())
    space = pk.discover(transformer, "all")
    timed = LatencyModel(transformer, pk.CostModel(transformer, space, size, TEXT), own)
    full, block = space.full(), space.depth_groups[0]
    assert timed.total(full) == own.dense
    without = space.full()
    without.values[space.slice(block)] = False
    inside = [
        times.full for path, times in own.layers.items() if path == block.path or path.startswith(f"{block.path}.")
    ]
    assert len(inside) > 1 and timed.latency_ratio(without) == (own.dense - sum(inside)) / own.dense


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_layers_in_common_products_are_refused(name, tmp_path):
    transformer = build_transformer(name)
    cost = pk.CostModel(transformer, pk.discover(transformer, "all"), latent_size(transformer), TEXT)
    with pytest.raises(
        ValueError, match="computes attention and feedforward together: give the budget in MACs"
    ) as error:
        latency_model(transformer, cost, LatencySettings(tables=str(tmp_path)))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", ["sd1", "sdxl"])
def test_layers_in_place_leave_a_rest_and_no_hook(shape):
    unet = build(shape)
    pruned = pk.slice_unet(unet, pk.discover(unet, "all").random(0.5, seed=1))
    for own in (unet, pruned):
        with torch.no_grad(), in_place(own) as marks:
            start = time.perf_counter()
            own(**inputs(own))
            took = time.perf_counter() - start
            seconds = layer_seconds(own, marks)
        assert set(seconds) == {site.path for site in walk(own) if site.kind != "block"}
        assert all(second > 0 for second in seconds.values()) and 0.1 * took < sum(seconds.values()) < took
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in own.modules())


def test_where_more_units_take_less_the_solver_counts_on_them():
    layer = LayerTimes.fitted("resnet", 4, {0: [1e-9], 2: [9e-9, 7e-9, 100e-9], 4: [5e-9]})
    assert layer.curve() == [1, 5, 9, 7, 5]  # medians, with linear interpolation
    assert least_from(layer.curve(), 1) == [1, 5, 5, 5, 5]
    assert least_from([1, 3, 2, 6, 4, 9, 7, 8], 2) == [1, 2, 2, 4, 4, 7, 7, 8]
    assert least_from([1, 3, 2, 1, 4, 9, 5, 8], 4) == [1, 4, 4, 4, 4, 8, 8, 8]


def test_the_cost_is_the_sum_of_layers(model, table):
    space, removed = model.space, model.space.full()
    assert model.total(space.full()) == model.dense_total == table.dense
    for seed in range(3):
        architecture = space.random(0.6, seed=seed)
        expected = predicted = table.rest
        for path, layer in table.layers.items():
            if not any(group.removes(path) for group in architecture.removed()):
                known = layer.units and len(architecture.kept(f"{layer.kind}:{path}"))
                expected += least_from(layer.curve(), 1)[known]
                predicted += layer.curve()[known]
        assert model.latency_ratio(architecture) == predicted / table.dense
        assert model.total(architecture) == expected == model.running(architecture).total
        assert model.total(architecture.values.double()) == expected
        assert model.total(architecture) <= predicted and model.macs(architecture) < model.dense_macs
    group = space.width_groups[0]
    removed.values[space.slice(group)] = torch.arange(group.size) < 3
    halves = removed.values.double()
    halves[space.slice(group)] = 3 / group.size  # the sum is the same
    assert float(model.total(halves)) == pytest.approx(model.total(removed), rel=1e-12)
    gates = torch.full((2, space.size), 0.7, requires_grad=True)
    model.total(gates).sum().backward()
    assert gates.grad.isfinite().all() and (gates.grad[:, space.num_width :] > 0).all()


@pytest.mark.parametrize("align", [None, 16])
def test_a_budget_in_time_is_met_and_leaves_nothing_out(model, align):
    scores = torch.rand(model.space.size, generator=torch.Generator().manual_seed(3))
    architecture = select(scores, model, 0.7, align)
    total, limit = model.total(architecture), 0.7 * model.dense_total
    assert 0 < total <= limit
    if align is None:
        assert model.latency_ratio(architecture) == total / model.dense_total  # no removed unit is counted
        running = model.running(architecture)
        over = [model.space.depth_units_over(group.path, group.kind) for group in model.space.groups]
        for group, depths in zip(model.space.groups, over, strict=True):
            if all(running.bits[model.space.num_width + depth] for depth in depths):
                part = range(model.space.size)[model.space.slice(group)]
                assert all(running.bits[unit] or total + running.change(unit) > limit for unit in part)


@pytest.mark.parametrize("name", names())
def test_every_method_takes_a_budget_in_time(name, unet, model, file):
    method = get(name)
    settings = {**SMALL.get(name, {}), "depth": "blocks", "text_length": TEXT}
    pruning = method(**settings, budget={"latency": 0.7, "device": str(file)}, align=8)
    result = pruning.prune(stub(unet), encoded_for(unet) if method.needs_data else None)
    ratios = result.info.latency_ratio
    assert [model.latency_ratio(a.on(model.space)) for a in result.architectures] == ratios
    assert float(weights_of(result) @ torch.tensor(ratios, dtype=torch.float64)) <= 0.7
    assert result.info.latency_table["digest"] == model.table.digest
    assert result.notes()[0].startswith("predicted at 0.")


def test_a_run_measures_a_table_once_and_shows_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr("prunekit.measuring.layer_times.MOST", 5)  # rounds per width
    monkeypatch.setattr("prunekit.methods.latency_budget.DEFAULT_WIDTHS", 2)
    training = {**TRAINING, "steps": 1}
    evaluation = {"num_images": 4, "steps": 1, "num_predictions": 4, "num_pictures": 2}
    prune = {"budget": {"latency": 0.9, "tables": str(tmp_path / "tables")}, "align": 64}
    content = {**write_world(tmp_path), "prune": prune, "methods": {"random": {}}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**content, "fine_tune": training, "evaluation": evaluation}))
    directory = start(recipe, (), tmp_path / "run")
    (kept,) = (tmp_path / "tables").iterdir()
    written = kept.stat().st_mtime_ns
    (row,) = json.loads((directory / "results.json").read_text())["latency"]["rows"]
    assert row["predicted"] <= 0.9 and row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    assert "error of the prediction" in (directory / "table.md").read_text()
    log = (directory / "log.jsonl").read_text()
    assert "of the dense time on" in log and "are not multiples of 64 channels" in log

    loaded = load_recipe(directory / "recipe.yaml")
    pipeline = load_pipeline(loaded.model)
    cost = budget_cost(pipeline, loaded.prune)
    assert kept.stat().st_mtime_ns == written and cost.table == LatencyTable.from_dict(json.loads(kept.read_text()))
    other = json.loads(kept.read_text())
    other["conditions"]["device"] = "Abacus, 10 threads"
    kept.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"for device Abacus, 10 threads, but .* was requested"):
        budget_cost(pipeline, loaded.prune)


def test_what_does_not_fit_is_refused(unet, file):
    def cost(target=unet, **own):
        return budget_cost(target, PruneSettings(budget={"latency": 0.7, "device": str(file), **own}, text_length=TEXT))

    with pytest.raises(ValueError, match="of another model"):
        cost(build("sdxl"))
    with pytest.raises(ValueError, match=r"for sample_size \[8, 8\], but \[16, 16\] was requested"):
        cost(build("sd2"))
    with pytest.raises(ValueError, match="give 'here', or the file"):
        cost(device="there")
    with pytest.raises(ValueError, match="not a latency table of format"):
        LatencyTable.from_dict({"format": 0})
    with pytest.raises(ValueError, match="meta device"):
        measure_table(build("sd2", device="meta"), SIZE)
    settings = PruneSettings(budget={"latency": 0.7, "batch": 4}, align=8)
    assert settings.budget == 0.7 and settings == PruneSettings(**settings.model_dump(exclude_unset=True))
    for budget, message in (({"device": "here"}, "with `latency`"), ({"latency": 2}, "less than 1")):
        with pytest.raises(ValueError, match=message):
            PruneSettings(budget=budget)
