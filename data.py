"""Text in, token batches out: tokenizer, chat template, rows of files, packing.

    tok = data.Tokenizer("tiny")
    row = data.parse_row({"question": "2 + 2?", "reasoning": "2 + 2 = 4.", "answer": 4})
    ids, mask, _ = data.read_example(row.fields, tok, data.SYSTEM)

Three facts about Gemma's SentencePiece vocabulary shape this file:

1. `<start_of_turn>`, `<end_of_turn>`, HTML tags and runs of newlines or spaces are USER_DEFINED
   pieces, which SentencePiece matches inside any text. People, data sets and models write text, so
   it is *neutralised*: a literal `<end_of_turn>` is encoded as `<` + `end_of_turn>`, decodes to the
   same characters and never ends a turn.
2. `<bos>`, `<eos>`, `<pad>` are CONTROL pieces: text never produces them. A sequence has one BOS,
   which is put in front by its id.
3. Gemma 3's id of `<end_of_turn>` is Gemma 2's of `<start_of_turn>`: ids are looked up by piece.
"""

import bisect
import contextlib
import csv
import functools
import importlib.util
import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise, starmap, takewhile, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

import gemma
import hub
import runs

# --- tokenizer and chat template ------------------------------------------------------------------

PIECES = ("<unk>", "<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
IMAGE_PIECES = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
# What text must never become, in either family. Each piece begins with its only "<" or "[", so a
# text that is cut behind the first character of every match holds none of them.
STEERING = re.compile(
    r"<(?:(?:start|end)_of_(?:turn|image)|image_soft_token|mask|2mass|unused[0-9]+)>"
    r"|\[(?:multimodal|@BOS@)\]"
)
# `Tokenizer.chat` as Jinja, for other programs that open a directory we saved. DEFAULT: the system
# text of a conversation that brings none of its own.
CHAT_TEMPLATE = r"""
{{- bos_token -}}
{%- set given = messages[0].role == 'system' -%}
{%- set system = messages[0].content + '\n\n' if given else DEFAULT -%}
{%- for m in (messages[1:] if given else messages) -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{%- if role != ('user' if loop.index0 % 2 == 0 else 'model') -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{{- '<start_of_turn>' + role + '\n' + (system if loop.first else '') -}}
{{- (m.content | trim) + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""


class Tokenizer:
    """Gemma's SentencePiece model and chat template, from a model directory or a file in it.

    The file is `tokenizer.model`, or `tokenizer.json` where that is alone (transformers 5 saves no
    other) or has added tokens that `tokenizer.model` lacks (a fine-tune's).

    Messages are `{"role": "system" | "user" | "assistant", "content": str}`; "model" is another
    name for "assistant". System text goes into the first user turn, as in Gemma 3's template.
    """

    def __init__(self, path: str | Path):
        files = [Path(path)]
        if files[0].is_dir():
            _check_chat_template(files[0])
            files = [files[0] / name for name in ("tokenizer.model", "tokenizer.json")]
            files = [file for file in files if file.exists()] or files[:1]
        self.file, *newer = files
        try:
            self.sp = _open(self.file)
            if newer and any(piece not in self for piece in _read_json(newer[0])[1]):
                self.file = newer[0]
                self.sp = _open(self.file)
            found = [self.sp.encode(piece, out_type=str) for piece in PIECES[-2:]]
        except (OSError, RuntimeError, ValueError) as e:
            found = e
        if found != [[piece] for piece in PIECES[-2:]]:
            raise ValueError(f"{self.file}: expected Gemma's tokenizer.model or tokenizer.json "
                             f"(--tokenizer DIR), to which {PIECES[-2:]} are one piece each, found "
                             f"{found}")
        self.vocab_size = self.sp.get_piece_size()
        ids = self.sp.piece_to_id(list(PIECES))
        self.unk, self.pad, self.bos, self.eos, self.start_of_turn, self.end_of_turn = ids
        self.hidden = dict(zip(ids[1:], PIECES[1:], strict=True))  # what `decode` leaves out
        self.stop_ids = (self.end_of_turn, self.eos)
        self.forbidden_ids = tuple(self.sp.piece_to_id(p) for p in IMAGE_PIECES if p in self)

    def __contains__(self, piece: str) -> bool:
        return self.sp.id_to_piece(self.sp.piece_to_id(piece)) == piece  # absent -> the id of <unk>

    def differs(self, other: "Tokenizer") -> str | None:
        """The first token that two tokenizers do not share, in words; None: they are the same."""
        both = [tok.sp.id_to_piece(list(range(tok.vocab_size))) for tok in (self, other)]
        for i, (mine, its) in enumerate(zip_longest(*both)):
            if mine != its:
                return f"token {i} is {mine!r} in {self.file}, {its!r} in {other.file}"
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of a text that may say anything: no BOS, and none of the STEERING pieces."""
        text.encode()  # half a surrogate pair: a ValueError here, a RuntimeError in SentencePiece
        cuts = [0, *(match.start() + 1 for match in STEERING.finditer(text)), len(text)]
        return [i for start, stop in pairwise(cuts) for i in self.sp.encode(text[start:stop])]

    def decode(self, ids, keep_special: bool = False) -> str:
        """Text without BOS, EOS, padding and turn markers; `keep_special` spells those out too."""
        ids = [i for i in np.asarray(ids, int).tolist() if keep_special or i not in self.hidden]
        stretches = ((piece, list(group)) for piece, group in groupby(ids, self.hidden.get))
        return "".join(p * len(group) if p else self.sp.decode(group) for p, group in stretches)

    def chat(self, messages: list[dict], generate: bool | None = None) -> list[int]:
        """Ids by the official template; `generate` opens a model turn (default: after a user)."""
        return [i for ids, _ in self._pieces(messages, generate) for i in ids]

    def example(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        """A training sequence (ids, mask): 1 on what the model says and on its `<end_of_turn>`.

        prompt [p p p] + completion [c c <end_of_turn>] -> mask [0 0 0 1 1 1]. The prompt is exactly
        `chat(messages[:-1])`; the last newline is left out, as the model never generates it.
        """
        *pieces, _newline = self._pieces(messages, generate=False)
        ids = [i for ids, _ in pieces for i in ids]
        return ids, [trained for ids, trained in pieces for _ in ids]

    def _pieces(self, messages, generate) -> Iterator[tuple[list[int], int]]:
        """The chat template, in pieces (ids, whether they are trained on).

        The cuts change no id: SentencePiece merges nothing across a turn marker or a newline.
        """
        system = ""
        if messages and messages[0]["role"] == "system":
            system, messages = messages[0]["content"] + "\n\n", messages[1:]
        roles = [message["role"].replace("assistant", "model") for message in messages]
        if not roles or any(role != ("user", "model")[n % 2] for n, role in enumerate(roles)):
            raise ValueError(f"roles must alternate user/assistant from user on, found {roles}")
        yield [self.bos], 0
        for role, message in zip(roles, messages, strict=True):
            by_model = int(role == "model")
            yield [self.start_of_turn], 0
            yield self.encode(f"{role}\n{system}"), 0
            yield self.encode(message["content"].strip()), by_model
            yield [self.end_of_turn], by_model
            yield self.encode("\n"), 0
            system = ""
        if generate or generate is None and role == "user":
            yield [self.start_of_turn], 0
            yield self.encode("model\n"), 0

    def save(self, directory: str | Path, system: str = "") -> None:
        """Writes what AutoTokenizer needs: `tokenizer.model` and `tokenizer_config.json`.

        system: what the chat template puts before a conversation without a system text of its own.
        Where tokenizer.json was read, it is copied too: transformers reads that first.
        """
        # added_tokens_decoder makes transformers' skip_special_tokens drop the turn markers. With
        # extra_special_tokens instead, HTML tags would fall apart (transformers 5.23).
        markers = (self.start_of_turn, self.end_of_turn)
        config = {
            "tokenizer_class": "GemmaTokenizer",
            **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
            "add_bos_token": True, "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {
                str(i): {"content": self.hidden[i], "special": True} for i in markers
            },
            "chat_template": CHAT_TEMPLATE.replace("DEFAULT", _quoted(system)),
        }
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.file.suffix == ".json":
            del config["added_tokens_decoder"]  # those of tokenizer.json count without it
            (directory / "tokenizer.json").write_bytes(self.file.read_bytes())
        (directory / "tokenizer.model").write_bytes(self.sp.serialized_model_proto())
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _quoted(system: str) -> str:
    """The system text and the empty line behind it as a string of Jinja's."""
    escaped = re.sub(r"(['\\])", r"\\\1", system + "\n\n" if system else "")
    return "'" + escaped.replace("\r", "\\r").replace("\n", "\\n") + "'"


def _check_chat_template(folder: Path) -> None:
    """ValueError where a model folder has a chat template that is not Gemma's."""
    templates = [gemma.read_text(file) for file in folder.glob("chat_template.jinja")]
    for file in folder.glob("tokenizer_config.json"):
        templates.append(gemma.read_json(file).get("chat_template"))
    prompt, system = folder / "prompt.json", ""  # the system text that a model of ours brings
    if prompt.exists():
        system = gemma.json_value(gemma.read_json(prompt), "system", str, "", prompt)
    turns = "b<end_of_turn>\n<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n"
    expected = [f"<bos><start_of_turn>user\n{first}a<end_of_turn>\n<start_of_turn>model\n{turns}"
                for first in ("", f"{system}\n\n")]  # the system text may be in the template
    for template in filter(None, templates):
        if PIECES[-2] not in str(template):
            raise ValueError(f"{folder}: expected Gemma's chat template, which has {PIECES[-2]}, "
                             f"found {str(template)!r:.60}")
        if isinstance(template, str) and (found := _apply(template)) not in (None, *expected):
            raise ValueError(f"{folder}: its chat template writes {found!r:.300}, expected Gemma's "
                             f"{expected[bool(system)]!r}")


def _apply(template: str) -> str | None:
    """Three turns by a chat template, as transformers applies it; None without jinja2."""
    if importlib.util.find_spec("jinja2") is None:
        return None
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    turns = [{"role": role, "content": text} for role, text in (
        ("user", "a"), ("assistant", "b"), ("user", "c"))]
    try:
        return environment.from_string(template).render(
            messages=turns, bos_token="<bos>", add_generation_prompt=True,
            raise_exception=raise_exception)
    except Exception as e:  # a template may fail in any way
        return f"{type(e).__name__}: {e}"


def _open(file: Path) -> sentencepiece.SentencePieceProcessor:
    if file.suffix == ".json":
        return sentencepiece.SentencePieceProcessor(model_proto=_model_proto(*_read_json(file)))
    gemma.check_file(file)
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


def _read_json(file: Path) -> tuple[list[str], list[str], list[str]]:
    """tokenizer.json: all pieces by id, those that are never split, and what each merge makes."""
    content = gemma.read_json(file)
    try:
        added = {t["id"]: t["content"].replace(" ", "▁") for t in content["added_tokens"]}
        other = [t["content"] for t in content["added_tokens"]
                 if any(t.get(k) for k in ("lstrip", "rstrip", "single_word"))]
        other += re.findall(r"Lowercase|NF[CDK]+|StripAccents|Bert\w*|Precompiled",
                            json.dumps(content.get("normalizer")))
        if other:
            raise ValueError(f"{file} with {other[0]!r:.60}, which changes the text")
        by_id = {i: piece for piece, i in content["model"]["vocab"].items()} | added
        merges = [m.split(" ") if isinstance(m, str) else m for m in content["model"]["merges"]]
        if by_id.get(last := len(by_id) - 1) == IMAGE_PIECES[-1]:
            del by_id[last], added[last]  # tokenizer.model lacks it, and text models a row for it
        pieces = [by_id[i] for i in range(len(by_id))]
        if missing := set(PIECES) - set(pieces):
            raise ValueError(f"{file} without {sorted(missing)}")
        return pieces, list(added.values()), ["".join(merge) for merge in merges]
    except (KeyError, TypeError, AttributeError) as e:  # KeyError 7: no token has that id
        raise ValueError(f"{file} without a key or id that a BPE has: {e!r}") from None


def _model_proto(pieces: list[str], added: list[str], merged: list[str]) -> bytes:
    """SentencePiece's own format; the numbers of fields are in its sentencepiece_model.proto.

    SentencePiece joins the two neighbours whose piece has the highest score, transformers those
    whose merge comes first: the scores are 0, -1, ... in the order of the merges.
    """
    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
    types = dict.fromkeys(added, USER_DEFINED) | dict.fromkeys(PIECES[1:4], CONTROL)
    types |= {PIECES[0]: UNKNOWN} | {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    normal = (piece for piece in dict.fromkeys([*merged, *pieces]) if piece not in types)
    scores = {piece: -float(n) for n, piece in enumerate(normal)}
    fields = [(1, {1: piece, 2: scores.get(piece, 0.0), 3: types.get(piece, NORMAL)})
              for piece in pieces]
    # model_type = BPE, vocab_size, split_digits, allow_whitespace_only_pieces, byte_fallback
    trainer = {3: 2, 4: len(pieces), 25: True, 26: True, 35: True}
    for n, piece in enumerate(("<unk>", "<bos>", "<eos>", "<pad>")):
        trainer |= {40 + n: pieces.index(piece), 45 + n: piece}
    # name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = {1: "identity", 3: False, 4: False, 5: True}
    return b"".join(starmap(_field, [*fields, (2, trainer), (3, normalizer)]))


def _field(number: int, value: dict | str | float | int | bool) -> bytes:
    """A field in protobuf's encoding: number and wire type, then varint, float, or sized bytes."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = value.encode() if isinstance(value, str) else b"".join(starmap(_field, value.items()))
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(n: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + _varint(n >> 7)


# --- rows -----------------------------------------------------------------------------------------

SYSTEM = (
    "Think about the problem first and write your reasoning between <reasoning> and </reasoning>. "
    "Then write only the final answer between <answer> and </answer>."
)
COLUMNS = {  # what a row holds: the columns it may be in, of which the first with a value counts
    "prompt": ("messages", "conversations", "prompt", "question", "problem", "instruction"),
    "completion": ("completion",),
    "output": ("output", "response"),  # the completion where no reasoning and answer make one
    "answer": ("answer", "answerKey", "answer_idx", "ground_truth"),
    "choices": ("choices", "options"),
    "system": ("system", "system_prompt"),
    "reasoning": ("reasoning",), "context": ("context",), "input": ("input",),
    "of pairs, rewards and judges": (
        "chosen", "rejected", "rubrics", "rubric", "reference", "reference_answer", "task_type",
        "domain", "difficulty", "kind", "script", "id"),
}
ROLES = {"system": "system", "user": "user", "human": "user",
         "assistant": "assistant", "model": "assistant", "gpt": "assistant"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The edges of a text that a chat template has wrapped already: Gemma's, Mistral's, <|any other|>,
# and "\nAssistant:" or "### Response:" where the model would begin.
TEMPLATED = re.compile(
    r"\A\s*(?:<bos>|<start_of_turn>|<[|｜]\w+[|｜]>|(?:<s>\s?)?\[INST])"
    r"|(?:<end_of_turn>|<eos>|<[|｜]\w+[|｜]>|\[/INST]|<start_of_turn>model"
    r"|\n\s*Assistant:|\bASSISTANT:|### Response:)\s*\Z"
)
GSM8K = re.compile(r"(?s)(.*)####[ \t]*([^\n]*)")


def format_completion(reasoning: str, answer: str) -> str:
    """The completion every stage trains on and rewards."""
    return f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"


class Row(NamedTuple):
    """A row of any known shape in the one form that every script reads."""

    chat: list[dict]  # messages up to the completion; the row's own system message comes first
    completion: str | None  # the assistant's last turn, to train on; None: the row is only a prompt
    answer: str | None  # the right one, a letter where there are choices; None: nothing to check
    choices: tuple[str, ...]
    fields: dict  # the row as the file has it: rewards and judges read their own fields


def parse_row(row: dict) -> Row:
    """Reads a row of any shape named here; a ValueError says what is wrong and what was found.

    {"messages": [...]}, ShareGPT's "conversations", {"prompt", "completion"} as texts or messages,
    Alpaca's {"instruction", "input", "output"}, {"question", "reasoning", "answer"}, GSM8K's
    {"question", "answer": "... #### 42"}; without reasoning the completion is the bare answer.
    "context" goes before the question, "system" before all, and choices are listed behind a
    question that is a text: a list, MedQA's {"A": "Rome"} or ARC's {"text": [], "label": []}. The
    answer is then a letter, a label, the text of a choice, or its number from 0.
    """
    found = {name: next((row[c] for c in columns if row.get(c) not in (None, "", [], {})), None)
             for name, columns in COLUMNS.items()}
    if found["prompt"] is None:
        raise ValueError(f"expected messages, prompt or question, found keys {sorted(row)}")
    for name in ("reasoning", "context", "input", "system"):
        if not isinstance(found[name], str | None):
            raise ValueError(f"expected a text under {name}, found {found[name]!r:.60}")
        found[name] = (found[name] or "").rstrip()
    choices = _choices(found["choices"])
    chat = _chat(found, choices, is_alpaca=found["prompt"] is row.get("instruction"))
    reasoning, answer = _answer(found, choices)
    traced = format_completion(reasoning, answer) if reasoning and answer else None
    said = found["completion"] or traced or found["output"] or answer
    if said and (chat[-1]["role"] == "user" or found["completion"]):
        chat += _turns(said, "assistant", "completion")
    completion = chat.pop()["content"] if chat[-1]["role"] == "assistant" else None
    if completion is not None and not completion.strip():
        raise ValueError("the completion is empty")
    if not chat or chat[-1]["role"] != "user" or not chat[-1]["content"].strip():
        raise ValueError(f"expected a prompt that ends with a user turn, found {chat!r:.60}")
    return Row(chat, completion, answer, tuple(choices.values()), row)


def _chat(found: dict, choices: dict[str, str], is_alpaca: bool) -> list[dict]:
    """The messages of a row without its completion, unless the completion is one of them."""
    prompt = found["prompt"]
    if isinstance(prompt, str):
        more = found["input"] if is_alpaca else ""
        lines = map("{}) {}".format, LETTERS, choices.values())
        prompt = "\n".join([f"{prompt.strip()}\n\n{more}".strip(), *lines])
    chat = _turns(prompt, "user", "prompt")
    own = chat.pop(0)["content"].strip() if chat[0]["role"] == "system" else ""
    system = found["system"].strip() or own
    if not chat or own not in ("", system):
        raise ValueError(f"expected a user turn, one system text; found {own!r:.60} {system!r:.60}")
    if context := found["context"].strip():
        chat[0]["content"] = f"{context}\n\n{chat[0]['content']}"
    return [{"role": "system", "content": system}, *chat] if system else chat


def _turns(value, role: str, name: str) -> list[dict]:
    """A text or a list of messages, in any known spelling -> [{"role", "content"}, ...]."""
    value = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"expected a text or a list of messages as {name}, found {value!r:.60}")
    turns = []
    for n, turn in enumerate(value):
        said, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(text, list):  # of parts; one that is not text is refused below
            parts = [isinstance(part, dict) and part.get("text") for part in text]
            text = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        if said not in [*ROLES] or not isinstance(text, str):
            raise ValueError(f"{name}, turn {n}: expected a text of {', '.join(ROLES)}, "
                             f"found {turn!r:.60}")
        if wrapped := TEMPLATED.search(text):
            raise ValueError(f"{name}, turn {n}: the text carries a chat template already "
                             f"({wrapped[0].strip()}); give the bare text, or messages")
        turns.append({"role": ROLES[said], "content": text})
    return turns


def _choices(found: list | dict | None) -> dict[str, str]:
    """The texts of a row's choices by their labels: {"A": "Rome", "B": "Oslo"}."""
    labels, texts = [*LETTERS], found or []
    if isinstance(found, dict):
        labels = found.get("label", labels) if "text" in found else [*found]
        texts = found["text"] if "text" in found else [*found.values()]
    if not isinstance(labels, list) or not isinstance(texts, list) or len(texts) > len(LETTERS):
        raise ValueError(f"expected a list of at most {len(LETTERS)} choices, found {found!r:.60}")
    pairs = zip(labels, texts, strict=False)
    return {str(label): _scalar(text, "choices") for label, text in pairs if text is not None}


def _scalar(value, name: str) -> str:
    """1.0 -> "1", ["a", 7] -> "a, 7"; an empty text, NaN or an object is an error."""
    if isinstance(value, list) and value and not any(isinstance(v, list) for v in value):
        return ", ".join(_scalar(v, name) for v in value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    if text in ("", "nan", "NaN", "inf", "-inf"):
        raise ValueError(f"expected a text, a number or a list of them as {name} (leave it out "
                         f"where there is none), found {value!r:.60}")
    return text


def _answer(found: dict, choices: dict[str, str]) -> tuple[str, str | None]:
    r"""(reasoning, right answer) of a row; "" and None where it has none.

    GSM8K's "48/2 = <<48/2=24>>24 clips.\n#### 1,024" -> ("48/2 = 24 clips.", "1024").
    """
    reasoning, value = found["reasoning"].strip(), found["answer"]
    if value is None:
        return reasoning, None
    answer = _scalar(value, "answer")
    if gsm8k := GSM8K.fullmatch(answer):
        reasoning = reasoning or re.sub("<<[^<>]*>>", "", gsm8k[1]).strip()
        answer = _scalar(gsm8k[2], "answer after ####")
        if re.fullmatch(r"-?[\d,]+(\.\d+)?", answer):
            answer = answer.replace(",", "")
    if not choices:
        return reasoning, answer
    numbers = map(str, range(len(choices)))
    readings = [choices, choices.values(), numbers]
    if not isinstance(value, str):  # of the choices 1, 2, 4 "2" is the second, and 2 the last
        readings = [choices, numbers, choices.values()]
    letters = [(name.strip().casefold(), letter) for reading in readings
               for name, letter in zip(reading, LETTERS, strict=False)]
    lettered = re.match(r"[(\[]?([A-Za-z])[).:\]]+(?:\s|$)", answer)  # (B), B. and B) Oslo
    for said in (answer, lettered[1] if lettered else answer):
        for name, letter in letters:
            if name == said.casefold():
                return reasoning, letter
    raise ValueError(f"answer {answer!r:.60} is none of the {len(choices)} choices")


def with_system(chat: list[dict], system: str = "") -> list[dict]:
    """Folds the row's own system text, else --system, into the first user turn."""
    if chat and chat[0]["role"] == "system":
        system, chat = chat[0]["content"], chat[1:]
    elif not system:
        return chat
    if not chat or chat[0]["role"] != "user":
        raise ValueError("a system message must be followed by a user message")
    return [{"role": "user", "content": f"{system}\n\n{chat[0]['content'].strip()}"}, *chat[1:]]


# --- training sequences ---------------------------------------------------------------------------


class Example(NamedTuple):
    """One training sequence: token ids, and a mask that is 1 on what is trained on."""

    ids: np.ndarray
    mask: np.ndarray
    fields: dict = {}  # the row that it was read from

    prompt = property(lambda self: self.ids[: np.argmax(self.mask)].tobytes())  # for hold-out
    n_tokens = property(lambda self: len(self.ids))


class Pair(NamedTuple):
    """Two completions of one prompt; the two sequences share a packed row, chosen first."""

    chosen: Example
    rejected: Example
    fields: dict = {}  # the row that it was read from, with the chosen completion as its own

    prompt = property(lambda self: self.chosen.prompt)
    n_tokens = property(lambda self: self.chosen.n_tokens + self.rejected.n_tokens)


def read_example(row: dict, tok: Tokenizer, system: str = "") -> Example:
    """A row as one training sequence; every turn of the assistant is trained on."""
    ids, mask = tok.example(_conversation(row, system))
    return Example(np.array(ids, np.int32), np.array(mask, np.int8), row)


def read_pair(row: dict, tok: Tokenizer, system: str = "") -> Pair:
    """A row of {"prompt", "chosen", "rejected"}, each a text or a list of messages.

    Lists that start with the user bring the prompt themselves. The mask is 1 on what the two don't
    share: prompt [p p p], chosen [c c], rejected [r] -> masks [0 0 0 1 1], [0 0 0 1].
    """
    rows = []
    for key in ("chosen", "rejected"):
        turns = _turns(row.get(key) or None, "assistant", key)
        own = "completion" if turns[0]["role"] == "assistant" else "messages"
        rows.append(row | {own: turns})
    chats = [_conversation(fields, system) for fields in rows]
    shared = len([*takewhile(lambda turns: turns[0] == turns[1], zip(*chats, strict=False))])
    examples = [tok.example(chat) for chat in chats]
    if examples[0] == examples[1] or shared % 2 == 0 or shared == min(map(len, chats)):
        raise ValueError("chosen and rejected must be different answers to the same prompt")
    n_prompt = len(tok.chat(chats[0][:shared]))
    mask = lambda trained: np.array([0] * n_prompt + trained[n_prompt:], np.int8)
    return Pair(*(Example(np.array(ids, np.int32), mask(trained)) for ids, trained in examples),
                rows[0])


def _conversation(row: dict, system: str) -> list[dict]:
    chat, completion, *_ = parse_row(row)
    if completion is None:
        raise ValueError("expected a completion to train on (messages that end with the assistant, "
                         f"completion, or reasoning and answer), found keys {sorted(row)}")
    return [*with_system(chat, system), {"role": "assistant", "content": completion}]


# --- sources of rows ------------------------------------------------------------------------------

BUILT_IN = ("problems", "solutions", "gsm8k")
SLICE = re.compile(r"(.*)\[(\d*)(%?):(\d*)(%?)\]")  # gsm8k[:50%], mine.jsonl[100:200]


def split_of(source: str) -> tuple[str, str]:
    """"gsm8k:test[:9]" -> ("gsm8k", "test"); the split of a file is "train"."""
    part = SLICE.fullmatch(source)
    name, _, split = (part[1] if part else source).partition(":")
    return name, split or "train"


def read_rows(source: str, flag: str = "--data") -> Iterator[tuple[str, dict | ValueError]]:
    """(where, row) of "problems", "solutions" or "gsm8k", each with :train or :test, of a file, or
    of a dataset of the Hub: "hf:owner/name" or "hf:owner/name/config", each with any :split.

    "solutions" are the problems with every step in their traces. A slice takes some of the rows, by
    number or by percentage, as in Hugging Face's datasets: gsm8k[:50%]. A line that is no JSON
    object comes as a ValueError in the row's place.
    """
    if part := SLICE.fullmatch(source):
        rows = list(read_rows(part[1], flag))
        start, stop = (int(n or 0) * len(rows) // 100 if percent else int(n) if n else None
                       for n, percent in (part.group(2, 3), part.group(4, 5)))
        yield from rows[start:stop]
        return
    if source.startswith("hf:"):
        for n, row in enumerate(_hub_dataset(source, flag), 1):
            yield f"{source} row {n}", row
        return
    name, split = split_of(source)
    if name in BUILT_IN and split not in ("train", "test"):
        raise ValueError(f"{flag} {source}: expected nothing, :train or :test after the name")
    if name in ("problems", "solutions"):
        import problems  # here: other sources do not need it

        for i in range(problems.N_PROBLEMS[split]):
            row = problems.word_problem(split, i)
            steps = {"reasoning": row["solution"]} if name == "solutions" else {}
            yield f"{source} row {i}", row | steps
        return
    path = hub.find_gsm8k(split) if name == "gsm8k" else hub.find_file(source, flag)
    if path.suffix in (".csv", ".tsv", ".parquet"):
        for n, row in enumerate(_table(path), 1):
            yield f"{path} row {n}", row
        return
    lines = runs.read_jsonl(path)
    if path.suffix == ".json" and (text := gemma.read_text(path, math.inf)).lstrip()[:1] == "[":
        try:
            lines = enumerate(gemma.parse_json(text), 1)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
    for n, row in lines:
        if not isinstance(row, dict | ValueError):
            row = ValueError(f"expected a JSON object, found a {type(row).__name__}")
        yield f"{path}:{n}", row


def _hub_dataset(source: str, flag: str):
    """The rows of hf:owner/name[/config][:split], by the package datasets."""
    name, _, split = source.removeprefix("hf:").partition(":")
    owner, *names = name.split("/")
    if len(names) not in (1, 2):
        raise ValueError(f"{flag} {source}: expected hf:owner/name, hf:owner/name/config, :split")
    try:
        import datasets

        return datasets.load_dataset(f"{owner}/{names[0]}", *names[1:], split=split or "train")
    except ImportError:
        raise ValueError(f"{flag} {source}: pip install datasets, which reads it") from None
    except Exception as e:  # whatever fails in it, the user sees one line
        why = (str(e).splitlines() or [""])[0]
        raise ValueError(f"{flag} {source}: {type(e).__name__}: {why}") from None


def _table(path: Path) -> Iterator[dict | ValueError]:
    """The rows of a CSV, TSV or Parquet file; an empty cell is None.

    The cells of a CSV are texts, but for lists and objects in JSON, and the difficulty.
    """
    if path.suffix == ".parquet":
        for row in _parquet(path):
            yield {k: None if v != v else v for k, v in row.items()}  # NaN is no value
        return
    csv.field_size_limit(2**30)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","):
                if None in row:
                    yield ValueError(f"more cells than the {len(row) - 1} columns of the header")
                else:
                    yield {k: _cell(k, v) for k, v in row.items()}
    except (csv.Error, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: {e}") from None


def _cell(column: str, text: str | None):
    if not text:
        return None
    if text[0] in "[{" or column == "difficulty":
        with contextlib.suppress(ValueError):  # then it is a text
            return gemma.parse_json(text)
    return text


def _parquet(path: Path) -> list[dict]:
    try:
        try:
            import pyarrow.parquet
        except ImportError:
            import pandas

            return pandas.read_parquet(path).to_dict("records")
        return pyarrow.parquet.read_table(path).to_pylist()
    except ImportError:
        raise ValueError(f"{path}: pip install pyarrow, which reads it") from None
    except Exception as e:  # a damaged file
        raise ValueError(f"{path}: {(str(e).splitlines() or [''])[0]}") from None


def read_columns(columns: str) -> dict[str, str]:
    """--columns question=instruction,answer=response as {our name: the file's}."""
    pairs = [pair.partition("=") for pair in columns.split(",") if pair.strip()]
    names = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if not all(names) or not all(names.values()) or len(names) < len(pairs):
        raise ValueError(f"--columns {columns}: expected OURS=THEIRS, each of ours once, as in "
                         "question=instruction,answer=response")
    return names


def renamed(row: dict, columns: dict[str, str]) -> dict:
    """A row with the columns that --columns names under our names, and without empty ones."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise ValueError(f"--columns {ours}={theirs}: no {theirs}, found keys {sorted(row)}")
    kept = {k: v for k, v in row.items() if k not in columns.values() and v is not None}
    new = {ours: row[theirs] for ours, theirs in columns.items()}
    return kept | {k: v for k, v in new.items() if v is not None}


def unread_in_messages(row: dict) -> set[str]:
    """What the messages of a row hold beside role and text: {"messages.reasoning_content"}."""
    turns = [(name, turn) for name in ("messages", "conversations", "prompt", "chosen", "rejected")
             if isinstance(row.get(name), list) for turn in row[name] if isinstance(turn, dict)]
    return {f"{name}.{key}" for name, turn in turns for key, value in turn.items()
            if value and key not in ("role", "content", "from", "value")}


class TooLong(ValueError):
    """What `read` raises in `load` for a row that is usable but for its length."""

    def __init__(self, n_tokens: int, limit: int, flag: str):
        super().__init__(f"{n_tokens} tokens, more than {flag} {limit}")
        self.n_tokens = n_tokens


def load(source: str, read: Callable[[dict], Any], *, rows: int = 0, skip_bad_rows: bool = False,
         flag: str = "--data", what: str = "rows",
         columns: str = "") -> tuple[list[list], list[str]]:
    """The items read(row) of each comma-separated source, and what was wrong with those left out.

    rows: at most so many items of each source, 0 for all. Bad rows, of which `read` or the JSON
    raises a ValueError, are counted; without skip_bad_rows they stop it, the first by its place.
    columns: see read_columns; not for the built-in sources.
    """
    sets, bad, names = [], [], read_columns(columns)
    for one in map(str.strip, source.split(",")):
        items, faults, found, longest, n_read = [], [], set(), 0, 0
        built_in = split_of(one)[0] in BUILT_IN
        ours = {} if built_in else names
        for where, row in read_rows(one, flag):
            if rows and len(items) == rows:
                break
            n_read += 1
            try:
                if isinstance(row, ValueError):
                    raise row
                row = renamed(row, ours)
                found |= row.keys() | unread_in_messages(row)
                items.append(read(row))
            except ValueError as e:
                faults.append(f"{where}: {e}")
                longest = max(longest, getattr(e, "n_tokens", 0))
        size = f"; the longest has {longest:,} tokens" if longest else ""
        if faults and not skip_bad_rows:
            count = f"; {len(faults):,} of {n_read:,} rows are bad{size}" if n_read > 1 else ""
            raise ValueError(f"{faults[0]}{count} (else: --skip-bad-rows)")
        note = f", {len(faults):,} bad rows left out; first: {faults[0]}{size}" if faults else ""
        if not items:
            raise ValueError(f"{flag} {one}: no usable row{note}")
        runs.say(f"data: {len(items):,} {what} of {one}{note}")
        unread = ", ".join(sorted(found.difference(*COLUMNS.values())))
        if unread and not built_in:
            runs.say(f"data: {one}: columns nothing reads: {unread} (but a --reward-file may)")
        sets.append(items)
        bad += faults
    return sets, bad


def test_split(source: str) -> str | None:
    """What a --data value is evaluated on: "gsm8k" -> "gsm8k:test"; None where a part has none."""
    parts = [split_of(part.strip()) for part in source.split(",")]
    if any(name not in BUILT_IN or split == "test" for name, split in parts):
        return None
    return ",".join(f"{name}:test" for name, _ in parts)


def load_split(config, read: Callable[[dict], Any], *, rows: int = 0) -> tuple[list[list], list]:
    """(items of each source of config.data, held-out items).

    Held out, at most config.eval_rows (0: all): config.eval_data, else the test split of built-in
    sources, else all rows of 2 % of the *prompts*: a repeated question is never on both sides.
    """
    sets, _ = load(config.data, read, rows=rows, skip_bad_rows=config.skip_bad_rows,
                   columns=config.columns)
    n = config.eval_rows or None
    if source := config.eval_data or test_split(config.data):
        each = -(-n // len(source.split(","))) if n else 0
        held_out, _ = load(source, read, rows=each, skip_bad_rows=config.skip_bad_rows,
                           flag="--eval-data", what="held-out rows", columns=config.columns)
        return sets, [item for items in held_out for item in items][:n]
    prompts = list(dict.fromkeys(item.prompt for items in sets for item in items))
    order = np.random.default_rng(config.seed).permutation(len(prompts))
    n_out = len(prompts) // 50 + 1
    out = {prompts[i] for i in order[: min(n_out, n or n_out)]}
    held_out = [item for items in sets for item in items if item.prompt in out]
    sets = [[item for item in items if item.prompt not in out] for items in sets]
    if not all(sets):
        raise ValueError(f"--data {config.data}: {len(prompts)} prompts are too few to hold "
                         "some out; --eval-data names other held-out rows")
    return sets, held_out[:n]


def mix_weights(mix: str | None, sources: list[list]) -> list[float] | None:
    """--mix 0.7,0.3 as numbers, one for each source; None without --mix."""
    try:
        weights = [float(weight) for weight in mix.split(",")] if mix else None
    except ValueError:
        weights = []
    if weights is not None and not (len(weights) == len(sources) and 0 < sum(weights) < math.inf
                                    and min(weights) >= 0):
        raise ValueError(f"--mix {mix}: expected {len(sources)} weights, one for each of --data")
    return weights


# --- packed batches -------------------------------------------------------------------------------


def pack(prompts: list[int], completions: list[list[int]],
         size: int) -> list[list[tuple[int, list[int]]]]:
    """Packs token counts into rows of `size`: a row is a list of (prompt, [its completions there]).

    Best-fit decreasing, by groups that share one copy of their prompt: the largest goes first, to
    the fullest row that takes it whole, else part of it to the emptiest row, else to a new one.
    A prompt of 2 with completions of 3, 5 and 1 in 8 -> [[(0, [1, 2])], [(0, [0])]]: 2+5+1, 2+3.
    """
    rows, spaces, n_noted = [], [], 0  # spaces, sorted: (room left, minus when noted, row)
    total = [p + sum(lengths) for p, lengths in zip(prompts, completions, strict=True)]
    for q in sorted(range(len(prompts)), key=lambda q: -total[q]):
        left = sorted(range(len(completions[q])), key=lambda i: -completions[q][i])
        while left:
            need = prompts[q] + sum(completions[q][i] for i in left)
            smallest = prompts[q] + completions[q][left[-1]]
            at = min(bisect.bisect_left(spaces, (need,)), len(spaces) - 1)
            if spaces and spaces[at][0] >= smallest:
                room, _, r = spaces.pop(at)
            else:
                room, r = size, len(rows)
                rows.append([])
            room, here = room - prompts[q], []
            for i in left:
                if completions[q][i] <= room:
                    room -= completions[q][i]
                    here.append(i)
            if not here:
                raise ValueError(f"{smallest} tokens do not fit into a row of {size}")
            rows[r].append((q, here))
            left = [i for i in left if i not in here]
            if room:
                bisect.insort(spaces, (room, -n_noted, r))
                n_noted += 1
    return rows


def fill(items: list[Example | Pair], size: int) -> list[list[Example]]:
    """Packed rows of training sequences."""
    rows = pack([0] * len(items), [[item.n_tokens] for item in items], size)
    sequences = lambda item: item[:2] if isinstance(item, Pair) else (item,)
    return [[example for i, _ in row for example in sequences(items[i])] for row in rows]


def assemble(rows: list[list[Example]], n_rows: int, size: int) -> dict[str, np.ndarray]:
    """Packed rows as arrays [n_rows, size]: tokens, mask, segments (0 = padding), positions.

    [[p c], [p p c]] in 6 -> mask 010010, segments 112220, positions 010120.
    """
    keys = ("tokens", "mask", "segments", "positions")
    out = {k: np.zeros((n_rows, size), np.int32) for k in keys}
    for r, row in enumerate(rows):
        start = 0
        for s, (ids, mask, *_) in enumerate(row, 1):
            span = slice(start, start + len(ids))
            for key, value in zip(keys, (ids, mask, s, np.arange(len(ids))), strict=True):
                out[key][r, span] = value
            start += len(ids)
    return out


class Packed:
    """Endless shuffled batches; batch n is a function of (seed, n): resuming needs only the step.

    Each epoch takes from every source its share of the weights (default: all of it once), in an
    order of its own, packs best-fit and shuffles the packed rows. A source is read to its end
    before any row of it comes again.
    """

    def __init__(self, sources: list[list], size: int, n_rows: int, seed: int,
                 weights: list[float] | None = None):
        self.sources, self.size, self.n_rows, self.seed = sources, size, n_rows, seed
        total = sum(map(len, sources))
        share = weights or [len(s) for s in sources]
        self.take = [max(1, round(total * w / sum(share))) if w else 0 for w in share]
        self.epochs = []  # packed rows up to the end of each epoch
        self._epoch = functools.lru_cache(maxsize=1)(self._epoch)

    def _epoch(self, epoch: int) -> list[list[Example]]:
        chosen = []
        for i, (source, take) in enumerate(zip(self.sources, self.take, strict=True)):
            for k in range(epoch * take, (epoch + 1) * take):
                lap, at = divmod(k, len(source))
                if at == 0 or k == epoch * take:
                    order = np.random.default_rng((self.seed, i, lap)).permutation(len(source))
                chosen.append(source[order[at]])
        rows = fill(chosen, self.size)
        order = np.random.default_rng((self.seed, 10**6, epoch)).permutation(len(rows))
        return [rows[r] for r in order]

    def batch(self, n: int) -> dict[str, np.ndarray]:
        """Batch n = 0, 1, ...: arrays [n_rows, size]; a batch may span two epochs."""
        first, rows = n * self.n_rows, []
        while len(rows) < self.n_rows:
            at = first + len(rows)
            epoch = bisect.bisect_right(self.epochs, at)
            packed = self._epoch(epoch)
            start = self.epochs[epoch - 1] if epoch else 0
            if epoch == len(self.epochs):
                self.epochs.append(start + len(packed))
            rows += packed[at - start :][: self.n_rows - len(rows)]
        return assemble(rows, self.n_rows, self.size)


def eval_batches(examples: list, size: int, n_rows: int) -> list[dict[str, np.ndarray]]:
    """Every example once, packed; the last batch is filled up with empty rows."""
    rows = fill(examples, size)
    return [assemble(rows[i : i + n_rows], n_rows, size) for i in range(0, len(rows), n_rows)]
