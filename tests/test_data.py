"""data.py: rows of every shape, hold-out, packing, and batches as functions of their number."""

import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import packed
import problems
import terminal

pytestmark = pytest.mark.smoke
TURN = lambda role, text: {"role": role, "content": text}
TOK = data.Tokenizer(ROOT / "tiny")
TAGGED = "<reasoning>r</reasoning>\n<answer>4</answer>"
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(terminal, "say", lines.append)
    return lines


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row", [
    {"question": "Q", "reasoning": "r", "answer": "4"},
    {"question": " Q\n", "reasoning": " r ", "answer": 4.0},
    {"question": "Q", "answer": "r\n#### 4"},
    {"question": "Q", "reasoning": "r", "answer": 4, "response": "not in our format"},
    {"prompt": "Q", "completion": TAGGED},
    {"prompt": [TURN("user", "Q")], "completion": [TURN("assistant", TAGGED)]},
    {"prompt": [TURN("user", "Q")], "question": "of the judge", "completion": TAGGED},
    {"messages": [TURN("system", ""), TURN("user", "Q"), TURN("model", TAGGED)]},
    {"messages": [TURN("user", [{"type": "text", "text": "Q"}]), TURN("assistant", TAGGED)]},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": TAGGED}]},
    {"instruction": "Q", "input": "", "output": TAGGED},
], ids=str)
def test_every_row_shape_is_the_same_row(row):
    before = json.dumps(row)
    assert data.parse_row(row)[:2] == ([TURN("user", "Q")], TAGGED)
    assert json.dumps(row) == before
    ids, mask, _ = packed.read_example(row, TOK, "Be brief.")
    assert (ids.tolist(), mask.tolist()) == TOK.example(
        [TURN("system", "Be brief."), TURN("user", "Q"), TURN("assistant", TAGGED)]
    )


@pytest.mark.parametrize("row, question, completion, answer", [
    ({"question": "Q", "answer": "4"}, "Q", "4", "4"),  # no trace: the bare answer is learnt
    ({"prompt": "Q", "rubrics": ["clear"]}, "Q", None, None),
    ({"question": "Q", "reasoning": "r", "answer": None}, "Q", None, None),
    ({"instruction": "Add.", "input": "2, 2", "output": "four"}, "Add.\n\n2, 2", "four", None),
    ({"prompt": "Add.", "input": "2, 2", "output": "four"}, "Add.\n\n2, 2", "four", None),
    ({"context": "Ann is 4.", "question": "Q", "answer": 4}, "Ann is 4.\n\nQ", "4", "4"),
    ({"question": "Q", "answer": "2*3=<<2*3=6>>6\n#### -1,024.5"}, "Q",
     data.format_completion("2*3=6", "-1024.5"), "-1024.5"),
    ({"question": "Q", "answer": "#### Overview\nTwo."}, "Q", "#### Overview\nTwo.",
     "#### Overview\nTwo."),
    *[({"question": "Q", "reasoning": "r", "answer": answer}, "Q",
       data.format_completion("r", text), text) for answer, text in [
          (1.0, "1"), (-0.0, "0"), (0.5, "0.5"), (1e300, "1e+300"), (True, "True"),
          (["a", 7], "a, 7"), (" 1,024 ", "1,024"), ("<end_of_turn>", "<end_of_turn>")]],
])
def test_what_a_row_asks_teaches_and_checks(row, question, completion, answer):
    assert data.parse_row(row)[:3] == ([TURN("user", question)], completion, answer)


@pytest.mark.parametrize("row", [
    {"system": "Mine.", "question": "Q", "answer": "A"},
    {"system_prompt": "Mine.", "question": "Q", "response": "A"},
    {"messages": [TURN("system", " Mine."), TURN("user", "Q"), TURN("assistant", "A")]},
    {"system": "Mine.", "messages": [TURN("system", "Mine.\n"), TURN("user", "Q"),
                                     TURN("assistant", "A")]},
    {"system": "Mine.", "prompt": "Q", "chosen": "A", "rejected": "B"},
])
def test_a_row_keeps_its_own_system_text(row):
    chat = data.parse_row(row).chat
    assert chat == [TURN("system", "Mine."), TURN("user", "Q")]
    assert data.with_system(chat, "Yours.") == [TURN("user", "Mine.\n\nQ")]
    is_pair = "chosen" in row
    example = packed.read_pair(row, TOK).chosen if is_pair else packed.read_example(row, TOK)
    assert TOK.decode(example.ids) == "user\nMine.\n\nQ\nmodel\nA"


CAPITALS = ["Rome", "Oslo", "Bern"]


@pytest.mark.parametrize("choices, answer, letter", [
    *[({"choices": CAPITALS}, answer, "C")
      for answer in (2, 2.0, "2", "C", "c", "(C)", "C.", "C) Bern", "Bern", " bern", ["C"])],
    ({"choices": ["1", "2", "4"]}, 2, "C"),  # a number is an index where it can be one
    ({"choices": ["1", "2", "4"]}, "2", "B"),
    ({"choices": [2, 4.0, 8]}, 4, "B"),
    ({"choices": ["A.D.", "a.m."]}, "a.m.", "B"),
    ({"options": {"A": "Rome", "B": "Oslo", "C": None}}, "Oslo", "B"),
    *[({"choices": {"text": CAPITALS, "label": ["1", "2", "3"]}}, answer, "B")
      for answer in ("2", 2)],  # a label before an index
    ({"options": CAPITALS, "answer": None, "answerKey": "B"}, None, "B"),
    ({"options": CAPITALS, "answer_idx": "B"}, "Oslo", "B"),
])
def test_a_choice_is_asked_and_answered_by_its_letter(choices, answer, letter):
    row = {"question": "Where?", "answer": answer, "reasoning": "r"} | choices
    row |= {"answer": choices["answer"]} if "answer" in choices else {}
    parsed = data.parse_row(row)
    assert parsed.answer == letter
    assert parsed.completion == data.format_completion("r", letter)
    listed = [f"{letter}) {text}" for letter, text in zip("ABC", parsed.choices, strict=False)]
    assert parsed.chat == [TURN("user", "\n".join(["Where?", *listed]))]


QR = {"question": "Q", "reasoning": "r"}
BAD_ROWS = [
    ({"text": "Q"}, "expected messages, prompt or question, found keys ['text']"),
    *[(QR | {"answer": answer}, f"found {answer!r}")
      for answer in (NAN, INF, "nan", " ", [["a"]], {"a": 1})],
    *[(QR | {"answer": answer}, "expected a completion to train on") for answer in ("", [], None)],
    *[(QR | {"answer": "a", "choices": choices}, "expected a list of at most 26 choices")
      for choices in ("a, b", 4, ["a"] * 27)],
    *[(QR | {"answer": answer, "choices": CAPITALS}, f"'{answer}' is none of the 3 choices")
      for answer in ("D", 3, True)],
    (QR | {"answer": "r\n#### "}, "as answer after ####"),
    (QR | {"answer": "a", "reasoning": ["r", "s"]}, "text under reasoning, found ["),
    (QR | {"answer": "a", "question": ["Q"]}, "list of messages as prompt, found ['Q']"),
    (QR | {"answer": "a", "question": " "}, "expected a prompt that ends with a user turn"),
    ({"prompt": "Q", "completion": " "}, "the completion is empty"),
    ({"prompt": "Q", "completion": {"text": "c"}}, "as completion"),
    ({"prompt": "Q", "completion": "c", "system": 4}, "text under system, found 4"),
    ({"messages": [TURN("system", "")], "answer": "A"}, "expected one system text, then"),
    ({"messages": [TURN("assistant", "A")]}, "expected a prompt that ends with a user turn"),
    *[({"messages": [TURN("user", "Q"), turn]}, "prompt, turn 1: expected a text and a role of")
      for turn in (TURN("assistant", None), TURN("tool", "A"), TURN("user", [{"type": "image"}]))],
    ({"messages": [TURN("system", "a"), TURN("user", "Q"), TURN("assistant", "A")], "system": "b"},
     "then a user turn; found 'a' 'b'"),
    ({"prompt": [TURN("user", "Q"), TURN("assistant", "A")], "completion": "B"}, "a user turn"),
    ({"prompt": "Q \ud83d", "completion": "A"}, "surrogates not allowed"),
    *[({"prompt": text, "completion": "A"}, "carries a chat template already") for text in (
        "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n", "<bos>Q", "Q<end_of_turn>",
        "<|im_start|>user\nQ", "<s>[INST] Q [/INST]", "Be brief.\n<|start_header_id|>\n",
        "\n\nHuman: Q\n\nAssistant:", "USER: Q ASSISTANT:", "Q\n\n### Response:\n")],
]


@pytest.mark.parametrize("row, why", BAD_ROWS, ids=str)
def test_bad_rows_are_named_with_file_and_line(tmp_path, row, why, said):
    file = write(tmp_path / "rows.jsonl", [QR | {"answer": 4}, row])
    read = lambda row: packed.read_example(row, TOK, "Be brief.")
    with pytest.raises(ValueError) as e:
        data.load(file, read)
    assert f"{file}:2: " in str(e.value) and why in str(e.value) and "\n" not in str(e.value)
    [[example]], [fault] = data.load(file, read, skip_bad_rows=True)
    assert why in fault and f"1 bad rows left out; first: {file}:2: " in said[0]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3)
    | st.sampled_from(["user", "assistant", "A", "#### 4", "\ud800", "<end_of_turn>"]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "text", "label", "type"]), x),
    max_leaves=8,
)


KNOWN = sorted(set().union(*data.COLUMNS.values()))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(KNOWN), VALUES, max_size=5))
def test_any_row_is_read_or_a_bad_row(row):
    for read in (packed.read_example, packed.read_pair):
        try:
            read(row, TOK, "Be brief.")
        except ValueError as e:
            assert len(str(e)) < 400


A, YES, NO = (TURN("assistant", text) for text in ("a", "Yes", "No way"))


@pytest.mark.parametrize("row", [
    {"prompt": "Q", "chosen": "Yes", "rejected": "No way"},
    {"question": "Q", "chosen": "Yes", "rejected": "No way", "answer": "Yes"},
    {"prompt": [TURN("user", "Q")], "chosen": [YES], "rejected": [NO]},
    {"prompt": "Q", "chosen": [TURN("user", "Q"), YES], "rejected": [TURN("user", "Q"), NO]},
    {"chosen": [TURN("user", "Q"), YES], "rejected": [TURN("user", "Q"), NO]},
    {"conversations": [{"from": "human", "value": "Q"}],
     "chosen": [{"from": "gpt", "value": "Yes"}], "rejected": [{"from": "gpt", "value": "No way"}]},
])
def test_every_pair_shape_is_the_same_two_examples(row):
    prompt = TOK.chat([TURN("user", "Be brief.\n\nQ")])
    pair = packed.read_pair(row, TOK, "Be brief.")
    for (ids, mask, _), text in zip(pair[:2], ("Yes", "No way"), strict=True):
        completion = [*TOK.encode(text), TOK.end_of_turn]
        assert ids.tolist() == prompt + completion
        assert mask.tolist() == [0] * len(prompt) + [1] * len(completion)
    assert pair.prompt == np.array(prompt, np.int32).tobytes() == pair.rejected.prompt
    assert pair.n_tokens == sum(len(ids) for ids, *_ in pair[:2])


def test_earlier_answers_of_a_pair_are_not_compared():
    shared = [TURN("user", "Q"), TURN("assistant", "A"), TURN("user", "Sure?")]
    n = len(TOK.chat(shared))
    row = {"prompt": shared, "chosen": "Y", "rejected": "N"}
    for ids, mask, _ in packed.read_pair(row, TOK)[:2]:
        assert mask.tolist() == [0] * n + [1] * (len(ids) - n)


DIFFER = "different answers to the same prompt"


@pytest.mark.parametrize("bad, why", [
    ({"prompt": "Q", "chosen": "a"}, "as rejected, found None"),
    ({"prompt": "Q", "chosen": 4, "rejected": "b"}, "as chosen, found 4"),
    ({"prompt": "Q", "chosen": "a", "rejected": " "}, "the completion is empty"),
    ({"chosen": "a", "rejected": "b"}, "expected messages, prompt or question"),
    ({"prompt": "Q", "chosen": "a", "rejected": "a "}, DIFFER),
    ({"chosen": [TURN("user", "Q"), YES], "rejected": [TURN("user", "R"), NO]}, DIFFER),
    ({"prompt": "Q", "chosen": "a", "rejected": [A, TURN("user", "Why?"), NO]}, DIFFER),
    ({"prompt": "Q", "chosen": "a", "rejected": [TURN("user", "b")]}, "expected a completion"),
    ({"prompt": "Q", "chosen": [{"role": "assistant"}], "rejected": "b"}, "chosen, turn 0"),
])
def test_bad_pairs_are_named(bad, why):
    with pytest.raises(ValueError, match=why):
        packed.read_pair(bad, TOK)


def test_bad_rows_stop_or_are_counted_with_the_first_and_the_longest(tmp_path, said):
    def read(row):
        if (n := len(TOK.encode(row["prompt"]))) > 3:
            raise data.TooLong(n, 3, "--max-length")
        return row["prompt"]

    file = tmp_path / "rows.jsonl"
    lines = ["", '{"prompt": "abc', "[1]", '{"prompt": "\xff"}', "[" * 10**5,
             '{"prompt": "12345"}', '{"prompt": "1234"}', '{"prompt": "a"}', '{"prompt": "b"}']
    file.write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{file}:2: .*; 6 of 8 rows are bad; the longest has 5 "
                                         "tokens .or --skip-bad-rows"):
        data.load(str(file), read)
    [items], bad = data.load(f" {file} ", read, skip_bad_rows=True, what="prompts")
    assert items == ["a", "b"]
    assert [fault.split(":")[1] for fault in bad] == ["2", "3", "4", "5", "6", "7"]
    assert "expected a JSON object, found a list" in bad[1] and "recursion" in bad[3]
    assert bad[4].endswith(": 5 tokens, more than --max-length 3")
    assert said == [f"data: 2 prompts of {file}, 6 bad rows left out; first: {bad[0]}; "
                    "the longest has 5 tokens"]
    assert data.load(str(file), read, rows=1, skip_bad_rows=True)[0] == [["a"]]
    file.write_text('{"prompt": "12345"}')
    with pytest.raises(ValueError, match="no usable row, 1 bad rows .*:1: 5 tokens, more"):
        data.load(str(file), read, skip_bad_rows=True, flag="--eval-data")


def test_columns_that_nothing_reads_are_said(tmp_path, said):
    file = write(tmp_path / "rows.jsonl", [{"question": "Q", "final_answer": "4", "url": "x"}])
    data.load(f"{file},problems:test", data.parse_row, rows=3)
    [line] = [line for line in said if "nothing reads" in line]
    assert "columns nothing reads: final_answer, url (" in line


def test_fields_of_messages_that_nothing_reads_are_said(tmp_path, said):
    turns = [TURN("user", "Q"), TURN("assistant", "A") | {"reasoning_content": "R", "name": None}]
    data.load(str(write(tmp_path / "rows.jsonl", [{"messages": turns}])), data.parse_row)
    [line] = [line for line in said if "nothing reads" in line]
    assert "columns nothing reads: messages.reasoning_content (" in line


@pytest.mark.parametrize("array", ['["a", 3, null]', "[" * 100_000, '[{"a'])
def test_an_array_that_holds_no_rows(tmp_path, array):
    (tmp_path / "rows.json").write_text(array)
    with pytest.raises(ValueError, match=f"{tmp_path}/rows.json") as error:
        data.load(str(tmp_path / "rows.json"), data.parse_row)
    assert "expected a JSON object, found a str" in str(error.value) or "as JSON (" in str(error)


def test_files_as_people_have_them(tmp_path):
    rows = [{"question": "2 + 2?", "reasoning": "It's \u00bd of 8.", "answer": n} for n in (4, 5)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    for name, at, content in (("mark.jsonl", ":2", "\ufeff" + text), ("lines.json", ":2", text),
                              ("array.json", " row 2", " \n" + json.dumps(rows))):
        (tmp_path / name).write_text(content, encoding="utf-8")
        where, read = zip(*data.read_rows(str(tmp_path / name)), strict=True)
        assert list(read) == rows and where[1].endswith(name + at)


def test_the_built_in_sources():
    first = lambda source: next(iter(data.read_rows(source)))
    assert first("problems") == ("problems row 0", problems.word_problem("train", 0))
    row = problems.word_problem("test", 0)
    assert first("solutions:test")[1] == row | {"reasoning": row["solution"]}
    with pytest.raises(ValueError, match="--eval-data gsm8k:tset: expected nothing, :train or"):
        next(data.read_rows("gsm8k:tset", "--eval-data"))
    assert data.test_split("gsm8k") == data.test_split("gsm8k:train") == "gsm8k:test"
    assert data.test_split("problems, solutions:train") == "problems:test,solutions:test"
    assert data.test_split("gsm8k[:50%]") == data.test_split("gsm8k:train[9:]") == "gsm8k:test"
    assert data.test_split("mine.jsonl,gsm8k") is data.test_split("gsm8k:test") is None


def config(data="problems", eval_data=None, eval_rows=0, seed=0):
    return SimpleNamespace(**locals(), columns="", skip_bad_rows=False)


def test_no_prompt_is_on_both_sides_of_a_hold_out(tmp_path, said):
    """A question that comes again, in another source too, goes where it went the first time."""
    one = write(tmp_path / "one.jsonl", [{"prompt": f"Q{n % 150}"} for n in range(600)])
    two = write(tmp_path / "two.jsonl", [{"prompt": f"Q{n}"} for n in range(140, 200)])
    read = lambda row: SimpleNamespace(prompt=row["prompt"])
    split = lambda **changes: data.load_split(config(data=f"{one},{two}", **changes), read)
    sets, held_out = split()
    assert said[-1] == (f"data: {len(held_out)} of these rows are held out; so few tell little, "
                        "--eval-data names others")
    out, kept = {item.prompt for item in held_out}, {item.prompt for s in sets for item in s}
    assert len(sets) == 2 and len(out) == 5 and not out & kept and len(out | kept) == 200
    assert len(held_out) + sum(map(len, sets)) == 660
    assert {item.prompt for item in split()[1]} == out != {i.prompt for i in split(seed=1)[1]}
    assert len(split(eval_rows=2)[1]) == 2
    with pytest.raises(ValueError, match="1 prompts are too few to hold some out; --eval-data"):
        data.load_split(config(data=write(tmp_path / "q.jsonl", [{"prompt": "Q"}] * 99)), read)


@pytest.mark.parametrize("part, expected", [
    ("[:3]", [0, 1, 2]), ("[8:]", [8, 9]), ("[2:4]", [2, 3]), ("[:40%]", [0, 1, 2, 3]),
    ("[90%:]", [9]), ("[25%:5]", [2, 3, 4]), ("[:]", [*range(10)]), ("[:0]", []), ("[20:]", [])])
def test_a_slice_takes_rows_by_number_or_percentage(tmp_path, part, expected):
    file = tmp_path / "a[b].jsonl"
    file.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(10)))
    assert [row["n"] for _, row in data.read_rows(f"{file}{part}")] == expected


def test_held_out_rows_are_those_named_or_a_test_split(tmp_path, said):
    read = lambda row: row["question"]
    [train], held_out = data.load_split(config(eval_rows=3), read, rows=5)
    assert train == [problems.word_problem("train", n)["question"] for n in range(5)]
    assert held_out == [problems.word_problem("test", n)["question"] for n in range(3)]
    assert said[1] == "data: 3 held-out rows of problems:test"
    one = write(tmp_path / "one.jsonl", [{"question": "one"}] * 9)
    both = config(data=one, eval_data=f"{one},problems:test", eval_rows=3)
    first = problems.word_problem("test", 0)["question"]
    assert data.load_split(both, read) == ([["one"] * 9], ["one", "one", first])


def bins(lengths, size):
    """pack for items without a prompt: the items of each row."""
    rows = data.pack([0] * len(lengths), [[n] for n in lengths], size)
    return [[i for i, _ in row] for row in rows]


def test_pack_is_best_fit():
    assert bins([3, 5, 2, 4], 7) == [[1, 2], [3, 0]]
    # 4 goes where it leaves nothing, though the first bin has room too
    assert bins([10, 11, 4], 15) == [[1, 2], [0]]
    assert data.pack([2], [[3, 5, 1]], 8) == [[(0, [1, 2])], [(0, [0])]]
    with pytest.raises(ValueError, match="9 tokens do not fit into a row of 8"):
        data.pack([4], [[1, 5]], 8)


GROUP = st.tuples(st.integers(0, 8), st.lists(st.integers(1, 24), max_size=6))


@given(st.lists(GROUP, max_size=9))
def test_rows_share_prompts_and_hold_everything_once(groups):
    prompts, completions = [p for p, _ in groups], [c for _, c in groups]
    rows = data.pack(prompts, completions, 32)
    total = [sum(prompts[q] + sum(completions[q][i] for i in here) for q, here in row)
             for row in rows]
    # Two rows that fit into one would mean that the later one was opened for nothing.
    assert max(total, default=0) <= 32 and sum(t <= 16 for t in total) <= 1
    held = sorted((q, i) for row in rows for q, here in row for i in here)
    assert held == [(q, i) for q, c in enumerate(completions) for i in range(len(c))]
    assert all(here for row in rows for _, here in row)


def test_assemble_worked_example():
    rows = [[(np.array([7, 8]), np.array([0, 1])), (np.array([7, 9, 8]), np.array([0, 0, 1]))]]
    out = packed.assemble(rows, 2, 6)
    assert out["tokens"].tolist() == [[7, 8, 7, 9, 8, 0], [0] * 6]
    assert out["mask"].tolist() == [[0, 1, 0, 0, 1, 0], [0] * 6]
    assert out["segments"].tolist() == [[1, 1, 2, 2, 2, 0], [0] * 6]
    assert out["positions"].tolist() == [[0, 1, 0, 1, 2, 0], [0] * 6]


example = lambda n, token: packed.Example(np.full(n, token), np.ones(n))
source = lambda n, first: [example(5, first + i) for i in range(n)]  # each of an id of its own


def seen(batches):
    """Every example of these batches, by token id, in order."""
    return [int(tokens[segments == s][0]) for b in batches
            for tokens, segments in zip(b["tokens"], b["segments"], strict=True)
            for s in range(1, segments.max() + 1)]


def test_the_two_of_a_pair_share_a_row_chosen_first():
    pairs = [packed.Pair(example(1 + i % 16, 2 * i + 1), example(1 + 5 * i % 16, 2 * i + 2))
             for i in range(30)]
    batches = packed.eval_batches(pairs, 32, 4)
    order = [seen([{k: v[r : r + 1] for k, v in b.items()}]) for b in batches for r in range(4)]
    assert sorted(sum(order, [])) == list(range(1, 61))
    for row in order:
        assert all(a % 2 and b == a + 1 for a, b in zip(row[::2], row[1::2], strict=True))


def test_batches_depend_on_seed_and_number_alone():
    make = lambda seed: packed.Batches([source(23, 10), source(9, 100)], 12, 3, seed)
    straight = [make(1).batch(n) for n in range(20)]
    batches = make(1)
    for n in (17, 3, 19, 0):
        for key, value in batches.batch(n).items():
            np.testing.assert_array_equal(value, straight[n][key])
    assert (make(2).batch(0)["tokens"] != straight[0]["tokens"]).any()


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    batches = packed.Batches([source(24, 10)], 12, 3, 0)  # two a row: an epoch is 4 batches
    first, second = (seen(map(batches.batch, range(n, n + 4))) for n in (0, 4))
    assert sorted(first) == sorted(second) == list(range(10, 34)) and first != second


def test_mixing_weights_set_the_shares_and_no_row_repeats_before_all_were_seen():
    batches = packed.Batches([source(30, 0), source(30, 100)], 10, 6, 0, [0.75, 0.25])
    small = [i for i in seen(map(batches.batch, range(10))) if i >= 100]  # two epochs: 2 x 15 of 30
    assert sorted(small) == list(range(100, 130))


# ------------------------------------------------------------------- data as people have it

PEOPLE = [{"instruction": "1 + 1?", "response": "2", "difficulty": 1, "choices": None},
          {"instruction": 'Say "a, b"\nand c', "response": "a, b", "difficulty": 2.5,
           "choices": ["a, b", "c"]}]


def people(kind, folder, monkeypatch) -> str:
    """The two rows as a --data source."""
    file = folder / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        with open(file, "w", newline="", encoding="utf-8-sig") as out:
            writer = csv.DictWriter(out, PEOPLE[0], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(row | {"choices": json.dumps(row["choices"]) if row["choices"] else ""}
                             for row in PEOPLE)
    elif kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(
            pytest.importorskip("pyarrow").Table.from_pylist(PEOPLE), file)
    elif kind == "hub":
        asked = SimpleNamespace(load_dataset=lambda *a, split: (
            PEOPLE if (a, split) == (("me/rows", "easy"), "test") else 1 / 0))
        monkeypatch.setitem(sys.modules, "datasets", asked)
        return "hf:me/rows/easy:test"
    else:
        file.write_text(json.dumps(PEOPLE, indent=1))
    return str(file)


@pytest.mark.parametrize("kind", ["json", "csv", "tsv", "parquet", "hub"])
def test_data_as_people_have_it(tmp_path, monkeypatch, kind, said):
    """Under their own column names, with cells that are empty or hold a list."""
    source = people(kind, tmp_path, monkeypatch)
    read = lambda row: data.parse_row(row)
    [rows], _ = data.load(source, read, columns="question=instruction, answer=response")
    assert [row.chat[-1]["content"] for row in rows] == [
        "1 + 1?", 'Say "a, b"\nand c\nA) a, b\nB) c']
    assert [row.answer for row in rows] == ["2", "A"]
    assert [row.fields["difficulty"] for row in rows] == [1, 2.5]
    assert "choices" not in rows[0].fields and "instruction" not in rows[0].fields
    assert len(said) == 1  # nothing is unread
    [half], _ = data.load(source + "[1:]", read, columns="question=instruction")
    assert [row.chat[-1]["content"][:3] for row in half] == ["Say"]
    with pytest.raises(ValueError, match=r"--columns answer=reply: no reply, found keys .*"
                                         r"'response'.*; 2 of 2 rows are bad"):
        data.load(source, read, columns="answer=reply")


def test_what_is_wrong_with_such_data_is_one_line(tmp_path, monkeypatch):
    read = lambda row: data.parse_row(row)
    (tmp_path / "a.csv").write_text("question,answer\n1 + 1?,2\n,3\n2,3,4\n")
    with pytest.raises(ValueError, match=r"a.csv row 2: expected messages, prompt or question, "
                                         r"found keys \['answer'\]; 2 of 3 rows are bad"):
        data.load(str(tmp_path / "a.csv"), read)
    (tmp_path / "b.csv").write_bytes(b"question\n\xff\xfe\n")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    for name in ("b.csv", "c.parquet"):
        with pytest.raises(ValueError, match=rf"{name}: [^\n]+$"):
            data.load(str(tmp_path / name), read)
    for name in ("pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="c.parquet: pip install pyarrow"):
        data.load(str(tmp_path / "c.parquet"), read)
    with pytest.raises(ValueError, match="hf:me/rows: pip install datasets"):
        data.load("hf:me/rows", read)
    with pytest.raises(ValueError, match="expected hf:owner/name"):
        data.load("hf:rows", read)
    failing = SimpleNamespace(load_dataset=lambda *a, split: {}["no such\nset"])
    monkeypatch.setitem(sys.modules, "datasets", failing)
    with pytest.raises(ValueError, match=r"--data hf:me/rows:test: KeyError: [^\n]+$"):
        data.load("hf:me/rows:test", read)
    for wrong in ("question", "=a", "question=", "a=b,a=c"):
        with pytest.raises(ValueError, match="--columns .*: expected OURS=THEIRS"):
            data.read_columns(wrong)
    assert data.load("problems:test", read, rows=1, columns="question=none of it")  # built in
