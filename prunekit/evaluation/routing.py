"""Measure whether routing carries information, by comparing a mixture's router with other ways to route.

Every expert runs on the same fixed samples, so each sample has an error under each expert, and a router chooses one
column per row of this matrix. The error is the squared difference to the dense denoiser's prediction (`agreement`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.data.encoded import EncodedData
from prunekit.evaluation.agreement import AgreementSamples, predictions
from prunekit.evaluation.comparison import Candidate, frequent_words, shares_of
from prunekit.runtime.randomness import generator

RESAMPLES = 2000
WORDS = 12


def error_matrix(candidate: Candidate, samples: AgreementSamples, reference: Tensor) -> Tensor:
    """Return each sample's mean squared difference to the dense prediction under each expert, (n, N) float64.

    reference: the dense denoiser's `predictions` of the samples, (n, C, h, w).
    """
    columns = [
        (predictions(model, samples) - reference).double().square().flatten(1).mean(1) for model in candidate.models
    ]
    return torch.stack(columns, dim=1)


def routing_report(
    candidate: Candidate, data: EncodedData, samples: AgreementSamples, reference: Tensor, seed: int = 0
) -> dict[str, Any]:
    """Return figures of a mixture's router and of its controls, as JSON values.

    controls: mean errors if every prompt goes to the router's choice (`routed`), to an expert drawn by the training
    prompts' shares (`random`), to the one expert with the lowest mean error (`best_single`, with its relative MACs), or
    to the best expert for the prompt (`oracle`, which no router can beat). `gain` is 1 - routed / random, with its 95 %
    bootstrap interval.
    difficulty: Spearman's correlation of a prompt's mean error over the experts with the MACs of the prompt's expert,
    and its p-value.
    paraphrases: how often two captions of one picture go to the same expert, and how often any two captions would.
    """
    pairs = data.training_pairs()
    trained = candidate.experts_of(data.prompts, pairs)
    count = len(candidate.models)
    shares = shares_of(trained, count)
    errors = error_matrix(candidate, samples, reference)
    routed = candidate.experts_of(data.prompts, samples.indices)
    captions = data.images.captions
    return {
        "experts": count,
        "shares": shares.tolist(),
        "entropy": _entropy(shares),
        "largest_over_even": float(shares.max() * count),
        "controls": _controls(errors, routed, shares, candidate.macs, seed),
        "difficulty": _difficulty(errors, routed, candidate.macs),
        "paraphrases": _paraphrases(data.image_index[pairs], trained, shares),
        "words": frequent_words([[captions[i] for i in pairs[trained == e].tolist()] for e in range(count)], WORDS),
        "samples": len(errors),
    }


def _entropy(shares: Tensor) -> float:
    """Return the entropy of the shares divided by that of equal shares: 1 if all are equal, 0 if one expert has all."""
    positive_shares = shares[shares > 0]
    return float(-(positive_shares * positive_shares.log()).sum() / math.log(len(shares))) if len(shares) > 1 else 0.0


def _controls(errors: Tensor, routed: Tensor, shares: Tensor, macs: Sequence[int], seed: int) -> dict[str, Any]:
    means = errors.mean(0)  # (N,)
    best = int(means.argmin())
    routed_errors, drawn = errors.gather(1, routed[:, None])[:, 0], errors @ shares  # (n,)
    rows = torch.randint(len(errors), (RESAMPLES, len(errors)), generator=generator(seed, "routing controls"))
    gains = 1 - routed_errors[rows].mean(1) / drawn[rows].mean(1)
    low, high = gains.quantile(torch.tensor([0.025, 0.975], dtype=gains.dtype)).tolist()
    mean_macs = float(shares @ torch.tensor(macs, dtype=torch.float64))
    return {
        "routed": float(routed_errors.mean()),
        "random": float(drawn.mean()),
        "best_single": float(means[best]),
        "best_single_expert": best,
        "best_single_macs_over_mean": macs[best] / mean_macs,
        "oracle": float(errors.amin(1).mean()),
        "gain": float(1 - routed_errors.mean() / drawn.mean()),
        "gain_interval": [low, high],
    }


def _difficulty(errors: Tensor, routed: Tensor, macs: Sequence[int]) -> dict[str, float | None]:
    from scipy.stats import spearmanr

    costs = torch.tensor(macs, dtype=torch.float64)[routed]
    if len(costs.unique()) < 2:
        return {"correlation": None, "p": None}
    correlation = spearmanr(errors.mean(1).numpy(), costs.numpy())
    return {"correlation": float(correlation.statistic), "p": float(correlation.pvalue)}


def _paraphrases(images: Tensor, experts: Tensor, shares: Tensor) -> dict[str, float | int | None]:
    """Return the number of caption pairs of one picture, and the share of them that goes to one expert (`agree`).

    chance: the value of `agree` if captions went to experts at random with the same shares.
    """
    counts = torch.zeros(int(images.max()) + 1, len(shares), dtype=torch.float64)
    counts.index_put_((images, experts), torch.ones(len(images), dtype=torch.float64), accumulate=True)
    total = counts.sum(1)
    pairs, same = (total * (total - 1)).sum() / 2, (counts * (counts - 1)).sum() / 2
    agreed = float(same / pairs) if pairs else None
    return {"pairs": int(pairs), "agree": agreed, "chance": float(shares.square().sum())}


def routing_lines(name: str, report: dict[str, Any]) -> list[str]:
    """Return the report in Markdown, a section of a run's table."""
    controls, difficulty, alike = report["controls"], report["difficulty"], report["paraphrases"]
    low, high = (100 * bound for bound in controls["gain_interval"])
    lines = [
        f"## Does the router of {name} carry information?\n",
        "| Prompts go | error against dense |",
        "|---|---:|",
        f"| where the router sends them | {controls['routed']:.5f} |",
        f"| to an expert at random, with the same shares | {controls['random']:.5f} |",
        f"| all to expert {controls['best_single_expert']}, the best for all "
        f"({100 * controls['best_single_macs_over_mean']:.0f} % of the mean MACs) | {controls['best_single']:.5f} |",
        f"| each to its best (no router can do better) | {controls['oracle']:.5f} |",
        "",
        f"- Routing saves {100 * controls['gain']:.1f} % of the error of random routing, 95 % interval "
        f"[{low:.1f}, {high:.1f}], {report['samples']} samples.",
        f"- Entropy of the shares: {report['entropy']:.3f} of even; the largest share is "
        f"{report['largest_over_even']:.2f} times an even one.",
    ]
    if difficulty["correlation"] is not None:
        lines += [
            f"- Hard prompts get larger experts: rank correlation {difficulty['correlation']:+.2f} "
            f"(p = {difficulty['p']:.2g})."
        ]
    if alike["agree"] is not None:
        lines += [
            f"- Two captions of one picture go to the same expert in {100 * alike['agree']:.0f} % of "
            f"{alike['pairs']:,} pairs; by chance {100 * alike['chance']:.0f} %."
        ]
    words = [f"| {index} | {', '.join(expert_words[:WORDS])} |" for index, expert_words in enumerate(report["words"])]
    return [*lines, "", "| Expert | Words that tell its training captions from the others' |", "|---:|---|", *words, ""]
