"""One set of weights for all experts: trained under their masks, sliced when it is loaded."""

import json
import shutil

import pytest
import torch
import yaml
from small_data import encoded_for, stub
from small_model import TRAINING, write_world
from unets import build, inputs

import prunekit as pk
from prunekit.export import load_unet
from prunekit.run import start
from prunekit.slicing import POINTER, save_member
from prunekit.training.fine_tuning import FineTuneConfig, Mixture, fine_tune


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
    backbone = load_unet(experts / "backbone" / "unet")
    arguments = inputs(backbone)
    with torch.no_grad(), pk.gated(backbone, result.space) as gates:
        for index, architecture in enumerate(result.architectures):
            gates.set(architecture)
            masked = backbone(**arguments).sample
            for load in (load_unet, pk.PrunedUNet2DConditionModel.from_pretrained):
                member = load(experts / str(index) / "unet").eval()
                assert float((member(**arguments).sample - masked).norm() / masked.norm()) <= 1e-5
            assert member.config["pruning"]["kept"] or member.config["pruning"]["removed"]


def test_one_step_equals_the_experts_own_gradients(tmp_path):
    """The backbone's step is the sum of the experts' own, each on its samples, where they keep a weight."""
    unet = build("sd2")
    data, space = encoded_for(unet, num=8), pk.discover(unet)
    architectures = [space.random(0.6, seed=seed) for seed in range(2)]
    config = FineTuneConfig(steps=4, batch_size=4, learning_rate=1e-4, log_every=1)
    experts, rows = torch.arange(8) % 2, []
    student = pk.slice_unet(unet, space.full())
    mixture = Mixture(architectures, experts)
    fine_tune(student, unet, data, config, tmp_path, scheduler=stub(unet).scheduler, log=rows.append, mixture=mixture)
    assert rows[-1]["loss"] < rows[0]["loss"]
    changed = {
        name for name, own in student.named_parameters() if not torch.equal(own, dict(unet.named_parameters())[name])
    }
    assert changed  # what no expert keeps is left as it was
    for group in space.width_groups:
        unkept = [index for index in range(group.size) if not any(index in a.kept(group.name) for a in architectures)]
        if unkept and group.kind == "resnet":
            layer = student.get_submodule(group.path).conv2.weight
            before = unet.get_submodule(group.path).conv2.weight
            channels = unkept[0] * group.channels
            decay = 1 - config.learning_rate * config.weight_decay
            assert torch.allclose(layer[:, channels], before[:, channels] * decay**4, rtol=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "does not name a backbone"), ('{"format": 9}', "reads format 1"), ("", "does not name a backbone")],
)
def test_a_bad_pointer_is_refused(run, tmp_path, content, message):
    member = tmp_path / "0" / "unet"
    shutil.copytree(run / "methods" / "aptp" / "experts" / "0" / "unet", member)
    with pytest.raises(ValueError, match="copy the backbone's folder too"):
        load_unet(member)
    (member / POINTER).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_unet(member)


def test_a_member_moves_with_its_backbone(tmp_path):
    unet = build("sd2")
    unet.save_pretrained(tmp_path / "a" / "backbone")
    architecture = pk.discover(unet).random(0.5, seed=3)
    (tmp_path / "a" / "0").mkdir()
    save_member(unet, architecture, tmp_path / "a" / "0", tmp_path / "a" / "backbone")
    (tmp_path / "a").rename(tmp_path / "b")
    member, sliced = load_unet(tmp_path / "b" / "0"), pk.slice_unet(unet, architecture)
    assert all(torch.equal(a, b) for a, b in zip(member.parameters(), sliced.parameters(), strict=True))
