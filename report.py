"""Run folders -> one HTML file: did it learn, how did it go, and what does it write now?

    python report.py runs/grpo            # runs/grpo/report.html
    python report.py runs/grpo runs/eval  # overlaid, in the first folder
    python report.py                      # all of runs/: runs/report.html

The training scripts write the same file now and then and at the end, however they end.

1. The page is a function of the folders' files alone, and opening it fetches nothing. Lines that a
   live or killed run left torn are skipped.
2. Curves are SVG, so that they show without scripts (in the preview of a mail). The page's
   script shows values under the pointer and pages through the completions.
3. "Learned" is said only if the last evaluation's accuracy is above the first one's by a 95 %
   interval of the difference: Newcombe's (Statistics in Medicine 17, 1998, method 10) from
   eval.py's Wilson intervals, taken as if of different problems, which is cautious.
4. The page holds about N_SAMPLES completions and N_BYTES of all runs (whole steps are left out,
   evenly, and the page says so), N_CHARS of a text, N_POINTS of a curve.
5. Completions are hostile text: the page handles them as data, never as markup, and shows
   characters that would reorder or hide text by their codes.
"""

import dataclasses
import html
import json
import math
import os
import re
import shlex
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import tyro

import disk
from commandline import Unset, introduction
from disk import good_rows
from terminal import command, flag

N_SAMPLES, N_BYTES, N_CHARS, N_POINTS = 5_000, 4_000_000, 20_000, 400
SAMPLE = ("prompt", "completion", "gold", "correct", "format", "reward", "rewards", "errors",
          "advantage", "stop", "n_tokens", "group", "mode", "domain")
CURVES = {  # metric -> (title, unit), in the page's order; other metrics are folded up
    "eval_accuracy": ("Held-out accuracy", "%"), "eval_loss": ("Held-out loss", ""),
    "reward": ("Reward", ""), "eval_pair_accuracy": ("Held-out pairs", "%"),
    "eval_margin": ("Held-out margin", ""), "accuracy": ("Accuracy", "%"),
    "eval_format": ("Held-out format", "%"), "format": ("Format", "%"),
    "completions/mean_length": ("Length", "tokens"),
    "completions/clipped_ratio": ("Cut at --max-new", "%"), "entropy": ("Entropy", "nats"),
    "kl": ("KL to the start", "nats"), "frac_reward_zero_std": ("Groups of equal rewards", "%"),
    "explained_variance": ("Variance of returns that the critic explains", "%"),
    "loss": ("Loss", ""), "pair_accuracy": ("Pairs", "%"), "margin": ("Margin", ""),
    "grad_norm": ("Gradient norm", ""), "clip_ratio/region_mean": ("Clipped ratios", "%"),
    "tokens_per_s": ("Speed", "tokens/s"), "step_s": ("Step", "s"), "rollout_s": ("Rollout", "s"),
    "reward_s": ("Wait for rewards after the rollout", "s"),
    "reference_s": ("Reference log-probs", "s"), "update_s": ("Update", "s"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders of the training scripts and of eval.py, the main one first; default: runs/*."""
    out: Unset = None
    """The file to write; default: report.html in the first folder, or runs/report.html."""


# --------------------------------------------------------------------------------------- reading


class Run(NamedTuple):
    name: str
    config: dict
    steps: dict[int, dict]  # step -> its metrics, those of an evaluation after it included
    results: dict  # of eval.py
    samples: dict  # what the page is given: unit, note, rows
    finished: bool


def number(value) -> float | None:
    """None for anything but a number that can be added up and drawn: null, NaN, a text."""
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    return value if ok and abs(value) < 1e100 else None


def is_run(folder: Path) -> bool:
    files = (folder / name for name in ("metrics.jsonl", "samples.jsonl", "results.json"))
    return any(file.is_file() and file.stat().st_size for file in files)


def read_run(folder: Path, share: float = 1.0) -> Run:
    """`share` is this run's part of the samples that a page may hold."""
    if not is_run(folder):
        raise ValueError(f"{folder} is no run folder: no metrics, samples or results in it")
    files = (folder / "results.json", folder / "config.json")
    results, config = (disk.read_json(file) if file.exists() else {} for file in files)
    wanted = disk.json_value(config, "steps", int, 0, files[1], low=0, high=2**53)
    config["code"] = disk.json_value(config, "code", dict, {}, files[1])
    if results:
        results["intervals"] = disk.json_value(results, "intervals", dict, {}, files[0])
    steps = {}
    for row in good_rows(folder / "metrics.jsonl", step=int):
        steps.setdefault(row.pop("step"), {}).update({k: number(v) for k, v in row.items()})
    finished = (folder / "final").is_dir() and max(steps, default=0) >= wanted
    samples = thin(good_rows(folder / "samples.jsonl"), share)
    return Run(folder.resolve().name, config, dict(sorted(steps.items())), results, samples,
               finished)


def thin(rows: list[dict], share: float) -> dict:
    """The rows of samples.jsonl for the page: all, or those of every n-th step or problem."""
    unit = "problem" if rows and "problem" in rows[0] else "step"
    groups: dict[int, list[dict]] = {}
    for row in rows:
        at = number(row.get(unit)) or 0
        groups.setdefault(at, []).append(sample(row) | {"at": at})
    n_bytes = sum(len(json.dumps(row)) for group in groups.values() for row in group)
    stride = math.ceil(max(len(rows) / N_SAMPLES, n_bytes / N_BYTES) / share) or 1
    steps = sorted(groups)
    kept = steps[:1] + steps[:0:-stride][::-1]  # the first and the last stay
    out = [row for at in kept for row in groups[at]][: int(N_SAMPLES * share)]
    note = f"Here are {len(out):,} of {len(rows):,} completions, to keep the file small."
    return {"unit": unit, "note": note * (len(out) < len(rows)), "rows": out}


def sample(row: dict) -> dict:
    """A row of samples.jsonl as the page gets it; what is absent or null stays absent."""
    out = {"rewards": {}, "errors": {}} | {k: value for k in SAMPLE
                                           if (value := plain(row.get(k))) is not None}
    for k in ("rewards", "errors"):
        out[k] = out[k] if isinstance(out[k], dict) else {}
    return out | {k: str(out[k]) for k in ("prompt", "completion") if k in out}


def plain(value):
    """Numbers, texts of at most N_CHARS, true and false, and objects of them; else None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, str) and (left_out := len(value) - N_CHARS) > 0:
        half = N_CHARS // 2
        return f"{value[:half]}\n[… {left_out:,} characters …]\n{value[-half:]}"
    return value if isinstance(value, str | bool) else number(value)


# --------------------------------------------------------------------------------------- figures


def curve(run: Run, name: str) -> list[tuple[int, float | None]]:
    """(step, value) at each training step or, of an eval_ metric, evaluation; None: no value."""
    kind = name.startswith("eval_")
    points = [(step, row.get(name)) for step, row in run.steps.items()
              if any(k.startswith("eval_") == kind for k in row)]
    return points if any(v is not None for _, v in points) else []


def ends(points: list, name: str) -> tuple[float, float]:
    """First and last value: of an evaluation itself, of training the mean of a tenth."""
    values = [v for _, v in points if v is not None]
    n = 1 if name.startswith("eval_") else max(1, len(values) // 10)
    return fmean(values[:n]), fmean(values[-n:])


def show(value: float, unit: str = "") -> str:
    """0.4225 -> 0.422, in % -> 42.2; 1234567 -> 1,234,567."""
    if unit == "%":
        return f"{100 * value:.1f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def rates(run: Run) -> list[tuple]:
    """(label, rate, low, high): of a run the first, best and last evaluation, or eval.py's."""
    rates = {step: row["eval_accuracy"] for step, row in run.steps.items()
             if row.get("eval_accuracy") is not None}
    best = max(rates, key=lambda step: (rates[step], step), default=None)
    out = [(f"step {step}" + ", the best" * (step == best and len(rates) > 2),
            *(run.steps[step].get("eval_accuracy" + end) for end in ("", "_low", "_high")))
           for step in sorted({*list(rates)[:1], *list(rates)[-1:]} | ({best} - {None}))]
    intervals = run.results.get("intervals", {})
    for name, value in run.results.items():
        rate, ends = number(value), intervals.get(name)
        if re.fullmatch(r"(pass|maj)@\d+(_sampled)?", name) and rate is not None:
            ends = [number(end) for end in ends] if isinstance(ends, list) else []
            low, high = ends if len(ends) == 2 else (None, None)
            out.append((name.replace("_", ", "), rate, low, high))
    return out


def difference(before: tuple, after: tuple) -> tuple[float, float]:
    """Newcombe's 95 % interval of after - before, each as (rate, low, high)."""
    (first, low, high), (last, low2, high2) = before, after
    least = last - first - math.hypot(last - low2, high - first)
    return least, last - first + math.hypot(high2 - last, first - low)


def verdict(run: Run) -> tuple[str, str, str]:
    """(class, in a word, in a sentence): did it learn?"""
    found = rates(run)
    if len(found) > 1 and not run.results:
        (_, first, low, high), *_, (_, last, low2, high2) = found
        what = f"held-out accuracy {show(first, '%')} % → {show(last, '%')} %"
        if None in (low, high, low2, high2):
            return "", "rose" if last > first else "did not rise", what
        least, most = difference((first, low, high), (last, low2, high2))
        what += f", a difference of {100 * least:+.1f} to {100 * most:+.1f} points"
        css = "good" if least > 0 else "bad" if most < 0 else ""
        return css, {"good": "learned", "bad": "got worse", "": "unclear"}[css], what
    if found:
        label, rate, *_ = found[0]
        return "", "measured", f"{label} {show(rate, '%')} %"
    for name in ("eval_loss", "reward", "loss"):
        if len(points := curve(run, name)) > 1:
            first, last = ends(points, name)
            word = "rose" if last > first else "fell" if last < first else "stood still"
            return "", word, f"{CURVES[name][0].lower()} {show(first)} → {show(last)}"
    return "", "too early", "nothing to compare yet"


# --------------------------------------------------------------------------------------- drawing

PICTURE = """<style>text { font: 11px sans-serif; fill: #777 } .grid { stroke: #ccc }
.raw { fill: none; stroke: #3583db; stroke-width: 2 } .band { fill: #3583db; opacity: .14 }
</style>"""
W, H, LEFT, RIGHT, TOP, BOTTOM = 280, 140, 46, 8, 8, 20
esc = lambda text: html.escape(str(text))
colour = lambda run: f"c{run % 6}"


def tag(run: int, name: str) -> str:
    return f'<span class="run {colour(run)}"><i></i><bdi>{esc(name)}</bdi></span>'


def ticks(low: float, high: float, least: float = 0.0) -> list[tuple[float, str]]:
    """At most five round numbers, `least` or more apart: 0.27 to 0.71 -> 0.3 0.4 0.5 0.6 0.7."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if high - low <= 4 * step * m)
    step = max(step, least)
    at = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(i * step, f"{i * step:,.6g}") for i in at]


def means(points: list, stride: int, half: int) -> list:
    """Every stride-th point, averaged with `half` neighbours on each side; None stays None."""
    out = []
    for i in range(stride // 2, len(points), stride):
        near = [v for _, v in points[max(0, i - half) : i + half + 1] if v is not None]
        out.append((points[i][0], None if points[i][1] is None else fmean(near)))
    return out


def path(points: list, x, y) -> str:
    """An SVG path through the known points; a lone point becomes a line to itself, a dot."""
    d, up = "", True
    for step, v in points:
        at = "" if v is None else f"{x(step):.1f},{y(v):.2f}"
        d += at and (f"M{at}L{at}" if up else f"L{at}")
        up = v is None
    return d


def chart(runs: list[Run], name: str, title: str, unit: str, span: tuple[int, int]) -> str:
    """A metric of all runs over the steps; "" where no run has it."""
    curves = {i: points for i, run in enumerate(runs) if (points := curve(run, name))}
    if not curves:
        return ""
    bands = {i: [point for point in curve(runs[i], f"{name}_low") +
                 curve(runs[i], f"{name}_high")[::-1] if point[1] is not None] for i in curves}
    factor = 100 if unit == "%" else 1
    values = [v * factor for line in [*curves.values(), *bands.values()] for _, v in line
              if v is not None]
    low, high, size = min(values), max(values), max(map(abs, values))
    pad = 0.06 * (high - low) if high - low > 1e-6 * size else 0.1 * size or 1.0
    rate = unit == "%" and 0 <= low <= high <= 100  # whose axis ends at 0 and at 100
    low, high = (max(low - pad, 0), min(high + pad, 100)) if rate else (low - pad, high + pad)
    x = lambda s: LEFT + (s - span[0]) / (span[1] - span[0]) * (W - LEFT - RIGHT)
    y = lambda v: TOP + (high - v * factor) / (high - low) * (H - TOP - BOTTOM)
    out, readout = [], []
    for v, text in ticks(low, high):
        at = y(v / factor)
        out.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{W - RIGHT}"/><text x="{LEFT - 5}" '
                   f'y="{at + 3.5:.1f}" text-anchor="end">{text}</text>')
    out += [f'<text x="{x(s):.1f}" y="{H - 5}" text-anchor="middle">{t}</text>'
            for s, t in ticks(*span, least=1)]
    for i, points in curves.items():
        css, stride, noisy = colour(i), -(-len(points) // N_POINTS), len(points) >= 40
        raw = means(points, stride, stride // 2)
        out += [f'<path class="{css} band" d="{path(bands[i], x, y)}"/>',
                f'<path class="{css} raw{" faint" * noisy}" d="{path(raw, x, y)}"/>']
        if noisy:
            smooth = means(points, stride, len(points) // 40)
            out.append(f'<path class="{css} line" d="{path(smooth, x, y)}"/>')
        first, last = (show(v, unit) for v in ends(points, name))
        readout.append(f"<span class={css}>{first} → <b>{last}</b></span>")
    axes = f"{span[0]} {span[1]} {low:.6g} {high:.6g}"
    return (f"<figure><figcaption><h3>{esc(title)} <small>{unit}</small></h3><span class=readout>"
            f'{"".join(readout)}</span></figcaption><svg viewBox="0 0 {W} {H}" data-axes="{axes}" '
            f'role="img" aria-label="{esc(title)}">{"".join(out)}</svg></figure>')


def picture(run: Run) -> str:
    """The curve of the held-out results as an SVG file; "" where there are not two of them."""
    for name in ("eval_accuracy", "eval_pair_accuracy", "eval_loss"):
        points = [step for step, value in curve(run, name) if value is not None]
        if len(points) > 1:
            figure = chart([run], name, *CURVES[name], (points[0], points[-1]))
            svg = figure[figure.index("<svg") : figure.index("</figure>")]
            size = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * W}" height="{2 * H}" '
            return svg.replace("<svg ", size, 1).replace(">", f">{PICTURE}", 1) + "\n"
    return ""


def header(runs: list[Run]) -> str:
    """The answer in one line a run."""
    items = []
    for i, run in enumerate(runs):
        css, word, sentence = verdict(run)
        about = [str(run.config[k]) for k in ("model", "data") if run.config.get(k)]
        if run.steps:
            steps, spent = run.config.get("steps"), curve(run, "step_s")
            about.append(f"step {max(run.steps)}" + (f" of {steps}" if steps else ""))
            about.append("finished" if run.finished else "not finished")
            about.append(f"{sum(v or 0.0 for _, v in spent) / 60:.1f} minutes of steps")
        items.append(f"<li>{tag(i, run.name)} <small>{esc(' · '.join(about))}</small><p class="
                     f'verdict><b class="{css}">{word.capitalize()}:</b> {esc(sentence)}</p>')
    return f"<header><h1>Did it learn?</h1><ul>{''.join(items)}</ul></header>"


def accuracies(runs: list[Run]) -> str:
    """The rates that the verdicts stand on, with their intervals."""
    rows = []
    for i, run in enumerate(runs):
        for label, rate, low, high in rates(run):
            interval = "no interval"
            if None not in (low, high):
                interval = f"[{show(low, '%')}, {show(high, '%')}]"
            rows.append(f"<tr><td>{tag(i, run.name)}<td>{esc(label)}<td>{show(rate, '%')} %"
                        f"<td>{interval}")
    return ("<h2>Right answers to held-out problems</h2><p><small>With 95 % intervals.</small></p>"
            f"<table>{''.join(rows)}</table>" if rows else "")


def charts(runs: list[Run]) -> str:
    """All metrics: those of CURVES, and the others folded up."""
    names = sorted({k for run in runs for row in run.steps.values() for k in row
                    if not k.endswith(("_low", "_high"))})
    cards = CURVES | {k: ("Reward: " + k[len("rewards/") : -len("/mean")], "") for k in names
                      if k.startswith("rewards/") and k.endswith("/mean")}
    # The rewards "answer" and "format" are mostly the accuracy and the format: once is enough.
    same = {k for k in cards.keys() - CURVES.keys() if any(
        all(curve(run, k) == curve(run, twin) for run in runs) for twin in ("accuracy", "format"))}
    cards = {k: card for k, card in cards.items() if k not in same}
    others = {k: (k, "") for k in names if k not in cards | dict.fromkeys(same)}
    steps = [step for run in runs for step in run.steps] or [0]
    span = min(steps), max(max(steps), min(steps) + 1)
    shown, more = ("".join(chart(runs, name, *card, span) for name, card in part.items())
                   for part in (cards, others))
    if not shown + more:
        return ""
    legend = "".join(tag(i, run.name) for i, run in enumerate(runs))
    return ("<section><h2>Curves</h2><p><small>Over the steps. Figures of training are means of "
            "the first → last tenth of its steps, bold lines running means.</small></p>"
            f"<p class=legend>{legend}</p><div class=charts>{shown}</div><details><summary>All "
            f"other metrics</summary><div class=charts>{more}</div></details></section>")


def command_of(config: dict) -> str:
    """The command that repeats a run, with every setting that was not left empty."""
    words = ["python", f"{config['code']['script']}.py"]
    for name, value in config.items():
        if name == "code" or " " in name or value is None:  # "checksum of the weights": no flag
            continue
        if isinstance(value, bool):
            words.append(flag(name if value else f"no-{name}"))
        else:
            words += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def settings(runs: list[Run]) -> str:
    """The runs' settings: the commands and what differs in sight, the others folded up."""
    tables = [{k: v for k, v in run.config.items() if k != "code"}
              | {f"code: {k}": v for k, v in run.config.get("code", {}).items()} for run in runs]
    keys = list(dict.fromkeys(k for table in tables for k in table))
    differ = [k for k in keys if len({json.dumps(table.get(k)) for table in tables}) > 1]
    head = "<tr><th>" + "".join(f"<th>{tag(i, run.name)}" for i, run in enumerate(runs))
    cells = lambda k: "".join(f"<td><bdi>{esc(table.get(k, ''))}</bdi>" for table in tables)
    rows = lambda keys: "".join(f"<tr><th>{esc(k)}{cells(k)}" for k in keys)
    commands = "".join(f"<p>{tag(i, run.name)}<pre>{esc(command_of(run.config))}</pre>"
                       for i, run in enumerate(runs)
                       if tables[i].get("code: script", "notebook") != "notebook")
    same = rows(k for k in keys if k not in differ)
    several = len(runs) > 1
    marked = f"<h3>What differs</h3><table>{head}{rows(differ)}</table>" * bool(several and differ)
    return (f"<section><h2>Settings</h2>{marked}<h3>The command of each run</h3>{commands}<details>"
            f"<summary>{'Settings that are equal' if several else 'All settings'}</summary>"
            f"<table>{same}</table></details></section>")


def page(runs: list[Run]) -> bytes:
    prompts: dict[str, int] = {}
    for run in runs:
        for row in run.samples["rows"]:  # the completions of a group share one text
            row["prompt"] = prompts.setdefault(row.get("prompt", ""), len(prompts))
    shown = [run.samples | {"name": run.name} for run in runs if run.samples["rows"]]
    data = json.dumps({"prompts": list(prompts), "runs": shown}, ensure_ascii=False)
    data = data.replace("<", "\\u003c")
    body = header(runs) + accuracies(runs) + charts(runs) + BROWSER * bool(prompts) + settings(runs)
    script = SCRIPT.replace("LIMITS", str([LEFT, RIGHT, TOP, BOTTOM]))
    title = esc(", ".join(run.name for run in runs))
    text = (f"<!doctype html><html lang=en><title>{title}</title>{HEAD}{body}"
            f"<script type=application/json id=data>{data}</script>{script}</html>\n")
    return text.encode(errors="backslashreplace")  # half a surrogate pair: its escape


def main(config: Config) -> Path:
    """Writes the report and returns its path."""
    folders = [Path(run) for run in config.runs] or sorted(filter(is_run, Path("runs").glob("*")))
    if not folders:
        raise ValueError("no run folder is given and runs/ holds none: python report.py runs/grpo")
    runs = [read_run(folder, 1 / len(folders)) for folder in folders]
    names = [run.name for run in runs]
    runs = [run._replace(name=str(folder)) if names.count(run.name) > 1 else run
            for run, folder in zip(runs, folders, strict=True)]
    default = folders[0] if config.runs else Path("runs")
    out = Path(config.out or default / "report.html")
    if out.suffix != ".html":  # whatever it is, it would be replaced
        raise ValueError(f"--out {out}: expected the name of an .html file")
    temporary = out.with_name(f".tmp-{os.getpid()}-{out.name}")
    try:
        temporary.write_bytes(page(runs))
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)  # on a full disk even a piece of it is in the way
    return out


# -------------------------------------------------------------------------------------- the page

HEAD = """
<meta charset=utf-8><meta name=viewport content="width=device-width">
<meta http-equiv=Content-Security-Policy
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel=icon href="data:,">
<style>
:root { color-scheme: light dark; --card: color-mix(in srgb, CanvasText 4%, Canvas);
  --dim: color-mix(in srgb, CanvasText 65%, Canvas);
  --line: color-mix(in srgb, CanvasText 18%, Canvas); --good: #1d9560; --bad: #d8493d }
.c0 { --c: #3583db } .c1 { --c: #db6a1e } .c2 { --c: #1d9560 }
.c3 { --c: #a35fd1 } .c4 { --c: #ad8a12 } .c5 { --c: #d94a80 }
* { box-sizing: border-box; margin: 0 }
body { background: Canvas; font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
  max-width: 1180px; margin: auto; padding: 24px 16px 80px }
h1, h3 { font-size: 13px; color: var(--dim) } h2 { font-size: 19px; margin: 40px 0 10px }
small, label { font-size: 12.5px; color: var(--dim); font-weight: 400 }
.run, .verdict, summary { font-weight: 600 } .verdict { font-size: 20px }
.run i { display: inline-block; width: 10px; height: 10px; margin-right: 6px; background: var(--c) }
.good { color: var(--good) } .bad { color: var(--bad) } ul { list-style: none; padding: 0 }
li, summary { margin: 14px 0 }
.legend, form, #chips { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: end;
  margin-bottom: 10px }
table { border-collapse: collapse; font-size: 13.5px }
th, td { text-align: left; font-weight: 400; padding: 3px 12px 3px 0; vertical-align: top }
.charts { display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 262px), 1fr)) }
figure, .view { background: var(--card); border: 1px solid var(--line); padding: 12px 14px }
figcaption { display: flex; justify-content: space-between; flex-wrap: wrap }
.readout span { color: var(--c); font-size: 13px; margin-left: 10px }
svg { display: block; width: 100%; touch-action: pan-y }
svg text { font-size: 11px; fill: var(--dim) } .grid { stroke: var(--line) }
.raw, .line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linecap: round }
.faint { stroke-width: 1; opacity: .4 } .band { fill: var(--c); opacity: .14 }
label { display: grid; max-width: 100% } .slider { flex: 1 1 260px }
input, select, button { font: inherit; color: CanvasText; background: var(--card); min-width: 0;
  border: 1px solid var(--line); border-radius: 6px; padding: 2px 8px }
[type=number] { width: 84px } :focus-visible { outline: 3px solid var(--dim) }
#chips .right { border-color: var(--good) } #chips .wrong { border-color: var(--bad) }
#chips [aria-current] { background: CanvasText; color: Canvas }
.columns { display: grid; gap: 8px 26px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)) }
#prompt, .text { max-height: 75vh; overflow: auto }
#prompt, .part, pre { white-space: pre-wrap; unicode-bidi: isolate; margin-bottom: 10px }
.part { padding: 7px 12px; border-left: 3px solid var(--line) }
.answer { border-color: CanvasText; font-weight: 600 }
.tag { color: var(--dim); font: 12px ui-monospace, monospace }
.hidden { font-size: 0; unicode-bidi: isolate } .hidden::before { content: attr(data-code);
  font: 10.5px ui-monospace, monospace; color: var(--bad); border: 1px solid; padding: 0 3px }
</style>"""

BROWSER = """
<h2>Completions</h2><noscript>They are shown by a script, and scripts are off here.</noscript>
<form>
<label>Run <select id=run></select></label>
<label>Show <select id=which><option value=all>all<option value=right>right answers
<option value=wrong>wrong answers<option value=format>format broken
<option value=cut>cut at --max-new<option value=missing>reward missing
<option value=disagree>judge (yes from 0.5) and answer disagree
</select></label>
<label>Reward from <input id=low type=number step=any></label>
<label>to <input id=high type=number step=any></label>
<label>Containing <input id=words type=search></label>
<button type=button id=back aria-label="Previous completion">←</button>
<button type=button id=next aria-label="Next completion">→</button>
<label class=slider><span id=at></span><input id=slider type=range min=0></label>
<small><span id=status role=status></span><br>Keys: ← and →, with Shift the next step</small>
</form>
<small id=note></small>
<div id=chips role=group aria-label="Completions of this step"></div>
<div class=view id=view><h3>Prompt</h3><div id=prompt></div>
<div class=columns id=answers></div><table id=facts></table></div>"""

SCRIPT = r"""<script type=module>
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const make = (parent, tag, css = "", text = "") => parent.appendChild(
  Object.assign(document.createElement(tag), {className: css, textContent: text}));

// ---- values under the pointer, read off the lines
for (const svg of document.querySelectorAll("figure svg")) {
  const readout = svg.parentNode.querySelector(".readout"), ends = [...readout.childNodes];
  const {width, height} = svg.viewBox.baseVal, [left, right, top, bottom] = LIMITS;
  const [step0, step1, low, high] = svg.dataset.axes.split(" ").map(Number);
  svg.onpointerleave = () => readout.replaceChildren(...ends);
  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * width;
    readout.replaceChildren();
    for (const line of svg.querySelectorAll(".raw")) {
      const points = line.getAttribute("d").slice(1).split(/[ML]/).map(p => p.split(","));
      const [x, y] = points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
      const step = step0 + (x - left) / (width - left - right) * (step1 - step0);
      const value = high - (y - top) / (height - top - bottom) * (high - low);
      const text = `step ${Math.round(step)}: ${value.toPrecision(3)}`;
      make(readout, "span", line.classList[0], text);
    }
  };
}

// ---- completions are hostile text: text nodes only, and what would hide or reorder is named
const HIDDEN = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029]+/gu;
function put(node, text) {
  let at = 0;
  for (const {0: hidden, index} of text.matchAll(HIDDEN)) {
    const codes = [...hidden].slice(0, 8).map(c => "U+" + c.codePointAt().toString(16));
    node.append(text.slice(at, index));
    make(node, "span", "hidden", hidden).dataset.code = codes.join(" ");
    at = index + hidden.length;
  }
  node.append(text.slice(at));
}
function putCompletion(node, text) {
  let part = node;  // the node itself: outside of the tags
  for (const piece of text.split(/(<\/?(?:reasoning|answer)>)/i)) {
    const [, close, name] = /^<(\/?)(reasoning|answer)>$/i.exec(piece) ?? [];
    if (name && !close) part = make(node, "div", "part " + name.toLowerCase());
    if (name) make(part, "span", "tag", piece);
    else put(part === node && piece.trim() ? make(node, "div", "part") : part, piece);
    if (close) part = node;
  }
}

let run, samples, matches, steps, now;
const judge = s => s.rewards.judge ?? s.rewards.judge_correctness;  // 0 to 1
const WHICH = {
  all: s => true, right: s => s.correct === true, wrong: s => s.correct === false,
  format: s => s.format === false, cut: s => s.stop === "length",
  missing: s => Object.keys(s.errors).length > 0,
  disagree: s => judge(s) != null && s.correct != null && judge(s) >= 0.5 !== s.correct,
};
const RIGHT = {true: "right", false: "wrong"};
const brief = v => String(typeof v === "number" ? +v.toFixed(3) : v ?? "missing");
function open() {
  run = data.runs[$("run").value];
  samples = run.rows;
  $("which").value = "all";
  $("note").textContent = run.note;
  filter(samples.findIndex(s => s.at === samples.at(-1).at));
}
function filter(from) {  // and go on from the sample of that number
  const [low, high, words] = ["low", "high", "words"].map(id => $(id).value.toLowerCase());
  const text = s => (data.prompts[s.prompt] + "\n" + s.completion).toLowerCase();
  matches = [...samples.keys()].filter(i => {
    const s = samples[i];
    return WHICH[$("which").value](s) && (!low || s.reward >= +low) && (!high || s.reward <= +high)
      && (!words || text(s).includes(words));
  });
  steps = [...new Set(matches.map(i => samples[i].at))];
  $("slider").max = steps.length - 1;
  const next = matches.findIndex(i => i >= from);
  show(next < 0 ? matches.length - 1 : next);
}
function show(position) {
  now = Math.max(0, Math.min(matches.length - 1, position));
  const s = samples[matches[now]];
  $("status").textContent = (s ? `${now + 1} of ${matches.length}` : "no") + " completions"
    + (matches.length < samples.length ? ` that match, of ${samples.length}` : "");
  $("view").hidden = !s;
  for (const id of ["chips", "prompt", "answers", "facts"]) $(id).replaceChildren();
  if (!s) return;
  $("slider").value = steps.indexOf(s.at);
  $("slider").ariaValueText = $("at").textContent = `${run.unit} ${s.at}`;
  for (let i = Math.max(0, now - 40); i <= now + 40; i++) {
    const other = samples[matches[i]];
    if (other?.at !== s.at) continue;
    const text = brief(other.reward ?? other.mode);
    const chip = make($("chips"), "button", RIGHT[other.correct], text);
    if (i === now) chip.ariaCurrent = "true";
    chip.onclick = () => show(i);
  }
  put($("prompt"), data.prompts[s.prompt]);
  for (const [other, answer] of [[run, s], ...beside(s)]) {
    const column = make($("answers"), "div"), right = RIGHT[answer.correct] ?? "";
    put(make(column, "h3"), `${other.name}, ${other.unit} ${answer.at} ${right}`);
    putCompletion(make(column, "div", "text"), answer.completion ?? "");
  }
  const {prompt, completion, at, rewards, errors, ...facts} = s;
  for (const name in rewards) facts["reward: " + name] = rewards[name];
  for (const name in errors) facts[name + ", why"] = errors[name];
  for (const name in facts) {
    const row = $("facts").insertRow();
    put(row.insertCell(), name);
    put(row.insertCell(), brief(facts[name]));
  }
}
function beside(s) {  // answers to the same prompt: of the other runs, else of an earlier step
  const same = run => run.rows.filter(row => row.prompt === s.prompt);
  const best = rows => rows.findLast(row => row.mode === s.mode) ?? rows.at(-1);
  const others = data.runs.filter(other => other !== run && same(other).length);
  const earlier = same(run).find(row => row.at < s.at);
  return others.length || !earlier ? others.map(r => [r, best(same(r))]) : [[run, earlier]];
}
const goTo = step => step in steps && show(matches.findIndex(i => samples[i].at === steps[step]));
if (data.runs.length) {
  $("run").replaceChildren(...data.runs.map((run, i) => new Option(run.name, i)));
  $("run").onchange = open;
  for (const id of ["which", "low", "high", "words"])
    $(id).oninput = () => filter(matches[now] ?? 0);
  document.forms[0].onsubmit = () => false;
  $("slider").oninput = () => goTo(+$("slider").value);
  $("back").onclick = () => show(now - 1);
  $("next").onclick = () => show(now + 1);
  document.onkeydown = event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!by || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.matches("input, select")) return;  // they have their own use for arrows
    event.shiftKey ? goTo(+$("slider").value + by) : show(now + by);
  };
  open();
}
</script>"""

if __name__ == "__main__":
    command(lambda: print(main(tyro.cli(Config, description=introduction(__doc__)))))
