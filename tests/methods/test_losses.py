import math

import numpy as np
import pytest
import torch

from prunekit.methods.aptp import losses
from prunekit.methods.search import resource_loss


def softmax_of_cosines(x, temperature):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    e = np.exp(x @ x.T / temperature)
    return e / e.sum(1, keepdims=True)


def paper_contrastive(z, gates, temperature):
    r, s = softmax_of_cosines(z, temperature), softmax_of_cosines(gates, temperature)
    total = 0.0
    for i in range(len(z)):
        for j in range(len(z)):
            total += r[i, j] * math.log(s[i, j]) + (1 - r[i, j]) * math.log(1 - s[i, j])
    return -total / len(z) ** 2


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.03, 0.1, 1.0])
def test_contrastive_equals_the_paper(temperature):
    z, gates = draw(24, 16), torch.sigmoid(draw(24, 40, seed=1) / 0.4)
    expected = paper_contrastive(z.numpy(), gates.numpy(), temperature)
    assert losses.contrastive_loss(z, gates, temperature).item() == pytest.approx(expected, abs=1e-9, rel=1e-9)
    assert losses.contrastive_loss(z.float(), gates.float(), temperature).item() == pytest.approx(expected, abs=1e-6)


def test_contrastive_is_stable_and_has_the_right_sign():
    torch.manual_seed(0)
    z = torch.randn(32, 8)
    one_hot = torch.eye(32).requires_grad_()  # the diagonal of s is 1 up to float32's last bit
    loss = losses.contrastive_loss(z, one_hot)
    loss.backward()
    assert loss.isfinite() and loss > 0 and one_hot.grad.isfinite().all()
    same = torch.ones(32, 5).requires_grad_()
    losses.contrastive_loss(torch.ones(32, 4), same).backward()
    assert same.grad.isfinite().all()
    assert losses.contrastive_loss(z, z) < losses.contrastive_loss(z, z.flip(0))
    assert losses.contrastive_loss(torch.zeros(4, 3), torch.rand(4, 5)).isfinite()


def test_contrastive_gradient():
    z, logits = draw(6, 5), draw(6, 7, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.contrastive_loss(z, torch.sigmoid(x)), (logits,))


def test_contrastive_float32_where_s_is_nearly_one():
    z, gates = draw(8, 64), draw(8, 64, seed=1)
    exact = losses.contrastive_loss(z, gates).item()
    assert losses.contrastive_loss(z.float(), gates.float()).item() == pytest.approx(exact, rel=1e-5)


def test_contrastive_needs_two_prompts():
    with pytest.raises(ValueError, match="two or more"):
        losses.contrastive_loss(torch.ones(1, 4), torch.ones(1, 4))
    with pytest.raises(ValueError, match="same"):
        losses.contrastive_loss(torch.ones(3, 4), torch.ones(2, 4))


@pytest.mark.parametrize("x, y", [(3.0, 7.0), (7.0, 3.0), (1e12, 8e11), (2.0, 2.0)])
def test_resource_loss_equals_the_paper(x, y):
    macs = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    loss = resource_loss(macs, y)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(max(x, y) / min(x, y)), abs=1e-9)
    assert macs.grad.item() == pytest.approx(np.sign(x - y) / x)


def test_batch_weighted_cost():
    costs = torch.tensor([10.0, 20.0, 40.0], requires_grad=True)
    mean = losses.batch_weighted_cost(costs, torch.tensor([0, 0, 2, 0]))
    assert mean.item() == pytest.approx(0.75 * 10 + 0.25 * 40)
    mean.backward()
    assert costs.grad.tolist() == [0.75, 0.0, 0.25]


def test_spread_and_maximum():
    ratios = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64, requires_grad=True)
    assert losses.spread_loss(ratios).item() == pytest.approx(-0.2)
    assert losses.maximum_loss(ratios).item() == pytest.approx(0.1)
    assert losses.spread_loss(ratios[:1]).item() == 0
    (losses.spread_loss(ratios) + losses.maximum_loss(ratios)).backward()
    assert ratios.grad[2] < 0 < ratios.grad[0]  # the gradient increases the differences of sizes
