"""data.py: rows as conversations, packing, and batches that are functions of their number."""

import hashlib
import json

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import data
import eval as evaluation
import hub
import problems

pytestmark = pytest.mark.smoke
TURN = lambda role, text: {"role": role, "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q", "reasoning": "r", "answer": "4"},
        {"question": "Q", "reasoning": "r", "answer": 4},
        {"question": "Q", "answer": "r\n#### 4"},
        {"prompt": "Q", "completion": "<reasoning>r</reasoning>\n<answer>4</answer>"},
        {
            "prompt": [TURN("user", "Q")],
            "completion": [TURN("assistant", "<reasoning>r</reasoning>\n<answer>4</answer>")],
        },
        {
            "messages": [
                TURN("user", "Q"),
                TURN("assistant", "<reasoning>r</reasoning>\n<answer>4</answer>"),
            ]
        },
    ],
)
def test_every_row_shape_is_the_same_conversation(row):
    assert data.messages(row, "Be brief.") == [
        TURN("user", "Be brief.\n\nQ"),
        TURN("assistant", "<reasoning>r</reasoning>\n<answer>4</answer>"),
    ]


def test_a_row_keeps_its_own_system_text():
    row = {"messages": [TURN("system", "Mine."), TURN("user", "Q"), TURN("assistant", "A")]}
    assert data.messages(row, "Yours.")[0] == TURN("user", "Mine.\n\nQ")


@pytest.mark.parametrize("answer, as_written", [(2, "C"), ("C", "C"), (["a", 7], "a, 7"), (4, "4")])
def test_an_answer_is_written_as_eval_expects_it(answer, as_written):
    tok, row = data.Tokenizer(ROOT / "tiny"), {"question": "Q", "reasoning": "r", "answer": answer}
    row |= {"choices": ["a", "b", "c"]} if as_written == "C" else {}
    assert data.messages(row)[-1]["content"] == data.format_completion("r", as_written)
    assert evaluation.read_problem(row, tok).gold == as_written


BAD_ROWS = [
    {"question": "Q", "reasoning": "r", "answer": "a", "choices": "a, b"},
    {"question": "Q", "reasoning": "r", "answer": "a", "choices": 4},
    {"question": "Q", "reasoning": ["r", "s"], "answer": "a"},
    {"question": ["Q"], "reasoning": "r", "answer": "a"},
    {"prompt": 4, "completion": "c"},
    {"messages": [TURN("user", [{"type": "text", "text": "Q"}]), TURN("assistant", "A")]},
    {"messages": [TURN("user", None), TURN("assistant", "A")]},
]


@pytest.mark.parametrize("row", BAD_ROWS, ids=str)
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_rows_of_wrong_types_are_named_with_file_and_line(tmp_path, row, system):
    """Never a traceback, nor a list's repr to learn from."""
    tok, file = data.Tokenizer(ROOT / "tiny"), tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=f"{file}:1: expected .*found|{file}:1: .*as content"):
        data.load_examples(str(file), tok, 256, system)


@given(st.lists(st.integers(1, 32), max_size=60))
def test_pack_places_every_item_once_and_overfills_nothing(lengths):
    bins = data.pack(lengths, 32)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in b) for b in bins]
    assert all(0 < s <= 32 for s in sums)
    # two bins that fit into one would mean that the later one was opened for nothing
    assert sum(s <= 16 for s in sums) <= 1


def test_pack_is_best_fit():
    assert data.pack([3, 5, 2, 4], 7) == [[1, 2], [3, 0]]
    # 4 goes where it leaves nothing, though the first bin has room too
    assert data.pack([10, 11, 4], 15) == [[1, 2], [0]]


def test_packing_wastes_little():
    tok = data.Tokenizer(ROOT / "tiny")
    ids = [tok.example(data.messages(problems.word_problem("train", i)))[0] for i in range(500)]
    bins = data.pack([len(i) for i in ids], 256)
    assert sum(map(len, ids)) / (256 * len(bins)) > 0.93  # 198 rows where 186 would hold it all


def test_assemble_worked_example():
    rows = [[(np.array([7, 8]), np.array([0, 1])), (np.array([7, 9, 8]), np.array([0, 0, 1]))]]
    out = data.assemble(rows, 2, 6)
    assert out["tokens"].tolist() == [[7, 8, 7, 9, 8, 0], [0] * 6]
    assert out["mask"].tolist() == [[0, 1, 0, 0, 1, 0], [0] * 6]
    assert out["segments"].tolist() == [[1, 1, 2, 2, 2, 0], [0] * 6]
    assert out["positions"].tolist() == [[0, 1, 0, 1, 2, 0], [0] * 6]


# ---------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "Yes", "rejected": "No way"},
        {
            "prompt": [TURN("user", "Q")],
            "chosen": [TURN("assistant", "Yes")],
            "rejected": [TURN("assistant", "No way")],
        },
        {
            "prompt": "Q",  # and again in the lists
            "chosen": [TURN("user", "Q"), TURN("assistant", "Yes")],
            "rejected": [TURN("user", "Q"), TURN("assistant", "No way")],
        },
        {
            "chosen": [TURN("user", "Q"), TURN("assistant", "Yes")],
            "rejected": [TURN("user", "Q"), TURN("assistant", "No way")],
        },
    ],
)
def test_every_pair_shape_is_the_same_two_examples(row):
    tok = data.Tokenizer(ROOT / "tiny")
    prompt = tok.chat([TURN("user", "Be brief.\n\nQ")])
    pair = data.read_pair(row, tok, "Be brief.")
    for (ids, mask), text in zip(pair, ("Yes", "No way"), strict=True):
        completion = [*tok.encode(text), tok.end_of_turn]
        assert ids.tolist() == prompt + completion
        assert mask.tolist() == [0] * len(prompt) + [1] * len(completion)


def test_what_a_pair_shares_is_its_prompt():
    """Earlier answers of the assistant are not compared."""
    tok = data.Tokenizer(ROOT / "tiny")
    shared = [TURN("user", "Q"), TURN("assistant", "A"), TURN("user", "Sure?")]
    row = {"prompt": shared, "chosen": "Yes", "rejected": "No"}
    for ids, mask in data.read_pair(row, tok):
        assert int(np.argmax(mask)) == len(tok.chat(shared)) and mask[-1] == 1
        assert mask.sum() == len(ids) - len(tok.chat(shared))


BAD_PAIRS = [
    ({"prompt": "Q", "chosen": "a"}, "'rejected'"),
    ({"prompt": "Q", "chosen": "", "rejected": "b"}, "'chosen'"),
    ({"prompt": "Q", "chosen": "a", "rejected": " "}, "rejected: the completion is empty"),
    ({"chosen": "a", "rejected": "b"}, "'prompt'"),
    ({"prompt": "Q", "chosen": "a", "rejected": "a "}, "the same"),
    ({"chosen": [TURN("user", "Q"), TURN("assistant", "a")],
      "rejected": [TURN("user", "R"), TURN("assistant", "b")]}, "the same prompt"),
    ({"prompt": "Q", "chosen": "a", "rejected": [TURN("assistant", "a"), TURN("user", "Why?"),
                                                 TURN("assistant", "b")]}, "the same prompt"),
    ({"prompt": "Q", "chosen": "a", "rejected": [TURN("user", "b")]}, "must end with an assistant"),
    ({"prompt": "Q", "chosen": "a", "rejected": ["b"]}, "rejected: expected a list of messages"),
    ({"prompt": "Q", "chosen": [{"role": "assistant"}], "rejected": "b"}, "chosen"),
    ({"prompt": "Q", "chosen": 4, "rejected": "b"}, "'chosen'"),
    ({"prompt": "Q", "chosen": "12345 " * 16, "rejected": "12345 " * 15}, "more than --max-length"),
]


@pytest.mark.parametrize("bad,why", BAD_PAIRS)
def test_bad_pairs_are_named_with_file_and_line_fatal_or_counted(tmp_path, bad, why):
    tok = data.Tokenizer(ROOT / "tiny")
    good = json.dumps({"prompt": "Hi", "chosen": "Hello", "rejected": "No"})
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join([good, "", json.dumps(bad), good]))
    with pytest.raises(ValueError) as e:
        data.load_examples(str(file), tok, 176, read=data.read_pair)
    assert f"{file}:3: " in str(e.value) and why in str(e.value) and "\n" not in str(e.value)
    pairs, left_out = data.load_examples(str(file), tok, 176, "", True, data.read_pair)
    assert len(pairs) == 2 and len(left_out) == 1 and f"{file}:3: " in left_out[0]


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 16)), max_size=30))
def test_the_two_of_a_pair_share_a_row_chosen_first(sizes):
    one = lambda n, token: (np.full(n, token), np.ones(n))
    pairs = [(one(a, 2 * i), one(b, 2 * i + 1)) for i, (a, b) in enumerate(sizes)]
    rows = data.fill(pairs, 32)
    assert sum(map(len, rows)) == 2 * len(pairs)
    for row in rows:
        assert sum(len(ids) for ids, _ in row) <= 32
        first = [int(ids[0]) for ids, _ in row]
        assert all(w % 2 == 0 and r == w + 1 for w, r in zip(first[::2], first[1::2], strict=True))


# -------------------------------------------------------------------------------------- batches


def source(n, first):
    """n examples, each of one token id of its own."""
    return [(np.full(5, first + i), np.ones(5)) for i in range(n)]


def seen(packed, batches):
    """Every example of these batches, by token id, in order."""
    out = []
    for n in batches:
        b = packed.batch(n)
        for tokens, segments in zip(b["tokens"], b["segments"], strict=True):
            out += [int(tokens[segments == s][0]) for s in range(1, segments.max() + 1)]
    return out


def test_batches_depend_on_seed_and_number_alone():
    make = lambda seed: data.Packed([source(23, 10), source(9, 100)], 12, 3, seed)
    straight = [make(1).batch(n) for n in range(20)]
    packed = make(1)
    for n in (17, 3, 19, 0, 4):
        for key, value in packed.batch(n).items():
            np.testing.assert_array_equal(value, straight[n][key])
    assert (make(2).batch(0)["tokens"] != straight[0]["tokens"]).any()


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    packed = data.Packed([source(24, 10)], 12, 3, 0)  # two a row: an epoch is 4 batches
    first, second = seen(packed, range(4)), seen(packed, range(4, 8))
    assert sorted(first) == sorted(second) == list(range(10, 34))
    assert first != second


def test_mixing_weights_set_the_shares_and_no_row_repeats_before_all_were_seen():
    packed = data.Packed([source(30, 0), source(30, 100)], 10, 6, 0, [0.75, 0.25])
    epoch = seen(packed, range(5))
    assert sum(i < 100 for i in epoch) == 45 and len(epoch) == 60
    small = [i for i in seen(packed, range(10)) if i >= 100]  # two epochs: 2 x 15 of 30
    assert sorted(small) == list(range(100, 130))


def test_eval_batches_hold_every_example_once():
    batches = data.eval_batches(source(7, 10), 10, 3)
    assert {b["tokens"].shape for b in batches} == {(3, 10)}
    ids = {int(i) for b in batches for i in np.unique(b["tokens"]) if i}
    assert ids == set(range(10, 17))


def test_gsm8k_is_found_named_or_refused_by_checksum(tmp_path, monkeypatch):
    monkeypatch.setenv("GSM8K", str(tmp_path))
    monkeypatch.setattr(data.Path, "home", lambda: tmp_path / "home")

    def refuse(*a, **k):
        raise OSError("no network")

    monkeypatch.setattr(data.urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match="no network") as e:
        list(data.read_rows("gsm8k"))
    assert str(tmp_path) in str(e.value) and "$GSM8K" in str(e.value)

    class Tampered:
        read = lambda self: b"{}"
        __enter__ = lambda self: self
        __exit__ = lambda self, *a: None

    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *a, **k: Tampered())
    with pytest.raises(ValueError, match=hub.GSM8K["train"]) as e:
        list(data.read_rows("gsm8k"))
    assert hashlib.sha256(b"{}").hexdigest() in str(e.value)
    assert not [*tmp_path.rglob("*.jsonl")]  # what is not the file is not kept
    monkeypatch.setitem(hub.GSM8K, "train", hashlib.sha256(b"{}").hexdigest())
    [(where, _)] = data.read_rows("gsm8k")
    assert where == f"{tmp_path}/home/.cache/gsm8k/train.jsonl:1"
    monkeypatch.setattr(data.urllib.request, "urlopen", refuse)
    assert len([*data.read_rows("gsm8k")]) == 1  # from there from now on
    (tmp_path / "test.jsonl").write_text('{"question": "Q", "answer": "r #### 4"}\n')
    [(where, row)] = data.read_rows("gsm8k:test")
    assert where.endswith("test.jsonl:1") and row["question"] == "Q"


def test_data_is_found_among_the_inputs_of_kaggle(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "KAGGLE", tmp_path)
    monkeypatch.delenv("GSM8K", raising=False)
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "datasets/somebody/other", "datasets/somebody/grade-gsm8k/main"):
        (tmp_path / "input" / folder).mkdir(parents=True)
    (tmp_path / "input/mine/rows.jsonl").write_text('{"a": 1}')
    (tmp_path / "input/datasets/somebody/grade-gsm8k/main/train.jsonl").write_text('{"a": 2}')
    assert [row for _, row in data.read_rows("rows.jsonl")] == [{"a": 1}]
    assert [row for _, row in data.read_rows("mine/rows.jsonl")] == [{"a": 1}]
    assert [row for _, row in data.read_rows("gsm8k")] == [{"a": 2}]
    (tmp_path / "input/datasets/somebody/other/rows.jsonl").write_text('{"a": 3}')
    with pytest.raises(ValueError, match="several inputs have it, give more of the path"):
        list(data.read_rows("rows.jsonl"))
    assert [row for _, row in data.read_rows("other/rows.jsonl")] == [{"a": 3}]
    (tmp_path / "rows.jsonl").write_text('{"a": 4}')  # here goes first
    assert [row for _, row in data.read_rows("rows.jsonl")] == [{"a": 4}]
    for absent in ("none.jsonl", "/none.jsonl", "../none.jsonl"):
        with pytest.raises(ValueError, match=f"--data {absent}: no such file"):
            list(data.read_rows(absent))
