"""Text in, tokens out: tokenizer, chat template, rows of data files, packing.

    tok = data.Tokenizer("tiny")
    row = data.parse_row({"question": "2 + 2?", "reasoning": "2 + 2 = 4.", "answer": 4})
    ids = tok.chat(data.with_system(row.chat, data.SYSTEM))

Three facts about Gemma's SentencePiece vocabulary shape this file:

1. `<start_of_turn>`, `<end_of_turn>`, HTML tags and runs of newlines or spaces are USER_DEFINED
   pieces, which SentencePiece matches inside any text. People, data sets and models write text, so
   a turn marker in a text is split: `<end_of_turn>` is encoded as `<` + `end_of_turn>`, which
   decodes to the same characters and never ends a turn.
2. `<bos>`, `<eos>`, `<pad>` are CONTROL pieces, which no text is encoded to. `chat` puts the id of
   one BOS in front.
3. Gemma 3's id of `<end_of_turn>` is Gemma 2's of `<start_of_turn>`: ids are looked up by piece.
"""

import bisect
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import disk
import hub
import terminal

# --- tokenizer and chat template ------------------------------------------------------------------

# The chat template: BOS, then TURN for each turn; before the first content a system text, if any,
# and AFTER_SYSTEM. The ids below, Jinja in tokenizer_files.py and Ollama's template in card.py are
# made of these.
TURN = ("<start_of_turn>", "{role}\n", "{content}", "<end_of_turn>", "\n")
AFTER_SYSTEM = "\n\n"
PIECES = ("<unk>", "<pad>", "<bos>", "<eos>", TURN[0], TURN[3])
IMAGE_PIECES = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
# What no text may be encoded to, in either family. The first character of each piece, "<" or "[",
# occurs in it only once, so a text that is cut after the first character of each match holds none.
STEERING = re.compile(
    r"<(?:(?:start|end)_of_(?:turn|image)|image_soft_token|mask|2mass|unused[0-9]+)>"
    r"|\[(?:multimodal|@BOS@)\]"
)


class Tokenizer:
    """Gemma's SentencePiece model and chat template, from a model folder or a file in it.

    Messages are `{"role": "system" | "user" | "assistant", "content": str}`; "model" is another
    name for "assistant". System text goes into the first user turn, as in Gemma 3's template.
    """

    def __init__(self, path: str | Path):
        import tokenizer_files  # here, as below: this page is not about the formats of files

        self.file, self.sp = tokenizer_files.load(Path(path))
        self.vocab_size = self.sp.get_piece_size()
        ids = self.sp.piece_to_id(list(PIECES))
        self.unk, self.pad, self.bos, self.eos, self.start_of_turn, self.end_of_turn = ids
        self.hidden = set(ids[1:])  # what `decode` leaves out
        self.stop_ids = (self.end_of_turn, self.eos)
        self.forbidden_ids = tuple(self.sp.piece_to_id(p) for p in IMAGE_PIECES if p in self)

    def save(self, folder: str | Path, system: str = "") -> None:
        """Writes what AutoTokenizer needs: `tokenizer.model` and `tokenizer_config.json`.

        system: what the chat template puts before a conversation without a system text of its own.
        """
        import tokenizer_files

        tokenizer_files.save(Path(folder), self.file, self.sp, system)

    def __contains__(self, piece: str) -> bool:
        return self.sp.id_to_piece(self.sp.piece_to_id(piece)) == piece  # absent -> the id of <unk>

    def encode(self, text: str) -> list[int]:
        """Ids of a text that may say anything: no BOS, and none of the STEERING pieces."""
        text.encode()  # half a surrogate pair: a ValueError here, a RuntimeError in SentencePiece
        cuts = [0, *(match.start() + 1 for match in STEERING.finditer(text)), len(text)]
        return [i for start, stop in pairwise(cuts) for i in self.sp.encode(text[start:stop])]

    def decode(self, ids) -> str:
        """Text without BOS, EOS, padding and turn markers."""
        return self.sp.decode([i for i in np.asarray(ids, int).tolist() if i not in self.hidden])

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
            system, messages = messages[0]["content"] + AFTER_SYSTEM, messages[1:]
        roles = [message["role"].replace("assistant", "model") for message in messages]
        if not roles or any(role != ("user", "model")[n % 2] for n, role in enumerate(roles)):
            raise ValueError(f"roles must alternate user/assistant from user on, found {roles}")
        yield [self.bos], 0
        for role, message in zip(roles, messages, strict=True):
            by_model = int(role == "model")
            yield [self.start_of_turn], 0
            yield self.encode(TURN[1].format(role=role) + system), 0
            yield self.encode(message["content"].strip()), by_model
            yield [self.end_of_turn], by_model
            yield self.encode(TURN[4]), 0
            system = ""
        if generate or generate is None and role == "user":
            yield [self.start_of_turn], 0
            yield self.encode(TURN[1].format(role="model")), 0


# --- rows -----------------------------------------------------------------------------------------

SYSTEM = (
    "Think about the problem first and write your reasoning between <reasoning> and </reasoning>. "
    "Then write only the final answer between <answer> and </answer>."
)
COLUMNS = {  # what a row holds -> columns it may be in; the first of them with a value counts
    "prompt": ("messages", "conversations", "prompt", "question", "problem", "instruction"),
    "completion": ("completion",),
    "output": ("output", "response"),  # the completion if no reasoning and answer make one
    "answer": ("answer", "answerKey", "answer_idx", "ground_truth"),
    "choices": ("choices", "options"),
    "system": ("system", "system_prompt"),
    "reasoning": ("reasoning",), "context": ("context",), "input": ("input",),
    "rubrics": ("rubrics", "rubric"), "reference": ("reference", "reference_answer"),  # RaR's names
    "of pairs and rewards": (
        "chosen", "rejected", "task_type", "domain", "difficulty", "kind", "script", "id"),
    "of synthesize.py pairs": [f"{side}_{what}" for side in ("chosen", "rejected")
                               for what in ("reward", "rewards", "sample")],
}
ROLES = {"system": "system", "user": "user", "human": "user",
         "assistant": "assistant", "model": "assistant", "gpt": "assistant"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# How a text begins or ends that already went through a chat template: Gemma's, Mistral's,
# <|any other|>, or plain text with "\nAssistant:" or "### Response:" at its end.
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
    {"question", "answer": "... #### 42"}. Without reasoning the completion is the bare answer.
    "context" is put before the question. Choices are a list, MedQA's {"A": "Rome"} or ARC's
    {"text": [], "label": []}; they are listed after a question that is a text, and the answer is
    then a letter, a label, the text of a choice, or its number from 0.
    """
    found = {name: value_of(row, name) for name in COLUMNS}
    if found["prompt"] is None:
        raise ValueError(f"expected messages, prompt or question, found keys {sorted(row)}")
    for name in ("reasoning", "context", "input", "system"):
        if not isinstance(found[name], str | None):
            raise ValueError(f"expected a text under {name}, found {found[name]!r:.60}")
        found[name] = (found[name] or "").rstrip()
    choices = _choices(found["choices"])
    chat = _chat(found, choices)
    reasoning, answer = _answer(found, choices)
    traced = format_completion(reasoning, answer) if reasoning and answer else None
    said = found["completion"] or traced or found["output"] or answer
    if said and (chat[-1]["role"] == "user" or found["completion"]):
        chat += turns(said, "assistant", "completion")
    completion = chat.pop()["content"] if chat[-1]["role"] == "assistant" else None
    if completion is not None and not completion.strip():
        raise ValueError("the completion is empty")
    if not chat or chat[-1]["role"] != "user" or not chat[-1]["content"].strip():
        raise ValueError(f"expected a prompt that ends with a user turn, found {chat!r:.60}")
    return Row(chat, completion, answer, tuple(choices.values()), row)


def value_of(row: dict, name: str):
    """What a row holds under the columns of a name, of COLUMNS; None: nothing."""
    return next((row[c] for c in COLUMNS[name] if row.get(c) not in (None, "", [], {})), None)


def _chat(found: dict, choices: dict[str, str]) -> list[dict]:
    """The messages of a row; its completion is among them only if it came in the same list."""
    prompt = found["prompt"]
    if isinstance(prompt, str):
        lines = map("{}) {}".format, LETTERS, choices.values())
        prompt = "\n".join([f"{prompt.strip()}\n\n{found['input']}".strip(), *lines])
    chat = turns(prompt, "user", "prompt")
    own = chat.pop(0)["content"].strip() if chat[0]["role"] == "system" else ""
    system = found["system"].strip() or own
    if not chat or own not in ("", system):
        raise ValueError("expected one system text, then a user turn; found "
                         f"{own!r:.60} {system!r:.60}")
    if context := found["context"].strip():
        chat[0]["content"] = f"{context}\n\n{chat[0]['content']}"
    return [{"role": "system", "content": system}, *chat] if system else chat


def turns(value, role: str, name: str) -> list[dict]:
    """A text or a list of messages, in any known spelling -> [{"role", "content"}, ...]."""
    value = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"expected a text or a list of messages as {name}, found {value!r:.60}")
    out = []
    for n, turn in enumerate(value):
        said, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(text, list):  # of parts; one that is not text is refused below
            parts = [isinstance(part, dict) and part.get("text") for part in text]
            text = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        if said not in [*ROLES] or not isinstance(text, str):
            raise ValueError(f"{name}, turn {n}: expected a text and a role of {', '.join(ROLES)}; "
                             f"found {turn!r:.60}")
        if wrapped := TEMPLATED.search(text):
            raise ValueError(f"{name}, turn {n}: the text carries a chat template already "
                             f"({wrapped[0].strip()}); give the bare text, or messages")
        out.append({"role": ROLES[said], "content": text})
    return out


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
    """A value as text: 1.0 -> "1", ["a", 7] -> "a, 7"; an empty text, NaN or an object raises."""
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
    if not isinstance(value, str):  # among 1, 2, 4 the text "2" is B, the number 2 is C
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


def conversation(row: dict, system: str) -> list[dict]:
    """The messages of a row with its completion, to train on."""
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
    """(where, row) of each row of a source; one that is no JSON object comes as a ValueError.

    A source is "problems", "solutions" (the problems with every step in their traces) or "gsm8k",
    each with :train or :test; a file; or "hf:owner/name" or "hf:owner/name/config", each with any
    :split. A slice takes some of the rows, by number or by percentage: gsm8k[:50%].
    """
    if part := SLICE.fullmatch(source):
        rows = list(read_rows(part[1], flag))
        start, stop = (int(n or 0) * len(rows) // 100 if percent else int(n) if n else None
                       for n, percent in (part.group(2, 3), part.group(4, 5)))
        yield from rows[start:stop]
        return
    name, split = split_of(source)
    if name in BUILT_IN and split not in ("train", "test"):
        raise ValueError(f"{flag} {source}: expected nothing, :train or :test after the name")
    if name in ("problems", "solutions"):
        import problems  # here: most sources need neither this nor tables

        where, rows = f"{source} row ", enumerate(problems.rows(name, split))
    elif source.startswith("hf:"):
        import tables

        where, rows = f"{source} row ", enumerate(tables.hub_dataset(source, flag), 1)
    else:
        path = hub.find_gsm8k(split) if name == "gsm8k" else hub.find_file(source, flag)
        where, rows = f"{path}:", disk.read_jsonl(path)
        if path.suffix != ".jsonl":
            import tables

            if (table := tables.read(path)) is not None:
                where, rows = f"{path} row ", enumerate(table, 1)
    for n, row in rows:
        if not isinstance(row, dict | ValueError):
            row = ValueError(f"expected a JSON object, found a {type(row).__name__}")
        yield f"{where}{n}", row


def read_columns(columns: str) -> dict[str, str]:
    """--columns question=instruction,answer=response as {our name: the file's}."""
    pairs = [pair.partition("=") for pair in columns.split(",") if pair.strip()]
    names = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if not all(names) or not all(names.values()) or len(names) < len(pairs):
        raise ValueError(f"--columns {columns}: expected OURS=THEIRS, each of ours once, as in "
                         "question=instruction,answer=response")
    return names


def renamed(row: dict, columns: dict[str, str]) -> dict:
    """A row with its columns under the names that --columns gives them, and without nulls."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise ValueError(f"--columns {ours}={theirs}: no {theirs}, found keys {sorted(row)}")
    kept = {k: v for k, v in row.items() if k not in columns.values() and v is not None}
    new = {ours: row[theirs] for ours, theirs in columns.items()}
    return kept | {k: v for k, v in new.items() if v is not None}


def unread_in_messages(row: dict) -> set[str]:
    """Keys of a row's messages that nothing reads: {"messages.reasoning_content"}."""
    lists = ("messages", "conversations", "prompt", "chosen", "rejected")
    return {f"{name}.{key}" for name in lists if isinstance(row.get(name), list)
            for turn in row[name] if isinstance(turn, dict) for key, value in turn.items()
            if value and key not in ("role", "content", "from", "value")}


class TooLong(ValueError):
    """A row is too long; `load` reports the longest."""

    def __init__(self, n_tokens: int, limit: int, flag: str):
        super().__init__(f"{n_tokens} tokens, more than {flag} {limit}")
        self.n_tokens = n_tokens


def load(source: str, read: Callable[[dict], Any], *, rows: int = 0, skip_bad_rows: bool = False,
         flag: str = "--data", what: str = "rows",
         columns: str = "") -> tuple[list[list], list[str]]:
    """The items read(row) of each comma-separated source, and what was wrong with each bad row.

    A row is bad if `read` raises a ValueError for it, or if it is no JSON object. A bad row raises
    a ValueError with its place, or is left out with skip_bad_rows. rows: the most items to take
    from each source, 0 for all. columns: see read_columns; built-in sources ignore it.
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
            raise ValueError(f"{faults[0]}{count} (or --skip-bad-rows)")
        note = f", {len(faults):,} bad rows left out; first: {faults[0]}{size}" if faults else ""
        if not items:
            raise ValueError(f"{flag} {one}: no usable row{note}")
        terminal.say(f"data: {len(items):,} {what} of {one}{note}")
        unread = ", ".join(sorted(found.difference(*COLUMNS.values())))
        if unread and not built_in:
            terminal.say(f"data: {one}: columns nothing reads: {unread} (but a --reward-file may)")
        sets.append(items)
        bad += faults
    return sets, bad


def test_split(source: str) -> str | None:
    """The test split of a --data value: "gsm8k" -> "gsm8k:test"; None if a source has none."""
    parts = [split_of(part.strip()) for part in source.split(",")]
    if any(name not in BUILT_IN or split == "test" for name, split in parts):
        return None
    return ",".join(f"{name}:test" for name, _ in parts)


def load_split(config, read: Callable[[dict], Any], *, rows: int = 0) -> tuple[list[list], list]:
    """(items of each source of config.data, held-out items).

    Held out are the rows of config.eval_data; or else the test split of built-in sources; or else
    all rows of 2 % of the *prompts*, so that a repeated question is never on both sides. At most
    config.eval_rows (0: all) of them are returned.
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
    held_out = held_out[:n]
    few = "; so few tell little, --eval-data names others" if len(held_out) < 30 else ""
    terminal.say(f"data: {len(held_out)} of these rows are held out{few}")
    return sets, held_out


# --- packing --------------------------------------------------------------------------------------


def pack(prompts: list[int], completions: list[list[int]],
         size: int) -> list[list[tuple[int, list[int]]]]:
    """Packs groups of completions into rows of `size` tokens; both arguments are token counts.

    A row is a list of (prompt, [its completions in this row]); they share one copy of the prompt.
    Best-fit decreasing: the largest group goes first, into the fullest row that takes all of it,
    or else part of it into the emptiest row, or else into a new row.
    A prompt of 2 with completions of 3, 5 and 1 in 8 -> [[(0, [1, 2])], [(0, [0])]]: 2+5+1, 2+3.
    """
    rows, spaces, n_noted = [], [], 0  # spaces: sorted (room left, -n_noted, row), newest first
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
