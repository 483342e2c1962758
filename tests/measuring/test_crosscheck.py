import sys

import pytest
import small_transformers
import torch
from diffusers import UNet2DConditionModel
from small_transformers import CONFIGS
from unets import MORE_SHAPES, build

from prunekit import CostModel, discover, slice_unet
from prunekit.measuring.crosscheck import crosscheck


@pytest.mark.parametrize("shape", MORE_SHAPES)
def test_every_counter_is_reconciled(shape):
    pytest.importorskip("thop")
    pytest.importorskip("fvcore")
    unet = build(shape)
    state = {key: value.clone() for key, value in unet.state_dict().items()}
    for model in (unet, slice_unet(unet, discover(unet, depth="blocks").random(0.5, seed=1))):
        rows = {row.counter: row for row in crosscheck(model, (9, 12), 5)}
        assert list(rows) == ["prunekit, exact", "torch FlopCounterMode / 2", "thop", "fvcore"]
        assert [row.unexplained for row in rows.values()] == [0, 0, 0, 0]
        assert rows["torch FlopCounterMode / 2"].difference == 0
        conv_linear = CostModel(model, discover(model), (9, 12), 5, "conv_linear").dense_macs
        assert rows["thop"].macs == conv_linear
        assert rows["thop"].difference < 0
        assert rows["fvcore"].macs > conv_linear
        assert rows["fvcore"].sample_size == (9, 12)
    assert unet.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in unet.state_dict().items())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name == "sana" else ()) for name in CONFIGS]
)
def test_transformers_are_reconciled(name):
    pytest.importorskip("thop")
    pytest.importorskip("fvcore")
    model = small_transformers.build(name, "meta")
    for measured in (model, slice_unet(model, discover(model, "all").random(0.5, seed=1))):
        assert [row.unexplained for row in crosscheck(measured, (8, 8), 5)] == [0, 0, 0, 0]


def test_a_large_model_is_traced_at_a_smaller_latent():
    pytest.importorskip("fvcore")
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=[320, 640],
            layers_per_block=1,
            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        )
    row = crosscheck(unet, 48)[-1]
    assert row.sample_size == (8, 8)
    assert "at a latent of 8 x 8" in row.explanation
    assert row.ours == CostModel(unet, discover(unet), 8).dense_macs
    assert row.unexplained == 0


def test_missing_packages_say_what_to_install(monkeypatch):
    for name in ("thop", "fvcore", "fvcore.nn"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = {row.counter: row for row in crosscheck(build("sd2", "meta"), 8, 5)}
    for name in ("thop", "fvcore"):
        assert rows[name].macs is None
        assert rows[name].difference is None
        assert "pip install 'prunekit[check]'" in rows[name].explanation
    assert rows["torch FlopCounterMode / 2"].difference == 0
