"""Measure how a search's experts share the training prompts, as one expert may get all of them.

Each search uses the embedded model in float32, one seed and the settings of recipes/settings_emoji.yaml, without
fine-tuning. Each row is a preset, or a preset with changed settings, written as PRESET[,SETTING=VALUE...]. A row gives
each expert's share of the training prompts: by the transport of the search's batches, and at inference by both
routings, with and without `balance`. The search does not depend on these two settings, so all shares are of the same
codes. A row also gives the cost of the gates at the end of the search, and the number of different architectures.
Run: python benchmarks/router_shares.py [--rows paper published_code paper,feature_blocks=none] [--steps 240]
[--batch-size 48] [--experts 4] [--warmup 80] [--budget 0.5] [--seed 0]
"""

import argparse
import time

import torch
import yaml

from prunekit.data.emoji import load_emoji
from prunekit.data.encoded import encode
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.evaluation.comparison import shares_of
from prunekit.methods import APTP
from prunekit.methods.transport import expert_potentials
from prunekit.models import load_pipeline

ROWS = ["paper", "published_code", "paper,feature_blocks=none"]
NAMES = ("cosine", "cosine, balanced", "hardened", "hardened, balanced")


class Counted(APTP):
    """APTP that records each expert's share of the training prompts under both routings."""

    def _decide(self, objective):
        result, config = super()._decide(objective), self.config
        for routing in ("cosine", "hardened"):
            self.config = config.model_copy(update={"routing": routing})
            router, inputs = self._router(objective), (objective.data.prompts, objective.pairs)
            balanced = router.shifted(expert_potentials(router.scores_of(*inputs), config.epsilon))
            for name, own in ((routing, router), (f"{routing}, balanced", balanced)):
                result.info.extra[name] = shares_of(own.route_rows(*inputs), config.experts).tolist()
        self.config = config
        return result


def main() -> None:
    """Search once for each row, and print the experts' shares of the prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    for name, value in (("steps", 240), ("batch-size", 48), ("experts", 4), ("warmup", 80), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--budget", type=float, default=0.5)
    given = parser.parse_args()
    pipeline = load_pipeline("emoji")
    data = encode(pipeline, load_emoji(None, 0.1), load_prompt_encoder("emoji"), 64)
    search = {"steps": given.steps, "batch_size": given.batch_size, "learning_rate": 3e-2, "warmup_steps": 20}
    search |= {"weight_decay": 0.0, "precision": "float32"}
    common = {"experts": given.experts, "warmup": given.warmup, "budget": given.budget, "seed": given.seed}
    for row in given.rows:
        preset, *changes = row.split(",")
        settings = {name: yaml.safe_load(value) for name, _, value in (change.partition("=") for change in changes)}
        started = time.monotonic()
        result = Counted(preset=preset, search=search, **common, **settings).prune(pipeline, data)
        info, found = result.info, []
        for architecture in result.architectures:
            found += [] if architecture in found else [architecture]
        print(f"{row}: {time.monotonic() - started:.0f} s, {len(found)} of {given.experts} architectures differ")
        spread = torch.tensor(info.assignment["transport"]).double()
        shown = {"transport": (spread / spread.sum()).tolist()}
        shown |= {"gates_ratio": info.gates_ratio} | {name: info.extra[name] for name in NAMES}
        for name, values in shown.items():
            print(f"  {name:>20}: {' / '.join(f'{100 * value:.1f}' for value in values)} %", flush=True)


if __name__ == "__main__":
    main()
