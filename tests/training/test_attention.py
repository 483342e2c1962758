"""Attention by plain matrix products, which is faster for few tokens on a CPU, equals torch's attention."""

import pytest
import torch
import torch.nn.functional as F
from small_transformers import CONFIGS, build
from unets import relative_error

from prunekit.core.call import normal, predict
from prunekit.core.registry import denoiser_of
from prunekit.training import diffusion
from prunekit.training.diffusion import attention_kernel, plain_attention


@pytest.mark.parametrize("mask", [None, "added", "boolean"])
def test_plain_attention_is_attention(mask):
    draw = normal(torch.Generator().manual_seed(0))
    query, key, value = draw("q", (2, 3, 5, 8)), draw("k", (2, 3, 7, 8)), draw("v", (2, 3, 7, 4))
    masks = {"added": draw("mask", (2, 1, 5, 7)), "boolean": (torch.arange(7) < 5).view(1, 7)}
    arguments = (query, key, value, masks.get(mask))
    assert relative_error(plain_attention(*arguments), F.scaled_dot_product_attention(*arguments)) <= 1e-6


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.1}])
def test_what_else_is_asked_is_torchs(options):
    draw = normal(torch.Generator().manual_seed(0))
    tensors = [draw("", (1, 2, 5, 8)) for _ in range(3)]
    assert torch.equal(plain_attention(*tensors, **options), F.scaled_dot_product_attention(*tensors, **options))


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_denoiser_predicts_the_same(name, monkeypatch):
    model, seen = build(name), []
    call = denoiser_of(model).example(model, 2, (8, 8), 5, normal(torch.Generator().manual_seed(0)))
    expected = predict(model, call)
    monkeypatch.setattr(diffusion, "plain_attention", lambda *a, **k: seen.append(1) or plain_attention(*a, **k))
    with attention_kernel(model, torch.zeros(2, 4, 8, 8)):
        assert relative_error(predict(model, call), expected) <= 1e-5
    assert seen or name == "pixart"  # its attentions get another processor
