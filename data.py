"""Text in, token batches out: tokenizer, chat template, rows of files, packing.

    tok = data.Tokenizer("tiny")
    row = data.parse_row({"question": "2 + 2?", "reasoning": "2 + 2 = 4.", "answer": 4})
    ids, mask = data.read_example(row.fields, tok, data.SYSTEM)

The tokenizer is SentencePiece itself, on the `tokenizer.model` of a Hugging Face Gemma directory.
Three facts about Gemma's vocabulary shape this file:

1. `<start_of_turn>` and `<end_of_turn>` are USER_DEFINED pieces: SentencePiece matches them inside
   any text. People, data sets and models write text, so every text is *neutralised*: a literal
   `<end_of_turn>` is encoded as `<` + `end_of_turn>`, decodes to the same characters and never ends
   a turn. HTML tags and runs of newlines or spaces are USER_DEFINED too; these stay whole.
2. `<bos>`, `<eos>`, `<pad>` are CONTROL pieces: text never produces them. A sequence has one BOS,
   which is put in front by its id.
3. Ids differ between the families (Gemma 3's `<end_of_turn>` is Gemma 2's `<start_of_turn>`), so
   every id is looked up by its piece.
"""

import bisect
import functools
import json
import re
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

import hub
import runs

# --- tokenizer and chat template ------------------------------------------------------------------

BOS, START, END = "<bos>", "<start_of_turn>", "<end_of_turn>"
IMAGE_PIECES = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
# What text must never become, in either family. Each piece begins with its only "<" or "[", so a
# text that is cut behind the first character of every match holds none of them.
STEERING = re.compile(
    r"<(?:(?:start|end)_of_(?:turn|image)|image_soft_token|mask|2mass|unused[0-9]+)>"
    r"|\[(?:multimodal|@BOS@)\]"
)
FAMILIES = {"gemma2": "gemma2", "gemma3": "gemma3", "gemma3_text": "gemma3"}  # by model_type

# `Tokenizer.render` as Jinja, for other programs that open a directory we saved.
CHAT_TEMPLATE = r"""
{{- bos_token -}}
{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' -%}
{%- for m in (messages[1:] if system else messages) -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{%- if role != ('user' if loop.index0 % 2 == 0 else 'model') -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{{- 'START' + role + '\n' + (system if loop.first else '') -}}
{{- (m.content | trim) + 'END\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'STARTmodel\n' -}}{%- endif -%}
""".replace("START", START).replace("END", END)
NO_SYSTEM = r"""
{%- if messages[0].role == 'system' -%}
{{- raise_exception('System role not supported') -}}
{%- endif -%}
"""


class Tokenizer:
    """Gemma's SentencePiece model and chat template, from a model directory or a `tokenizer.model`.

    Messages are `{"role": "system" | "user" | "assistant", "content": str}`; "model" is another
    name for "assistant". `family`, "gemma2" or "gemma3", decides the template. By default it is
    read from the `config.json` beside the file, and is "gemma3" where there is none.
    """

    def __init__(self, path: str | Path, family: str | None = None):
        path = Path(path)
        self.file = file = path / "tokenizer.model" if path.is_dir() else path
        if not file.is_file():
            fix = "--tokenizer DIR takes a Hugging Face directory with a tokenizer.model"
            raise ValueError(f"{file}: no such file; {fix}")
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.load_from_serialized_proto(file.read_bytes())
            self.vocab_size = self.sp.get_piece_size()
        except RuntimeError:
            raise ValueError(f"{file}: expected a SentencePiece model, found none") from None

        config = file.parent / "config.json"
        if family is None and config.is_file():
            family = json.loads(config.read_text()).get("model_type")
            if family not in FAMILIES:
                known = ", ".join(FAMILIES)
                raise ValueError(f"{config}: expected model_type {known}, found {family!r}")
        self.family = FAMILIES[family or "gemma3"]

        pieces = ("<unk>", "<pad>", BOS, "<eos>", START, END)
        if missing := [piece for piece in pieces if piece not in self]:
            raise ValueError(f"{file}: expected Gemma's pieces, found no {', '.join(missing)}")
        for piece in (START, END):
            if (found := self.sp.encode(piece, out_type=str)) != [piece]:
                raise ValueError(f"{file}: expected {piece} in a text as one piece, found {found}")
        ids = self.sp.piece_to_id(list(pieces))
        self.unk, self.pad, self.bos, self.eos, self.start_of_turn, self.end_of_turn = ids
        self.markers = {BOS: self.bos, START: self.start_of_turn, END: self.end_of_turn}
        self.hidden = dict(zip(ids[1:], pieces[1:], strict=True))  # what `decode` leaves out
        self.stop_ids = (self.end_of_turn, self.eos)
        self.forbidden_ids = tuple(self.sp.piece_to_id(p) for p in IMAGE_PIECES if p in self)

    def __contains__(self, piece: str) -> bool:
        return self.sp.id_to_piece(self.sp.piece_to_id(piece)) == piece  # absent -> the id of <unk>

    def encode(self, text: str) -> list[int]:
        """Ids of a text that may say anything: no BOS, and none of the STEERING pieces."""
        cuts = [0, *(match.start() + 1 for match in STEERING.finditer(text)), len(text)]
        return [i for start, stop in pairwise(cuts) for i in self.sp.encode(text[start:stop])]

    def decode(self, ids, keep_special: bool = False) -> str:
        """Text without BOS, EOS, padding and turn markers; `keep_special` spells those out too."""
        ids = np.asarray(ids, int).tolist()
        if not keep_special:
            return self.sp.decode([i for i in ids if i not in self.hidden])
        stretches = ((piece, list(group)) for piece, group in groupby(ids, self.hidden.get))
        return "".join(p * len(group) if p else self.sp.decode(group) for p, group in stretches)

    def render(self, messages: list[dict], generate: bool | None = None) -> str:
        """The conversation as the official template prints it; nothing in it is neutralised.

        `generate` opens a model turn at the end; by default it does so after a user turn.
        """
        return "".join(text for text, _, _ in self._pieces(messages, generate))

    def chat(self, messages: list[dict], generate: bool | None = None) -> list[int]:
        """The ids of `render`: one BOS, contents neutralised."""
        return [i for piece in self._pieces(messages, generate) for i in self._ids(piece)]

    def example(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        """A training sequence (ids, mask): 1 on what the model says and on each `<end_of_turn>`.

        prompt [p p p] + completion [c c <end_of_turn>] -> mask [0 0 0 1 1 1]. The prompt is exactly
        `chat(messages[:-1])`. The sequence ends at the last `<end_of_turn>`: the newline after it
        is template text, which the model never generates.
        """
        *pieces, _newline = self._pieces(messages, generate=False)
        if not pieces[-1][2]:
            raise ValueError("a training row must end with an assistant turn, found a user turn")
        spans = [(self._ids(piece), piece[2]) for piece in pieces]
        ids = [i for span, _ in spans for i in span]
        return ids, [trained for span, trained in spans for _ in span]

    def _pieces(self, messages, generate: bool | None) -> Iterator[tuple[str, bool, int]]:
        """The chat template, once: pieces (text, whether it is a marker, whether it is trained on).

        A cut lies where sampling starts a completion. The cuts change no id: SentencePiece merges
        nothing across a turn marker or a newline.
        """
        turns = self._turns(messages)
        yield BOS, True, 0
        for role, content in turns:
            yield START, True, 0
            if role == "user":
                yield f"user\n{content}", False, 0
            else:
                yield "model\n", False, 0
                yield content, False, 1
            yield END, True, int(role == "model")
            yield "\n", False, 0
        if generate or generate is None and role == "user":
            yield START, True, 0
            yield "model\n", False, 0

    def _ids(self, piece: tuple[str, bool, int]) -> list[int]:
        text, is_marker, _ = piece
        return [self.markers[text]] if is_marker else self.encode(text)

    def _turns(self, messages: list[dict]) -> list[tuple[str, str]]:
        """Checks a conversation: [("user", "Be brief.\n\nHi"), ("model", "Ho")]."""
        system = ""
        if messages and messages[0]["role"] == "system":
            if self.family == "gemma2":
                raise ValueError("Gemma 2 has no system role: data.with_system moves the text")
            system, messages = messages[0]["content"] + "\n\n", messages[1:]
        if not messages:
            raise ValueError("expected a conversation that starts with a user turn, found no turn")
        turns = []
        for n, message in enumerate(messages):
            role = "model" if message["role"] == "assistant" else message["role"]
            if role != ("user", "model")[n % 2]:
                found = f"turn {n} is {message['role']!r}"
                raise ValueError(f"roles must alternate user/assistant from user on, but {found}")
            if not isinstance(message["content"], str):
                found = type(message["content"]).__name__
                raise ValueError(f"turn {n}: expected text as content, found {found}")
            turns.append((role, message["content"].strip()))
        turns[0] = ("user", system + turns[0][1])  # the system text itself is not trimmed
        return turns

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.model` and `tokenizer_config.json`, all that AutoTokenizer needs.

        `added_tokens_decoder` makes transformers' `skip_special_tokens` drop the turn markers. A
        list of `extra_special_tokens` would *replace* the USER_DEFINED pieces there, and HTML tags
        would fall apart (transformers 5.23).
        """
        markers = {self.start_of_turn: START, self.end_of_turn: END}
        config = {
            "tokenizer_class": "GemmaTokenizer",
            **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {
                str(i): {"content": piece, "special": True} for i, piece in markers.items()
            },
            "chat_template": (NO_SYSTEM if self.family == "gemma2" else "") + CHAT_TEMPLATE,
        }
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.model").write_bytes(self.sp.serialized_model_proto())
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# --- rows -----------------------------------------------------------------------------------------

SYSTEM = (
    "Think about the problem first and write your reasoning between <reasoning> and </reasoning>. "
    "Then write only the final answer between <answer> and </answer>."
)
CHATS = ("messages", "conversations", "prompt", "question", "instruction")  # the first one counts
COMPLETIONS = ("completion", "output", "response")
ANSWERS = ("answer", "answerKey", "answer_idx")
KNOWN = {  # the columns that data, a reward or a judge reads
    *CHATS, *COMPLETIONS, *ANSWERS, "input", "context", "system", "system_prompt", "reasoning",
    "choices", "options", "chosen", "rejected", "rubrics", "rubric", "reference",
    "reference_answer", "task_type", "domain", "difficulty", "kind", "script", "id",
}
ROLES = {"system": "system", "user": "user", "human": "user",
         "assistant": "assistant", "model": "assistant", "gpt": "assistant"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The edges of a text that a chat template has wrapped already: Gemma's, Mistral's, <|any other|>.
TEMPLATED = re.compile(
    r"\A\s*(?:<bos>|<start_of_turn>|<[|｜]\w+[|｜]>|(?:<s>\s?)?\[INST])"
    r"|(?:<end_of_turn>|<eos>|<[|｜]\w+[|｜]>|\[/INST]|<start_of_turn>model)\s*\Z"
)
FORMATTED = re.compile(r"(?s)\s*<reasoning>.+</reasoning>\s*<answer>(.+)</answer>\s*")
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
    """Reads a row of any known shape; a ValueError says what is wrong and what was found.

    - {"messages": [...]}, or ShareGPT's "conversations"
    - {"prompt", "completion"}, each a text or a list of messages
    - {"question", "reasoning", "answer"}, or GSM8K's {"question", "answer": "... #### 42"}
    - {"question", "answer"}: the completion is the bare answer
    - Alpaca's {"instruction", "input", "output"}

    "choices" or "options" is a list, MedQA's {"A": "Rome"} or ARC's {"text": [], "label": []}.
    Choices are listed behind a question that is a text. The answer is then a letter, a label, the
    text of a choice, or its number from 0. "context" goes before the question, "system" before all.
    """
    labels, choices = _choices(row)
    chat = _chat(row, choices)
    reasoning, answer = _answer(row, labels, choices)
    key = next((key for key in COMPLETIONS if row.get(key)), None)
    if key == "completion" or key and not (reasoning and answer):
        chat += _turns(row[key], "assistant", key)
    elif answer and chat[-1]["role"] == "user":
        text = format_completion(reasoning, answer) if reasoning else answer
        chat += _turns(text, "assistant", "answer")
    completion = chat.pop()["content"] if chat[-1]["role"] == "assistant" else None
    if completion is not None and not completion.strip():
        raise ValueError("the completion is empty")
    if not chat or chat[-1]["role"] != "user" or not chat[-1]["content"].strip():
        raise ValueError("expected a user turn with a text before the completion, found "
                         f"{chat[-1] if chat else 'none'!r:.60}")
    if answer is None and completion and (tagged := FORMATTED.fullmatch(completion)):
        answer = _answer({"answer": tagged[1]}, labels, choices)[1]
    texts = [*(turn["content"] for turn in chat), completion or "", answer or "", *choices]
    if half := re.search("[\ud800-\udfff]", "".join(texts)):
        raise ValueError(f"half a surrogate pair in a text: {half[0]!r}")
    return Row(chat, completion, answer, choices, row)


def _chat(row: dict, choices: tuple[str, ...]) -> list[dict]:
    """The messages of a row without its completion, unless the completion is one of them."""
    key = next((key for key in CHATS if row.get(key)), None)
    if key is None:
        raise ValueError(f"expected messages, prompt or question, found keys {sorted(row)}")
    chat = row[key]
    if isinstance(chat, str):
        more = _column(row, "input") if key == "instruction" else ""
        lines = [f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        chat = "\n".join([f"{chat.strip()}\n\n{more}".strip(), *lines])
    chat = _turns(chat, "user", key)
    own = chat.pop(0)["content"].strip() if chat[0]["role"] == "system" else ""
    if not chat:
        raise ValueError(f"expected a user turn under {key!r}, found none")
    if context := _column(row, "context"):
        chat[0]["content"] = f"{context.strip()}\n\n{chat[0]['content']}"
    system = (_column(row, "system") or _column(row, "system_prompt")).strip() or own
    if own not in ("", system):
        raise ValueError("found a system column, and another system text in the messages")
    return [{"role": "system", "content": system}, *chat] if system else chat


def _turns(value, role: str, key: str) -> list[dict]:
    """A text or a list of messages, in any known spelling -> [{"role", "content"}, ...]."""
    value = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"expected a text or a list of messages under {key!r}, "
                         f"found {value!r:.60}")
    turns = []
    for n, turn in enumerate(value):
        said, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if said not in [*ROLES]:
            raise ValueError(f"{key!r}, turn {n}: expected {', '.join(ROLES)} as role, "
                             f"found {said!r:.60}")
        if isinstance(text, list) and all(isinstance(part, dict) for part in text):
            parts = [part.get("text") for part in text]
            text = "".join(parts) if all(isinstance(part, str) for part in parts) else text
        if not isinstance(text, str):
            raise ValueError(f"{key!r}, turn {n}: expected text as content, found {text!r:.60}")
        if wrapped := TEMPLATED.search(text):
            raise ValueError(f"{key!r}, turn {n}: the text carries a chat template already "
                             f"({wrapped[0].strip()}); give the bare text, or messages")
        turns.append({"role": ROLES[said], "content": text})
    return turns


def _column(row: dict, key: str) -> str:
    """The text of a column that may be absent, null, empty, or NaN where a table has a gap."""
    value = row.get(key)
    if not value or value != value:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"expected a text under {key!r}, found {value!r:.60}")
    return value


def _choices(row: dict) -> tuple[list[str], tuple[str, ...]]:
    """(labels, texts) of a row's choices: (["A", "B"], ("Rome", "Oslo"))."""
    key = next((key for key in ("choices", "options") if row.get(key)), None)
    labels, texts = [*LETTERS], row.get(key, [])
    if isinstance(texts, dict) and "text" in texts:
        labels, texts = texts.get("label", labels), texts["text"]
    elif isinstance(texts, dict):
        texts = {label: text for label, text in texts.items() if text is not None}
        labels, texts = [*texts], [*texts.values()]
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) > len(LETTERS):
        raise ValueError(f"expected a list of at most {len(LETTERS)} choices under {key!r}, "
                         f"found {row[key]!r:.60}")
    return list(map(str, labels[: len(texts)])), tuple(_scalar(text, key) for text in texts)


def _scalar(value, key: str) -> str:
    """1.0 -> "1", ["a", 7] -> "a, 7"; an empty text, NaN or an object is an error."""
    if isinstance(value, list) and value and not any(isinstance(v, list) for v in value):
        return ", ".join(_scalar(v, key) for v in value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    if text in ("", "nan", "NaN", "inf", "-inf"):
        raise ValueError(f"expected a text, a number or a list of them under {key!r} (leave it out "
                         f"where there is none), found {value!r:.60}")
    return text


def _answer(row: dict, labels: list[str], choices: tuple[str, ...]) -> tuple[str, str | None]:
    r"""(reasoning, right answer) of a row; "" and None where it has none.

    GSM8K's "48/2 = <<48/2=24>>24 clips.\n#### 1,024" -> ("48/2 = 24 clips.", "1024").
    """
    reasoning = _column(row, "reasoning").strip()
    key = next((key for key in ANSWERS if row.get(key) is not None), None)
    if key is None:
        return reasoning, None
    answer = _scalar(row[key], key)
    if gsm8k := GSM8K.fullmatch(answer):
        reasoning = reasoning or re.sub("<<[^<>]*>>", "", gsm8k[1]).strip()
        answer = _scalar(gsm8k[2], f"{key} after ####")
        if re.fullmatch(r"-?[\d,]+(\.\d+)?", answer):
            answer = answer.replace(",", "")
    if not choices:
        return reasoning, answer

    numbers = range(len(choices))
    if isinstance(row[key], str):
        lettered = re.match(r"[(\[]?([A-Za-z])[).:\]]+(?:\s|$)", answer)  # (B), B. and B) Oslo
        letter = lettered[1] if lettered else answer
        readings = [(labels, answer), (choices, answer), (labels, letter), (numbers, answer)]
    else:
        readings = [(labels, answer), (numbers, answer), (choices, answer)]
    for names, said in readings:
        for letter, name in zip(LETTERS, names, strict=False):
            if str(name).strip().casefold() == said.casefold():
                return reasoning, letter
    raise ValueError(f"answer {answer!r:.60} is none of the {len(choices)} choices")


def with_system(chat: list[dict], system: str = "") -> list[dict]:
    """Puts --system in front unless the row has its own; folds it into the first user turn.

    Gemma 3's template folds the system text the same way; Gemma 2's has no system role.
    """
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

    @property
    def prompt(self) -> bytes:
        """What comes before the first token that is trained on; hold-out compares these."""
        return self.ids[: np.argmax(self.mask)].tobytes()

    @property
    def n_tokens(self) -> int:
        return len(self.ids)


class Pair(NamedTuple):
    """Two completions of one prompt; the two sequences share a packed row, chosen first."""

    chosen: Example
    rejected: Example
    fields: dict = {}  # the row that it was read from, with the chosen completion as its own

    @property
    def prompt(self) -> bytes:
        return self.chosen.prompt

    @property
    def n_tokens(self) -> int:
        return self.chosen.n_tokens + self.rejected.n_tokens


def read_example(row: dict, tok: Tokenizer, system: str = "") -> Example:
    """A row as one training sequence; every turn of the assistant is trained on."""
    ids, mask = tok.example(_conversation(row, system))
    return Example(np.array(ids, np.int32), np.array(mask, np.int8), row)


def read_pair(row: dict, tok: Tokenizer, system: str = "") -> Pair:
    """A preference row as two training sequences; the mask is 1 on what the two don't share.

    {"prompt", "chosen", "rejected"}, each a text or a list of messages. Lists under "chosen" and
    "rejected" that start with the user bring the prompt themselves.
    prompt [p p p], chosen [c c], rejected [r] -> masks [0 0 0 1 1], [0 0 0 1]. Earlier turns of the
    assistant, in the prompt, are 0 too.
    """
    chats, own = [], {}
    for key in ("chosen", "rejected"):
        turns = _turns(row.get(key) or None, "assistant", key)
        whole = turns[0]["role"] != "assistant"
        fields = row | {"messages" if whole else "completion": turns}
        own = own or fields
        try:
            chat = _conversation(fields, system)
        except ValueError as e:
            raise ValueError(f"{key}: {e}") from None
        chats.append(chat)
    examples = [tok.example(chat) for chat in chats]
    if examples[0][0] == examples[1][0]:
        raise ValueError("chosen and rejected are the same")
    n = len([*takewhile(lambda turns: turns[0] == turns[1], zip(*chats, strict=False))])
    if n % 2 == 0 or n == min(map(len, chats)):  # not before an assistant turn of both
        raise ValueError("chosen and rejected must answer the same prompt")
    first = len(tok.chat(chats[0][:n]))
    return Pair(*(Example(np.array(ids, np.int32), np.array([0] * first + mask[first:], np.int8))
                  for ids, mask in examples), own)


def _conversation(row: dict, system: str) -> list[dict]:
    parsed = parse_row(row)
    if parsed.completion is None:
        raise ValueError("expected a completion to train on (messages that end with the assistant, "
                         f"completion, or reasoning and answer), found keys {sorted(row)}")
    turn = {"role": "assistant", "content": parsed.completion}
    return [*with_system(parsed.chat, system), turn]


# --- sources of rows ------------------------------------------------------------------------------

BUILT_IN = ("problems", "solutions", "gsm8k")
TABLES = {".csv": "read_csv", ".parquet": "read_parquet"}  # what pandas reads them with


def read_rows(source: str, flag: str = "--data") -> Iterator[tuple[str, dict | ValueError]]:
    """(where, row) of "problems", "solutions" or "gsm8k", each with :train or :test, or of a file.

    "solutions" are the problems with every step in their traces. What is not a JSON object comes as
    a ValueError in the row's place, so that the caller can count it or stop.
    """
    name, _, split = source.partition(":")
    if name in BUILT_IN and split not in ("", "train", "test"):
        raise ValueError(f"{flag} {source}: expected nothing, :train or :test after the name")
    split = split or "train"
    if name in ("problems", "solutions"):
        import problems  # here: other sources do not need it

        for i in range(problems.N_PROBLEMS[split]):
            row = problems.word_problem(split, i)
            steps = {"reasoning": row["solution"]} if name == "solutions" else {}
            yield f"{source} row {i}", row | steps
        return
    path = hub.find_gsm8k(split) if name == "gsm8k" else hub.find_file(source, flag)
    is_table = path.suffix in TABLES
    if path.suffix == ".json":  # an array, or JSON lines all the same
        is_table = path.read_text("utf-8-sig", errors="replace").lstrip().startswith("[")
    for where, row in _read_table(path) if is_table else runs.read_jsonl(path):
        if not isinstance(row, dict | ValueError):
            row = ValueError(f"expected a JSON object, found {type(row).__name__}")
        yield f"{path}:{where}", row


def _read_table(path: Path) -> Iterator[tuple[str, Any]]:
    """("row 1", {...}), ...: a JSON array, or CSV and Parquet through pandas, where installed."""
    try:
        if path.suffix == ".json":
            text = path.read_bytes().decode("utf-8-sig")
        else:
            import pandas

            table = getattr(pandas, TABLES[path.suffix])(path)
            text = table.to_json(orient="records", double_precision=15)
        return ((f"row {n}", row) for n, row in enumerate(json.loads(text), 1))
    except ImportError as e:  # of pandas, or of what pandas reads Parquet with
        raise ValueError(f"{path}: {e}; install it, or convert the file to JSON lines") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: {e}") from None


class TooLong(ValueError):
    """What `read` raises in `load` for a row that is usable but for its length."""

    def __init__(self, n_tokens: int, limit: int, flag: str):
        super().__init__(f"{n_tokens} tokens, more than {flag} {limit}")
        self.n_tokens = n_tokens


def load(source: str, read: Callable[[dict], Any], *, rows: int = 0, skip_bad_rows: bool = False,
         flag: str = "--data", what: str = "rows") -> tuple[list[list], list[str]]:
    """The items read(row) of each comma-separated source, and what was wrong with those left out.

    rows: at most so many items of each source, 0 for all. A bad row (not JSON, or `read` raises a
    ValueError) stops with its file and line unless skip_bad_rows. Says what was read, one line a
    source, and one that names the columns nothing reads.
    """
    sets, bad = [], []
    for one in filter(None, (s.strip() for s in source.split(","))):
        items, faults, columns, longest = [], [], {}, 0
        for n, (where, row) in enumerate(read_rows(one, flag)):
            if rows and len(items) == rows:
                break
            try:
                if isinstance(row, ValueError):
                    raise row
                if n < 100:
                    columns |= row
                items.append(read(row))
            except ValueError as e:
                fault = f"{where}: {e}"
                if not skip_bad_rows:
                    raise ValueError(f"{fault} (--skip-bad-rows leaves such rows out)") from None
                faults.append(fault)
                longest = max(longest, getattr(e, "n_tokens", 0))
        note = f", {len(faults):,} bad rows left out; first: {faults[0]}" if faults else ""
        note += f"; the longest has {longest:,} tokens" if longest else ""
        if not items:
            raise ValueError(f"{flag} {one}: no usable row{note}")
        runs.say(f"data: {len(items):,} {what} of {one}{note}")
        unread = [column for column in columns if column not in KNOWN]
        if unread and one.partition(":")[0] not in BUILT_IN:
            runs.say(f"data: {one}: columns nothing reads: {', '.join(unread)} "
                     "(but a --reward-file may)")
        sets.append(items)
        bad += faults
    if not sets:
        raise ValueError(f"{flag} {source!r}: names no source")
    return sets, bad


def test_split(source: str) -> str | None:
    """What a --data value is evaluated on: "gsm8k" -> "gsm8k:test"; None where a part has none."""
    parts = [part.strip().partition(":") for part in source.split(",")]
    if any(name not in BUILT_IN or split == "test" for name, _, split in parts):
        return None
    return ",".join(f"{name}:test" for name, _, _ in parts)


def load_split(config, read: Callable[[dict], Any], *, rows: int = 0) -> tuple[list[list], list]:
    """(items of each source of config.data, held-out items).

    Held out, at most config.eval_rows (0: all): config.eval_data, else the test split of built-in
    sources, else all rows of 2 % of the *prompts*: a repeated question is never on both sides.
    """
    sets, _ = load(config.data, read, rows=rows, skip_bad_rows=config.skip_bad_rows)
    n = config.eval_rows or None
    if source := config.eval_data or test_split(config.data):
        each = -(-n // len(source.split(","))) if n else 0
        held_out, _ = load(source, read, rows=each, skip_bad_rows=config.skip_bad_rows,
                           flag="--eval-data", what="held-out rows")
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
    if mix is None:
        return None
    try:
        weights = [float(weight) for weight in mix.split(",")]
    except ValueError:
        weights = []
    if len(weights) != len(sources) or not all(0 <= w < 1e9 for w in weights) or not sum(weights):
        raise ValueError(f"--mix {mix}: expected {len(sources)} weights, one for each source of "
                         "--data")
    return weights


# --- packed batches -------------------------------------------------------------------------------


def pack(prompts: list[int], completions: list[list[int]],
         size: int) -> list[list[tuple[int, list[int]]]]:
    """Packs token counts into rows of `size`: a row is a list of (prompt, [its completions there]).

    Completions of a prompt share one copy of the prompt in a row. The largest group comes first,
    and goes to the fullest row that takes it whole, else part of it to the emptiest row, else to a
    new one: best-fit decreasing, if every group is a single completion.
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
    """Endless shuffled batches of packed rows; batch n is a function of (seed, n) alone.

    So resuming needs no more than the step. Each epoch takes from every source its share of the
    weights (default: all of it once), walks each source in an order of its own, packs best-fit and
    shuffles the packed rows. A source is read to its end before any row of it comes again.
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
