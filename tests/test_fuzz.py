"""Thousands of damaged files and odd rows, from a seed: each is used, or refused in one line.

The line names the file. Readers are called in this process; a reader that waits fails by an alarm.
"""

import contextlib
import copy
import json
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

import data
import disk
import eval as evaluation
import gemma
import hub
import judge
import lora
import model_files
import packed
import problems
import report
import rewards
import rollouts
import runs
import stage
import synthesize
import terminal
import train_sft
from recipes import table

pytestmark = pytest.mark.slow
N = int(os.environ.get("FUZZ", 2000))  # files, and rows
ODD = [
    None, True, False, -1, 0, 1, 1.5, -1.0, float("nan"), float("inf"), 2**31, 10**30, 10**400, "",
    "x", "1", "\ud800", "a\0b", "line\nline", "\x1b[2J", "x" * 5000, "../..", "(a+)+$", "<bos>",
    [], {}, [[]], [None], [1, "2", None, {}], ["a"], {"a": {"b": 1}}, {"": []}, [{}] * 3,
]
DEEP = "[" * 100_000, '{"a":' * 100_000, "[" * 70 + "]" * 70
BYTES = b"\xff\xfe", b"\0", b"\xed\xa0\x80", b"{", b"]", b'"', b"\n", b"1e999", b"9" * 5000


# ------------------------------------------------------------------------------------------ damage


def places(value, at=()):
    """The paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list) else ()
    for key, child in list(inner)[:50]:
        yield (*at, key)
        yield from places(child, (*at, key))


def odd_json(value, rng: random.Random):
    """A copy with one to three values replaced, left out, or put under another name."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not (paths := [*places(value)]):
            return rng.choice(ODD)
        *path, key = rng.choice(paths)
        inner = value
        for step in path:
            inner = inner[step]
        if rng.random() < 0.15:
            moved = inner.pop(key)
            if isinstance(inner, dict) and rng.random() < 0.5:
                inner[rng.choice(("x", "", "\ud800", *map(str, inner)))] = moved
        else:
            own = inner[key], [inner[key]], str(inner[key])
            inner[key] = copy.deepcopy(rng.choice((*ODD, *own)))
    return value


def odd_bytes(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    if content[:1] != b"{" and rng.random() < 0.7:
        at = rng.randrange(min(len(content), 3000) + 1)  # the header of a binary file
    match rng.randrange(5):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + rng.choice(BYTES) + content[at:]
        case 2:
            return content[:at] + rng.randbytes(1) + content[at + 1 :]
        case 3:
            return rng.choice((b"", b"null", b"[]", b"3", b'"a"', *map(str.encode, DEEP)))
        case _:
            return content[:at] + content[at + rng.randrange(40) :]


def damage(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    if rng.random() < 0.06:
        file.unlink()
        kind = rng.choice(("folder", "nowhere", "gone"))
        if kind == "folder":
            file.mkdir()
        elif kind == "nowhere":
            file.symlink_to("/nowhere")
    elif file.suffix == ".jsonl" and rng.random() < 0.6:
        lines = content.splitlines()
        n = rng.randrange(len(lines))
        lines[n] = json.dumps(odd_json(json.loads(lines[n]), rng)).encode()
        file.write_bytes(b"\n".join(lines))
    elif file.suffix == ".json" and rng.random() < 0.7:
        file.write_text(json.dumps(odd_json(json.loads(content), rng)))
    else:
        file.write_bytes(odd_bytes(content, rng))


# ----------------------------------------------------------------------------------------- readers


@pytest.fixture(scope="module")
def good(small, tmp_path_factory):
    """One good file of each kind that is read, in folders as users have them."""
    root = tmp_path_factory.mktemp("good")
    model = shutil.copytree(small, root / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "chat_template.jinja").write_text(settings["chat_template"])
    cfg, _ = gemma.load(model)
    adapter = lora.init(cfg, jax.random.key(3), 4, 8.0)
    lora.save(root / "adapter", adapter, cfg, "google/gemma-3-1b-it")
    lora.write_prompt(root / "adapter", "Add.")
    settings = root / "adapter" / "adapter_config.json"
    pattern = {"alpha_pattern": {"layers.1.self_attn.q_proj": 4}, "rank_pattern": {"(a+)+$": 3}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | pattern))

    parts = shutil.copytree(small, root / "parts")
    tensors = load_file(parts / "model.safetensors")
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in {*names.values()}:
        save_file({k: v for k, v in tensors.items() if names[k] == file}, parts / file)
    (parts / "model.safetensors").unlink()
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    tok = data.Tokenizer(small)
    pieces = [tok.sp.id_to_piece(i) for i in range(tok.vocab_size)]
    special = [p for p in pieces if p.startswith("<") and not p.startswith("<0x")]
    (parts / "tokenizer.json").write_text(json.dumps({
        "added_tokens": [{"id": pieces.index(p), "content": p} for p in special],
        "model": {"vocab": {p: i for i, p in enumerate(pieces)},
                  "merges": [[p[0], p[1:]] for p in pieces if len(p) > 1 and p not in special]}}))
    (parts / "tokenizer.model").unlink()

    config = train_sft.Config(out=str(root / "run"), steps=2, save_every=1, report_to="")
    with runs.Run(config, {}) as run:
        run.restore({})
        for step in (1, 2):
            run.log(step, {"loss": 1.0, "eval_accuracy": 0.5, "eval_accuracy_low": 0.4,
                           "eval_accuracy_high": 0.6, "step_s": 1.0})
            run.log_samples(step, [{"prompt": "1 + 1?", "completion": "2", "reward": 1.0,
                                    "rewards": {"answer": 1.0}, "errors": {}, "correct": True}])
        run.finish(lambda final: shutil.copytree(root / "adapter", final, dirs_exist_ok=True))
    rows = [problems.word_problem("train", i) for i in range(4)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "array.json").write_text(json.dumps(rows))
    journal, found = root / "eval", [rollouts.read_problem(row, tok) for row in rows]
    graded = [{"problem": i, "id": p.id, "domain": p.domain, "mode": mode, "sample": s,
               "correct": s == 0, "format": True, "stop": "stop", "n_tokens": 9, "gold": p.gold,
               "answer": "3", "vote": "3", "prompt": p.question, "completion": "3", "reward": 1.0,
               "rewards": {"answer": 1.0}, "errors": {}}
              for mode, n in (("greedy", 1), ("sampled", 2))
              for i, p in enumerate(found) for s in range(n)]
    journal.mkdir()
    (journal / "samples.jsonl").write_bytes(disk.to_jsonl(graded))
    disk.write_json(journal / "results.json", evaluation.summarize(graded))
    runs.write_config(journal, evaluation.Config(out=str(journal)), kind="eval")
    shutil.copytree(journal, root / "recipe" / "eval-start")
    (root / "replies.jsonl").write_text("\n".join(map(json.dumps, (
        {"requests": 1}, {"key": "a", "model": "m", "text": "hello"}, {"tokens": [1, 2],
                                                                       "dollars": 0.5}))))
    return root, found, cfg, tok


def readers(root: Path, found: list, cfg, tok) -> dict:
    """Name -> (the files to damage, what reads them)."""
    model, adapter, run, journal = (root / n for n in ("model", "adapter", "run", "eval"))
    whole = (journal / "samples.jsonl").read_bytes()

    def read_model(folder):
        # all of load() but the devices
        found = model_files._find_tensors(gemma.read_config(folder), folder)
        for file, tensor in found.values():
            model_files._read(file, tensor)
        data.Tokenizer(folder).encode("Tom has 12 apples.")

    def read_adapter(folder):
        start = hub.find_start("tiny", str(model), str(folder))
        lora.read_prompt(str(folder), None)
        lora.load(start.adapter, cfg)

    def read_run():
        runs.claim(run)
        runs.check_unchanged(run, train_sft.Config(out=str(run), steps=2, save_every=1))
        for name in ("metrics", "samples"):
            disk.good_rows(run / f"{name}.jsonl", step=int)

    def read_journal():
        runs.claim(journal, "eval")
        n_of = {"greedy": 1, "sampled": 2}
        others = disk.good_rows(journal / "samples.jsonl", **evaluation.COMPLETION)
        rows = evaluation.read_journal(journal / "samples.jsonl", found, n_of)
        (journal / "samples.jsonl").write_bytes(whole)  # it left out the scores
        for both in (rows, others):
            if both:
                evaluation.table(evaluation.summarize(both))
                evaluation.compare(both, both)

    def read_rows(file):
        read = lambda row: rollouts.read_problem(row, tok)
        data.load(str(file), read)
        with contextlib.suppress(ValueError):  # no usable row is left
            data.load(str(file), read, skip_bad_rows=True)

    def read_cache():
        teacher = synthesize.Teacher("http://localhost:1/v1", "m", cache=root / "replies.jsonl")
        teacher.close()
        assert 0 <= teacher.n_sent < 2**53 and 0 <= teacher.dollars < 2**53

    files = lambda folder, *patterns: [f for p in patterns for f in sorted(folder.glob(p))]
    page = lambda folder: report.main(report.Config((str(folder),), out=str(root / "page.html")))
    return {
        "model": (files(model, "*.json", "*.safetensors", "tokenizer.model", "*.jinja"),
                  lambda: read_model(model)),
        "parts": (files(root / "parts", "*.json", "*.safetensors"),
                  lambda: read_model(root / "parts")),
        "adapter": (files(adapter, "*"), lambda: read_adapter(adapter)),
        "final": (files(run / "final", "*"), lambda: read_adapter(run)),
        "run": (files(run, "*.json", "*.jsonl"), read_run),
        "report": (files(run, "*.json", "*.jsonl"), lambda: page(run)),
        "journal": (files(journal, "*.json", "*.jsonl"), read_journal),
        "report of eval": (files(journal, "*.json", "*.jsonl"), lambda: page(journal)),
        "table": (files(root / "recipe" / "eval-start", "results.json"),
                  lambda: table.table([root / "recipe"])),
        "rows": ([root / "rows.jsonl"], lambda: read_rows(root / "rows.jsonl")),
        "array": ([root / "array.json"], lambda: read_rows(root / "array.json")),
        "cache": ([root / "replies.jsonl"], read_cache),
    }


@contextlib.contextmanager
def alarm(seconds: int):
    def ring(*_):
        raise TimeoutError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_damaged_files_are_used_or_refused_in_a_line(good, monkeypatch):
    pytest.importorskip("openai")  # which a teacher's cache needs, and slow to import
    monkeypatch.setattr(terminal, "say", str)
    monkeypatch.setattr(evaluation, "N_RESAMPLES", 20)
    root, tried, refused = good[0], Counter(), Counter()
    kinds, wrong = readers(*good), []
    for _, read in kinds.values():
        read()  # nothing is damaged yet
    for seed in range(N):
        rng = random.Random(seed)
        name = rng.choice([*kinds])
        files, read = kinds[name]
        file = rng.choice(files)
        before = file.read_bytes()
        damage(file, rng)
        damaged = file.read_bytes()[:200] if file.is_file() and not file.is_symlink() else "special"
        tried[name] += 1
        try:
            with alarm(60):
                read()
        except (ValueError, SystemExit) as e:
            refused[name] += 1
            line = str(e)
            if "\n" in line or str(root) not in line or len(line) > 1500:
                wrong.append((seed, name, file.name, repr(e)[:400]))
        except BaseException as e:
            wrong.append((seed, name, file.name, repr(e)[:300], damaged))
        finally:
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
            file.write_bytes(before)
    for _, read in kinds.values():
        read()  # nor was anything left damaged
    print(f"{N} files, {refused.total()} refused, {len(wrong)} wrong; of them:",
          ", ".join(f"{refused[name]} of {n} {name}" for name, n in tried.items()))
    assert not wrong, "\n".join(map(repr, wrong[:40]))
    assert N / 4 < refused.total() < N


# -------------------------------------------------------------------------------------------- rows

RUBRIC = [{"title": "Right", "description": "It is right.", "weight": 5}, "It is short."]
ROWS = [
    {"question": "2 + 2?", "reasoning": "2 and 2.", "answer": 4, "difficulty": 2, "kind": "number"},
    {"messages": [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2?"},
                  {"role": "assistant", "content": "4"}], "answer": "4", "script": "LATIN"},
    {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "chosen": "Hello",
     "rejected": [{"role": "assistant", "content": "No"}], "rubrics": RUBRIC, "reference": "Hello"},
    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "rubric": RUBRIC, "task_type": "maths"},
    {"instruction": "Add.", "input": "2 2", "output": "4", "system_prompt": "You add."},
    {"question": "Capital?", "choices": {"text": ["Rome", "Oslo"], "label": ["A", "B"]},
     "answerKey": "B", "context": "Norway", "domain": "geography"},
    {"question": "Capital?", "options": {"A": "Rome", "B": "Oslo"}, "answer_idx": "A", "id": 7},
    {"question": "48/2?", "answer": "48/2 = <<48/2=24>>24\n#### 24", "reference_answer": "24"},
    {"prompt": "Say <answer>.", "completion": "<reasoning>a</reasoning><answer>b</answer>"},
]


def test_odd_rows_are_used_or_bad_rows(small, tmp_path, capsys):
    """By every reader of rows, by all rewards, by the judge's prompts, and written again."""
    tok, rng = data.Tokenizer(small), random.Random(1)
    rows = [odd_json(rng.choice(ROWS), rng) for _ in range(N)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    readings = (lambda row: rollouts.read_problem(row, tok, "Think."),
                lambda row: packed.read_example(row, tok),
                lambda row: packed.read_pair(row, tok))
    mix = rewards.read_mix("format,tags,answer,overlong,length,repetition,language,reasoning")
    functions, usable = rewards.prepare(mix, []), []
    for read in readings:
        (items,), bad = data.load(str(file), read, skip_bad_rows=True)
        assert len(items) + len(bad) == N and len(items) > N / 20
        for line in bad:
            assert line.startswith(f"{file}:") and "\n" not in line and len(line) < 1000, line
            assert "Error" not in line, line
        usable.append(items)
    config = train_sft.Config(data=str(file), out=str(tmp_path))
    model = stage.Model(None, tok, None, {}, {}, {}, False, None, {})
    for items in usable:
        stage.keep_held_out(config, items)
        assert len(disk.good_rows(tmp_path / "held_out.jsonl")) == len(items)
        assert len(stage.facts(config, model, [items], items)) == 2
    missing = set()
    for problem in rollouts.numbered(usable[0]):
        row = rollouts.reward_row(problem, 9, "stop", evaluation.Config(max_new=20))
        for text in ("<reasoning>2 and 2 are 4.</reasoning>\n<answer>4</answer>", "", "\ud800 B"):
            scored = rewards.score(mix, functions, text, row)
            missing |= {*scored.errors.values()}
            rollouts.check(problem, text)
        for style in judge.STYLES:
            for ask in (lambda: judge.json_prompt(style, ["4", "5"], row),  # noqa: B023
                        lambda: judge.STYLES[style].digits  # noqa: B023
                        and judge.digit_prompts(style, "4", row)):  # noqa: B023
                with contextlib.suppress(ValueError):
                    ask()
        with contextlib.suppress(ValueError):
            rollouts.Order([problem], "ordered", 0)
    assert all(len(why) < 300 and "\n" not in why for why in missing), missing
    print(f"{N} rows; usable as problems, examples, pairs: {[*map(len, usable)]}; {missing}")
