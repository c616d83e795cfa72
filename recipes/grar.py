"""G-RaR's reward: --rewards grar, 0 to 1.

clip(0.2 * format + 0.2 * numeric_exact + 0.6 * judge, 0, 1). Ours differs in one part: `answer`
checks texts, letters and formulas as well as numbers.

What it pays for nothing: the format alone is 0.2. The judge's share is as good as the judge.
"""

WEIGHTS = {"format": 0.2, "answer": 0.2, "judge": 0.6}
RANGE = (0, 1)
