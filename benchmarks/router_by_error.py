"""Compare a finished emoji run's router with a router that predicts each prompt's error under each expert.

Every expert and the dense UNet run on the same noisy latents and captions, at a few timesteps. On half of the pictures,
a ridge regression learns each expert's log error from the prompt's embedding. On the other half, each prompt goes to
the expert with the smallest predicted error, after a shift per expert that spreads the first half's prompts evenly.
Prints how well a prompt's difficulty can be predicted at all, and the error under each way of routing.
Run: python benchmarks/router_by_error.py RUN/methods/aptp [--experts FOLDER] [--pairs 1500]
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from prunekit.core.registry import denoiser_of, process_of
from prunekit.data.emoji import load_emoji
from prunekit.data.encoded import EncodedData, encode
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.evaluation.agreement import AgreementSamples, predictions
from prunekit.export import load_denoiser
from prunekit.methods import PruneResult
from prunekit.methods.transport import expert_potentials
from prunekit.models import load_pipeline

TIMESTEPS = (150, 400, 650, 900)
RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def errors_of(unets: list, dense, data: EncodedData, process, pairs: Tensor) -> Tensor:
    """Return the mean squared difference to the dense prediction, (pairs, timesteps, experts)."""
    source, found = torch.Generator().manual_seed(0), []
    latents = data.latents[data.image_index[pairs]].float()
    for timestep in TIMESTEPS:
        times = torch.full((len(pairs),), timestep)
        noise = torch.randn(latents.shape, generator=source)
        noisy = process.noised(latents, noise, times)
        call = denoiser_of(dense).call(noisy, times, data.conditions(pairs))
        samples = AgreementSamples(pairs, call.to("cpu", torch.float32))
        reference = predictions(dense, samples)
        found.append(torch.stack([(predictions(u, samples) - reference).square().flatten(1).mean(1) for u in unets], 1))
    return torch.stack(found, 1).double()


def ridge(z: Tensor, targets: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Return the weights (Z, N) and offsets (N,) that predict targets (n, N) from embeddings (n, Z)."""
    center, mean = z.mean(0), targets.mean(0)
    x = z - center
    weight = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (targets - mean))
    return weight, mean - center @ weight


def explained(predicted: Tensor, targets: Tensor) -> float:
    """Return R², relative to the mean of the targets."""
    return float(1 - (predicted - targets).square().sum() / (targets - targets.mean(0)).square().sum())


def main() -> None:
    """Print the predictability of errors, then the table of routings in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="a method's folder with its result and experts")
    parser.add_argument("--experts", type=Path, help="the folder of the experts; RESULT/experts by default")
    parser.add_argument("--pairs", type=int, default=1500, help="captions")
    given = parser.parse_args()
    pipeline = load_pipeline("emoji")
    data = encode(pipeline, load_emoji(None, 0.1), load_prompt_encoder("emoji"), 64)
    result = PruneResult.load(given.result)
    folder = given.experts or given.result / "experts"
    unets = [load_denoiser(folder / str(index) / "unet").eval() for index in range(len(result.architectures))]
    order = torch.randperm(len(data.training_pairs()), generator=torch.Generator().manual_seed(1))
    pairs = data.training_pairs()[order[: given.pairs]]
    errors = errors_of(unets, pipeline.unet, data, process_of(pipeline), pairs)
    scaled = errors / errors.mean((0, 2), keepdim=True)  # every timestep has the same weight
    z, first = data.prompts[pairs].double(), data.image_index[pairs] % 2 == 0
    targets, hard = scaled.mean(1).log(), scaled.mean((1, 2)).log()[:, None]  # (n, N), (n, 1)
    preferences = targets - targets.mean(1, keepdim=True)
    between = torch.corrcoef(scaled.mean(2).log().T)
    between = between[~torch.eye(len(between), dtype=bool)].mean()
    print(f"{len(pairs)} captions, {int(first.sum())} to learn from. Sd of a prompt's log difficulty {hard.std():.2f}")
    print(f"its correlation between two timesteps: {between:.2f}")
    for name, goal in {"difficulty": hard, "an expert's error, less the experts' mean": preferences}.items():
        held = {
            s: explained(z[~first] @ (w := ridge(z[first], goal[first], s))[0] + w[1], goal[~first]) for s in RIDGES
        }
        best = max(held, key=held.get)
        print(f"R² of {name} on other pictures, from the embedding: {held[best]:.3f} (best of ridges, {best:g})")
    weight, offset = ridge(z[first], preferences[first], 10.0)
    predicted = -(z @ weight + offset)
    shares = torch.bincount(result.router.route(data.prompts[pairs]), minlength=len(unets)).double() / len(pairs)
    predicted = predicted + expert_potentials(predicted[first], 0.05)
    own, test = scaled.mean(1), ~first
    ways = {
        "an expert at random, the run's shares": own[test] @ shares,
        "the run's router": own[test].gather(1, result.router.route(data.prompts[pairs[test]])[:, None])[:, 0],
        "least predicted error": own[test].gather(1, predicted[test].argmax(1)[:, None])[:, 0],
        "the best expert of each (no router can do better)": own[test].amin(1),
    }
    macs = torch.tensor(result.info.ratio, dtype=torch.float64)
    costs = [
        shares @ macs,
        *(
            macs[e].mean()
            for e in (result.router.route(data.prompts[pairs[test]]), predicted[test].argmax(1), own[test].argmin(1))
        ),
    ]
    print("\n| prompts go to | error, mean of all experts = 1 | MACs over the dense |\n|---|---:|---:|")
    for (name, error), cost in zip(ways.items(), costs, strict=True):
        print(f"| {name} | {error.mean() / own[test].mean():.3f} | {cost:.3f} |")


if __name__ == "__main__":
    main()
