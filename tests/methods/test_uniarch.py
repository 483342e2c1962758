"""Uni-Arch and the loss terms shared with APTP's search are exact, deterministic, resumable, and within the budget."""

import math
from dataclasses import replace

import pytest
import torch
from small_blocks import block_paths, outputs_of
from small_data import encoded_for, stub
from unets import build

from prunekit import CostModel, discover
from prunekit.core.gates import gated
from prunekit.core.registry import process_of
from prunekit.methods import APTP, PruneResult, UniArch
from prunekit.methods.search import GateSearchObjective, SearchSettings
from prunekit.methods.uniarch import UniArchObjective
from prunekit.runtime.errors import UserError
from prunekit.runtime.randomness import generator

SEARCH = {"steps": 4, "batch_size": 3, "learning_rate": 0.05, "log_every": 1}
SETTINGS = {"budget": 0.6, "text_length": 5}


class StopError(Exception):
    """Ends a search like a kill."""


@pytest.fixture(scope="module")
def unet():
    return build("sd2", layers_per_block=1)


def search(unet, directory=None, log=None, **changes):
    settings = {**SETTINGS, **changes, "search": {**SEARCH, **changes.get("search", {})}}
    return UniArch(**settings).prune(stub(unet), encoded_for(unet), directory, log)


@pytest.fixture(scope="module")
def searched(unet):
    rows = []
    result = search(unet, log=rows.append)
    return result, [row["loss"] for row in rows]


def without_seconds(info):
    return replace(info, search={name: value for name, value in info.search.items() if name != "seconds"})


def test_stopped_and_resumed_it_ends_where_it_would_have(unet, searched, tmp_path):
    result, losses = searched

    def stop(row):
        if row["step"] == 3:
            raise StopError

    slow = {"search": {"checkpoint_minutes": 1e-9}}
    with pytest.raises(StopError):
        search(unet, tmp_path, stop, **slow)
    assert (tmp_path / "checkpoints").is_dir() and not (tmp_path / "result.json").exists()
    rows = []
    resumed = search(unet, tmp_path, rows.append, **slow)
    assert [row["loss"] for row in rows] == losses[2:]  # step 3 was not saved in a checkpoint
    assert resumed.architectures == result.architectures
    assert not list((tmp_path / "checkpoints").glob("*"))
    assert PruneResult.load(tmp_path, unet).architectures == result.architectures


def test_the_same_again_whatever_the_micro_batch(unet, searched):
    result, losses = searched
    rows = []
    again = search(unet)
    parts = search(unet, log=rows.append, search={"micro_batch": 2})
    assert again.architectures == result.architectures
    assert without_seconds(again.info) == without_seconds(result.info)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-4)
    assert parts.architectures == result.architectures
    assert not torch.equal(search(unet, seed=1).architectures[0].values, result.architectures[0].values)


def test_budget_is_met_and_nothing_left_out_that_fits(unet, searched):
    result, _ = searched
    (architecture,) = result.architectures
    cost = CostModel(unet, discover(unet), text_length=5)
    limit = 6 * cost.dense_macs
    assert architecture.is_boolean and result.router is None and 10 * cost.macs(architecture) <= limit
    for unit in torch.nonzero(~architecture.values).flatten().tolist():
        more = cost.running(architecture).change(unit)
        assert more == 0 or 10 * (cost.macs(architecture) + more) > limit
    assert result.info.method == "uniarch" and result.info.macs == [cost.macs(architecture)]
    assert result.info.search["steps"] == 4 and "distillation" in result.info.search


def test_a_search_that_ends_before_its_gates_close_is_said(searched):
    result, _ = searched
    (ratio,) = result.info.gates_ratio
    assert 0.9 < ratio <= 1, "four steps close nothing"
    (line,) = result.warnings()
    assert f"gates kept {ratio:.2f} of the dense cost when the search ended" in line and "warmup" not in line
    assert not PruneResult(result.architectures, info=replace(result.info, gates_ratio=[0.62])).warnings()


def test_without_distillation_the_dense_unet_does_not_run(unet):
    passes = []
    handle = unet.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    try:
        result = search(unet, distillation_weight=0, search={"steps": 2})
        assert passes == [True] * 2 and "distillation" not in result.info.search
        passes.clear()
        search(unet, search={"steps": 2})
        assert passes == [False, True] * 2
    finally:
        handle.remove()


def test_a_heavy_resource_term_closes_gates(unet):
    rows, changes = [], {"resource_weight": 1e3, "distillation_weight": 0}
    search(unet, log=rows.append, budget=0.4, **changes, search={"steps": 12, "batch_size": 1, "learning_rate": 0.6})
    distance = [row["resource"] / 1e3 for row in rows]  # log of the ratio of the soft cost to the budget
    assert distance[0] == pytest.approx(math.log(1 / 0.4), abs=0.1)  # at first, all gates are open
    assert min(distance[6:]) < 0.5 * distance[0]


def plain_terms(unet, data, objective, batch, logits, rows, weights):
    """Compute Eq. 9 and 25 sample by sample, with explicit gates and noise, and a teacher without gates."""
    config, plan = objective.config, batch.plan
    uniform = torch.empty(logits.shape).exponential_(generator=generator(config.seed, "gates", batch.step))
    gates = 1 / (1 + torch.exp(-(logits + config.offset - uniform.log()) / config.temperature))
    denoising = distillation = 0.0
    for position, row in enumerate(rows.tolist()):
        pair, t = batch.pairs[position], plan.timesteps[position]
        alpha = objective.process.scheduler.alphas_cumprod[t]
        latent, noise = data.latents[pair][None], plan.noise[position][None]
        arguments = {
            "sample": alpha.sqrt() * latent + (1 - alpha).sqrt() * noise,
            "timestep": t,
            "encoder_hidden_states": data.text[pair][None],
        }
        if data.pooled is not None:
            added = {"text_embeds": data.pooled[pair][None], "time_ids": data.time_ids[None]}
            arguments["added_cond_kwargs"] = added
        teacher = outputs_of(unet, block_paths(unet), **arguments)
        with gated(unet, objective.cost.space) as handle:
            handle.set(gates[row])
            student = outputs_of(unet, block_paths(unet), **arguments)
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latent
        denoising += weights[position] * (student[0] - velocity).square().mean()
        errors = [(a - b).square().mean() for a, b in zip(student, teacher, strict=True)]
        distillation += weights[position] * sum(errors[: None if config.feature_blocks == "all" else 1])
    return float(denoising), config.distillation_weight * float(distillation), gates


@torch.no_grad()
@pytest.mark.parametrize(("shape", "blocks"), [("sd2", "all"), ("sd2", "none"), ("sdxl", "all")])
def test_the_terms_are_those_of_a_plain_computation(shape, blocks):
    unet = build(shape, layers_per_block=1)
    data, space = encoded_for(unet), discover(unet)
    config = SearchSettings(
        budget=0.6, distillation_weight=0.3, feature_blocks=blocks, search={**SEARCH, "batch_size": 4}
    )
    process = process_of(stub(unet))
    cost = CostModel(unet, space, text_length=5)
    logits = torch.randn(3, space.size, generator=generator(0, "logits"))
    rows, weights = torch.tensor([2, 0, 2, 1]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    with gated(unet, space) as gates:
        objective = GateSearchObjective(unet, gates, cost, process, data, config, unet.device)
        batch = objective.draw(5)
        terms = [
            objective.sample_terms(batch, part, logits, rows[part], weights[part])
            for part in torch.arange(4).split([3, 1])
        ]
        soft_macs = cost.macs(objective.gate(batch, logits))
        resource = objective.resource_term(soft_macs.mean())
    denoising, distillation, soft = plain_terms(unet, data, objective, batch, logits, rows, weights)
    assert float(sum(term["denoising"] for term in terms)) == pytest.approx(denoising, rel=1e-5)
    assert float(sum(term["distillation"] for term in terms)) == pytest.approx(distillation, rel=1e-5)
    ratio = float(cost.macs(soft).mean()) / (0.6 * cost.dense_macs)
    assert float(resource) == pytest.approx(2 * abs(math.log(ratio)), rel=1e-4)


def test_the_objective_averages_over_the_batch(unet):
    data, space = encoded_for(unet), discover(unet)
    cost, config = CostModel(unet, space, text_length=5), UniArch(**SETTINGS, search=SEARCH).config
    with torch.no_grad(), gated(unet, space) as gates:
        objective = UniArchObjective(unet, gates, cost, process_of(stub(unet)), data, config, unet.device)
        batch, positions = objective.batch(0), torch.arange(3)
        terms = objective.micro_loss(batch, positions)
        rows, weights = torch.zeros(3, dtype=torch.long), torch.full((3,), 1 / 3)
        expected = objective.sample_terms(batch, positions, torch.zeros(1, space.size), rows, weights)
    assert {name: float(value) for name, value in terms.items()} == {n: float(v) for n, v in expected.items()}
    assert list(objective.modules) == ["codes"] and objective.codes.values.shape == (1, space.size)


@pytest.mark.parametrize("method", [UniArch, APTP])
def test_an_sdxl_shaped_unet_is_searched_with_its_added_conditions(method):
    unet = build("sdxl", layers_per_block=1)
    extra = {"experts": 2, "warmup": 1} if method is APTP else {}
    small = method(**SETTINGS, **extra, search={**SEARCH, "steps": 2})
    result = small.prune(stub(unet), encoded_for(unet))
    cost = CostModel(unet, discover(unet), text_length=5)
    counts = torch.tensor(result.info.prompts_per_expert or [1], dtype=torch.float64)
    ratios = torch.tensor([cost.ratio(a) for a in result.architectures], dtype=torch.float64)
    assert float((counts * ratios).sum() / counts.sum()) <= 0.6


def test_a_budget_below_the_floor_is_refused_before_the_search(unet):
    with pytest.raises(ValueError, match="least"):
        search(unet, budget=0.01)


def test_a_unet_alone_is_refused_and_a_pipelines_stays_as_it_was(unet):
    """Only the scheduler says whether the UNet predicts noise or velocity."""
    method = UniArch(**SETTINGS, search={**SEARCH, "steps": 1})
    with pytest.raises(UserError, match="needs the whole pipeline: its scheduler determines what the UNet predicts"):
        method.prune(unet, encoded_for(unet))
    with pytest.raises(UserError, match="EncodedData"):
        method.prune(stub(unet), None)
    before = [(part, part.training) for part in unet.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    try:
        unet.train().requires_grad_(True)
        unet.conv_in.weight.requires_grad_(False)
        assert method.prune(stub(unet), encoded_for(unet)).info.search["steps"] == 1
        assert all(part.training for part in unet.modules())
        assert [name for name, p in unet.named_parameters() if not p.requires_grad] == ["conv_in.weight"]
    finally:
        for part, mode in before:
            part.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
