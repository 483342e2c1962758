"""Timestep experts: a mean budget over the sampler's timesteps, nested masks, and one trained set of weights."""

import json
from itertools import pairwise

import pytest
import torch
import yaml
from small_data import encoded_for, stub
from small_model import TRAINING, write_world
from unets import build

import prunekit as pk
from prunekit.core.registry import process_of
from prunekit.core.slicing import slice_model
from prunekit.core.timesteps import TimestepBins, TimestepModel, sampled_timesteps
from prunekit.jobs.run import start
from prunekit.methods import PruneResult, TimestepExperts
from prunekit.methods.base import space_and_cost
from prunekit.methods.timestep_experts import even_bins
from prunekit.recovery.backbone import BackboneObjective, Mixture
from prunekit.recovery.fine_tuning import FineTuneConfig, FineTuningObjective
from prunekit.runtime.errors import UserError
from prunekit.serving.exporting import export

SETTINGS = {"samples": 4, "score": {"samples": 4, "batch_size": 4, "precision": "float32"}, "sampling_steps": 7}


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    unet = build("sd2").eval().requires_grad_(False)
    return unet, encoded_for(unet, num=12)


@pytest.mark.parametrize(
    ("bins", "depth"),
    [(2, "all"), *(pytest.param(*more, marks=pytest.mark.long) for more in ((3, "aptp"), (7, "none")))],
)
def test_the_mean_over_the_samplers_timesteps_meets_the_budget(bins, depth, world):
    unet, data = world
    method, pipeline = TimestepExperts(budget=0.7, bins=bins, depth=depth, **SETTINGS), stub(unet)
    result = method.prune(pipeline, data)
    cost = space_and_cost(pipeline, method.config)[1]
    timesteps = sampled_timesteps(pipeline.scheduler, 7)
    limit = 0.7 * cost.dense_macs
    assert len(result.architectures) == len(result.bins) == bins and result.num_experts == 1
    macs = [cost.macs(result.architectures[int(b)]) for b in result.bins.of(timesteps)]
    assert sum(macs) <= 7 * limit
    assert result.info.mean_ratio == pytest.approx(sum(macs) / 7 / cost.dense_macs, rel=1e-9)
    assert result.expert_macs(cost, 0, pipeline.scheduler, 7) == round(sum(macs) / 7)
    values = [architecture.values for architecture in result.architectures]
    for index, vector in enumerate(values):  # no removed unit fits into the budget
        share = sum(int(b) == index for b in result.bins.of(timesteps))
        for unit in (~vector).nonzero().flatten().tolist():
            more = vector.clone()
            more[unit] = True
            added = cost.macs(pk.Architecture(result.space, more)) - cost.macs(result.architectures[index])
            assert not added or sum(macs) + share * added > 7 * limit


def test_nested_bins_keep_what_smaller_ones_keep_and_are_read_again(world, tmp_path):
    unet, data = world
    result = TimestepExperts(budget=0.6, bins=3, depth="none", **SETTINGS).prune(stub(unet), data, tmp_path)
    again = PruneResult.load(tmp_path, unet)
    assert again.bins == result.bins and again.architectures == result.architectures
    vectors = sorted((a.values for a in result.architectures), key=lambda vector: int(vector.sum()))
    for group in result.space.width_groups:
        counts = [int(vector[result.space.slice(group)].sum()) for vector in vectors]
        kept = [set(vector[result.space.slice(group)].nonzero().flatten().tolist()) for vector in vectors]
        order = sorted(range(3), key=counts.__getitem__)
        assert all(kept[a] <= kept[b] for a, b in pairwise(order))


def test_bins_have_as_many_timesteps_each():
    bins = even_bins(torch.tensor([961.0, 801, 641, 481, 321, 161, 1, 961]), 3)
    assert [int((bins.of(torch.tensor([1, 161, 321, 481, 641, 801, 961])) == b).sum()) for b in range(3)] == [3, 2, 2]
    with pytest.raises(UserError, match="raise sampling_steps"):
        even_bins(torch.tensor([1.0, 2.0]), 3)


def test_a_step_trains_each_sample_through_the_slice_of_its_timestep(world):
    unet, data = world
    space = pk.discover(unet, depth="all")
    architectures = [space.random(0.6, seed=seed) for seed in range(2)]
    result = PruneResult(architectures, bins=TimestepBins((500.0,)))
    config = FineTuneConfig(
        steps=1, batch_size=6, learning_rate=1e-4, feature_blocks="none", precision="float32", shared_backbone=True
    )
    backbone = pk.slice_unet(unet, space.full()).train().requires_grad_(True)
    pairs = torch.arange(12)
    inputs = (backbone, unet, process_of(stub(unet)), data, pairs, config, 0, torch.device("cpu"))
    objective = BackboneObjective(*inputs, mixture=Mixture(architectures, torch.zeros(12).long(), result.bins))
    batch, alone = objective.batch(0), FineTuningObjective(*inputs)
    positions = torch.arange(6)
    bins = result.bins.of(batch.timesteps)
    assert len(bins.unique()) == 2
    terms = objective.micro_loss(batch, positions)
    expected = dict.fromkeys(terms, 0.0)
    for index in range(2):
        student = slice_model(backbone, architectures[index])
        for name, term in alone.terms(student, batch, positions[bins == index]).items():
            expected[name] += term.item()
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
def test_a_run_serves_it_in_a_routed_pipeline(tmp_path):
    content = {
        **write_world(tmp_path),
        "prune": {"budget": 0.7},
        "methods": {"timestep_experts": {"bins": 2, "sampling_steps": 2, "samples": 2, "score": {"samples": 2}}},
        "fine_tune": {"steps": 2, **TRAINING},
        "evaluation": {"num_images": 4, "steps": 2, "num_predictions": 4, "num_pictures": 2},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    run = start(tmp_path / "small.yaml", directory=tmp_path / "run")
    rows = {row["name"]: row for row in json.loads((run / "results.json").read_text())["table"]["rows"]}
    assert rows["timestep_experts"]["macs_ratio"] <= 0.7
    routed = pk.PromptRoutedPipeline.from_pretrained(run)
    drawn = routed(["red apple"], num_inference_steps=2, output_type="np", guidance_scale=1.0)
    with routed.mixture.experts.use(0) as model:
        assert isinstance(model, TimestepModel) and len(model.slices) == 2
    dense = rows["dense"]["macs"]
    calls = len(sampled_timesteps(routed.scheduler, 2))
    assert 0 < drawn.macs[0] <= calls * 0.7 * dense
    assert routed.mixture.experts.size(0) == 4 * sum(p.numel() for p in model.parameters())
    exported = export(run, tmp_path / "exported")
    assert len(exported.tiers) == 2 and len(exported.checked) > 2
    assert not (tmp_path / "exported" / "pipeline.py").exists()  # only prunekit chooses experts by timestep
    assert "Only prunekit chooses among them" in (tmp_path / "exported" / "README.md").read_text()
    again = pk.PromptRoutedPipeline.from_pretrained(tmp_path / "exported")
    options = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 1.0, "seeds": 0}
    assert (again(["red apple"], **options).images == routed(["red apple"], **options).images).all()
