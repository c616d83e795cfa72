"""Whether two formulas are equal, by the package math-verify in a process of its own.

math-verify limits its computations by signals, which only main threads receive, and completions are
scored in other threads. So it runs without its own limits in a process whose alarm ends it after
SECONDS: a formula that takes longer, as 9^{9^{9}} does, is not equal.
"""

import functools
import json
import re
import subprocess
import sys
import threading

SECONDS = 5
WORKER = f"""
import json, resource, signal, sys
signal.alarm(60)
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from math_verify import parse, verify
replies, sys.stdout = sys.stdout, sys.stderr
parse("$x^2$", parsing_timeout=None)  # loads its grammar
signal.alarm(0)
print("ready", file=replies, flush=True)
for line in sys.stdin:
    signal.alarm({SECONDS})
    try:
        gold, guess = (parse(f"${{text}}$", parsing_timeout=None) for text in json.loads(line))
        right = bool(gold and guess) and verify(gold, guess, timeout_seconds=None)
    except Exception:
        right = False
    signal.alarm(0)
    print("right" if right else "wrong", file=replies, flush=True)
"""
TO_LATEX = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"√\(([^()]*)\)", r"\\sqrt{\1}"), (r"√([\d.]+|\w)", r"\\sqrt{\1}"), ("π", r"\\pi "),
    ("∞", r"\\infty "), (r"\*", r"\\cdot "), (r"\^(-?[\d.]+|-\w)", r"^{\1}"),
    (r"(?<!\\)\b(sin|cos|tan|log|ln)\b", r"\\\1"),
)]


class Verifier:
    """The process, which serves all threads one after the other."""

    def __init__(self):
        self.lock = threading.Lock()
        # A completion is graded for its reward and once more for the accuracy that is logged.
        self.equal = functools.lru_cache(maxsize=4096)(self.ask)
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", WORKER], text=True, bufsize=1,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL)
        self.installed = self.process.stdout.readline() == "ready\n"

    def ask(self, guess: str, gold: str) -> bool:
        with self.lock:
            if self.process.poll() is not None:
                self.start()
            self.process.stdin.write(json.dumps([gold, guess]) + "\n")
            if not (reply := self.process.stdout.readline()):  # its alarm rang
                self.process.wait()
        return reply == "right\n"


@functools.cache
def _verifier() -> Verifier:
    verifier = Verifier()
    if not verifier.installed:
        print("math-verify is not installed: formulas must be equal but for notation and the order "
              "of a sum (pip install math-verify)", file=sys.stderr)
    return verifier


def equal(guess: str, gold: str) -> bool:
    """Whether two formulas in answers.plain() notation are equal; without math-verify: no."""
    for pattern, replacement in TO_LATEX:
        guess, gold = pattern.sub(replacement, guess), pattern.sub(replacement, gold)
    return _verifier().installed and _verifier().equal(guess, gold)
