"""Train the evaluator that has not seen Emoji-64's held-out pictures: 20 % of them at seed 0.

These pictures include the pictures that are held out at 10 %. Training takes about half an hour on a CPU core with
bfloat16 units; start the same command again to resume a training that was stopped.

Run: python benchmarks/held_out_evaluator.py runs/held_out_evaluator
Then copy runs/held_out_evaluator/evaluator to prunekit/assets/evaluator_held_out.
"""

import argparse
import json
from pathlib import Path

from prunekit.data.config import DataConfig, load_data
from prunekit.data.images import HELD_OUT, TRAINING
from prunekit.embedded.evaluator_training import evaluator_training, train_evaluator
from prunekit.evaluation.ceiling import real_figures

HOLDOUT, SEED = 0.2, 0


def main() -> None:
    """Train, and print the evaluator's figures for real pictures of both splits, the same number of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    data = load_data(DataConfig(kind="emoji", holdout=HOLDOUT, holdout_by="pictures"), SEED)
    training, held = data.of_split(TRAINING), data.of_split(HELD_OUT)
    evaluator = train_evaluator(training, evaluator_training(), directory, SEED)
    size = evaluator.config.size
    step = training.num_images // held.num_images
    training = training.take(list(range(0, training.num_images, step))[: held.num_images])
    for name, images in (("held out", held), ("training", training)):
        shown = images.image_index.unique()
        print(json.dumps({"pictures": name, "count": len(shown), **real_figures(evaluator, images, shown, size)}))


if __name__ == "__main__":
    main()
