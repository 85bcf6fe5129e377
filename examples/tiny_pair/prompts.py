"""Prints prompts of questionnaires that the long pair may be trained on, one JSON object a line, for `train-order`."""

from __future__ import annotations

import argparse
import json
import random

from simsd import questionnaires


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="how many, a quarter of each family")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    for number in range(asked.count):
        family = questionnaires.FAMILIES[number % len(questionnaires.FAMILIES)]
        print(json.dumps({"prompt": questionnaires.training_item(family, rng).prompt}))


if __name__ == "__main__":
    main()
