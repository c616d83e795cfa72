"""The tokenizer and chat template, against transformers and the official templates."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from conftest import SHARED, spelled
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from make_tokenizer import TAGS, special_pieces, train_tokenizer

from data import PIECES, Tokenizer, with_system
from tokenizer_files import chat_template

ROOT = Path(__file__).parents[1]
FAMILIES = ("gemma2", "gemma3")
START, END = PIECES[-2:]


def train(directory, family="gemma3"):
    texts = [(ROOT / name).read_text() for name in ("data.py", "tests/test_tokenizer.py")]
    return train_tokenizer(directory, texts, 512, family)


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """{family: a directory written by Tokenizer.save}"""
    root = tmp_path_factory.mktemp("tokenizers")
    for family in FAMILIES:
        Tokenizer(train(root / "trained", family)).save(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="session")
def ours(directories):
    return {family: Tokenizer(directories[family]) for family in FAMILIES}


@pytest.fixture(scope="session")
def theirs(directories):
    auto = pytest.importorskip("transformers").AutoTokenizer
    return {family: auto.from_pretrained(directories[family]) for family in FAMILIES}


system = lambda text: {"role": "system", "content": text}
user = lambda text: {"role": "user", "content": text}
assistant = lambda text: {"role": "assistant", "content": text}
CONVERSATIONS = [
    [user("What is 2+2?")],
    [user("What is 2+2?"), assistant("4")],
    [user("What is 2+2?"), {"role": "model", "content": "4"}],
    [user("  spaces \n\n and\ttabs \n"), assistant("\n\n<b>4</b>\n  indented\n\n\n")],
    [user("\u00a0\u3000 unicode white space \u2028"), assistant("\x1c4\x85")],
    [user("a"), assistant("b"), user(" c"), assistant("d "), user("e")],
    [user("a"), assistant(""), user(""), assistant("  ")],
    [user("😀 ½ 中文 é e\u0301"), assistant("🏳️‍🌈")],
]
WITH_SYSTEM = [
    [system("Be brief."), user("What is 2+2?")],
    [system("\n  Not trimmed. \n"), user("  trimmed  "), assistant("4"), user("5")],
    [system(""), user("Hi"), assistant("Ho")],
]
BAD_TURNS = [
    [assistant("a")],
    [user("a"), user("b")],
    [user("a"), assistant("b"), assistant("c")],
    [user("a"), assistant("b"), {"role": "tool", "content": "c"}],
    [user("a"), system("b")],
]

# Building blocks of texts: what tokenizers stumble over, and whatever hypothesis thinks of.
WORDS = ["the", "return", "def ", "12", "3.5", "1,042", "é", "e\u0301", "ﬁ", "½", "中", "😀"]
MARKS = [*"\t\r\0\u00a0\u200b_'\"#\\⁇", "####", "<b>", "</b>", "<i", "<x>", "<0x41>", "🏳️‍🌈"]
SPACE = [" ", "  ", "     ", "\n", "\n\n", "\n\n\n\n\n"]
texts = st.lists(st.sampled_from(WORDS + MARKS + SPACE) | st.text(max_size=9), max_size=12)
texts = texts.map("".join)
STEERING = {p for f in FAMILIES for p in special_pieces(f) if p[0] in "<[" and p not in TAGS}
HOSTILE = [*sorted(STEERING), "<bos>", "<eos>", "<pad>", "<unk>", "<image_soft_token>"]
HOSTILE += ["<", "<<", ">", "<start_of_", "turn>", "end_of_turn>", "▁"]
hostile_texts = st.lists(st.sampled_from(HOSTILE) | texts, max_size=9).map("".join)
many = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(text=texts)
def test_ids_equal_transformers(ours, theirs, family, text):
    # SentencePiece reads "▁" as a space, transformers not always; and that reads "<bos>" as BOS.
    assume(not re.search("▁|<(bos|eos|pad|unk)>", text))
    ids = ours[family].sp.encode(text)
    assert theirs[family](text).input_ids == [ours[family].bos, *ids]
    assert theirs[family](text, add_special_tokens=False).input_ids == ids
    if not any(piece in text for piece in STEERING):
        assert ours[family].encode(text) == ids


def test_runs_of_white_space_equal_transformers(ours, theirs):
    for text in (f"a{run * n}the{run * n}" for run in " \n\t" for n in range(1, 70)):
        ids = theirs["gemma3"](text, add_special_tokens=False).input_ids
        assert ours["gemma3"].encode(text) == ids


@pytest.mark.parametrize("source", ["official", "saved"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chat_equals_the_jinja_templates(ours, theirs, family, source):
    template = theirs[family].chat_template
    if source == "official":
        trl = pytest.importorskip("trl")  # which ships them
        name = {"gemma2": "gemma.jinja", "gemma3": "gemma3.jinja"}[family]
        template = (Path(trl.__file__).parent / "chat_templates" / name).read_text()

    def jinja(messages, generate=False):
        return theirs[family].apply_chat_template(
            messages, chat_template=template, add_generation_prompt=generate, return_dict=False
        )

    no_system = family == "gemma2" and source == "official"
    for messages in CONVERSATIONS + WITH_SYSTEM * (not no_system):
        for generate in (False, True):
            assert ours[family].chat(messages, generate) == jinja(messages, generate)
    for messages in BAD_TURNS[: -1 if source == "official" else None] + WITH_SYSTEM * no_system:
        with pytest.raises(Exception, match="System role not supported|must alternate"):
            jinja(messages)


def test_transformers_drops_the_markers_and_nothing_else(theirs):
    text = "a\n\nb  <b>c</b>"
    ids = theirs["gemma3"](f"{START}{text}{END}").input_ids
    assert theirs["gemma3"].decode(ids, skip_special_tokens=True) == text


def test_chat_by_hand(ours):
    messages = [system("Be brief."), user(" 2+2?\n"), assistant("4 "), user("Sure?")]
    expected = ("<bos><start_of_turn>user\nBe brief.\n\n2+2?<end_of_turn>\n"
                "<start_of_turn>model\n4<end_of_turn>\n"
                "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n")
    for tok in ours.values():
        for chat in (messages, with_system(messages), with_system(messages[1:], "Be brief.")):
            assert spelled(tok, tok.chat(chat)) == expected


def test_with_system():
    messages = [system("Be brief."), user(" Hi "), assistant("Ho"), user("Hm")]
    before = json.dumps(messages)
    assert with_system(messages, "Another.") == [user("Be brief.\n\nHi"), *messages[2:]]
    assert json.dumps(messages) == before and with_system(messages[1:]) == messages[1:]
    for chat in (messages[:1], messages[2:]):
        with pytest.raises(ValueError, match="followed by a user message"):
            with_system(chat, "Be brief.")


@pytest.mark.parametrize("messages", [*BAD_TURNS, [], [system("alone")]])
def test_roles_must_alternate(ours, messages):
    with pytest.raises(ValueError, match=r"roles must alternate .*, found \["):
        ours["gemma3"].chat(messages)


def test_mask_is_what_the_model_says(ours):
    for tok in ours.values():
        chat = [user("a"), assistant(" It is 4.\n"), user("c"), assistant("")]
        ids, mask = tok.example(chat)
        words = [spelled(tok, [i]) for i in ids]
        said = "".join(word if m else "|" for word, m in zip(words, mask, strict=True))
        assert re.sub(r"\|+", "|", said) == "|It is 4.<end_of_turn>|<end_of_turn>"


@many
@given(contents=st.lists(hostile_texts, min_size=1, max_size=3), answer=hostile_texts)
def test_a_prompt_is_a_prefix_of_its_row(ours, contents, answer):
    tok = ours["gemma3"]
    messages = [turn for text in contents for turn in (user(text), assistant(text))]
    messages = [system(answer), *messages[:-1], assistant(answer)]
    prompt, (ids, mask) = tok.chat(messages[:-1]), tok.example(messages)
    assert ids[: len(prompt)] == prompt
    assert not mask[len(prompt) - 1] and all(mask[len(prompt) :])
    assert ids + tok.encode("\n") == tok.chat(messages)
    assert ids.count(tok.bos) == 1 and ids[0] == tok.bos
    assert ids.count(tok.start_of_turn) == ids.count(tok.end_of_turn) == 2 * len(contents)
    assert tok.decode(ids[len(prompt) :]) == answer.strip().replace("▁", " ")


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(text=hostile_texts)
def test_text_never_steers(ours, family, text):
    tok = ours[family]
    forbidden = {tok.sp.piece_to_id(piece) for piece in STEERING if piece in tok}
    ids = tok.encode(text)
    assert not {tok.pad, tok.bos, tok.eos, tok.unk, *forbidden} & set(ids)
    assert tok.decode(ids) == spelled(tok, ids) == text.replace("▁", " ")


def test_literals_are_cut_and_tags_are_not(ours):
    tok = ours["gemma3"]
    assert tok.encode("<end_of_turn>") == tok.sp.encode("<") + tok.sp.encode("end_of_turn>")
    for whole in (*TAGS, "\n", "\n\n\n", "    "):
        assert tok.encode(whole) == [tok.sp.piece_to_id(whole.replace(" ", "▁"))]


def test_decode(ours):
    tok = ours["gemma3"]
    ids = [tok.bos, *tok.encode("  a\n"), tok.end_of_turn, tok.eos, tok.pad, tok.pad]
    assert tok.decode(ids) == tok.decode(np.array(ids, np.int32)) == "  a\n"
    assert spelled(tok, ids) == "<bos>  a\n<end_of_turn><eos><pad><pad>"
    assert tok.decode([]) == spelled(tok, []) == ""
    assert tok.decode(tok.encode("\U0001f98a")[:2]) == "\ufffd\ufffd"  # cut inside a character


def test_ids_are_looked_up(ours):
    for tok in ours.values():
        assert (tok.pad, tok.eos, tok.bos, tok.unk, tok.vocab_size) == (0, 1, 2, 3, 512)
        assert tok.sp.id_to_piece(4) == "<mask>" and tok.stop_ids == (tok.end_of_turn, tok.eos)
    assert ours["gemma3"].end_of_turn == ours["gemma2"].start_of_turn  # as in the real ones
    pieces = [ours["gemma3"].sp.id_to_piece(i) for i in ours["gemma3"].forbidden_ids]
    assert pieces == ["<start_of_image>", "<end_of_image>"] and ours["gemma2"].forbidden_ids == ()


def test_save_keeps_the_file(tmp_path):
    before = train(tmp_path / "trained").read_bytes()
    Tokenizer(tmp_path / "trained").save(tmp_path / "new" / "folder")
    Tokenizer(tmp_path / "new" / "folder").save(tmp_path / "new" / "folder")  # onto itself
    assert (tmp_path / "new" / "folder" / "tokenizer.model").read_bytes() == before


def test_files_that_are_no_tokenizer(directories, tmp_path):
    file = tmp_path / "tokenizer.model"

    def refused(path, why):
        with pytest.raises(ValueError, match=why) as error:
            Tokenizer(path)
        assert "\n" not in str(error.value) and "tokenizer" in str(error.value)

    for path in (tmp_path, tmp_path / "absent"):
        refused(path, "--tokenizer DIR.*No such file")
    real = (directories["gemma3"] / "tokenizer.model").read_bytes()
    lfs_pointer = b"version https://git-lfs.github.com/spec/v1\n"
    for junk in (b"", b"\0" * 99, b"garbage", lfs_pointer, real[:-99], real[:999]):
        file.write_bytes(junk)
        refused(tmp_path, str(file))
    for symbols in ({}, {"control_symbols": [START, END]}):  # of another model
        with file.open("wb") as model:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(["ab abc abcd"]), model_writer=model, model_type="bpe",
                vocab_size=16, hard_vocab_limit=False, minloglevel=2, **symbols)
        refused(tmp_path, "are one piece each, found")


@pytest.fixture(scope="module")
def json_folder(directories, tmp_path_factory):
    """The tokenizer as transformers 5 saves it: tokenizer.json, and no tokenizer.model."""
    folder = tmp_path_factory.mktemp("json")
    auto = pytest.importorskip("transformers", "5").AutoTokenizer
    auto.from_pretrained(directories["gemma3"]).save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    return folder


@pytest.fixture(scope="module")
def from_json(json_folder):
    return Tokenizer(json_folder)


@many
@given(text=hostile_texts)
def test_tokenizer_json_gives_the_same_ids(ours, from_json, text):
    ids = ours["gemma3"].sp.encode(text)
    assert from_json.sp.encode(text) == ids
    assert spelled(from_json, ids) == spelled(ours["gemma3"], ids)


def test_tokenizer_json_gives_the_same_pieces(ours, from_json, json_folder, tmp_path):
    old, new = ours["gemma3"].sp, from_json.sp
    for i in range(old.get_piece_size()):
        for fact in ("id_to_piece", "is_control", "is_unknown", "is_byte", "is_unused"):
            assert getattr(old, fact)(i) == getattr(new, fact)(i), (i, fact)
    assert len(old) == len(new) and old.pad_id() == new.pad_id() and old.bos_id() == new.bos_id()
    text = (ROOT / "data.py").read_text()
    assert old.encode(text) == new.encode(text)
    content = json.loads((json_folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]  # as once
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer(tmp_path).sp.serialized_model_proto() == new.serialized_model_proto()


@pytest.mark.parametrize("beside", [False, True], ids=["json alone", "beside tokenizer.model"])
def test_added_tokens_are_read_and_kept(directories, json_folder, tmp_path, beside):
    auto = pytest.importorskip("transformers").AutoTokenizer
    theirs = auto.from_pretrained(json_folder)
    theirs.add_tokens(["<think>", "</think>", "<a tool>"])
    theirs.save_pretrained(tmp_path / "tuned")
    if beside:
        shutil.copy(directories["gemma3"] / "tokenizer.model", tmp_path / "tuned")
    tok = Tokenizer(tmp_path / "tuned")
    tok.save(tmp_path / "saved")
    text = "<think>Is it  4?</think>\n\n\n<b>4</b><a tool>"
    ids, chat = tok.encode(text), [user(text), assistant(text)]
    assert {512, 513, 514} < set(ids) and tok.decode(ids) == text and tok.vocab_size == 515
    assert tok.chat(chat) == Tokenizer(tmp_path / "saved").chat(chat)
    for folder in ("tuned", "saved"):
        theirs = auto.from_pretrained(tmp_path / folder)
        assert theirs(text, add_special_tokens=False).input_ids == ids and len(theirs) == 515
        assert theirs.apply_chat_template(chat, return_dict=False) == tok.chat(chat)
    assert theirs.decode(tok.chat(chat)[-9:], skip_special_tokens=True) == (
        tok.decode(tok.chat(chat)[-9:]))


def test_tokenizer_model_comes_first_where_it_lacks_nothing(directories, json_folder, tmp_path):
    for file in (*directories["gemma3"].iterdir(), json_folder / "tokenizer.json"):
        shutil.copy(file, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"].append({"id": 512, "content": "<image_soft_token>"})  # as published
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer(tmp_path).file == tmp_path / "tokenizer.model"
    (tmp_path / "tokenizer.model").unlink()
    tok = Tokenizer(tmp_path)
    assert tok.file == tmp_path / "tokenizer.json" and tok.vocab_size == 512


def test_files_that_are_no_tokenizer_json(json_folder, tmp_path):
    content = json.loads((json_folder / "tokenizer.json").read_text())
    added, model = content["added_tokens"], content["model"]
    for bad, why in [
        ("", "cannot be read as JSON"), ("[]", "expected a JSON object"), ("{}", "added_tokens"),
        ({"added_tokens": added, "model": {"vocab": [["a", -1.0]]}}, "items"),  # a unigram model
        ({"added_tokens": added, "model": model | {"merges": [1]}}, "TypeError"),
        ({"added_tokens": [], "model": {"vocab": {"a": 0}, "merges": []}}, "without.*<bos>"),
        ({"added_tokens": [*added, {"id": 600, "content": "x"}], "model": model}, "KeyError.512"),
        (content | {"added_tokens": [added[0] | {"lstrip": True}, *added[1:]]}, "which changes"),
        (content | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}},
         "Lowercase"),
    ]:
        (tmp_path / "tokenizer.json").write_text(bad if isinstance(bad, str) else json.dumps(bad))
        with pytest.raises(ValueError, match=why) as error:
            Tokenizer(tmp_path)
        assert "tokenizer.json: expected Gemma's" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_template_of_another_model(directories, tmp_path, file):
    shutil.copy(directories["gemma3"] / "tokenizer.model", tmp_path)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    is_json = file.endswith(".json")
    (tmp_path / file).write_text(json.dumps({"chat_template": template}) if is_json else template)
    with pytest.raises(ValueError, match="Gemma's chat template.*found.*im_start") as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert Tokenizer(tmp_path / "tokenizer.model")  # which brings no template
    pytest.importorskip("jinja2")
    tok = Tokenizer(tmp_path / "tokenizer.model")
    if is_json:  # the template of a model of ours writes the system text beside it
        tok.save(tmp_path, "Be \"brief\".\nSay it's so.")
        with pytest.raises(ValueError, match="its chat template writes .*Be .*brief"):
            Tokenizer(tmp_path)
        prompt = tmp_path / "prompt.json"
        prompt.write_text(json.dumps({"system": "Be \"brief\".\nSay it's so."}))
        Tokenizer(tmp_path)
        prompt.unlink()
    ours = chat_template("")
    for template, found in (
        (ours, None), (ours.replace("'user'", "'human'"), "must alternate"),
        (ours.replace("{{- bos_token -}}", ""), "'<start_of_turn>user"),
        (ours.replace("model\\n", "model\\n<think>"), "model\\n<think>'"),
        (ours.replace("<end_of_turn>\\n", "<end_of_turn>"), "<end_of_turn><start_of_turn>"),
        (ours + "{{ ''.__class__.__mro__ }}", "SecurityError"), (ours + "{% if", "TemplateSyntax"),
    ):
        text = json.dumps({"chat_template": template}) if is_json else template
        (tmp_path / file).write_text(text)
        if found is None:
            Tokenizer(tmp_path)
            continue
        with pytest.raises(ValueError, match="its chat template writes .*expected Gemma's") as e:
            Tokenizer(tmp_path)
        assert found in str(e.value) and "\n" not in str(e.value), template


@pytest.mark.parametrize("variable", [
    "GEMMA_TOKENIZER", pytest.param("GEMMA_WEIGHTS", marks=pytest.mark.real)])
def test_published_tokenizer(variable):
    """Ids of transformers; the variable names a folder with the tokenizer of a Gemma 3."""
    folder, golden = Path(os.environ.get(variable, "nowhere")), SHARED / "real/golden_tokens.json"
    if not [*folder.glob("tokenizer.*")] or not golden.exists():
        pytest.skip(f"${variable} names no tokenizer, or ../shared/real is absent")
    tok, golden = Tokenizer(folder), json.loads(golden.read_text())
    assert tok.vocab_size == 262144
    for chat in golden["chats"]:
        assert tok.chat(chat["messages"], chat["generate"]) == chat["ids"]
    wrong = {row["text"] for row in golden["texts"] if tok.encode(row["text"]) != row["ids"]}
    assert wrong == {"[multimodal]", "<unused0>", "<mask>"}  # which text never becomes


def test_training_is_deterministic(tmp_path):
    assert train(tmp_path / "a").read_bytes() == train(tmp_path / "b").read_bytes()
    command = [sys.executable, ROOT / "tests/make_tokenizer.py", tmp_path / "c", ROOT / "data.py"]
    options = ["--vocab-size", "480", "--extra", "<answer>", "</answer>"]
    subprocess.run([*command, *options], check=True)
    tok = Tokenizer(tmp_path / "c")
    assert tok.vocab_size == 480 and len(tok.encode("<answer></answer>")) == 2
