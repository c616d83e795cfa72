"""The files of a tokenizer: opened, checked to be Gemma's, and written. data.Tokenizer uses them.

    file, sp = tokenizer_files.load(Path("tiny"))          # the file and its SentencePieceProcessor
    tokenizer_files.save(Path("merged"), file, sp, "")     # what transformers' AutoTokenizer needs

A model folder holds `tokenizer.model`, which is SentencePiece's own format, or `tokenizer.json`,
which is all that transformers 5 saves, or both. Its chat template is Jinja, in
`chat_template.jinja` or `tokenizer_config.json`.
"""

import importlib.util
import json
import re
import struct
from itertools import starmap
from pathlib import Path

import sentencepiece

import data
import disk

MARKERS = (data.TURN[0], data.TURN[3])
# The chat template in Jinja; `chat_template` puts values in place of the names in capitals.
JINJA = """
{{- bos_token -}}
{%- set given = messages[0].role == 'system' -%}
{%- set system = messages[0].content + AFTER_SYSTEM if given else DEFAULT -%}
{%- for m in (messages[1:] if given else messages) -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{%- if role != ('user' if loop.index0 % 2 == 0 else 'model') -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- set content = (system if loop.first else '') + (m.content | trim) -%}
{{- TURN -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- MODEL -}}{%- endif -%}
"""


def load(path: Path) -> tuple[Path, sentencepiece.SentencePieceProcessor]:
    """(the file read, its tokenizer) of a model folder or of one file.

    tokenizer.json is read where it is alone, or has added tokens that tokenizer.model lacks.
    ValueError unless each turn marker is one token and the folder's chat template is Gemma's.
    """
    files = [path]
    if path.is_dir():
        check_chat_template(path)
        files = [path / name for name in ("tokenizer.model", "tokenizer.json")]
        files = [file for file in files if file.exists()] or files[:1]
    file, *newer = files
    try:
        sp = _open(file)
        if newer and any(sp.id_to_piece(sp.piece_to_id(t)) != t for t in _read_json(newer[0])[1]):
            file = newer[0]
            sp = _open(file)
        found = [sp.encode(marker, out_type=str) for marker in MARKERS]
    except (OSError, RuntimeError, ValueError) as e:
        found = e
    if found != [[marker] for marker in MARKERS]:
        raise ValueError(f"{file}: expected Gemma's tokenizer.model or tokenizer.json (--tokenizer "
                         f"DIR), in which {MARKERS} are one piece each, found {found}")
    return file, sp


def save(folder: Path, file: Path, sp: sentencepiece.SentencePieceProcessor, system: str) -> None:
    """Writes tokenizer.model and tokenizer_config.json, and copies a tokenizer.json that was read.

    system: what the chat template puts before a conversation without a system text of its own.
    """
    # added_tokens_decoder makes transformers' skip_special_tokens drop the turn markers. With
    # extra_special_tokens instead, HTML tags would fall apart (transformers 5.23).
    markers = {str(sp.piece_to_id(m)): {"content": m, "special": True} for m in MARKERS}
    config = {
        "tokenizer_class": "GemmaTokenizer",
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": markers,
        "chat_template": chat_template(system),
    }
    folder.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".json":  # transformers reads this file first, with its own added tokens
        del config["added_tokens_decoder"]
        (folder / "tokenizer.json").write_bytes(file.read_bytes())
    (folder / "tokenizer.model").write_bytes(sp.serialized_model_proto())
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# --- chat templates -------------------------------------------------------------------------------


def turn(role: str, content: str) -> str:
    """One turn of the chat template as text; `role` is "user" or "model"."""
    return "".join(data.TURN).format(role=role, content=content)


def opening(role: str) -> str:
    """What comes before the content of a turn."""
    return "".join(data.TURN[:2]).format(role=role)


def chat_template(system: str) -> str:
    """data.Tokenizer.chat in Jinja; `system` is for a conversation without a system text."""
    written = turn("' + role + '", "' + content + '").replace("\n", "\\n")
    values = {"DEFAULT": _literal(system + data.AFTER_SYSTEM if system else ""),
              "AFTER_SYSTEM": _literal(data.AFTER_SYSTEM),
              "TURN": f"'{written}'", "MODEL": _literal(opening("model"))}
    return re.sub("[A-Z_]{4,}", lambda name: values[name[0]], JINJA)


def _literal(text: str) -> str:
    """A text as a string literal of Jinja."""
    escaped = re.sub(r"(['\\])", r"\\\1", text)
    return "'" + escaped.replace("\r", "\\r").replace("\n", "\\n") + "'"


def check_chat_template(folder: Path) -> None:
    """ValueError where a model folder has a chat template that does not write Gemma's turns."""
    templates = [disk.read_text(file) for file in folder.glob("chat_template.jinja")]
    for file in folder.glob("tokenizer_config.json"):
        templates.append(disk.read_json(file).get("chat_template"))
    prompt, system = folder / "prompt.json", ""
    if prompt.exists():  # a model of ours, whose template may add this system text
        system = disk.json_value(disk.read_json(prompt), "system", str, "", prompt)
    later = turn("model", "b") + turn("user", "c") + opening("model")
    expected = ["<bos>" + turn("user", first + "a") + later
                for first in ("", system + data.AFTER_SYSTEM)]
    for template in filter(None, templates):
        if MARKERS[0] not in str(template):
            raise ValueError(f"{folder}: expected Gemma's chat template, which has {MARKERS[0]}, "
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


# --- tokenizer.json -------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # SentencePiece's types of pieces
SPECIAL = {"<unk>": UNKNOWN, "<pad>": CONTROL, "<bos>": CONTROL, "<eos>": CONTROL}


def _open(file: Path) -> sentencepiece.SentencePieceProcessor:
    if file.suffix == ".json":
        return sentencepiece.SentencePieceProcessor(model_proto=_model_proto(*_read_json(file)))
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


def _read_json(file: Path) -> tuple[list[str], list[str], list[str]]:
    """tokenizer.json: all pieces by id, the added ones (never split), and what each merge makes."""
    content = disk.read_json(file)
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
        if by_id.get(last := len(by_id) - 1) == "<image_soft_token>":
            del by_id[last], added[last]  # tokenizer.model lacks it, and text models a row for it
        pieces = [by_id[i] for i in range(len(by_id))]
        if missing := SPECIAL.keys() - set(pieces):
            raise ValueError(f"{file} without {sorted(missing)}")
        return pieces, list(added.values()), ["".join(merge) for merge in merges]
    except (KeyError, TypeError, AttributeError) as e:  # KeyError 7: no token has that id
        raise ValueError(f"{file} without a key or id that a BPE has: {e!r}") from None


def _model_proto(pieces: list[str], added: list[str], merged: list[str]) -> bytes:
    """SentencePiece's own format; the field numbers are those of its sentencepiece_model.proto.

    SentencePiece joins the two neighbours whose piece has the highest score, transformers those
    whose merge comes first: the scores are 0, -1, ... in the order of the merges.
    """
    types = dict.fromkeys(added, USER_DEFINED) | SPECIAL
    types |= {f"<0x{byte:02X}>": BYTE for byte in range(256)}
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
