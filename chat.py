"""Talk to a model in the terminal; its trace and its answer appear as they are written.

    python chat.py --adapter runs/grpo                     # /base, /reset, Ctrl-D
    python chat.py --adapter runs/grpo --prompt "12 + 30?" # one answer
    python chat.py --adapter runs/grpo < turns.txt         # a conversation, a line each turn

/base answers the last question with the base model, without any adapter; /reset forgets the
conversation. Programs are compiled for up to 256, 512, 1024, ... tokens of conversation: a turn
compiles only where it outgrows the last size.
"""

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Iterator

import data
import hub
import rewards
import rollouts
import settings
import stage
import terminal
from sampler import Sampler


@dataclasses.dataclass(frozen=True)
class Config(settings.Model):
    """Fields left at None take the model's defaults from DEFAULTS."""

    # answers
    system: str | None = None
    """System text before the first question; default: the one the adapter was trained under."""
    prompt: str | None = None
    """Answer this question and leave; default: read questions from the terminal or a pipe."""
    temperature: float = 0.0
    """Temperature of the answers; 0: the likeliest token each time."""
    max_new: int | None = None
    """Longest answer, in tokens."""


REAL = dict(dtype="bfloat16", system=data.SYSTEM, max_new=768)
DEFAULTS = {"tiny": dict(dtype="float32", system="", max_new=104), "gemma2": REAL, "gemma3": REAL}


class Chat:
    """A conversation with a model, and with the base that it was trained from."""

    def __init__(self, config: Config):
        config = settings.resolve(config, DEFAULTS)
        self.config, self.messages, self.n_answers = config, [], 0
        start = hub.find_start(config.model, config.weights, config.adapter)
        self.tok = data.Tokenizer(config.tokenizer or start.weights)
        self.model, self.weights = stage.load_to_sample(start, config)

    @functools.cached_property
    def base(self) -> tuple:
        """(params, adapter) before training; with an adapter of scale 0 nothing compiles anew."""
        params, adapter = self.weights
        if adapter is not None:
            return params, adapter | {"scale": {k: 0 * s for k, s in adapter["scale"].items()}}
        start = hub.find_start(self.config.model, self.config.weights, None)
        return stage.load_to_sample(start, self.config)[1]

    def answer(self, messages: list[dict], weights: tuple) -> Iterator[tuple[str, str | None]]:
        """Yields (the answer so far, why it has ended or None)."""
        ids = self.tok.chat(data.with_system(messages, self.config.system))
        if len(ids) >= self.model["cfg"].max_position_embeddings:
            raise ValueError(f"{len(ids)} tokens are more than the model takes: /reset")
        self.n_answers += 1  # each has noise of its own
        size = max(256, 1 << (len(ids) - 1).bit_length())
        sampler = Sampler(**self.model, max_prompt=size, max_new=self.config.max_new, slots=1,
                          cached_prompts=1, chunk=4)
        for r in sampler.sample(
                weights[0], [ids], lora=weights[1], temperature=self.config.temperature,
                step=self.n_answers, partial=True, **rollouts.token_rules(self.tok)):
            yield self.tok.decode(r.ids), r.stop

    def turn(self, line: str) -> None:
        """Answers a question or obeys a command; a ValueError says what cannot be done."""
        if line == "/reset":
            self.messages = []
        elif line == "/base" and self.messages:
            stream(self.answer(self.messages[:-1], self.base))
        elif line.startswith("/"):
            raise ValueError(f"{line}: expected /base, after a question, or /reset; Ctrl-D ends")
        elif line:
            asked = [*self.messages, {"role": "user", "content": line}]
            text = stream(self.answer(asked, self.weights))
            self.messages = [*asked, {"role": "assistant", "content": text}]


def stream(answer: Iterator[tuple[str, str | None]]) -> str:
    """Prints an answer as it grows -> its text; in colour on a terminal."""
    in_colour, shown = sys.stdout.isatty() and not os.environ.get("NO_COLOR"), ""
    for text, stop in answer:
        # What the next token may complete has to wait: a tag, a character of several bytes.
        safe = text if stop else re.sub(r"(?i)(<[a-z/]{0,10}|\ufffd+)\Z", "", text)
        now = rewards.colour(safe) if in_colour else rewards.printable(safe)
        now = now if stop else now.removesuffix("\x1b[0m")
        print(now[len(shown) :], end="", flush=True)
        shown = now
    print(" [cut at --max-new]" * (stop == "length"), flush=True)
    return text


def main(config: Config) -> None:
    """Answers --prompt, or what is typed or piped in, line by line."""
    terminal.check_versions()
    terminal.compilation_cache()
    if os.name != "nt":  # Windows has none
        import readline  # noqa: F401  input() then edits lines
    chat = Chat(config)
    if config.prompt is not None:
        return chat.turn(config.prompt)
    while True:
        try:
            chat.turn(input("> " * sys.stdin.isatty()).strip())
        except (ValueError, KeyboardInterrupt) as e:  # Ctrl-C ends the answer only
            terminal.say(f"error: {e}" if str(e) else "\x1b[0mstopped")
        except EOFError:
            return


if __name__ == "__main__":
    import commandline

    terminal.command(lambda: main(commandline.cli(Config, description=__doc__)))
