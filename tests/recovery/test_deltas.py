"""Experts as differences: they start at 0, train with the shared weights, and are saved with a reference to them."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_data import encoded_for, stub
from small_model import TRAINING, write_world
from unets import build, inputs, relative_error

import prunekit as pk
from prunekit.core.slicing import DELTAS, load_model, save_member, slice_model
from prunekit.core.timesteps import TimestepBins, TimestepModel
from prunekit.jobs.run import start
from prunekit.methods import OneMask, PruneResult, Random
from prunekit.recovery.backbone import Member
from prunekit.recovery.deltas import DeltaConfig, Deltas
from prunekit.runtime.errors import UserError

SETTINGS = {"batch_size": 6, "learning_rate": 1e-2, "precision": "float32", "feature_blocks": "none"}


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    unet = build("sd2").eval().requires_grad_(False)
    return unet, encoded_for(unet, num=12), Random(budget=0.6, depth="all").prune(unet).architectures[0]


def run(model):
    with torch.no_grad():
        return model(**inputs(model, 2, 8)).sample


@pytest.mark.parametrize("rank", [0, 2])
def test_changes_begin_at_zero_and_gradients_reach_them(rank, world):
    unet, _, architecture = world
    backbone = pk.slice_unet(unet, architecture.space.full()).requires_grad_(True)
    member = Member(backbone, architecture)
    member.deltas = Deltas(member.model, DeltaConfig(rank=rank), 0, 0, backbone.device)
    student = member.take().eval()
    assert relative_error(run(student), run(slice_model(unet, architecture))) <= 1e-6
    student(**inputs(student, 2, 8)).sample.square().mean().backward()
    vectors = [shift.grad for shift in member.deltas.shift]
    assert vectors and any(bool(grad.any()) for grad in vectors if grad is not None)
    assert bool(rank) == any(up.grad is not None and bool(up.grad.any()) for up in member.deltas.up)
    assert any(p.grad is not None and bool(p.grad.any()) for p in backbone.parameters())


def test_a_members_own_model_is_what_trained(world):
    unet, _, architecture = world
    backbone = pk.slice_unet(unet, architecture.space.full())
    member = Member(backbone, architecture)
    member.deltas = Deltas(member.model, DeltaConfig(rank=2), 0, 0, backbone.device)
    with torch.no_grad():
        for parameter in member.deltas.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    trained = run(member.take().eval())
    assert relative_error(run(member.sliced()), trained) <= 1e-6
    assert relative_error(trained, run(slice_model(unet, architecture))) > 1e-3


def test_experts_recovered_in_memory_differ_in_their_changes(world):
    unet, data, architecture = world
    result = PruneResult([architecture] * 2, bins=TimestepBins((500.0,)))
    config = pk.FineTuneConfig(steps=3, shared_backbone=True, deltas=DeltaConfig(rank=2), **SETTINGS)
    (model,) = pk.recover_experts(result, stub(unet), data, config)
    assert isinstance(model, TimestepModel)
    first, second = (dict(part.named_parameters()) for part in model.slices)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def _shortened(content):
    content["conv_in.weight.down"] = content["conv_in.weight.down"][:, 1:].contiguous()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.pop("conv_in.weight.up"), r"is damaged: it has no conv_in\.weight\.up$"),
        (lambda content: content.pop("conv_in.weight.down"), r"is damaged: it has no conv_in\.weight\.down$"),
        (lambda content: content.update({"conv_on.bias.shift": torch.zeros(1)}), r"the model has no conv_on\.bias$"),
        (_shortened, r"does not fit the model of its folder: conv_in\.weight: shape"),
    ],
)
def test_damaged_changes_are_one_clear_error(damage, message, world, tmp_path):
    unet, _, architecture = world
    unet.save_pretrained(tmp_path / "backbone")
    save_member(unet, architecture, tmp_path / "0", tmp_path / "backbone")
    member = Member(pk.slice_unet(unet, architecture.space.full()), architecture)
    Deltas(member.model, DeltaConfig(rank=1), 0, 0, unet.device).save(tmp_path / "0")
    assert relative_error(run(load_model(tmp_path / "0").eval()), run(slice_model(unet, architecture))) <= 1e-6
    content = load_file(tmp_path / "0" / DELTAS)
    damage(content)
    save_file(content, tmp_path / "0" / DELTAS)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "0")


def test_changes_need_weights_that_are_shared():
    with pytest.raises(ValueError, match=r"needs fine_tune\.shared_backbone"):
        pk.FineTuneConfig(steps=1, deltas=DeltaConfig(), **SETTINGS)


def test_one_mask_has_one_architecture_a_router_and_bins(world):
    unet, data, _ = world
    method = OneMask(budget=0.7, experts=2, bins=3, choice="norm", choice_settings={"samples": 1})
    result = method.prune(stub(unet), data)
    assert len(result.architectures) == 6 and len({id(a) for a in result.architectures}) == 1
    assert result.num_experts == 2 and len(result.bins) == 3 and result.router.num_experts == 2
    assert sum(result.info.prompts_per_expert) == len(data.training_pairs()) and not result.warnings()[1:]
    assert result.info.mean_ratio <= 0.7


@pytest.mark.long
def test_a_run_saves_one_model_and_what_experts_change(tmp_path):
    content = {
        **write_world(tmp_path),
        "prune": {"budget": 0.7},
        "methods": {"one_mask": {"experts": 2, "bins": 2, "choice": "norm", "choice_settings": {"samples": 1}}},
        "fine_tune": {"steps": 2, "shared_backbone": True, "deltas": {"rank": 1}, **TRAINING},
        "evaluation": {"num_images": 4, "steps": 2, "num_predictions": 4, "num_pictures": 2},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    run_folder = start(tmp_path / "small.yaml", directory=tmp_path / "run")
    experts = run_folder / "methods" / "one_mask" / "experts"
    folders = [experts / str(e) / "unet" / f"slice-{b}" for e in range(2) for b in range(2)]
    assert all((folder / DELTAS).is_file() for folder in folders)
    assert not list(experts.glob("[01]/**/diffusion_pytorch_model*"))
    shared = sum(path.stat().st_size for path in (experts / "backbone").rglob("*.safetensors"))
    assert sum((folder / DELTAS).stat().st_size for folder in folders) < shared
    rows = {row["name"] for row in json.loads((run_folder / "results.json").read_text())["table"]["rows"]}
    assert rows == {"dense", "one_mask"}
    routed = pk.PromptRoutedPipeline.from_pretrained(run_folder)
    assert len(routed(["red apple", "blue star"], num_inference_steps=2, output_type="np").images) == 2
    (folders[0] / DELTAS).write_bytes((folders[0] / DELTAS).read_bytes().replace(b"conv_in", b"conv_on"))
    again = pk.PromptRoutedPipeline.from_pretrained(run_folder)
    with pytest.raises(UserError, match="does not fit"), again.mixture.experts.use(0):
        pass
