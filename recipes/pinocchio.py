"""Pinocchio's reward: --rewards pinocchio, -10 to 15.

0.5 * 10 * correctness (0 to 1) + 0.5 * 2 * reasoning (0 to 5), both a judge's, + format (0 to 5) -
the judge's penalties, and at least -10.

What it pays for nothing: all four tags in any order get the 5 of the format, with nothing between
them. Repaired, with half of the 5 for the strict format alone, as pinocchio.sh has it:

    --rewards pinocchio,format:2.5,tags_pinocchio:2.5
"""

import math

from answers import TAGS


def tags_pinocchio(completion: str, row: dict) -> float:
    """0.3 for each tag of the reasoning there exactly once, 0.2 for each of the answer: 0 to 1."""
    shares = zip(TAGS, (0.3, 0.3, 0.2, 0.2), strict=True)
    return sum((share for tag, share in shares if completion.count(tag) == 1), 0.0)


REWARDS = {"tags_pinocchio": tags_pinocchio}
WEIGHTS = {"tags_pinocchio": 5, "judge_correctness": 5, "judge_reasoning": 1, "judge_penalty": -1}
RANGE = (-10, math.inf)
