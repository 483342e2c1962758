"""Published transformers by name: exact parameters and MACs, computed quickly and with little memory."""

import resource
import time

import pytest
import torch
from small_transformers import call_of
from torch.utils.flop_counter import FlopCounterMode

import prunekit as pk
from prunekit.core.call import predict, zeros
from prunekit.core.registry import denoiser_in, denoiser_of, latent_size
from prunekit.models import load_shape

GOLDENS = {  # text tokens, parameters and MACs of one call at batch 1 and the model's default size
    "sd-3-medium": (333, 2_028_328_000, 4_452_168_769_536),
    "sd-3.5-medium": (333, 2_243_171_520, 5_624_786_853_888),
    "sd-3.5-large": (333, 8_056_627_520, None),
    "flux.1-dev": (512, 11_901_408_320, 37_192_326_709_248),
    "flux.1-schnell": (256, 11_891_178_560, None),
    "qwen-image": (512, 20_430_401_088, 39_151_961_112_576),
    "pixart-sigma": (300, 610_856_096, 3_316_789_886_976),
    "flux.2-dev": (512, 32_223_281_152, 141_299_775_700_992),
    "flux.2-klein-4b": (512, 3_875_544_576, 17_410_089_025_536),
    "flux.2-klein-9b": (512, 9_078_581_248, 37_757_360_537_600),
    "z-image": (512, 6_154_908_736, 31_253_186_674_688),
    "sana-1.6b": (300, 1_604_462_752, 1_483_330_580_480),
    "sana-1.5-1.6b": (300, 1_604_641_952, 1_483_330_580_480),
    "sana-1.5-4.8b": (300, 4_721_825_952, 4_443_519_610_880),
    "wan-2.1-1.3b": (512, 1_418_996_800, 2_325_786_918_912),
    "wan-2.1-14b": (512, 14_288_491_584, 21_070_942_044_160),
}


LATER = (  # other sizes of the same classes
    "flux.2-klein-4b",
    "flux.2-klein-9b",
    "sana-1.6b",
    "sana-1.5-4.8b",
    "wan-2.1-14b",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LATER else ()) for name in GOLDENS]
)
def test_a_published_models_cost(name):
    tokens, params, macs = GOLDENS[name]
    shape = load_shape(name)
    model = denoiser_in(shape)
    assert shape.text_length == tokens
    assert shape.resolution == ((480, 832) if name.startswith("wan") else (1024, 1024))
    cost = pk.CostModel(model, pk.discover(model, "all"), text_length=tokens)
    assert cost.dense_params == params == sum(parameter.numel() for parameter in model.parameters())
    call = denoiser_of(model).example(model, 1, latent_size(model), tokens, zeros("meta"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict(model, call)
    assert 2 * cost.dense_macs == counter.get_total_flops()
    assert macs in (None, cost.dense_macs)


def test_other_goldens():
    model = denoiser_in(load_shape("qwen-image"))
    cost = pk.CostModel(model, pk.discover(model, "all"), (166, 166), 512)
    assert cost.dense_macs == 70_495_463_645_184
    from diffusers import PixArtTransformer2DModel

    config = {"sample_size": 128, "num_layers": 28, "caption_channels": 4096, "cross_attention_dim": 1152}
    with torch.device("meta"):
        alpha = PixArtTransformer2DModel(**config, use_additional_conditions=True)
    cost = pk.CostModel(alpha, pk.discover(alpha, "all"), 128, 120)
    assert (cost.dense_params, cost.dense_macs) == (611_349_152, 3_254_761_783_296)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict(alpha, call_of(alpha, 1, (128, 128), 120))
    assert counter.get_total_flops() == 2 * cost.dense_macs


@pytest.mark.parametrize("name", ["flux.1-dev", "flux.2-dev"])
def test_discovery_holds_no_weights(name):
    """Discovery needs little memory besides the model's modules; `benchmarks/` measures its time."""
    model = denoiser_in(load_shape(name))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    pk.CostModel(model, pk.discover(model, "all"), text_length=512)
    assert time.process_time() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
