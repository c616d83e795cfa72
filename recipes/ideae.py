"""IDEA-E's rewards: --rewards ideae, -0.25 to 7.75.

0.75 for the strict format, four tags at +-0.0625, five markers at 0.1 in the scaffold phase, 2.25 *
the TF-IDF cosine of trace and reference trace, the answer 0 to 4. `contrast` is the other reading
of their summary, a trace unlike its own answer: --rewards ideae,tfidf:0,contrast:2.25.

What it pays for nothing: "the right answer is among the words of the answer" pays 2.5 for a list of
likely answers. With the markers and common words, one constant line gets about 4.2, more than an
honest trace with a wrong answer. Repaired, with only a right answer paid, and no markers:

    --rewards ideae,answer_ideae:0,answer:4,markers:0
"""

import math
from collections import Counter

from recipe_text import between, off

from answers import correct, words
from rewards import Reward, told

SCAFFOLD = 0.5  # share of the run in which `markers` pays; IDEA-E's own schedule is not known
vectorizer = None  # scikit-learn's, fitted on the reference traces of the training rows


def fit(traces: list[str]) -> None:
    """Fits the TF-IDF: 500 words, without English stop words, smoothed idf, unit vectors."""
    global vectorizer
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise ValueError("--rewards ideae: needs scikit-learn (pip install scikit-learn)") from None
    vectorizer = TfidfVectorizer(stop_words="english", max_features=500)
    try:
        vectorizer.fit(traces)
    except ValueError:  # scikit-learn's "empty vocabulary"
        raise ValueError('--rewards tfidf: no row of the data has words in "reasoning"') from None


def cosine(a: str, b: str) -> float:
    """0 (no word in common, or nothing to compare) to 1."""
    a, b = vectorizer.transform([a, b])
    return min(1.0, float(a.multiply(b).sum()))


def tfidf(completion: str, row: dict) -> float:
    """Cosine of the trace and the reference trace: 0 to 1; 0 without both tags of the trace."""
    return cosine(between(completion, "reasoning"), row["reasoning"])


def contrast(completion: str, row: dict) -> float:
    """1 - cosine of the trace and the answer; 0 without both, or with no word that was fitted."""
    trace, said = between(completion, "reasoning"), between(completion, "answer")
    return 1.0 - cosine(trace, said) if said and vectorizer.transform([trace]).nnz else 0.0


def markers(completion: str, row: dict) -> float:
    """How many of the markers [I] [D] [E] [A] [E] the trace has: 0 to 5; 0 after the scaffold."""
    trace = between(completion, "reasoning") if row.get("progress", 0.0) < SCAFFOLD else ""
    return float(sum(min(trace.count(f"[{m}]"), n) for m, n in Counter("IDEAE").items()))


def answer_ideae(completion: str, row: dict) -> float:
    """The same text 4; the right letter, boolean or number 3.5; a number within 5 %, or the right
    answer among the words of the answer, 2.5; within 10 % 1.25; else 0."""
    said, (gold, kind, choices) = between(completion, "answer"), told(row)
    if said == gold:
        return 4.0
    if kind in ("number", "choice", "boolean") and correct(said, gold, kind, choices):
        return 3.5
    distance = off(said, gold) if kind == "number" else None
    distance = math.inf if distance is None else distance
    if distance <= 0.05 or words(gold) and f" {words(gold)} " in f" {words(said)} ":
        return 2.5
    return 1.25 if distance <= 0.1 else 0.0


REWARDS = {"tfidf": Reward(tfidf, "reasoning"), "contrast": contrast, "markers": markers,
           "answer_ideae": Reward(answer_ideae, "answer")}
WEIGHTS = {"format": 0.75, "tags": 0.25, "markers": 0.1, "tfidf": 2.25, "answer_ideae": 1}
