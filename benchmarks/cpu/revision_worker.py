"""Decodes for `revisions`, by whichever checkout comes first on the path: for each line of JSON, [prompts per
family, settings], the tokens per second of one call of `simsd.generate`, and the texts.

Uses what every revision has; it belongs to none of them.
"""

import json
import sys
import time

import simsd
from simsd import tasks


def main() -> None:
    target, draft = simsd.load("tiny-target"), simsd.load("tiny-draft")
    for line in sys.stdin:
        each, settings = json.loads(line)
        prompts = [task.prompt for family in tasks.FAMILIES for task in tasks.held_out(family, each, 0)]
        began = time.perf_counter()
        results = simsd.generate(target, prompts, draft=draft, **settings)
        seconds = time.perf_counter() - began
        done = sum(len(result.tokens) for result in results)
        print(json.dumps([done / seconds, [result.text for result in results]]), flush=True)


if __name__ == "__main__":
    main()
