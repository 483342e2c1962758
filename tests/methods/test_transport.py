import numpy as np
import pytest
import torch

from prunekit.methods.transport import assign, expert_potentials, sinkhorn


def paper_sinkhorn(scores, epsilon, iterations):
    """Compute Eq. 5-7 as printed: Q* = diag(m) exp(A^T E / eps) diag(n), (N, B); rows sum to 1/N, columns to 1/B."""
    q = np.exp(scores.T / epsilon)
    num_experts, num_prompts = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdims=True) / num_experts
        q = q / q.sum(0, keepdims=True) / num_prompts
    return q.T


def cosines(num_prompts, num_experts, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    e, a = (torch.randn(n, 16, generator=generator, dtype=dtype) for n in (num_prompts, num_experts))
    return torch.nn.functional.normalize(e, dim=1) @ torch.nn.functional.normalize(a, dim=1).T


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("epsilon", [0.05, 0.3])
@pytest.mark.parametrize("shape", [(1, 1), (6, 8), (64, 8), (257, 16)])
def test_equals_the_paper(shape, epsilon, iterations):
    scores = cosines(*shape)
    expected = paper_sinkhorn(scores.numpy(), epsilon, iterations)
    np.testing.assert_allclose(sinkhorn(scores, epsilon, iterations).numpy(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sinkhorn(scores.float(), epsilon, iterations).numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 8), (1024, 16), (6, 8)])
def test_equals_pot(shape):
    batch = pytest.importorskip("ot.batch")
    scores, (num_prompts, num_experts) = cosines(*shape), shape
    plan = batch.bregman_log_projection_batch(
        (scores / 0.05).T[None],
        a=torch.full((1, num_experts), 1 / num_experts, dtype=scores.dtype),
        b=torch.full((1, num_prompts), 1 / num_prompts, dtype=scores.dtype),
        max_iter=3,
        tol=0,
    )["T"][0].T
    torch.testing.assert_close(sinkhorn(scores, 0.05, 3), plan, rtol=1e-6, atol=1e-12)


def test_marginals():
    q = sinkhorn(cosines(128, 8), iterations=200)
    torch.testing.assert_close(q.sum(0), torch.full((8,), 1 / 8, dtype=q.dtype), rtol=1e-6, atol=0)
    torch.testing.assert_close(q.sum(1), torch.full((128,), 1 / 128, dtype=q.dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_and_sharp_scores_stay_finite(dtype):
    scores = (cosines(4096, 64, dtype=torch.float32) * 4).clamp(-1, 1).to(dtype)
    q = sinkhorn(scores, epsilon=0.01)
    assert q.dtype == torch.float32 and q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.full((4096,), 1 / 4096), rtol=1e-4, atol=0)
    assert sinkhorn(scores * 100, epsilon=0.01).isfinite().all()


def test_assignment_balances_what_argmax_would_not():
    scores = cosines(512, 8)
    scores[:, 0] += 0.5
    loads = torch.bincount(assign(scores), minlength=8)
    assert torch.bincount(scores.argmax(1), minlength=8)[0] > 300
    assert loads.min() > 20 and loads.max() < 150


def test_no_gradient_and_bad_input():
    scores = cosines(8, 4).requires_grad_()
    assert not sinkhorn(scores).requires_grad
    assert assign(scores).dtype == torch.int64
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        sinkhorn(torch.zeros(4))
    with pytest.raises(ValueError, match="finite"):
        sinkhorn(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match="epsilon"):
        sinkhorn(torch.zeros(2, 2), epsilon=0)


@pytest.mark.parametrize("num_experts", [2, 4, 16])
def test_potentials_balance_a_router_that_one_expert_would_win(num_experts):
    torch.manual_seed(0)
    scores = torch.randn(4000, num_experts, dtype=torch.float64) + 30 * torch.rand(num_experts, dtype=torch.float64)
    assert torch.bincount(scores.argmax(1), minlength=num_experts).max() > 3000 or num_experts == 16
    potentials = expert_potentials(scores)
    shares = torch.bincount((scores + potentials).argmax(1), minlength=num_experts) / 4000
    assert (shares * num_experts - 1).abs().max() < 0.15
    assert abs(float(potentials.mean())) < 1e-9
    assert torch.allclose(expert_potentials(100 * scores), 100 * potentials)
