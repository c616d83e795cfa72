"""The report: what it says, what it survives, and how it behaves in a real browser."""

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
import time

import numpy as np
import pytest
import tyro

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
    for row in ("learning_rate<td><bdi>0.0001</bdi><td><bdi>0.001</bdi>",
                "adapter<td><bdi></bdi><td><bdi>&lt;i&gt;</bdi>"):
        assert row in seen.split("<table class=differs>")[1]
    assert "learning_rate" not in folded.split("<pre>")[0]
    assert "<small>keep</small> <bdi>2</bdi>" in folded
    assert "<table class=differs>" not in html(a)


@pytest.mark.parametrize("module", [train_sft, train_simpo, train_grpo, evaluation])
def test_the_command_repeats_the_run(module, tmp_path, monkeypatch):
    """The settings come back from config.json, through a shell's own splitting of the command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my rewards.py").write_text("def score(completion, row):\n    return 1.0\n")
    config = module.Config(model="tiny", out="runs/of mine", system="It's $HOME; `x`")
    if module is train_grpo:
        config = dataclasses.replace(config, reward_file="my rewards.py:score", mask_truncated=True)
    config, name = module.resolve(config), f"{module.__name__}.py"
    stored = json.loads(json.dumps(dataclasses.asdict(config) | {"code": {"script": name}}))
    python, script, *flags = shlex.split(report.command(stored))
    assert (python, script) == ("python", name)
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


@pytest.mark.parametrize(("low", "high"), [(0.27, 0.71), (-3, 5), (0, 1e9), (1e-7, 3e-7), (7, 8)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = report.ticks(low, high)
    assert 2 <= len(ticks) <= 5 and len({text for _, text in ticks}) == len(ticks)
    for value, text in ticks:
        assert low - 1e-9 <= value <= high + 1e-9
        assert float(text.replace(",", "")) == pytest.approx(value, rel=0.01, abs=1e-12)
    assert [text for _, text in report.ticks(0, 3, least=1)] == ["0", "1", "2", "3"]


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
    assert drawn(values, unit).count("class=grid") >= 1


def test_unknown_is_a_gap_and_not_zero():
    svg = drawn([1.0, 2.0, None, 4.0])
    d = re.search('class="c0 raw" d="(.*?)"', svg)[1]
    assert d.count("M") == 2 and d.count("L") == 3  # two lines, the second a dot
    assert "1 → <b>4</b>" in svg


def test_a_long_curve_is_averaged_and_a_noisy_one_gets_its_running_mean():
    svg = drawn([float(step % 2) for step in range(4000)])
    assert re.search('raw faint" d="(.*?)"', svg)[1].count("L") == report.N_POINTS
    assert 'class="c0 line"' in svg and "0.5 → <b>0.5" in svg and len(svg) < 20_000


# -------------------------------------------------------------------------------- what it survives


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
    rows = [json.dumps({"step": i // 8 + 1} | sample()) for i in range(20_000)]
    rows.append(json.dumps({"step": 2501} | sample("é" * 100_000)))
    (tmp_path / "x/samples.jsonl").write_text("\n".join(rows))
    run = embedded(html(tmp_path / "x"))["runs"][0]
    steps = sorted({row["at"] for row in run["rows"]})
    assert 3_000 < len(run["rows"]) <= report.N_SAMPLES
    assert steps[0] == 1 and steps[-1] == 2501 and len(set(np.diff(steps)[1:])) == 1
    assert f"Here are {len(run['rows']):,} of 20,001 completions" in run["note"]
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
    assert not [*(tmp_path / "x").glob("tmp-*")]


# ---------------------------------------------------------------------------------- who writes it


def test_a_failing_report_stops_nothing_and_takes_one_percent_of_the_time(
        tmp_path, monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(report, "main", lambda config: (tried.append(1), time.sleep(0.05), 1 / 0))
    with runs.Run(dataclasses.replace(CONFIG, out=str(tmp_path / "x"))) as run:
        run.restore({})
        run.log(1, {"loss": 1.0})
        run.save(1, {}, {})
        assert not tried  # a young run has nothing to tell
        run.report_due = 0.0
        for _ in range(3):
            run.save(1, {}, {})
        assert len(tried) == 1 and run.report_due - time.monotonic() > 4
    assert len(tried) == 2 and "no report of" in capsys.readouterr().err


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
        run.save(1, {}, {})
        run.stop()
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
        session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.to = {"sessionId": session}
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

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.process.kill()
    one.process.wait()


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
    box = f'(b => [b.x, b.y, b.width])({find}.querySelector("svg").getBoundingClientRect())'
    x, y, width = browser.js(box)
    move = lambda x, y: browser("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    move(x + width * 0.98, y + 20)
    assert browser.js(f'{find}.querySelector(".readout").innerText') == "step 3: 0.300"
    move(2, 2)
    assert browser.js(f'{find}.querySelector(".readout").innerText') == "0.1 → 0.3"


def test_the_keyboard_turns_the_pages(browser, three_steps):
    browser.open(three_steps)
    assert status(browser) == "5 of 5 completions"
    for focus, key, shift, now in (
        (None, "ArrowLeft", False, 4),
        (None, "ArrowLeft", True, 1),  # the first of step 1
        (None, "ArrowLeft", False, 1),
        (None, "ArrowRight", False, 2),
        ("slider", "ArrowRight", False, 3),  # its own arrows: a step
        ("words", "ArrowRight", False, 3),  # the caret's own
    ):
        if focus:
            browser.js(f'document.getElementById("{focus}").focus()')
        browser.press(key, shift)
        assert status(browser) == f"{now} of 5 completions"
    assert browser.js('document.getElementById("slider").ariaValueText') == "step 2"
    browser.press("Tab")
    assert browser.js("document.activeElement.matches(':focus-visible')")
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
    assert "timed out" in facts and "judge\tmissing" in facts and "\nreward\t" not in facts
    assert choose(which="all", low="0.7") == 3  # a missing reward is not in any range
    assert choose(high="1") == 2 and choose(low="", high="") == 5
    assert choose(which="cut") == 1 and choose(which="all") == 5
    assert choose(words="2 + 2") == 5 and choose(words="nowhere") == 0
    assert browser.js('document.getElementById("view").hidden')
    assert choose(words="") == 5 and not browser.js('document.getElementById("view").hidden')
    browser.check_quiet()


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
    assert (left, right) == ("base, problem 1 wrong", "trained, problem 1 right")
    assert (base, trained) == ("base 1 hm", "trained 1")
    assert (x2 > x + 200) == (width == 1200) and height < 900  # a long text scrolls
    assert browser.js("document.documentElement.scrollWidth") <= width
    browser.check_quiet()


def test_an_earlier_answer_of_the_same_run_is_shown_beside(browser, three_steps):
    browser.open(three_steps)
    titles = '[...document.querySelectorAll(".columns h3")].map(e => e.textContent)'
    assert browser.js(titles) == ["x, step 3 right", "x, step 1 wrong"]
    browser.press("ArrowLeft", shift=True)
    browser.press("ArrowLeft", shift=True)
    assert browser.js(titles) == ["x, step 1 wrong"]  # there is none before it
    parts = """[...document.querySelector("#answers .text").querySelectorAll(".part")]
        .map(e => [e.className, e.innerText])"""
    assert browser.js(parts) == [["part reasoning", "<reasoning>2 + 2</reasoning>"],
                                 ["part answer", "<answer>4</answer>"]]


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
        .map(text => [...Array(text.length).keys()].map(i => text.charCodeAt(i)))"""
    loose = """[...document.querySelectorAll("#view *")].some(e => e.className !== "hidden" &&
        [...e.childNodes].some(n => n.nodeType === 3 && /[\\u202a-\\u202e\\u2066-\\u2069]/
        .test(n.data)))"""
    for i, text in enumerate(HOSTILE):
        assert status(browser).startswith(f"{i + 1} of {len(HOSTILE)}")
        if len(text) > report.N_CHARS:
            text = f"{text[:10_000]}\n[… {len(text) - 20_000:,} characters …]\n{text[-10_000:]}"
        assert browser.js(shown) == [units(text)] * 2, text[:99]
        assert browser.js("document.documentElement.scrollWidth") <= 1200
        assert not browser.js(loose)  # an override stands in a box of its own, isolated
        browser.press("ArrowRight")
    assert browser.js("document.title") == "<b>&x"
    assert not browser.js('document.querySelectorAll("#view img, #view a, #view style").length')
    browser.check_quiet()


def test_five_thousand_completions_stay_responsive(browser, tmp_path):
    (tmp_path / "x").mkdir()
    rows = [{"step": 1} | sample(f"<answer>1 {i}</answer>") for i in range(5_000)]
    (tmp_path / "x/samples.jsonl").write_bytes(runs.to_jsonl(rows))
    assert len(html(tmp_path / "x")) < 2.5e6
    browser.open(tmp_path / "x/report.html")
    assert status(browser) == "1 of 5000 completions"
    assert browser.js('document.querySelectorAll("*").length') < 1_000
    browser.js("""var n = 0; new MutationObserver(all => n += all.length).observe(document.body,
        {childList: true, subtree: true}); document.getElementById("words").focus()""")
    for typed in "1 7":
        browser("Input.insertText", text=typed)
        assert 0 < browser.js("n + (n = 0)") < 200
    assert status(browser) == "1 of 111 completions that match, of 5000"
    browser.js('document.getElementById("words").blur()')
    browser.press("ArrowRight")
    assert status(browser).startswith("2 of 111")
    browser.check_quiet()
