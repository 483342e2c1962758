"""A denoiser that is defined and described only here: the laws hold, and methods and recovery run on it."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from small_data import encoded_for
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from unets import relative_error

import prunekit as pk
from prunekit import slicing
from prunekit.core.axes import Axis, Layer
from prunekit.core.call import normal, predict
from prunekit.core.description import Description
from prunekit.core.registry import denoiser_of
from prunekit.core.space import UnitGroup
from prunekit.denoisers.unet.family import StableDiffusion
from prunekit.methods import Norm, UniArch
from prunekit.recovery.fine_tuning import FineTuneConfig, fine_tune


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, hidden_states):
        return self.down(nn.functional.gelu(self.up(hidden_states)))


class Block(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), Mlp(width, inner)

    def forward(self, hidden_states, condition):
        return hidden_states + self.mlp(self.norm(hidden_states + condition))


class ToyTransformer(ModelMixin, ConfigMixin):
    """A few blocks on pixels as tokens; the text's mean and the timestep are added to each token."""

    @register_to_config
    def __init__(self, sample_size=8, in_channels=4, width=24, inner=48, cross_attention_dim=16, blocks=3):
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(in_channels, width), nn.Linear(width, in_channels)
        self.text, self.time = nn.Linear(cross_attention_dim, width), nn.Linear(1, width)
        self.transformer_blocks = nn.ModuleList(Block(width, inner) for _ in range(blocks))

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=True):
        time = self.time(timestep.reshape(-1, 1, 1).to(hidden_states.dtype) / 1000)
        condition = self.text(encoder_hidden_states).mean(1, keepdim=True) + time
        tokens = self.proj_in(hidden_states.flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, condition)
        sample = self.proj_out(tokens).transpose(1, 2).reshape(hidden_states.shape)
        return SimpleNamespace(sample=sample) if return_dict else (sample,)


class Toy(Description):
    """The complete description for prunekit."""

    dense, family = ToyTransformer, StableDiffusion()
    outputs: ClassVar = {"feedforward": "down"}

    def stem(self, model):
        return Layer("stem", "", "image", {"text": "text", "time": "one"})

    def inside(self, model, path, block):
        mlp, feeds = f"{path}.mlp", (f"{path}.norm",)
        if not isinstance(block.mlp, Mlp):
            return [Layer("block", path), Layer("feedforward", mlp, "image", feeds=feeds)]
        group = UnitGroup("feedforward", mlp, block.mlp.down.in_features // 4, 4)
        axes = (Axis("up", "out"), Axis("down", "in"))
        return [Layer("block", path), Layer("feedforward", mlp, "image", group=group, axes=axes, feeds=feeds)]

    def width(self, model):
        return model.config.width

    def lengths(self, model, latent, text_length):
        return {"image": latent[0] * latent[1], "text": text_length, "one": 1}


pk.register_denoiser([ToyTransformer], Toy())
SEEDS = range(6)


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    model = ToyTransformer().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def call_of(model, batch=2):
    return denoiser_of(model).example(model, batch, (8, 6), 5, normal(torch.Generator().manual_seed(1)))


def architecture(space, seed):
    """Return a random architecture; seed 0 has no units, seed 1 an empty first group, and seed 2 no layers."""
    values = space.random(0.6, seed).values
    if seed == 0:
        values[:] = False
    elif seed == 1:
        values[: space.groups[0].size] = False
    elif seed == 2:
        values[space.num_width :] = False
    return pk.Architecture(space, values)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_laws_hold(toy, seed, tmp_path):
    space, call = pk.discover(toy, "all"), call_of(toy)
    assert (space.num_width, space.num_depth) == (36, 3)
    chosen = architecture(space, seed)
    pruned = pk.slice_model(toy, chosen)
    with torch.no_grad():
        dense = predict(toy, call)
        with pk.gated(toy, space) as gates:
            gates.set(chosen)
            masked = predict(toy, call)
        sliced = predict(pruned, call)
    assert relative_error(masked, sliced) <= 1e-5 < relative_error(dense, sliced)
    cost = pk.CostModel(toy, space, (8, 6), text_length=5)
    with torch.device("meta"):
        shape = type(pruned).from_config(pruned.config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict(shape, call_of(toy, 1).to("meta"))
    assert 2 * cost.macs(chosen) == counter.get_total_flops()
    assert cost.params(chosen) == sum(parameter.numel() for parameter in pruned.parameters())
    pruned.save_pretrained(tmp_path)
    loaded = type(pruned).from_pretrained(tmp_path)
    state = pruned.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(predict(loaded, call), predict(pruned, call))


def test_each_sample_under_its_own_row(toy):
    space, call = pk.discover(toy, "all"), call_of(toy)
    rows = [architecture(space, seed) for seed in (2, 4)]
    with torch.no_grad(), pk.gated(toy, space) as gates:
        gates.set(torch.stack([row.values for row in rows]).float())
        both = predict(toy, call)
        for index, row in enumerate(rows):
            gates.set(row)
            assert relative_error(both[index : index + 1], predict(toy, call.take(slice(index, index + 1)))) <= 1e-5


def test_gates_are_differentiable(toy):
    model, generator = toy.double(), torch.Generator().manual_seed(2)
    try:
        space, call = pk.discover(model, "all"), call_of(model).to("cpu", torch.float64)
        soft = torch.rand(space.size, generator=generator, dtype=torch.float64).requires_grad_()
        with pk.gated(model, space) as gates:

            def value(vector):
                gates.set(vector)
                return predict(model, call).square().sum()

            value(soft).backward()
            for unit in (0, 13, space.size - 1):
                step = torch.zeros_like(soft)
                step[unit] = 1e-4
                with torch.no_grad():
                    slope = (value(soft + step) - value(soft - step)) / 2e-4
                assert soft.grad[unit].item() == pytest.approx(slope.item(), rel=1e-4)
    finally:
        toy.float()


def test_methods_recovery_and_a_fresh_name(toy, tmp_path):
    data = encoded_for(toy)
    pipeline = SimpleNamespace(transformer=toy, scheduler=DDIMScheduler(), vae_scale_factor=8, tokenizer=None)
    settings = {"budget": 0.6, "depth": "all", "text_length": 7}
    searched = UniArch(**settings, search={"steps": 2, "batch_size": 2, "learning_rate": 0.1})
    for method in (Norm(**settings), searched):
        result = method.prune(pipeline, data)
        assert result.info.ratio[0] <= 0.6
    student = pk.slice_model(toy, result.architectures[0])
    config = FineTuneConfig(steps=2, batch_size=2, learning_rate=1e-4)
    figures = fine_tune(student, toy, data, config, tmp_path, scheduler=pipeline.scheduler)
    assert figures["steps"] == 2
    assert pk.export_model(student, tmp_path / "pruned") == "pruned"
    loaded = slicing.PrunedToyTransformer.from_pretrained(tmp_path / "pruned")
    assert type(loaded) is type(student)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), student.parameters(), strict=True))
