"""One set of weights for all experts: trained under the experts' masks, and sliced when it is loaded."""

import json
import shutil
from functools import partial

import pytest
import torch
import yaml
from small_data import encoded_for, stub
from small_model import TRAINING, write_world
from unets import build, inputs

import prunekit as pk
from prunekit.core.registry import process_of
from prunekit.core.slicing import POINTER, save_member
from prunekit.export import load_denoiser
from prunekit.jobs.run import start
from prunekit.methods.router import Router
from prunekit.recovery.backbone import BackboneObjective, Mixture
from prunekit.recovery.fine_tuning import FineTuneConfig, FineTuningObjective, fine_tune


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    content = {
        **write_world(folder),
        "prune": {"budget": 0.7},
        "methods": {"aptp": {"experts": 3, "warmup": 1, "search": {"steps": 3, **TRAINING}}},
        "fine_tune": {"steps": 3, "shared_backbone": True, **TRAINING},
        "evaluation": {"num_images": 6, "steps": 2, "num_predictions": 4, "at_steps": [1]},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    return start(folder / "small.yaml", directory=folder / "run")


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_all_experts_take_the_room_of_one_dense_unet(run):
    experts = run / "methods" / "aptp" / "experts"
    shutil.rmtree(experts / "backbone" / "step-1", ignore_errors=True)
    dense = size(experts / "backbone" / "unet")
    assert sorted(path.name for path in experts.iterdir()) == ["0", "1", "2", "backbone"]
    assert size(experts) <= 1.1 * dense
    assert not list(experts.glob("[0-9]*/unet/*.safetensors"))


def test_a_run_with_a_shared_backbone_is_used_as_any_other(run):
    rows = {row["name"]: row for row in json.loads((run / "results.json").read_text())["table"]["rows"]}
    assert set(rows) == {"dense", "aptp@1", "aptp"} and rows["aptp"]["macs_ratio"] <= 0.7
    routed = pk.PromptRoutedPipeline.from_pretrained(run)
    output = routed(["red apple", "blue star"], num_inference_steps=2, generator=None, output_type="np")
    assert len(output.images) == 2 and set(output.experts) <= {0, 1, 2}


def test_members_are_the_masked_backbone(run):
    experts = run / "methods" / "aptp" / "experts"
    result = pk.methods.PruneResult.load(run / "methods" / "aptp")
    backbone = load_denoiser(experts / "backbone" / "unet")
    arguments = inputs(backbone)
    with torch.no_grad(), pk.gated(backbone, result.space) as gates:
        for index, architecture in enumerate(result.architectures):
            gates.set(architecture)
            masked = backbone(**arguments).sample
            for load in (load_denoiser, pk.PrunedUNet2DConditionModel.from_pretrained):
                member = load(experts / str(index) / "unet").eval()
                assert float((member(**arguments).sample - masked).norm() / masked.norm()) <= 1e-5
            assert member.config["pruning"]["kept"] or member.config["pruning"]["removed"]


def test_a_step_is_the_masked_backbones(tmp_path):
    """Slicing inside the computation graph gives the loss and gradients of the dense UNet under per-sample masks."""
    unet = build("sd2")
    data, space = encoded_for(unet, num=8), pk.discover(unet, depth="all")
    architectures, experts = [space.random(0.6, seed=seed) for seed in range(2)], torch.arange(8) % 2
    config = FineTuneConfig(steps=4, batch_size=6, learning_rate=1e-4, log_every=1, feature_blocks="none")
    student = pk.slice_unet(unet, space.full()).train().requires_grad_(True)
    inputs = (student, unet, process_of(stub(unet)), data, data.training_pairs(), config, 0, unet.device)
    sliced = BackboneObjective(*inputs, mixture=Mixture(architectures, experts))
    batch = sliced.batch(0)
    assert experts[sliced.pairs[batch.indices]].diff().ge(0).all()
    found = []
    for micro in (6, 2):
        student.zero_grad()
        for positions in torch.arange(6).split(micro):
            sum(sliced.micro_loss(batch, positions).values()).backward()
        found.append({name: own.grad for name, own in student.named_parameters() if own.grad is not None})
    student.zero_grad()
    with pk.gated(student, space) as gates:
        masks = torch.stack([architecture.values for architecture in architectures])
        gates.set(masks, rows=experts[sliced.pairs[batch.indices]])
        terms = FineTuningObjective(*inputs).micro_loss(batch, torch.arange(6))
        sum(terms.values()).backward()
    norm = sum(float(own.grad.square().sum()) for own in student.parameters() if own.grad is not None) ** 0.5
    for gradients in found:
        for name, own in student.named_parameters():
            expected = torch.zeros_like(own) if own.grad is None else own.grad
            assert float((gradients.get(name, torch.zeros_like(own)) - expected).norm()) <= 1e-5 * norm, name


def test_training_a_backbone_leaves_what_no_expert_keeps(tmp_path):
    unet = build("sd2")
    data, space = encoded_for(unet, num=8), pk.discover(unet)
    architectures = [space.random(0.6, seed=seed) for seed in range(2)]
    config = FineTuneConfig(steps=4, batch_size=4, learning_rate=1e-4, log_every=1, gradient_checkpointing=True)
    student, rows = pk.slice_unet(unet, space.full()), []
    objective = partial(BackboneObjective, mixture=Mixture(architectures, torch.arange(8) % 2))
    scheduler = stub(unet).scheduler
    fine_tune(student, unet, data, config, tmp_path, scheduler=scheduler, log=rows.append, objective=objective)
    assert rows[-1]["loss"] < rows[0]["loss"]
    unkept = 0
    for group in space.width_groups:
        gone = [index for index in range(group.size) if not any(index in a.kept(group.name) for a in architectures)]
        if gone and group.kind == "resnet":
            unkept += 1
            layer = student.get_submodule(group.path).conv2.weight
            before = unet.get_submodule(group.path).conv2.weight
            channels = gone[0] * group.channels
            decay = 1 - config.learning_rate * config.weight_decay
            assert torch.allclose(layer[:, channels], before[:, channels] * decay**4, rtol=1e-3)
    assert unkept


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "does not name a backbone"), ('{"format": 9}', "reads format 1"), ("", "does not name a backbone")],
)
def test_a_bad_pointer_is_refused(run, tmp_path, content, message):
    member = tmp_path / "0" / "unet"
    shutil.copytree(run / "methods" / "aptp" / "experts" / "0" / "unet", member)
    with pytest.raises(ValueError, match="copy the backbone's folder too"):
        load_denoiser(member)
    (member / POINTER).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_denoiser(member)


def test_a_member_moves_with_its_backbone(tmp_path):
    unet = build("sd2")
    unet.save_pretrained(tmp_path / "a" / "backbone")
    architecture = pk.discover(unet).random(0.5, seed=3)
    (tmp_path / "a" / "0").mkdir()
    save_member(unet, architecture, tmp_path / "a" / "0", tmp_path / "a" / "backbone")
    (tmp_path / "a").rename(tmp_path / "b")
    member, sliced = load_denoiser(tmp_path / "b" / "0"), pk.slice_unet(unet, architecture)
    assert all(torch.equal(a, b) for a, b in zip(member.parameters(), sliced.parameters(), strict=True))


@pytest.mark.parametrize("shared", [False, True], ids=["of their own", "shared backbone"])
def test_experts_are_recovered_in_memory(shared):
    """Like in a run, the router's prompts train each expert, and an expert without prompts is not trained."""
    unet = build("sd2")
    data, space = encoded_for(unet, num=8), pk.discover(unet)
    first = data.prompts[:1].double() - data.prompts.double().mean(0)
    router = Router(torch.cat([first, -first, first * 0]), torch.tensor([0.0, 0.0, -1e9]))
    routes = router.route(data.prompts[data.training_pairs()])
    assert 0 < (routes == 0).sum() < len(routes) and not (routes == 2).any()
    result = pk.methods.PruneResult([space.random(0.6, seed=seed) for seed in range(3)], router)
    config = FineTuneConfig(steps=2, batch_size=2, learning_rate=1e-3, shared_backbone=shared)
    before = {name: own.clone() for name, own in unet.named_parameters()}
    experts = pk.recover_experts(result, stub(unet), data, config)
    assert all(torch.equal(own, before[name]) for name, own in unet.named_parameters())
    for index, (expert, architecture) in enumerate(zip(experts, result.architectures, strict=True)):
        sliced = dict(pk.slice_unet(unet, architecture).named_parameters())
        assert not any(own.requires_grad for own in expert.parameters())
        changed = any(not torch.equal(own, sliced[name]) for name, own in expert.named_parameters())
        assert changed == bool(shared or (routes == index).any())


@pytest.mark.parametrize(
    "shared", [False, pytest.param(True, marks=pytest.mark.long)], ids=["of their own", "shared backbone"]
)
def test_without_a_router_every_architecture_is_recovered_on_all_pairs(shared, tmp_path):
    """A run does the same. Once, in memory, the first architecture got all pairs and the others none."""
    unet = build("sd2")
    data, space = encoded_for(unet, num=8), pk.discover(unet)
    result = pk.methods.PruneResult([space.random(0.6, seed=seed) for seed in range(2)])
    config = FineTuneConfig(steps=2, batch_size=2, learning_rate=1e-3, shared_backbone=shared)
    experts = pk.recover_experts(result, stub(unet), data, config)
    for index, (expert, architecture) in enumerate(zip(experts, result.architectures, strict=True)):
        alone = pk.slice_unet(unet, architecture)
        options = {"pairs": data.training_pairs(), "scheduler": stub(unet).scheduler}
        pk.fine_tune(alone, unet, data, config, tmp_path / str(index), **options)
        assert all(torch.equal(own, other) for own, other in zip(expert.parameters(), alone.parameters(), strict=True))
        sliced = pk.slice_unet(unet, architecture)
        assert any(not torch.equal(own, a) for own, a in zip(expert.parameters(), sliced.parameters(), strict=True))
