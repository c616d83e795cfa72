"""The report: what it says, what it survives, and how it behaves in a real browser."""

import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from html import unescape

import numpy as np
import pytest
import tyro

import disk
import eval as evaluation
import report
import runs
import train_distill
import train_grpo
import train_ppo
import train_sft
import train_simpo

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "tiny"
    data: str = "problems"
    steps: int = 4
    time_limit: str | None = None
    out: str = ""
    keep: int = 2
    report_to: str = ""
    learning_rate: float = 1e-4
    adapter: str | None = None


CONFIG = Config()


def sample(text="<reasoning>2 + 2</reasoning>\n<answer>4</answer>", **more):
    return {"prompt": "What is 2 + 2?", "completion": text, "gold": "4", "correct": True,
            "format": True, "reward": 1.5, "advantage": 0.5, "group": 0, "errors": {},
            "rewards": {"judge": 0.9, "answer": 1.0}, "n_tokens": 9, "stop": "stop",
            } | more


def write(folder, rates=((0, 20, 100), (4, 60, 100)), samples=None, steps=4, config=CONFIG):
    """A run folder as the scripts write it: `rates` are (step, right, of)."""
    config = dataclasses.replace(config, out=str(folder), steps=steps)
    with runs.Run(config, {}, every_s=1e9) as run:
        run.restore({})
        evaluations = {step: (c, n) for step, c, n in rates}
        for step in range(steps + 1):
            if step:
                run.log(step, {"reward": step / 10, "rewards/answer/mean": 0.5, "kl": 0.1 * step,
                               "p": step / steps, "step_s": 1.0, "tokens_per_s": 9.0})
                run.log_samples(step, (samples or {}).get(step, [sample()]))
            if step in evaluations:
                c, n = evaluations[step]
                low, high = evaluation.wilson(c, n)
                run.log(step, {"eval_accuracy": c / n, "eval_accuracy_low": low,
                               "eval_accuracy_high": high, "eval_format": 1.0})
        run.finish(lambda path: (path / "adapter").write_text(""))
    return folder


def html(*folders, **options):
    path = report.main(report.Config(tuple(map(str, folders)), **options))
    return path.read_text(errors="strict")


def embedded(page):
    return json.loads(re.search("<script type=application/json id=data>(.*?)</script>", page)[1])


# ----------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(("first", "last", "says"), [
    ((48, 80), (56, 70), "Learned:</b> held-out accuracy 60.0 % → 80.0 %, a difference of +5.2 to "
                         "+33.4 points"),  # the example of Newcombe 1998: 0.0524 to 0.3339
    ((56, 70), (48, 80), "Got worse:</b> held-out accuracy 80.0 % → 60.0 %, a difference of -33.4"),
    ((40, 80), (44, 80), "Unclear:</b> held-out accuracy 50.0 % → 55.0 %, a difference of -"),
])
def test_learned_is_said_of_what_chance_does_not_explain(tmp_path, first, last, says):
    page = html(write(tmp_path / "x", [(0, *first), (2, 1, 80), (4, *last)]))
    assert says in page
    low, high = evaluation.wilson(*first)
    assert f"[{100 * low:.1f}, {100 * high:.1f}]" in page


def test_without_intervals_or_evaluations_it_claims_no_more_than_it_has(tmp_path):
    folder = write(tmp_path / "x")
    lines = (folder / "metrics.jsonl").read_text()
    lines = re.sub(r', "eval_accuracy_(low|high)": [^,}]+', "", lines)
    (folder / "metrics.jsonl").write_text(lines)
    assert "Rose:</b> held-out accuracy 20.0 % → 60.0 %<" in html(folder)
    assert "no interval" in html(folder)
    assert "Rose:</b> reward 0.1 → 0.4" in html(write(tmp_path / "y", rates=()))


def test_runs_are_overlaid_with_an_evaluation(tmp_path, base_and_trained):
    a, b = write(tmp_path / "a"), write(tmp_path / "deep" / "a", [(0, 30, 100), (4, 31, 100)])
    page = html(a, b, base_and_trained.parent, out=str(tmp_path / "all.html"))
    for text in (str(a), str(b), "Unclear:", "Learned:", "Measured:</b> pass@1 0.0 %"):
        assert text in page, text
    assert {"c0", "c1"} == set(re.findall('"(c.) raw"', page))
    assert [run["unit"] for run in embedded(page)["runs"]] == ["step", "step", "problem"]


def test_settings_that_differ_are_marked(tmp_path):
    a = write(tmp_path / "a")
    config = dataclasses.replace(CONFIG, learning_rate=1e-3, adapter="<i>")
    seen, folded = re.search("Settings(.*?)<details>(.*?)</details>",
                             html(a, write(tmp_path / "b", config=config))).groups()
    assert "learning_rate<td><bdi>0.0001</bdi><td><bdi>0.001</bdi>" in seen
    assert "adapter<td><bdi>None</bdi><td><bdi>&lt;i&gt;</bdi>" in seen
    assert "learning_rate" not in folded.split("<pre>")[0]
    assert "keep<td><bdi>2</bdi><td><bdi>2</bdi>" in folded
    assert seen.count("--learning-rate") == 2  # the commands are in sight
    alone = html(a)
    assert "All settings" in alone and "What differs" not in alone


@pytest.mark.parametrize("module", [train_sft, train_simpo, train_grpo, train_ppo, train_distill,
                                    evaluation])
def test_the_command_repeats_the_run(module, tmp_path, monkeypatch):
    """The settings come back from config.json, through a shell's own splitting of the command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my rewards.py").write_text("def score(completion, row):\n    return 1.0\n")
    config = module.Config(model="tiny", out="runs/of mine", system="It's $HOME; `x`")
    if module is train_grpo:
        config = dataclasses.replace(config, reward_file="my rewards.py:score", mask_truncated=True)
    config, name = module.resolve(config), module.__name__
    stored = json.loads(json.dumps(dataclasses.asdict(config) | {"code": {"script": name}}))
    python, script, *flags = shlex.split(report.command_of(stored))
    assert (python, script) == ("python", f"{name}.py")
    assert module.resolve(tyro.cli(module.Config, args=flags)) == config


def test_without_arguments_it_takes_the_run_folders_of_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no run folder is given"):
        report.main(report.Config())
    with pytest.raises(ValueError, match="absent is no run folder"):
        report.main(report.Config(("absent",)))
    write(tmp_path / "runs/b"), write(tmp_path / "runs/a")
    (tmp_path / "runs/notes").mkdir()
    assert str(report.main(report.Config())) == "runs/report.html"
    assert "<title>a, b</title>" in (tmp_path / "runs/report.html").read_text()


@pytest.mark.parametrize("steps", [2, 4])  # ticks of 2 steps would be halves
def test_ticks_are_whole_steps_and_a_reward_that_is_the_accuracy_is_drawn_once(tmp_path, steps):
    folder = write(tmp_path / "x", steps=steps)
    texts = re.findall('text-anchor="middle">([^<]*)<', html(folder))
    assert {*texts} == {str(step) for step in range(steps + 1)}
    for accuracy, cards in ((0.5, ["Accuracy"]), (0.6, ["Accuracy", "Reward: answer"])):
        with open(folder / "metrics.jsonl", "a") as file:
            for step in range(1, steps + 1):
                file.write(json.dumps({"step": step, "accuracy": accuracy}) + "\n")
        titles = re.findall("<h3>([^<]*) <small>", html(folder))
        assert [t for t in titles if re.search("(?i)accuracy$|answer", t)] == [
            "Held-out accuracy", *cards]


def drawn(values, unit=""):
    steps = {step: {"kl": value, "p": 0.5} for step, value in enumerate(values)}
    run = report.Run("x", {}, steps, {}, {}, True)
    return report.chart([run], "kl", "KL", unit, (0, max(1, len(values) - 1)))


@pytest.mark.parametrize("values", [
    [0.3, 0.1 + 0.2], [0.0, 0.0], [-5.0, -5.0], [1e-9, 2e-9], [-1e12, 1e12], [0.5],
])
@pytest.mark.parametrize("unit", ["", "%"])
def test_every_curve_lies_within_its_frame(values, unit):
    ys = [float(y) for y in re.findall(r"[ML][\d.]+,(-?[\d.]+)", drawn(values, unit))]
    assert ys and all(report.TOP <= y <= report.H - report.BOTTOM for y in ys)
    assert drawn(values, unit).count('class="grid"') >= 1
    texts = re.findall(r'anchor="end">([^<]*)<', drawn([0.0, 1.0], "%"))
    assert texts[0] == "0" and texts[-1] == "100"


def test_unknown_is_a_gap_and_not_zero():
    svg = drawn([1.0, 2.0, None, 4.0])
    d = re.search('class="c0 raw" d="(.*?)"', svg)[1]
    assert d.count("M") == 2 and d.count("L") == 3  # two lines, the second a dot
    assert "1 → <b>4</b>" in svg


# -------------------------------------------------------------------------------- what it survives


def test_odd_values_are_left_out_and_nothing_but_a_page_is_replaced(tmp_path):
    folder = write(tmp_path / "x")
    odd = [None, "1", [1], {"a": 1}, float("nan"), float("inf"), 10**400, -(10**400), True, 1e300]
    with open(folder / "metrics.jsonl", "a") as metrics, open(folder / "samples.jsonl", "a") as s:
        for i, value in enumerate(odd):
            metrics.write(json.dumps({"step": 3, "reward": value, f"new{i}": value}) + "\n")
            metrics.write(json.dumps({"step": value, "reward": 1.0}) + "\n")
            s.write(json.dumps({"step": 3, **{key: value for key in report.SAMPLE}}) + "\n")
            s.write(json.dumps({"step": value, "rewards": {"a": value}}) + "\n")
    results = {"pass@1": 0.5, "n": 3, "intervals": {"pass@1": [0.1, 0.9]}}
    disk.write_json(folder / "results.json", results)
    assert "[10.0, 90.0]" in html(folder)
    for value in odd:
        changed = results | {"pass@1": value, "maj@2": 0.5, "intervals": {"maj@2": value}}
        (folder / "results.json").write_text(json.dumps(changed))
        page = html(folder)
        rows = embedded(page)["runs"][0]["rows"]
        assert "maj@2" in page and all(isinstance(row["rewards"], dict) for row in rows)
    (folder / "results.json").write_text('{"intervals": 3}')
    with pytest.raises(ValueError, match="results.json: intervals is 3, expected dict"):
        html(folder)
    (folder / "results.json").unlink()
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match="expected the name of an .html file"):
        html(tmp_path / "x", out=str(folder / "config.json"))
    assert (folder / "config.json").read_bytes() == before


def test_files_of_a_live_or_killed_run(tmp_path):
    folder = write(tmp_path / "x")
    assert "finished" in html(folder)
    written = (folder / "report.html").read_bytes()  # the same files give the same bytes
    assert html(folder).encode() == written
    for name in ("metrics.jsonl", "samples.jsonl"):
        text = (folder / name).read_bytes()
        for cut in range(0, len(text), len(text) // 10):
            (folder / name).write_bytes(text[:cut])
            assert "Did it learn?" in html(folder)
        (folder / name).write_bytes(text)
    shutil.rmtree(folder / "final")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "reward": NaN, "kl": null}\n')
    with open(folder / "samples.jsonl", "a") as file:
        file.write('[1]\n{"step": 5, "completion": "", "reward": null, "gold": null}\n{"st')
    page = html(folder)
    row = embedded(page)["runs"][0]["rows"][-1]
    assert "step 5 of 4 · not finished" in page and "nan" not in page.split("<script")[0]
    assert row["at"] == 5 and "reward" not in row  # missing is not zero


def test_what_is_embedded_is_bounded_and_the_page_says_so(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    rows = [json.dumps({"step": i // 8 + 1} | sample()) for i in range(10_000)]
    rows.append(json.dumps({"step": 1251} | sample("é" * 100_000)))
    (tmp_path / "x/samples.jsonl").write_text("\n".join(rows))
    run = embedded(html(tmp_path / "x"))["runs"][0]
    steps = sorted({row["at"] for row in run["rows"]})
    assert 3_000 < len(run["rows"]) <= report.N_SAMPLES
    assert steps[0] == 1 and steps[-1] == 1251 and len(set(np.diff(steps)[1:])) == 1
    assert f"Here are {len(run['rows']):,} of 10,001 completions" in run["note"]
    assert "é\n[… 80,000 characters …]\né" in run["rows"][-1]["completion"]
    (tmp_path / "x/samples.jsonl").write_text("\n".join([rows[0]] * 6_000))  # all of one step
    assert len(embedded(html(tmp_path / "x"))["runs"][0]["rows"]) == 5_000
    monkeypatch.setattr(report, "N_BYTES", 10_000)
    (tmp_path / "x/samples.jsonl").write_text("\n".join(rows[:1600]))
    assert len(embedded(html(tmp_path / "x"))["runs"][0]["rows"]) < 50


def test_a_full_disk_keeps_the_old_page_and_no_piece_of_the_new(tmp_path, monkeypatch):
    before = (write(tmp_path / "x") / "report.html").read_bytes()
    monkeypatch.setattr(report, "page", lambda runs: b"new")

    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        report.main(report.Config((str(tmp_path / "x"),)))
    assert (tmp_path / "x/report.html").read_bytes() == before
    assert not [*(tmp_path / "x").glob(".tmp-*")]


# ---------------------------------------------------------------------------------- who writes it


def test_a_failing_report_stops_nothing_and_takes_one_percent_of_the_time(
        tmp_path, monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(report, "main", lambda config: (tried.append(1), time.sleep(0.05), 1 / 0))
    with runs.Run(dataclasses.replace(CONFIG, out=str(tmp_path / "x")), {}) as run:
        run.restore({})
        run.log(1, {"loss": 1.0})
        run.save(1, {}, {})
        assert not tried  # a young run has nothing to tell
        run.report_due, began = 0.0, time.monotonic()
        for _ in range(3):
            run.save(1, {}, {})
        assert len(tried) == 1 and run.report_due - began > 5
    assert len(tried) == 2 and "no report of" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["SIGTERM", "exception"])
def test_a_run_that_ends_early_leaves_one(tmp_path, fault):
    config = dataclasses.replace(CONFIG, out=str(tmp_path / "x"))
    with pytest.raises((SystemExit, RuntimeError)), runs.Run(config, {}) as run:
        run.restore({})
        run.log(1, {"reward": 0.25})
        if fault == "exception":
            raise RuntimeError
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stopping == "SIGTERM"
        run.end(1, lambda score: run.save(1, {}, {}, score=score), lambda: 0.0, lambda path: None)
    assert "step 1 of 4 · not finished" in (tmp_path / "x/report.html").read_text()


# ------------------------------------------------------------------------------ in a real browser

LISTEN = """<script>const faults = []; onerror = message => faults.push(message);
addEventListener("securitypolicyviolation", event => faults.push(event.blockedURI));</script>"""
DRIVE = """<script type=module>
const $ = id => document.getElementById(id), all = query => [...document.querySelectorAll(query)];
const press = (key, shiftKey = false, at = document.body) => at.dispatchEvent(
  new KeyboardEvent("keydown", {key, shiftKey, bubbles: true}));
const now = () => $("status").textContent;
const choose = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("input")); };
let found = null;
try { found = (() => { SCRIPT })(); } catch (error) { faults.push(String(error)); }
const fetched = performance.getEntriesByType("resource").map(entry => entry.name);
const text = JSON.stringify([found, [...faults, ...fetched], document.title]);
document.documentElement.replaceChildren("RESULT" + text + "RESULT");
</script>"""


def drive(page, script, width=1200, dark=False):
    """What the script returns in the page, where nothing fails and nothing is fetched."""
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    driven = page.with_name("driven.html")
    text = page.read_text().replace("<style>", LISTEN + "<style>", 1)
    driven.write_text(text + DRIVE.replace("SCRIPT", script))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}",
         f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", driven.as_uri()],
        capture_output=True, text=True, timeout=120)
    found, faults, title = json.loads(unescape(done.stdout.split("RESULT")[1]))
    assert not faults and title in (page.parent.name, "base, trained"), (faults, title)
    return found


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    rows = {
        1: [sample(reward=0.1, correct=False, rewards={"judge": 0.2}),
            sample(reward=0.7, correct=False, rewards={"judge": 0.8}, stop="length")],
        2: [sample(reward=1.5), sample(reward=1.0, rewards={"judge": 0.1})],
        3: [sample(reward=None, rewards={"judge": None}, errors={"judge": "timed out"})],
    }
    return write(tmp_path_factory.mktemp("runs") / "x", samples=rows, steps=3) / "report.html"


@pytest.mark.parametrize("width, dark", [(1200, False), (500, True)])
def test_it_opens_quietly_in_light_and_dark_and_on_a_phone(three_steps, width, dark):
    wide, background, figures, nameless = drive(three_steps, """
        const nameless = all("input, select, button").filter(e =>
          !e.labels?.[0]?.textContent.trim() && !e.ariaLabel && !e.textContent.trim());
        return [document.documentElement.scrollWidth, getComputedStyle(document.body)
          .backgroundColor, all("figure").length, nameless.length];""", width, dark)
    assert wide <= width and figures >= 5 and nameless == 0
    assert (max(map(int, re.findall(r"\d+", background))) < 60) == dark


def test_the_pointer_reads_the_curves(three_steps):
    assert drive(three_steps, """
        const svg = all("figure svg")[1], box = svg.getBoundingClientRect();
        const readout = () => svg.parentNode.querySelector(".readout").textContent;
        const found = [readout()];
        svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.x + 0.98 * box.width}));
        found.push(readout());
        svg.dispatchEvent(new PointerEvent("pointerleave"));
        return [...found, readout()];""") == ["0.1 → 0.3", "step 3: 0.300", "0.1 → 0.3"]


def test_keys_and_slider_turn_the_pages(three_steps):
    found = drive(three_steps, """
        const found = [now()], then = () => found.push(now());
        press("ArrowLeft"); then();
        press("ArrowLeft", true); then();
        press("ArrowLeft"); then();
        press("ArrowRight"); then();
        choose("slider", 1); then();
        press("ArrowRight", false, $("words")); then();  // the caret's own
        return [...found, $("slider").ariaValueText];""")
    assert found == [f"{i} of 5 completions" for i in (5, 4, 1, 1, 2, 3, 3)] + ["step 2"]


def test_filters(three_steps):
    rows = [  # a missing reward is in no range and says nothing of the judge
        ("which", "disagree", 2), ("which", "wrong", 2), ("which", "right", 3), ("which", "cut", 1),
        ("which", "missing", 1), ("which", "all", 5), ("low", "0.7", 3), ("high", "1", 2),
        ("low", "", 3), ("high", "", 5), ("words", "2 + 2", 5), ("words", "nowhere", 0),
    ]
    facts, *found = drive(three_steps, f"""
        const facts = all("#facts tr").map(row => [...row.cells].map(cell => cell.textContent));
        return [facts, ...{json.dumps(rows)}.map(([id, value]) => (choose(id, value), now()))];""")
    assert ["reward: judge", "missing"] in facts and ["judge, why", "timed out"] in facts
    assert "reward" not in dict(facts)
    for (name, value, n), status in zip(rows, found, strict=True):
        wanted = f"1 of {n} " if n else "no "
        assert re.sub(r"^\d+ of", "1 of", status).startswith(wanted), (name, value, status)


@pytest.fixture(scope="module")
def base_and_trained(tmp_path_factory):
    """Two evaluations of the same problems, as eval.py writes them; the base writes a lot."""
    folders = []
    for name, right in (("base", False), ("trained", True)):
        folder = tmp_path_factory.mktemp("evals") / name
        folder.mkdir()
        rows = [{"problem": i, "id": str(i), "domain": "d", "correct": right, "format": True,
                 "mode": "greedy", "sample": 0, "prompt": f"What is {i} + 1?", "vote": "4",
                 "n_tokens": 3, "stop": "stop", "completion": f"{name} {i}" + " hm" * 3000}
                for i in range(3)]
        (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
        disk.write_json(folder / "results.json", evaluation.summarize(rows))
        folders.append(str(folder))
    return report.main(report.Config(tuple(folders)))


@pytest.mark.parametrize("width", [1200, 500])
def test_base_and_trained_answers_stand_side_by_side(base_and_trained, width):
    (left, base, x, height), (right, trained, x2, _) = drive(base_and_trained, """
        press("ArrowLeft");
        return all("#view h3 + .text").map(text => {
          const {x, height} = text.getBoundingClientRect();
          return [text.previousSibling.textContent, text.textContent.slice(0, 9), x, height]; });
        """, width)
    assert (left, right) == ("base, problem 1 wrong", "trained, problem 1 right")
    assert (base, trained) == ("base 1 hm", "trained 1")
    assert (x2 > x + 200) == (width == 1200) and height < 900  # a long text scrolls


HOSTILE = [
    "</script><script>document.title = 'taken'</script>", "<img src=x onerror=document.title=1>",
    "<!-- <script>", "]]> &lt;b&gt; &amp; &#0;", "a\u202eb\u2066c\u200fd\ufeff", "x\u2028y\u2029z",
    "\ud800 halves \udfff", "\0 NUL \x1b[31m \x85 \x7f", "\r\n\tx\r  ", "\\u003c \" ' ` ${1} {{}}",
    "<reasoning>a</reasoning><REASONING>b<answer></answer></answer> 7 <answer>\u202e8",
    "\U0001f469\u200d\U0001f467", "שלום 123 abc", "", " ",
    "<a href='https://example.com/'>x</a><style>*{display:none}</style>",
    "\u202e" * 3_000, "<answer>" * 2_000, "long" * 25_000,
]


def test_hostile_completions_are_text(tmp_path):
    rows = [sample(text, prompt=text, gold=text, stop=text or "stop", errors={"e": text[:99]})
            for text in HOSTILE]
    rows[0]["rewards"] = {"</script><b>": 1.0}
    config = Config(model="</title></script><script>document.title = 'taken'</script>\ud800")
    folder = write(tmp_path / "<b>&x", samples={1: rows}, steps=1, config=config)
    found = drive(folder / "report.html", r"""
        return Array.from({length: N}, () => {
          const texts = [$("prompt"), $("answers").querySelector(".text")].map(e => e.textContent);
          const loose = all("#view *").some(e => e.className !== "hidden" && [...e.childNodes].some(
            n => n.nodeType === 3 && /[\u202a-\u202e\u2066-\u2069]/.test(n.data)));
          const made = all("#view img, #view a, #view style").length;
          const wide = document.documentElement.scrollWidth;
          press("ArrowRight");
          return [...texts.map(t => [...Array(t.length).keys()].map(i => t.charCodeAt(i))),
            loose, made, wide];
        });""".replace("N}", f"{len(rows)}}}"))
    units = lambda text: np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2").tolist()
    for text, (prompt, completion, loose, made, wide) in zip(HOSTILE, found, strict=True):
        if len(text) > report.N_CHARS:
            text = f"{text[:10_000]}\n[… {len(text) - 20_000:,} characters …]\n{text[-10_000:]}"
        assert prompt == completion == units(text), text[:99]
        assert not loose and not made and wide <= 1200  # an override stands in an isolated box
