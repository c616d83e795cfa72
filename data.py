"""Text in, token batches out: tokenizer, chat template, files of rows, packing.

The tokenizer is SentencePiece itself, on the `tokenizer.model` of a Hugging Face Gemma directory.
Three facts about it shape this file:

1. `<start_of_turn>` and `<end_of_turn>` are USER_DEFINED pieces: SentencePiece matches them inside
   any text. Text comes from people, data sets and models, so it is *neutralised*: a literal
   `<end_of_turn>` is encoded as `<` + `end_of_turn>`, reads the same and never ends a turn. HTML
   tags and runs of newlines or spaces are USER_DEFINED too, and stay whole.
2. `<bos>`, `<eos>`, `<pad>` are CONTROL pieces: text never produces them. A row has one BOS, by id.
3. Ids differ between the families (Gemma 3's `<end_of_turn>` is Gemma 2's `<start_of_turn>`), so
   every id is looked up by piece.
"""

import bisect
import functools
import json
import re
from collections.abc import Iterator
from itertools import groupby, pairwise, takewhile
from pathlib import Path

import numpy as np
import sentencepiece

import hub
import problems

# --- tokenizer and chat template ------------------------------------------------------------------

START, END = "<start_of_turn>", "<end_of_turn>"
IMAGE_PIECES = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
# What text must never become, in either family. Each has one "<" or "[", in front, so a text cut
# behind the first character of every match holds none of them.
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
{{- '<start_of_turn>' + role + '\n' + (system if loop.first else '') -}}
{{- (m.content | trim) + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""
NO_SYSTEM = r"""
{%- if messages[0].role == 'system' -%}
{{- raise_exception('System role not supported') -}}
{%- endif -%}
"""


def fold_system(messages: list[dict]) -> list[dict]:
    """Moves the system text into the first user turn: what Gemma 3's template does itself."""
    if not messages or messages[0]["role"] != "system":
        return messages
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise ValueError("a system message must be followed by a user message")
    for message in messages[:2]:
        if not isinstance(message["content"], str):
            raise ValueError(f"expected text as content, found {type(message['content']).__name__}")
    text = messages[0]["content"] + "\n\n" + messages[1]["content"].strip()
    return [{"role": "user", "content": text}, *messages[2:]]


class Tokenizer:
    """Gemma's SentencePiece model and chat template, from a model directory or a `tokenizer.model`.

    Messages are `{"role": "system" | "user" | "assistant", "content": str}`; "model" is another
    name for "assistant". `family`, "gemma2" or "gemma3", decides the template; it is read from the
    `config.json` beside the file unless given, and is "gemma3" where there is none.
    """

    def __init__(self, path: str | Path, family: str | None = None):
        path = Path(path)
        file = path / "tokenizer.model" if path.is_dir() else path
        if not file.is_file():
            fix = "--tokenizer DIR takes a Hugging Face directory with a tokenizer.model"
            raise ValueError(f"{file}: no such file; {fix}")
        self.file = file
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

        pieces = ("<unk>", "<pad>", "<bos>", "<eos>", START, END)
        if missing := [piece for piece in pieces if piece not in self]:
            raise ValueError(f"{file}: expected Gemma's pieces, found no {', '.join(missing)}")
        for piece in (START, END):
            if (found := self.sp.encode(piece, out_type=str)) != [piece]:
                raise ValueError(f"{file}: expected {piece} in a text as one piece, found {found}")
        ids = self.sp.piece_to_id(list(pieces))
        self.unk, self.pad, self.bos, self.eos, self.start_of_turn, self.end_of_turn = ids
        self.hidden = dict(zip(ids[1:], pieces[1:], strict=True))  # from the reader, by `decode`
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
        runs = ((piece, list(run)) for piece, run in groupby(ids, self.hidden.get))
        return "".join(piece * len(run) if piece else self.sp.decode(run) for piece, run in runs)

    def render(self, messages: list[dict], generate: bool | None = None) -> str:
        """The conversation as the official template prints it; nothing in it is neutralised.

        `generate` opens a model turn at the end; by default it does so after a user turn.
        """
        turns, generate = self._turns(messages, generate)
        text = "<bos>" + "".join(f"{START}{role}\n{content}{END}\n" for role, content in turns)
        return text + f"{START}model\n" * generate

    def chat(self, messages: list[dict], generate: bool | None = None) -> list[int]:
        """The ids of `render`: one BOS, contents neutralised."""
        return [i for span, _ in self._spans(*self._turns(messages, generate)) for i in span]

    def example(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        """A training row (ids, mask): 1 on what the model says, each `<end_of_turn>` included.

        prompt [p p p] + completion [c c <end_of_turn>] -> mask [0 0 0 1 1 1]. The prompt is exactly
        `chat(messages[:-1])`. The row ends at the last `<end_of_turn>`: the newline that follows it
        is template text and never generated.
        """
        turns, _ = self._turns(messages, None)
        if turns[-1][0] != "model":
            raise ValueError("a training row must end with an assistant turn, found a user turn")
        spans = list(self._spans(turns, generate=False))[:-1]
        ids = [i for span, _ in spans for i in span]
        return ids, [trained for span, trained in spans for _ in span]

    def _turns(self, messages: list[dict], generate: bool | None):
        """Checks a conversation -> ([("user", "Be brief. Hi"), ("model", "Ho")], generate)."""
        system = ""
        if messages and messages[0]["role"] == "system":
            if self.family == "gemma2":
                raise ValueError("Gemma 2 has no system role: data.fold_system moves the text")
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
        return turns, turns[-1][0] == "user" if generate is None else generate

    def _spans(self, turns, generate: bool) -> Iterator[tuple[list[int], int]]:
        """The template as spans (ids, trained), cut where sampling would start a completion.

        The cuts change no id: nothing merges across a turn marker or a newline.
        """
        yield [self.bos], 0
        for role, content in turns:
            if role == "user":
                yield [self.start_of_turn, *self.encode(f"user\n{content}"), self.end_of_turn], 0
            else:
                yield [self.start_of_turn, *self.encode("model\n")], 0
                yield [*self.encode(content), self.end_of_turn], 1
            yield self.encode("\n"), 0
        if generate:
            yield [self.start_of_turn, *self.encode("model\n")], 0

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


# --- rows ----------------------------------------------------------------------------------------


SYSTEM = (
    "Think about the problem first and write your reasoning between <reasoning> and </reasoning>. "
    "Then write only the final answer between <answer> and </answer>."
)


def format_completion(reasoning: str, answer: str) -> str:
    """The completion every stage trains on and rewards."""
    return f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"


def gsm8k_row(row: dict) -> dict:
    r"""A row of GSM8K's own files as question, reasoning and answer.

    "48/2 = <<48/2=24>>24 clips.\n#### 1,024" -> reasoning "48/2 = 24 clips.", answer "1024".
    """
    texts = (row.get(key) for key in ("question", "answer"))
    question, whole = (text.strip() if isinstance(text, str) else "" for text in texts)
    reasoning, _, number = re.sub(r"<<[^<>]*>>", "", whole).partition("####")
    reasoning, number = reasoning.strip(), number.strip().replace(",", "")
    if not question or not reasoning or not re.fullmatch(r"-?\d+(\.\d+)?", number):
        raise ValueError("GSM8K row: expected a question, and an answer of reasoning and one "
                         f'"#### number" at its end, found {whole[-60:]!r}')
    return {"question": question, "reasoning": reasoning, "answer": number}


def asked(text: str, choices=()) -> str:
    """A question as the model reads it: ("Where?", ["Rome", "Oslo"]) -> Where? A) Rome B) Oslo."""
    if not isinstance(choices, list | tuple):
        raise ValueError(f"expected a list of choices, found {choices!r:.60}")
    listed = (f"{chr(ord('A') + i)}) {choice}" for i, choice in enumerate(choices))
    return "\n".join([text.strip(), *listed])


def messages(row: dict, system: str = "") -> list[dict]:
    """A row of any known shape as one conversation that ends with the assistant.

    {"messages": [...]} · {"prompt", "completion"} (texts or message lists) · {"question",
    "reasoning", "answer"}, perhaps with "choices" · GSM8K's {"question", "answer": "... #### 42"}.
    `system` is folded into the first user turn unless the row brings a system text of its own.
    """
    if "messages" in row:
        chat = row["messages"]
    elif "prompt" in row:
        chat = _turns(row, "prompt", "user") + _turns(row, "completion", "assistant")
    elif "question" in row:
        row = row if "reasoning" in row else row | gsm8k_row(row)
        question = asked(_text(row, "question"), row.get("choices") or ())
        answer = format_completion(_text(row, "reasoning"), _answer(row))
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    else:
        raise ValueError(f"expected messages, prompt or question, found keys {sorted(row)}")
    if not isinstance(chat, list) or not all(isinstance(m, dict) and "role" in m for m in chat):
        raise ValueError("expected a list of messages with role and content")
    if not chat or not str(chat[-1].get("content", "")).strip():
        raise ValueError("the completion is empty")
    if system and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": system}, *chat]
    return fold_system(chat)


def _text(row: dict, key: str, kinds=str):
    value = row.get(key)
    if not value or not isinstance(value, kinds):
        raise ValueError(f"expected a text under {key!r}, found {value!r:.60}")
    return value


def _turns(row: dict, key: str, role: str) -> list[dict]:
    value = _text(row, key, str | list)
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _answer(row: dict) -> str:
    """As the model writes it, and eval.py expects it: a choice's number as its letter, a list."""
    answer = row.get("answer")
    if isinstance(answer, int) and 0 <= answer < len(row.get("choices") or ()):
        return chr(ord("A") + answer)
    if isinstance(answer, list):
        return ", ".join(map(str, answer))
    return str(answer) if isinstance(answer, int | float) else _text(row, "answer")


def read_rows(source: str) -> Iterator[tuple[str, dict | ValueError]]:
    """(where, row) for each row of "problems", "gsm8k", either with ":test", or a JSONL file.

    "solutions" are the problems with every step in their traces.

    A line that is not a JSON object in UTF-8 comes as a ValueError in the row's place, so that
    the caller can count it or stop.
    """
    name, _, split = source.partition(":")
    if name in ("problems", "solutions"):
        for i in range(problems.N_PROBLEMS[_split(source, split)]):
            row = problems.word_problem(split or "train", i)
            steps = {"reasoning": row["solution"]} if name == "solutions" else {}
            yield f"{source} row {i}", row | steps
        return
    path = hub.find_gsm8k(_split(source, split)) if name == "gsm8k" else hub.find_file(source)
    with path.open("rb") as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, found {type(row).__name__}")
            except (ValueError, RecursionError) as e:  # of JSON, UTF-8; of brackets in brackets
                row = ValueError(str(e))
            yield f"{path}:{n}", row


def _split(source: str, split: str) -> str:
    if split not in ("", "train", "test"):
        raise ValueError(f"--data {source}: expected nothing, :train or :test after the name")
    return split or "train"


# --- packed batches ------------------------------------------------------------------------------


def read_example(row: dict, tok: Tokenizer, system: str = "") -> tuple:
    """A row as (ids, mask)."""
    ids, mask = tok.example(messages(row, system))
    return np.array(ids, np.int32), np.array(mask, np.int8)


def read_pair(row: dict, tok: Tokenizer, system: str = "") -> tuple:
    """A preference row as two examples, chosen and rejected; 1 on what the two don't share.

    {"prompt", "chosen", "rejected"}, each a text or a message list; lists under "chosen" and
    "rejected" that start with the user bring the prompt themselves.
    prompt [p p p], chosen [c c], rejected [r] -> masks [0 0 0 1 1], [0 0 0 1]. What the assistant
    says in the prompt is 0 too.
    """
    chats = []
    for key in ("chosen", "rejected"):
        turns = _turns(row, key, "assistant")
        whole = isinstance(turns[0], dict) and turns[0].get("role") in ("user", "system")
        prompt = [] if whole else _turns(row, "prompt", "user")
        try:
            chats.append(messages({"messages": prompt + turns}, system))
        except ValueError as e:
            raise ValueError(f"{key}: {e}") from None
    examples = [tok.example(chat) for chat in chats]
    if examples[0][0] == examples[1][0]:
        raise ValueError("chosen and rejected are the same")
    n = len([*takewhile(lambda turns: turns[0] == turns[1], zip(*chats, strict=False))])
    if n % 2 == 0 or n == min(map(len, chats)):  # not before an assistant turn of both
        raise ValueError("chosen and rejected must answer the same prompt")
    first = len(tok.chat(chats[0][:n]))
    return tuple(
        (np.array(ids, np.int32), np.array([0] * first + mask[first:], np.int8))
        for ids, mask in examples
    )


def sequences(item: tuple) -> tuple:
    """The (ids, mask) of what is packed as one: an example alone, or the two of a pair."""
    return item if isinstance(item[0], tuple) else (item,)


def n_tokens(item: tuple) -> int:
    return sum(len(ids) for ids, _ in sequences(item))


def load_examples(source: str, tok: Tokenizer, max_length: int, system: str = "",
                  skip_bad_rows: bool = False,
                  read=read_example) -> tuple[list, list[str]]:
    """Training rows [(ids, mask), ...] of one source, and what was wrong with the rows left out.

    A bad row (not JSON, a field missing, an empty completion, more than max_length tokens) raises
    ValueError with its file and line, unless skip_bad_rows. `read=read_pair` reads pairs instead.
    """
    examples, bad = [], []
    for where, row in read_rows(source):
        try:
            if isinstance(row, ValueError):
                raise row
            example = read(row, tok, system)
            if (n := n_tokens(example)) > max_length:
                raise ValueError(f"{n} tokens, more than --max-length {max_length}")
            examples.append(example)
        except (ValueError, KeyError, TypeError) as e:
            bad.append(f"{where}: {e}")
            if not skip_bad_rows:
                raise ValueError(f"{bad[-1]} (--skip-bad-rows leaves such rows out)") from None
    if not examples:
        raise ValueError(f"--data {source}: no usable row" + (f"; first: {bad[0]}" if bad else ""))
    return examples, bad


def pack(lengths: list[int], size: int) -> list[list[int]]:
    """Best-fit decreasing: items into as few bins of `size` as it manages, each by its index.

    pack([3, 5, 2, 4], 7) -> [[1, 2], [3, 0]]: each item goes where it leaves the least room.
    """
    bins, spaces = [], []  # spaces, sorted: (room left, minus when it was noted, bin)
    for n, i in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        if (at := bisect.bisect_left(spaces, (lengths[i], -n))) < len(spaces):
            space, _, b = spaces.pop(at)
        else:
            space, b = size, len(bins)
            bins.append([])
        bins[b].append(i)
        if left := space - lengths[i]:
            bisect.insort(spaces, (left, -n, b))
    return bins


def fill(items: list, size: int) -> list[list[tuple]]:
    """Packed rows, each a list of (ids, mask); the two of a pair share a row, chosen first."""
    bins = pack([n_tokens(item) for item in items], size)
    return [[example for i in b for example in sequences(items[i])] for b in bins]


def assemble(rows: list[list[tuple]], n_rows: int, size: int) -> dict[str, np.ndarray]:
    """Packed rows as arrays [n_rows, size]: tokens, mask, segments (0 = padding), positions.

    [[p c], [p p c]] in 6 -> mask 010010, segments 112220, positions 010120.
    """
    keys = ("tokens", "mask", "segments", "positions")
    out = {k: np.zeros((n_rows, size), np.int32) for k in keys}
    for r, row in enumerate(rows):
        start = 0
        for s, (ids, mask) in enumerate(row, 1):
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

    def _epoch(self, epoch: int) -> list[list[tuple]]:
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
