"""Tunix's rewards of GSM8K: --rewards tunix, -2 to 9.5.

format 3, four tags at +-0.5, the answer -1 to 3, its first number 1.5, of the text between both
answer tags.

What it pays for nothing: one constant line in the right tags gets the 5 of the format. With an
answer that is no number it gets 4.5, more than the 4 of an honest wrong number. Repaired, with the
format as 0.9 of 5.4 and only a right answer paid:

    --rewards format:0.9,answer:4.5
"""

from recipe_text import between, off

from answers import TAG, bare, figured, found_in, parse, same_quantity
from rewards import Reward


def answer_tunix(completion: str, row: dict) -> float:
    """The same text 3, but for white space 1.5; within 10 % 0.5, 20 % 0.25, else -1; unread -0.5.

    Outside the strict format it is 0: Tunix finds no answer there, and its range begins at -2.
    """
    if not parse(completion)[2]:
        return 0.0
    said, gold = TAG.split(completion)[6], str(row["answer"])
    if said.strip() == gold.strip():
        return 3.0 if said == gold else 1.5
    distance = off(said, gold)
    if distance is None:
        return -0.5
    return 0.5 if distance <= 0.1 else 0.25 if distance <= 0.2 else -1.0


def first_number(completion: str, row: dict) -> float:
    """1 if the first number of the answer is the right one, else 0."""
    wanted = bare(str(row["answer"]))
    said = figured(between(completion, "answer")[:1000])
    found = [one for one in found_in(said) if one.value is not None]
    return float(bool(wanted and found) and same_quantity(found[0], wanted))


REWARDS = {"answer_tunix": Reward(answer_tunix, "answer"),
           "first_number": Reward(first_number, "answer")}
WEIGHTS = {"format": 3, "tags": 2, "answer_tunix": 1, "first_number": 1.5}
