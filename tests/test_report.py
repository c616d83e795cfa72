"""The report: what it says, what it survives, and how it behaves in a real browser."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tyro
from conftest import ROOT

import eval as evaluation
import report
import runs
import train_grpo
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


CONFIG = Config()


def sample(text="<reasoning>2 + 2</reasoning>\n<answer>4</answer>", **more):
    return {"prompt": "What is 2 + 2?", "completion": text, "gold": "4", "correct": True,
            "format": True, "reward": 1.5, "advantage": 0.5, "group": 0, "errors": {},
            "rewards": {"judge": 0.9, "answer": 1.0}, "n_tokens": 9, "stop": "stop",
            } | more


def write(folder, rates=((0, 20, 100), (4, 60, 100)), samples=None, steps=4, config=CONFIG):
    """A run folder as the scripts write it: `rates` are (step, right, of)."""
    config = dataclasses.replace(config, out=str(folder), steps=steps)
    with runs.Run(config, every_s=1e9) as run:
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


def test_scripts_log_no_accuracy_where_nothing_could_be_checked():
    results = {"pass@1": None, "format": 0.5, "length": 3.0, "intervals": {"format": (0.1, 0.9)}}
    assert evaluation.eval_metrics(results) == {"eval_format": 0.5, "eval_length": 3.0}


def test_unknown_is_a_gap_and_not_zero():
    row = lambda value: {"reward": value, "p": 0.5}
    run = report.Run("x", {}, {1: row(1.0), 2: row(2.0), 3: row(None), 4: row(4.0)}, {}, {}, True)
    drawn = report.chart([run], "reward", "Reward", "", (1, 4))
    d = re.search('class="c0 raw" d="(.*?)"', drawn)[1]
    assert d.count("M") == 2 and d.count("L") == 3  # two lines, the second a dot
    assert report.ends(report.curve(run, "reward"), "reward") == (1.0, 4.0)
    del run.steps[3]["reward"]
    assert report.curve(run, "reward")[2] == (3, None)


@pytest.mark.parametrize(("low", "high"), [(0.27, 0.71), (-3, 5), (0, 1e9), (1e-7, 3e-7), (7, 8)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = report.ticks(low, high)
    assert 2 <= len(ticks) <= 5 and len({text for _, text in ticks}) == len(ticks)
    for value, text in ticks:
        assert low - 1e-9 <= value <= high + 1e-9
        assert float(text.replace(",", "")) == pytest.approx(value, rel=0.01, abs=1e-12)


def test_step_ticks_are_whole():
    assert [text for _, text in report.ticks(0, 3, least=1)] == ["0", "1", "2", "3"]
    assert [text for _, text in report.ticks(1, 2, least=1)] == ["1", "2"]


@pytest.mark.parametrize("values", [
    [0.3, 0.1 + 0.2], [0.0, 0.0], [1.0, 1.0], [-5.0, -5.0], [1e-9, 2e-9], [-1e12, 1e12], [0.5],
])
@pytest.mark.parametrize("unit", ["", "%"])
def test_every_curve_lies_within_its_frame(values, unit):
    run = report.Run("x", {}, {s: {"kl": v, "p": 0} for s, v in enumerate(values)}, {}, {}, True)
    drawn = report.chart([run], "kl", "KL", unit, (0, max(1, len(values) - 1)))
    ys = [float(y) for y in re.findall(r"[ML][\d.]+,(-?[\d.]+)", drawn)]
    assert ys and all(report.TOP <= y <= report.H - report.BOTTOM for y in ys)
    assert "nan" not in drawn and drawn.count("class=grid") >= 1


def test_a_long_curve_is_averaged_and_a_noisy_one_gets_its_running_mean():
    steps = {s: {"reward": float(s % 2), "p": 0.0} for s in range(1, 4001)}
    run = report.Run("x", {}, steps, {}, {}, True)
    drawn = report.chart([run], "reward", "Reward", "", (1, 4000))
    assert re.search('raw faint" d="(.*?)"', drawn)[1].count("L") == report.N_POINTS
    assert 'class="c0 line"' in drawn and "0.5 → <b>0.5" in drawn and len(drawn) < 20_000


def test_runs_are_overlaid_with_an_evaluation(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "deep" / "a", [(0, 30, 100), (4, 31, 100)])
    (tmp_path / "e").mkdir()
    row = {"id": "q", "domain": "d", "correct": True, "format": True, "stop": "stop", "vote": "4",
           "n_tokens": 3}
    rows = [
        {"problem": i, "mode": mode, "sample": j} | row | {"id": str(i), "completion": "4"}
        for i in range(9)
        for mode, n in (("greedy", 1), ("sampled", 2))
        for j in range(n)
    ]
    (tmp_path / "e/samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    runs.write_json(tmp_path / "e/results.json", evaluation.summarize(rows))
    page = html(a, b, tmp_path / "e", out=str(tmp_path / "all.html"))
    for text in (str(a), str(b), "Unclear:", "Learned:", "Measured:</b> pass@1 100.0 %", "maj@2"):
        assert text in page, text
    assert {"c0", "c1"} == set(re.findall('"(c.) raw"', page))
    assert [run["unit"] for run in embedded(page)["runs"]] == ["step", "step", "problem"]
    assert len(embedded(page)["runs"][2]["rows"]) == 27


def test_a_reward_that_is_the_accuracy_is_shown_once():
    steps = {s: {"accuracy": s / 4, "rewards/answer/mean": s / 4, "rewards/judge/mean": s / 5}
             for s in range(4)}
    page = report.charts([report.Run("x", {}, steps, {}, {}, True)])
    titles = re.findall("<h3>(.*?) <small>", page)
    assert titles == ["Accuracy = Reward: answer", "Reward: judge"]


def test_settings_that_differ_are_marked(tmp_path):
    a = write(tmp_path / "a", config=CONFIG | {"learning_rate": 1e-4, "seed": 0, "adapter": None})
    b = write(tmp_path / "b", config=CONFIG | {"learning_rate": 1e-3, "seed": 0, "adapter": "<i>",
                                              "judge": None})  # absent in the other run
    seen, folded = re.search("Settings(.*?)<details>(.*?)</details>", html(a, b)).groups()
    rows = seen.split("<table class=differs>")[1].split("</table>")[0].split("<tr><th>")
    assert rows[2:] == ["learning_rate<td><bdi>0.0001</bdi><td><bdi>0.001</bdi>",
                      "adapter<td><bdi></bdi><td><bdi>&lt;i&gt;</bdi>"]
    assert "learning_rate" not in folded.split("<pre>")[0]
    assert "<small>seed</small> <bdi>0</bdi>" in folded
    alone = html(a)
    assert "All settings" in alone and "<table class=differs>" not in alone


@pytest.mark.parametrize("module", [train_sft, train_simpo, train_grpo, evaluation])
def test_the_command_repeats_the_run(module):
    """The settings come back from config.json, through a shell's own splitting of the command."""
    config = module.Config(model="tiny", out="runs/of mine", system="It's $HOME; `x`")
    if module is train_grpo:
        config = dataclasses.replace(config, reward_file="my rewards.py:score", mask_truncated=True)
    config = module.resolve(config)
    stored = json.loads(json.dumps(dataclasses.asdict(config) | {"code": {"jax": "0.10"}}))
    python, script, *flags = shlex.split(report.command(stored))
    assert (python, script) == ("python", f"{module.__name__}.py")
    assert module.resolve(tyro.cli(module.Config, args=flags)) == config


def test_without_arguments_it_takes_the_run_folders_of_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no run folder is given"):
        report.main(report.Config())
    write(tmp_path / "runs/b"), write(tmp_path / "runs/a")
    (tmp_path / "runs/notes").mkdir()
    assert str(report.main(report.Config())) == "runs/report.html"
    assert "<title>a, b</title>" in (tmp_path / "runs/report.html").read_text()


# -------------------------------------------------------------------------------- what it survives


ODD = [None, float("nan"), float("inf"), -1e999, 1e308, 10**400, "x", "", [], [1], {"a": 1}, True]


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_odd_values_never_break_it(tmp_path, value):
    """Wherever a number, a list or a text is expected, in any of the four files."""
    folder = write(tmp_path / "x")
    line = json.dumps({k: value for k in (
        "reward", "eval_accuracy", "eval_accuracy_low", "eval_accuracy_high", "kl", "step_s")})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("".join(f'{{"step": {step}, {line[1:]}\n' for step in (5, 6)))
        file.write(json.dumps({"step": value, "reward": 1.0}) + "\n")
    with open(folder / "samples.jsonl", "a") as file:
        row = dict.fromkeys([*sample(), "mode", "domain"], value)
        file.write(json.dumps({"step": 5} | row) + "\n" + json.dumps({"step": value}) + "\n")
    for results in ({"pass@1": value}, {"pass@1": 0.5, "intervals": value},
                    {"pass@1": 0.5, "intervals": {"pass@1": value}},
                    {"pass@1": 0.5, "intervals": {"pass@1": [value, value]}}):
        (folder / "results.json").write_text(json.dumps(results))
        assert "Did it learn?" in html(folder)
    config = dict.fromkeys(("steps", "model", "data", "group", "learning_rate", "code"), value)
    (folder / "config.json").write_text(json.dumps(config))
    page = html(folder)
    assert "Did it learn?" in page and embedded(page)["runs"][0]["rows"][-1]["at"] == 5
    texts = "<style>.*?</style>|<pre>.*?</pre>|<bdi>.*?</bdi>|<small>.*?</small>"
    drawn = re.sub(texts, "", page.split("<script")[0], flags=re.DOTALL)
    assert not re.search(r"(\b|\d)(nan|inf)\b", drawn)




def test_files_of_a_live_or_killed_run(tmp_path):
    whole = write(tmp_path / "x")
    texts = {name: (whole / name).read_bytes() for name in report.FILES if (whole / name).exists()}
    assert len(texts) == 3
    for name, text in texts.items():
        for cut in [*range(0, len(text), max(1, len(text) // 40)), None]:
            if cut is None:
                (whole / name).unlink()
            else:
                (whole / name).write_bytes(text[:cut])
            assert "Did it learn?" in html(whole)
        (whole / name).write_bytes(text)
    shutil.rmtree(whole / "final")
    assert "step 4 of 4 · not finished" in html(whole)
    with open(whole / "samples.jsonl", "ab") as file:
        file.write(b'[1]\n{"step": 5, "completion": {"a": 1}, "reward": NaN, "gold": 4}\n')
        file.write(b"[" * 9**5)
    row = embedded(html(whole))["runs"][0]["rows"][-1]
    assert row["completion"] == '{"a": 1}' and "reward" not in row and row["at"] == 5


def test_what_is_no_run_folder_ends_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        done = subprocess.run([sys.executable, ROOT / "report.py", tmp_path / folder],
                              capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert f"{folder} is no run folder" in done.stderr


def test_the_same_files_give_the_same_bytes(tmp_path):
    written = (write(tmp_path / "x") / "report.html").read_bytes()  # by the run itself, at its end
    assert "finished" in html(tmp_path / "x")
    assert (tmp_path / "x/report.html").read_bytes() == written


def test_what_is_embedded_is_bounded_and_the_page_says_so(tmp_path):
    (tmp_path / "x").mkdir()
    rows = [json.dumps({"step": i // 8 + 1} | sample()) for i in range(20_000)]
    rows.append(json.dumps({"step": 2501} | sample("é" * 100_000)))
    (tmp_path / "x/samples.jsonl").write_text("\n".join(rows))
    page = html(tmp_path / "x")
    run = embedded(page)["runs"][0]
    steps = sorted({row["at"] for row in run["rows"]})
    assert len(page) < 3e6 and 4_000 < len(run["rows"]) <= report.N_SAMPLES
    assert steps[0] == 1 and steps[-1] == 2501 and len(set(np.diff(steps)[1:])) == 1
    assert f"Here are {len(run['rows']):,} of 20,001 completions" in run["note"]
    assert f"({len(steps):,} of 2,501 steps)" in run["note"]
    assert "1 have texts cut in the middle" in run["note"]
    assert "é\n[… 80,000 characters …]\né" in run["rows"][-1]["completion"]
    (tmp_path / "x/samples.jsonl").write_text("\n".join([rows[0]] * 6_000))  # all of one step
    run = embedded(html(tmp_path / "x"))["runs"][0]
    assert len(run["rows"]) == 5_000 and "Here are 5,000 of 6,000" in run["note"]
    texts = [json.dumps({"step": i} | sample("x" * 3_000)) for i in range(4_000)]
    (tmp_path / "x/samples.jsonl").write_text("\n".join(texts))
    assert 2e6 < len(html(tmp_path / "x")) < 4.2e6


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


def test_a_failing_report_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "main", lambda config: 1 / 0)
    write(tmp_path / "x")
    assert (tmp_path / "x/final/adapter").exists() and not (tmp_path / "x/report.html").exists()
    assert "no report of" in capsys.readouterr().err


def test_it_is_written_now_and_then_in_one_percent_of_the_time(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(report, "main", lambda config: (written.append(1), time.sleep(0.05)))
    with runs.Run(dataclasses.replace(CONFIG, out=str(tmp_path / "x"))) as run:
        run.restore({})
        run.log(1, {"loss": 1.0})
        run.save(1, {}, {})
        assert not written  # a young run has nothing to tell
        run.report_due = 0.0
        for _ in range(3):
            run.save(1, {}, {})
        assert len(written) == 1 and run.report_due - time.monotonic() > 4
    assert len(written) == 2


@pytest.mark.parametrize("fault", ["SIGTERM", "exception"])
def test_a_run_that_ends_early_leaves_one(tmp_path, fault):
    config = dataclasses.replace(CONFIG, out=str(tmp_path / "x"))
    with pytest.raises((SystemExit, RuntimeError)), runs.Run(config) as run:
        run.restore({})
        run.log(1, {"reward": 0.25})
        if fault == "exception":
            raise RuntimeError
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stopping == "SIGTERM"
        run.end(1, lambda score: run.save(1, {}, {}, score=score), lambda: 0.0, lambda path: None)
    assert "step 1 of 4 · not finished" in (tmp_path / "x/report.html").read_text()


# ------------------------------------------------------------------------------ in a real browser


class Browser:
    """Chromium, headless, by its DevTools protocol: JSON ended by NUL over two pipes."""

    FLAGS = ("--headless --no-sandbox --disable-gpu --no-first-run --disable-sync "
             "--disable-background-networking --disable-component-update "
             "--remote-debugging-pipe").split()

    def __init__(self, profile):
        (theirs, self.write), (self.read, back) = os.pipe(), os.pipe()
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{back}', "bash", CHROMIUM, *self.FLAGS,
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        os.close(theirs), os.close(back)
        self.n, self.buffer, self.events, self.to = 0, b"", [], {}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.to = {
            "sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        }
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        self.n += 1
        message = {"id": self.n, "method": method, "params": params} | self.to
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (reply := self.receive()).get("id") != self.n:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def receive(self, patience_s=60):
        while b"\0" not in self.buffer:
            assert select.select([self.read], [], [], patience_s)[0], "the browser hangs"
            assert (got := os.read(self.read, 1 << 16)), "the browser died"
            self.buffer += got
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def js(self, code):
        reply = self("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def open(self, path, width=1200, dark=False):
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
             mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def press(self, key, shift=False):
        number = {"ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=8 * shift,
                 windowsVirtualKeyCode=number)

    def check_quiet(self):
        """Nothing was complained of, and nothing but the file itself was asked for."""
        loud = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        assert not [event for event in self.events if event["method"] in loud]
        sent = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        urls = {event["params"]["request"]["url"] for event in sent}
        assert len({url for url in urls if not url.startswith("data:")}) == 1, urls

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self("Browser.close")
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


def status(browser):
    return browser.js('document.getElementById("status").textContent')


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    rows = {
        1: [sample(reward=0.1, correct=False, rewards={"judge": 0.2}),
            sample(reward=0.7, correct=False, rewards={"judge": 0.8}, stop="length")],
        2: [sample(reward=1.5), sample(reward=1.0, rewards={"judge": 0.1})],
        3: [sample(reward=None, rewards={"judge": None}, errors={"judge": "timed out"})],
    }
    return write(tmp_path_factory.mktemp("runs") / "x", samples=rows, steps=3) / "report.html"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 360])
def test_it_opens_quietly_in_light_and_dark_and_on_a_phone(browser, three_steps, width, dark):
    browser.open(three_steps, width, dark)
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("document.documentElement.clientWidth") <= width
    background = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 60) == dark
    assert browser.js('document.querySelector(".verdict").getBoundingClientRect().bottom') < 300
    assert browser.js('document.querySelectorAll("figure").length') >= 5
    nameless = """[...document.querySelectorAll("input, select, button")].filter(e =>
        !e.labels?.[0]?.textContent.trim() && !e.ariaLabel && !e.textContent.trim()).length"""
    assert browser.js(nameless) == 0
    browser.check_quiet()


def test_the_pointer_reads_the_curves(browser, three_steps):
    browser.open(three_steps)
    find = '[...document.querySelectorAll("figure")].find(f => f.innerText.startsWith("Reward"))'
    browser.js(f'{find}.scrollIntoView({{block: "center"}})')
    x, y, width = browser.js(
        f'(b => [b.x, b.y, b.width])({find}.querySelector("svg").getBoundingClientRect())'
    )
    move = lambda x, y: browser("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    move(x + width * 0.98, y + 20)
    assert browser.js(f'{find}.querySelector(".readout").innerText') == "step 3: 0.300"
    move(2, 2)
    assert browser.js(f'{find}.querySelector(".readout").innerText') == "0.1 → 0.3"


def test_the_keyboard_turns_the_pages(browser, three_steps):
    browser.open(three_steps)
    assert status(browser) == "5 of 5 completions"
    browser.press("ArrowLeft")
    assert status(browser) == "4 of 5 completions"
    browser.press("ArrowLeft", shift=True)
    assert status(browser) == "1 of 5 completions"  # the first of step 1
    browser.press("ArrowLeft")
    assert status(browser) == "1 of 5 completions"
    browser.press("ArrowRight")
    assert status(browser) == "2 of 5 completions"
    browser.js('document.getElementById("slider").focus()')
    browser.press("ArrowRight")  # the slider's own: a step
    assert status(browser) == "3 of 5 completions"
    assert browser.js('document.getElementById("slider").ariaValueText') == "step 2"
    browser.js('document.getElementById("words").focus()')
    browser.press("ArrowRight")  # the caret's own
    assert status(browser) == "3 of 5 completions"
    for _ in range(3):
        browser.press("Tab")
        focus = "(e => e.matches(':focus-visible') && getComputedStyle(e).outlineStyle)"
        assert browser.js(f"{focus}(document.activeElement)") == "solid"
    browser.check_quiet()


def test_filters(browser, three_steps):
    browser.open(three_steps)

    def choose(**values):
        for name, value in values.items():
            browser.js(f'(e => {{ e.value = "{value}"; e.dispatchEvent(new Event("input")) }})'
                       f'(document.getElementById("{name}"))')
        found = re.match(r"(no|\d+ of \d+) completions(?: that match, of 5)?$", status(browser))
        return 0 if found[1] == "no" else int(found[1].split()[-1])

    assert choose(which="disagree") == 2  # 0.8 but wrong, 0.1 but right; a missing one says nothing
    assert choose(which="wrong") == 2 and choose(which="right") == 3
    assert choose(which="missing") == 1
    facts = browser.js('document.getElementById("facts").innerText')
    assert "reward\tmissing" in facts and "timed out" in facts and "judge\tmissing" in facts
    assert choose(which="all", low="0.7") == 3  # a missing reward is not in any range
    assert choose(high="1") == 2 and choose(low="", high="") == 5
    assert choose(stop="length") == 1 and choose(stop="") == 5
    assert choose(words="2 + 2") == 5 and choose(words="nowhere") == 0
    assert browser.js('document.getElementById("view").hidden')
    assert choose(words="") == 5 and not browser.js('document.getElementById("view").hidden')
    browser.check_quiet()


def test_trace_and_answer_stand_apart(browser, three_steps):
    browser.open(three_steps)
    parts = """[...document.querySelector("#answers .text").querySelectorAll(".part")]
        .map(e => [e.className, e.innerText])"""
    assert browser.js(parts) == [["part reasoning", "<reasoning>2 + 2</reasoning>"],
                                 ["part answer", "<answer>4</answer>"]]


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
        runs.write_json(folder / "results.json", evaluation.summarize(rows))
        folders.append(str(folder))
    return report.main(report.Config(tuple(folders)))


@pytest.mark.parametrize("width", [1200, 360])
def test_base_and_trained_answers_stand_side_by_side(browser, base_and_trained, width):
    browser.open(base_and_trained, width)
    browser.press("ArrowLeft")
    columns = """[...document.querySelectorAll("#view h3 + .text")].map(text => {
        const {x, height} = text.getBoundingClientRect();
        return [text.previousSibling.textContent, text.textContent.slice(0, 9), x, height]; })"""
    (left, base, x, height), (right, trained, x2, _) = browser.js(columns)
    assert (left, right) == ("base, problem 1: wrong", "trained, problem 1: right")
    assert (base, trained) == ("base 1 hm", "trained 1")
    assert (x2 > x + 200) == (width == 1200) and height < 900  # a long text scrolls
    rows = '[...document.querySelectorAll("#facts tr")].map(e => e.getBoundingClientRect().height)'
    assert max(browser.js(rows)) < 60  # and the table beside it keeps its rows together
    assert browser.js("document.documentElement.scrollWidth") <= width
    browser.check_quiet()


def test_an_earlier_answer_of_the_same_run_is_shown_beside(browser, three_steps):
    browser.open(three_steps)
    titles = '[...document.querySelectorAll(".columns h3")].map(e => e.textContent)'
    assert browser.js(titles) == ["x, step 3: right", "x, step 1: wrong"]
    browser.press("ArrowLeft", shift=True)
    browser.press("ArrowLeft", shift=True)
    assert browser.js(titles) == ["x, step 1: wrong"]  # there is none before it


HOSTILE = [
    "</script><script>document.title = 'taken'</script>", "<img src=x onerror=document.title=1>",
    "<!-- <script>", "]]> &lt;b&gt; &amp; &#0;", "a\u202eb\u2066c\u200fd\ufeff", "x\u2028y\u2029z",
    "\ud800 halves \udfff", "\0 NUL \x1b[31m \x85 \x7f", "\r\n\tx\r  ", "\\u003c \" ' ` ${1} {{}}",
    "<reasoning>a</reasoning><REASONING>b<answer></answer></answer> 7 <answer>\u202e8",
    "\U0001f469\u200d\U0001f467",
    "שלום 123 abc", "", " ", "<a href='https://example.com/'>x</a><style>*{display:none}</style>",
    "\u202e" * 3_000, "<answer>" * 2_000, "long" * 25_000,
]


def test_hostile_completions_are_text(browser, tmp_path):
    rows = [sample(text, prompt=text, gold=text, stop=text or "stop", errors={"e": text[:99]})
            for text in HOSTILE]
    rows[0]["rewards"] = {"</script><b>": 1.0}
    config = Config(model="</title></script><script>document.title = 'taken'</script>\ud800")
    folder = write(tmp_path / "<b>&x", samples={1: rows}, steps=1, config=config)
    browser.open(folder / "report.html")
    browser.press("ArrowLeft", shift=True)
    units = lambda text: np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2").tolist()
    shown = """["#prompt", "#answers .text"].map(at => document.querySelector(at).textContent)
        .map(text => Array.from(text, (_, i) => i).length && [...Array(text.length).keys()]
        .map(i => text.charCodeAt(i)))"""
    for i, text in enumerate(HOSTILE):
        assert status(browser).startswith(f"{i + 1} of {len(HOSTILE)}")
        if len(text) > report.N_CHARS:
            text = f"{text[:10_000]}\n[… {len(text) - 20_000:,} characters …]\n{text[-10_000:]}"
        assert browser.js(shown) == [units(text) or 0] * 2, text[:99]
        assert browser.js("document.documentElement.scrollWidth") <= 1200
        loose = """[...document.querySelectorAll("#view *")].some(e => e.className !== "hidden" &&
            [...e.childNodes].some(n => n.nodeType === 3 && /[\\u202a-\\u202e\\u2066-\\u2069]/
            .test(n.data)))"""
        assert not browser.js(loose)  # an override stands in a box of its own, isolated
        browser.press("ArrowRight")
    assert (
        browser.js('getComputedStyle(document.querySelector("#prompt")).unicodeBidi') == "isolate"
    )
    assert browser.js("document.title") == "<b>&x"
    assert not browser.js('document.querySelectorAll("#view img, #view a, #view style").length')
    browser.check_quiet()


@pytest.mark.parametrize(("n_steps", "first", "found"), [
    (625, "4993 of 5000", "63 of 63"), (1, "1 of 5000", "1 of 111"),
])
def test_five_thousand_completions_stay_responsive(browser, tmp_path, n_steps, first, found):
    rows = {step: [sample(f"<answer>{step} {i}</answer>") for i in range(5_000 // n_steps)]
            for step in range(1, n_steps + 1)}
    folder = write(tmp_path / "x", samples=rows, steps=n_steps)
    assert (folder / "report.html").stat().st_size < 2.5e6
    browser.open(folder / "report.html")
    assert status(browser) == f"{first} completions"
    assert browser.js('document.querySelectorAll("*").length') < 1_000
    browser.js("""var n = 0; new MutationObserver(all => all.forEach(m => m.addedNodes.forEach(
        a => n += 1 + (a.querySelectorAll?.("*").length ?? 0)))).observe(document.body,
        {childList: true, subtree: true}); document.getElementById("words").focus()""")
    for typed in "1 7":
        browser("Input.insertText", text=typed)
        assert 10 < browser.js("n + (n = 0)") < 200
    assert status(browser) == f"{found} completions that match, of 5000"
    browser.js('document.getElementById("words").blur()')
    browser.press("ArrowLeft" if n_steps > 1 else "ArrowRight")
    assert not status(browser).startswith(found) and 10 < browser.js("n") < 200
    browser.check_quiet()
