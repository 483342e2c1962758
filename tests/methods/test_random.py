"""Random scores are uniform and depend only on the seed, for widths and depths."""

import torch
from unets import build

from prunekit import discover
from prunekit.methods import Random


def test_scores_are_uniform_and_keyed_by_the_seed():
    unet = build("sd2", device="meta")
    scores, again, other = (Random(depth="all", seed=seed).score(unet) for seed in (0, 0, 1))
    assert scores.space == discover(unet, "all") and torch.equal(scores.values, again.values)
    assert scores.info == again.info and scores.info["method"] == "random" and scores.values.device.type == "cpu"
    assert not torch.equal(scores.values, other.values)
    assert len(scores.values.unique()) == scores.space.size
    for part in (scores.values[: scores.space.num_width], scores.values[scores.space.num_width :]):
        assert 0 <= part.min() < 0.15 and 0.85 < part.max() < 1 and abs(part.mean() - 0.5) < 0.15
    correlation = torch.corrcoef(torch.stack([scores.values, other.values]))[0, 1]
    assert abs(correlation) < 0.15


def test_widths_and_layers_go_in_the_order_of_their_scores():
    unet = build("sd1")
    result = Random(depth="all", budget=0.4, seed=3).prune(unet)
    architecture = result.architectures[0]
    scores = Random(depth="all", seed=3).score(unet).values
    kept = architecture.canonical.bool()
    assert result.info.ratio[0] <= 0.4 and 0 < len(architecture.removed()) < architecture.space.num_depth
    assert scores[kept].mean() > scores[~kept].mean() + 0.2
