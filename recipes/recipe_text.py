"""How recipes read completions: text between both of its tags, and how far a number is off."""

import math

from answers import number


def between(completion: str, tag: str) -> str:
    """The text from the first <tag> to its </tag>; "" without either."""
    text, closed, _ = completion.partition(f"<{tag}>")[2].partition(f"</{tag}>")
    return text.strip() if closed else ""


def off(guess: str, gold: str) -> float | None:
    """Distance of two numbers as a share of the second: ("9", "10") -> 0.1; None without both."""
    a, b = number(guess), number(gold)
    if a is None or b is None:
        return None
    return round(abs(a - b) / abs(b), 9) if b else math.inf if a else 0.0
