"""chat.py: what is streamed, the conversation, the base beside it, and what a terminal is given."""

import io
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from test_lora import random_adapter

import chat
import data
import gemma
import lora
import rewards
import rollouts
from sampler import Sampler

TOK = data.Tokenizer(ROOT / "tiny")
FIRST, SECOND = "Mia has 12 cards. She buys 7 more. How many does she have?", "And half of them?"


class Written(io.StringIO):
    """Standard output that remembers each write; a terminal or not."""

    def __init__(self, terminal=False):
        super().__init__()
        self.isatty, self.parts = lambda: terminal, []

    def write(self, text):
        self.parts += [text] * bool(text)
        return super().write(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with an adapter for the tiny model that was trained under a system text."""
    folder = tmp_path_factory.mktemp("runs") / "grpo"
    cfg = gemma.read_config(ROOT / "tiny")
    lora.save(folder / "final", random_adapter(cfg), cfg, str(ROOT / "tiny"))
    lora.write_prompt(folder / "final", "Be brief.")
    return folder


def ask(monkeypatch, lines, **config):
    """Pipes lines into chat.main -> (the ids of each prompt that was sampled from, stdout)."""
    out = Written()
    prompts, real = [], Sampler.sample
    recorded = lambda self, params, ids, **kw: prompts.append(ids[0]) or real(
        self, params, ids, **kw)
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", recorded)
        patch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        patch.setattr(sys, "stdout", out)
        chat.main(chat.Config(**config))
    return prompts, out


def greedy(ids, adapter=None):
    """The line that chat.py should print, by a sampler that is asked for the whole answer."""
    cfg, params = gemma.load(ROOT / "tiny")
    sampler = Sampler(cfg, gemma.all_devices(), 3, 128, 104, dtype=np.float32)
    (r,) = sampler.sample(params, [ids], lora=adapter and lora.load(adapter, cfg), temperature=0.0,
                          **rollouts.token_rules(TOK))
    text = rewards.printable(TOK.decode(r.ids))
    return text, text + " [cut at --max-new]" * (r.stop == "length") + "\n"


def test_a_prompt_streams_the_greedy_answer(monkeypatch):
    (ids,), out = ask(monkeypatch, [], prompt=FIRST)
    text, line = greedy(ids)
    assert out.getvalue() == line and text.endswith("</answer>")
    assert len(out.parts) > 5 and max(map(len, out.parts)) < len(text) / 2


def test_piped_lines_are_a_conversation_and_base_answers_beside_it(monkeypatch, run):
    lines = [FIRST, "/base", "", SECOND, "/reset", SECOND]
    prompts, out = ask(monkeypatch, lines, adapter=str(run))
    final = run / "final"
    said, _ = greedy(prompts[0], final)
    chats = [[("user", FIRST)], [("user", FIRST)],
             [("user", FIRST), ("assistant", said), ("user", SECOND)], [("user", SECOND)]]
    for ids, turns in zip(prompts, chats, strict=True):
        messages = [{"role": role, "content": content} for role, content in turns]
        assert ids == TOK.chat([{"role": "system", "content": "Be brief."}, *messages])
    lines = [greedy(ids, None if i == 1 else final)[1] for i, ids in enumerate(prompts)]
    assert lines[0] != lines[1] and out.getvalue() == "".join(lines)


def test_a_turn_compiles_nothing_within_a_length_bucket(run):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None)
    config = chat.Config(adapter=str(run), max_new=40)  # of no other test
    talk = chat.Chat(config)
    talk.turn(FIRST)
    talk.turn("/base")
    before = len(compiled)
    assert before
    talk.turn(SECOND)
    talk.turn("/base")
    assert len(compiled) == before


def test_what_cannot_be_answered_is_one_line_and_the_conversation_goes_on(
        monkeypatch, capfd):
    prompts, _ = ask(monkeypatch, ["/base", "/what", "word " * 600, FIRST])
    assert prompts == [TOK.chat([{"role": "user", "content": FIRST}])]
    said = capfd.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == ["error"] * 3
    assert "/base" in said[0] and "/what" in said[1] and "more than the model takes" in said[2]


def answer(*texts, stop="stop"):
    return iter([*((text, None) for text in texts[:-1]), (texts[-1], stop)])


def test_hostile_text_cannot_drive_the_terminal(monkeypatch):
    hostile = "a\x1b[2Jb\x1b[31mc\u202ed\r"
    for terminal in (False, True):
        monkeypatch.setattr(sys, "stdout", out := Written(terminal))
        assert chat.stream(answer("a\x1b", "a\x1b[2Jb", hostile)) == hostile
        assert out.getvalue() == r"a\x1b[2Jb\x1b[31mc\u202ed\r" + "\n"


def test_tags_and_characters_appear_whole_and_in_colour(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = "<reasoning>1 < 2 é</reasoning>\n<answer>4</answer>"
    texts = [text[:n] for n in range(1, len(text) + 1)] + [text]
    texts.insert(text.index("é"), text[: text.index("é")] + "\ufffd")  # its first byte alone
    monkeypatch.setattr(sys, "stdout", out := Written(terminal=True))
    chat.stream(answer(*texts))
    assert out.getvalue() == rewards.colour(text) + "\n" and "\ufffd" not in out.getvalue()
    assert len(out.parts) > 10
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", out := Written(terminal=True))
    chat.stream(answer(*texts, stop="length"))
    assert out.getvalue() == text + " [cut at --max-new]\n"
