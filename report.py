"""Run folders -> one HTML file: did it learn, how did it go, and what does it write now?

    python report.py runs/grpo                     # runs/grpo/report.html
    python report.py runs/grpo runs/sft runs/eval  # overlaid; the file lies in the first folder
    python report.py                               # all run folders in runs/: runs/report.html

The training scripts write the same file now and then and when they end, for whatever reason.

1. The page is a function of the folders' files alone: no clock, no network, and opening it fetches
   nothing. Lines that a live or killed run left torn are skipped.
2. Curves are drawn here, as SVG, so that they show where scripts are off (the preview of a mail).
   The page's script shows values under the pointer and pages through the completions.
3. Figures of a training metric are means of the first and the last tenth of its steps. "Learned" is
   said only if the last evaluation's accuracy is above the first one's by a 95 % interval of the
   difference: Newcombe's (Statistics in Medicine 17, 1998, method 10) from eval.py's Wilson
   intervals, taken as if of different problems, which is cautious.
4. The page is bounded: N_SAMPLES completions and N_BYTES over all runs (whole steps are left out,
   evenly), N_CHARS of a text, N_POINTS of a curve. The page says what is left out.
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
import sys
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import tyro

from runs import good_rows

N_SAMPLES, N_BYTES, N_CHARS, N_POINTS = 5_000, 4_000_000, 20_000, 400
FILES = ("metrics.jsonl", "samples.jsonl", "results.json", "config.json")
CURVES = {  # metric -> (title, unit), in the page's order; other metrics are folded up
    "eval_accuracy": ("Held-out accuracy", "%"), "eval_loss": ("Held-out loss", ""),
    "reward": ("Reward", ""), "eval_pair_accuracy": ("Held-out pairs", "%"),
    "eval_margin": ("Held-out margin", ""), "accuracy": ("Accuracy", "%"),
    "eval_format": ("Held-out format", "%"), "format": ("Format", "%"),
    "rewards/": ("Reward: ", ""), "completions/mean_length": ("Length", "tokens"),
    "completions/clipped_ratio": ("Cut at --max-new", "%"), "entropy": ("Entropy", "nats"),
    "kl": ("KL to the start", "nats"), "frac_reward_zero_std": ("Groups of equal rewards", "%"),
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
    out: str | None = None
    """The file to write; default: report.html in the first folder, or runs/report.html."""


# --------------------------------------------------------------------------------------- reading


class Run(NamedTuple):
    name: str
    config: dict
    steps: dict[int, dict]  # step -> its metrics, those of an evaluation after it included
    results: dict  # of eval.py
    samples: dict  # what the page is given: unit, note, rows
    finished: bool


def loads(text: bytes) -> dict:
    """A JSON object; {} for torn text and for other values."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def number(value) -> float | None:
    """None for anything but a number that can be added up and drawn: NaN, inf, a string."""
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    return value if ok and abs(value) < 1e100 else None


def whole(value) -> int | None:
    """A step's or a problem's number, if it is one."""
    return int(value) if number(value) is not None and value == int(value) else None


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() and (folder / name).stat().st_size for name in FILES[:3])


def read_run(folder: Path, share: float = 1.0) -> Run:
    """`share` is this run's part of the samples that a page may hold."""
    if not is_run(folder):
        raise ValueError(f"{folder} is no run folder: nothing in {', '.join(FILES[:3])}")
    metrics, samples, *objects = (folder / name for name in FILES)
    results, config = (loads(file.read_bytes()) if file.is_file() else {} for file in objects)
    steps = {}
    for row in good_rows(metrics):
        if (step := whole(row.pop("step", None))) is not None:
            steps.setdefault(step, {}).update({k: number(v) for k, v in row.items()})
    steps = dict(sorted(steps.items()))
    at_end = max(steps, default=0) >= (number(config.get("steps")) or 0)
    finished = at_end and (folder / "final").is_dir()
    return Run(folder.resolve().name, config, steps, results, thin(samples, share), finished)


def thin(file: Path, share: float) -> dict:
    """The rows of samples.jsonl for the page: all, or those of every n-th step or problem."""
    groups: dict[int, list[dict]] = {}
    unit, n_all = "step", 0
    for row in good_rows(file):
        key = "problem" if "problem" in row else "step"
        if (at := whole(row.get(key))) is not None:
            unit, n_all = key, n_all + 1
            groups.setdefault(at, []).append(sample(row) | {"at": at})
    price = lambda row: max(1 / N_SAMPLES, len(json.dumps(row)) / N_BYTES) / share
    prices = {at: sum(map(price, rows)) for at, rows in sorted(groups.items())}
    kept, stride, spent, rows = list(prices), 1, 0.0, []
    while len(kept) > 2 and sum(prices[at] for at in kept) > 1 + 1e-9:
        stride += 1  # the first and the last stay
        kept = [at for i, at in enumerate(prices) if not i or (len(prices) - 1 - i) % stride == 0]
    for row in (row for at in kept for row in groups[at]):
        spent += price(row)
        if spent <= 1 + 1e-9:
            rows.append(row)
    n_cut, note = sum(row.pop("cut") for row in rows), ""
    if len(rows) < n_all:
        steps = f" ({len(kept):,} of {len(groups):,} {unit}s)" if stride > 1 else ""
        note = f"Here are {len(rows):,} of {n_all:,} completions{steps}, to keep the file small. "
    if n_cut:
        note += f"{n_cut:,} have texts cut in the middle to {N_CHARS:,} characters."
    return {"unit": unit, "note": note, "rows": rows}


def sample(row: dict) -> dict:
    """A row of samples.jsonl as the page gets it; what is absent or null stays absent."""
    out = {"cut": False}
    for key in ("prompt", "completion", "gold", "stop", "mode", "domain"):
        if (value := row.get(key)) is None:
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if (left_out := len(text) - N_CHARS) > 0:
            half, out["cut"] = N_CHARS // 2, True
            text = f"{text[:half]}\n[… {left_out:,} characters …]\n{text[-half:]}"
        out[key] = text
    out |= {k: row[k] for k in ("correct", "format") if isinstance(row.get(k), bool)}
    numbers = {k: number(row.get(k)) for k in ("reward", "advantage", "group", "n_tokens")}
    out |= {k: v for k, v in numbers.items() if v is not None}
    parts = lambda key: found.items() if isinstance(found := row.get(key), dict) else ()
    return out | {"rewards": {k: number(v) for k, v in parts("rewards")},
                  "errors": {k: str(v)[:300] for k, v in parts("errors")}}


# --------------------------------------------------------------------------------------- figures


def curve(run: Run, name: str) -> list[tuple[int, float | None]]:
    """(step, value) of its kind of step, training or evaluation; None where it has no value."""
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
    """(label, rate, low, high): the first and last evaluation of a run, or what eval.py found."""
    rows = [(step, row) for step, row in run.steps.items() if row.get("eval_accuracy") is not None]
    out = [(f"step {step}", *(row.get("eval_accuracy" + end) for end in ("", "_low", "_high")))
           for step, row in rows[:1] + rows[1:][-1:]]
    intervals = run.results.get("intervals")
    for name in run.results:
        rate = number(run.results[name])
        if re.fullmatch(r"(pass|maj)@\d+(_sampled)?", name) and rate is not None:
            ends = intervals.get(name) if isinstance(intervals, dict) else None
            low, high = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
            out.append((name.replace("_", ", "), rate, number(low), number(high)))
    return out


def verdict(run: Run) -> tuple[str, str, str]:
    """(class, in a word, in a sentence): did it learn?"""
    found = rates(run)
    if len(found) > 1 and not run.results:
        (_, first, low, high), (_, last, low2, high2) = found
        what = f"held-out accuracy {show(first, '%')} % → {show(last, '%')} %"
        if None in (low, high, low2, high2):
            return "", "rose" if last > first else "did not rise", what
        least = last - first - math.hypot(last - low2, high - first)
        most = last - first + math.hypot(high2 - last, first - low)
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

W, H, LEFT, RIGHT, TOP, BOTTOM = 280, 140, 46, 8, 8, 20
N_COLOURS = 8
esc = lambda text: html.escape(str(text))


def tag(run: int, name: str) -> str:
    return f'<span class="run c{run % N_COLOURS}"><i></i><bdi>{esc(name)}</bdi></span>'


def ticks(low: float, high: float, n: int = 4, least: float = 0.0) -> list[tuple[float, str]]:
    """At most n + 1 round numbers, `least` or more apart: 0.27 to 0.71 -> 0.3 0.4 0.5 0.6 0.7."""
    step = 10.0 ** math.floor(math.log10((high - low) / n))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= n)
    step = max(step, least)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    form = f",.{digits}f" if max(abs(low), abs(high)) < 1e5 and digits < 5 else ".3g"
    at = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(i * step, f"{i * step:{form}}") for i in at]


def means(points: list, centres: range, half: int) -> list:
    """Means over `half` neighbours on both sides of some; what is unknown there stays unknown."""
    out = []
    for i in centres:
        values = [v for _, v in points[max(0, i - half) : i + half + 1] if v is not None]
        out.append((points[i][0], None if points[i][1] is None else fmean(values)))
    return out


def path(points: list, x, y) -> str:
    """A line through what is known; a point alone is a line to itself, which shows as a dot."""
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
    limits = {i: [[(s, row.get(name + end)) for s, row in runs[i].steps.items()
                   if row.get(name + end) is not None] for end in ("_low", "_high")]
              for i in curves}
    lines = [*curves.values(), *(line for pair in limits.values() for line in pair)]
    factor = 100 if unit == "%" else 1
    values = [v * factor for line in lines for _, v in line if v is not None]
    spread, size = max(values) - min(values), max(map(abs, values))
    pad = 0.06 * spread if spread > 1e-6 * size else 0.1 * size or 1.0  # else: but for rounding
    low = min(values) - pad if min(values) < 0 else max(0.0, min(values) - pad)
    high = max(values) + pad if unit != "%" else min(max(values) + pad, max(100.0, size))
    x = lambda s: LEFT + (s - span[0]) / (span[1] - span[0]) * (W - LEFT - RIGHT)
    y = lambda v: TOP + (high - v * factor) / (high - low) * (H - TOP - BOTTOM)
    out, readout = [], []
    for v, text in ticks(low, high):
        at = y(v / factor)
        out.append(f'<path class=grid d="M{LEFT} {at:.1f}H{W - RIGHT}"/><text x={LEFT - 5} '
                   f"y={at + 3.5:.1f} text-anchor=end>{text}</text>")
    out += [f"<text x={x(s):.1f} y={H - 5} text-anchor=middle>{t}</text>"
            for s, t in ticks(*span, least=1)]
    for i, points in curves.items():
        css, k = f"c{i % N_COLOURS}", -(-len(points) // N_POINTS)
        if all(limits[i]):
            there, back = limits[i][0], limits[i][1][::-1]
            out.append(f'<path class="{css} band" d="{path(there + back, x, y)}"/>')
        raw = means(points, range(k // 2, len(points), k), k // 2)
        noisy = len(points) >= 40
        out.append(f'<path class="{css} raw{" faint" * noisy}" d="{path(raw, x, y)}"/>')
        if noisy:
            smooth = means(points, range(k // 2, len(points), k), len(points) // 40)
            out.append(f'<path class="{css} line" d="{path(smooth, x, y)}"/>')
        if name.startswith("eval_"):
            out += [f"<circle class={css} cx={x(s):.1f} cy={y(v):.2f} r=2.6 />"
                    for s, v in raw if v is not None]
        first, last = (show(v, unit) for v in ends(points, name))
        readout.append(f"<span class={css}>{first} → <b>{last}</b></span>")
    spoken = esc(f"{title}: " + re.sub("<.*?>", "", "; ".join(readout)))
    axes = f"{span[0]} {span[1]} {low:.6g} {high:.6g}"
    return (f"<figure><figcaption><h3>{esc(title)} <small>{unit}</small></h3><span class=readout>"
            f'{"".join(readout)}</span></figcaption><svg viewBox="0 0 {W} {H}" data-axes="{axes}" '
            f'role=img aria-label="{spoken}">{"".join(out)}<path class=cursor /></svg></figure>'
            )


def header(runs: list[Run]) -> str:
    """The answer in one line a run."""
    items = []
    for i, run in enumerate(runs):
        css, word, sentence = verdict(run)
        about = [str(run.config[k]) for k in ("model", "data") if run.config.get(k)]
        if run.steps:
            steps, spent = number(run.config.get("steps")), curve(run, "step_s")
            about.append(f"step {max(run.steps)}" + (f" of {steps}" if steps else ""))
            about.append("finished" if run.finished else "not finished")
            about.append(f"{sum(v or 0.0 for _, v in spent) / 60:.1f} minutes of steps")
        about = esc(" · ".join(about))
        items.append(f"<li>{tag(i, run.name)} <small>{about}</small><p class=verdict>"
                     f'<b class="{css}">{word.capitalize()}:</b> {esc(sentence)}</p>')
    return f"<header><h1>Did it learn?</h1><ul>{''.join(items)}</ul></header>"


def forest(runs: list[Run]) -> str:
    """Rates with their intervals, as dots and whiskers on one axis from 0 to 100 %."""
    rows = []
    for i, run in enumerate(runs):
        for label, rate, low, high in rates(run):
            known = None not in (low, high)
            text = f"[{show(low, '%')}, {show(high, '%')}]" if known else "no interval"
            low, high = (low, high) if known else (rate, rate)
            rows.append(f"<tr><th>{tag(i, run.name)} {esc(label)}<td class=bar><div class=c"
                        f'{i % N_COLOURS}><s style="left:{low:.2%};width:{high - low:.2%}"></s>'
                        f'<b style="left:{rate:.2%}"></b></div><td class=n>{show(rate, "%")} %'
                        f"<td class=n><small>{text}</small>")
    return ("<h2>Right answers to held-out problems</h2><p><small>With 95 % intervals; from 0 to "
            f"100 %, a line every 10.</small></p><table class=forest>{''.join(rows)}</table>"
            if rows else "")


def charts(runs: list[Run]) -> str:
    """All metrics, those of CURVES first; a reward that is the accuracy again has no card."""
    names = sorted({k for run in runs for row in run.steps.values() for k in row})
    names = [k for k in names if not k.endswith(("_low", "_high"))]
    cards, hidden = {}, set()  # metric -> [title, unit]
    for name, (title, unit) in CURVES.items():
        parts = [k for k in names if name[-1] == "/" and re.fullmatch(f"{name}.*/mean", k)]
        for part in parts:
            label = title + part[len(name) : -5]
            equal = [k for k in ("reward", "accuracy", "format") if k in names
                     and all(curve(run, k) == curve(run, part) for run in runs)]
            if equal:
                cards[equal[0]][0] += f" = {label}"
                hidden.add(part)
            else:
                cards[part] = [label, unit]
        if not parts:
            cards[name] = [title, unit]
    rest = {k: [k, ""] for k in names if k not in cards and k not in hidden}
    steps = [step for run in runs for step in run.steps] or [0]
    span = min(steps), max(max(steps), min(steps) + 1)
    shown, rest = ("".join(chart(runs, name, *card, span) for name, card in part.items())
                   for part in (cards, rest))
    if not shown + rest:
        return ""
    legend = "".join(tag(i, run.name) for i, run in enumerate(runs))
    legend = f"<p class=legend>{legend}</p>" if len(runs) > 1 else ""
    more = f"<details><summary>All other metrics</summary><div class=charts>{rest}</div></details>"
    return ("<section><h2>Curves</h2><p><small>Over the steps. Figures of training are means of "
            "the first → last tenth of its steps, bold lines running means.</small></p>"
            f"{legend}<div class=charts>{shown}</div>{more if rest else ''}</section>")


SCRIPTS = {"group": "train_grpo.py", "beta": "train_simpo.py", "batch_rows": "train_sft.py",
           "greedy": "eval.py"}  # a field that no earlier script has -> the script


def command(config: dict) -> str:
    """The command that repeats a run, with every setting that was not left empty."""
    words = ["python", next((script for field, script in SCRIPTS.items() if field in config), "")]
    for name, value in config.items():
        flag = "--" + name.replace("_", "-")
        if name == "code" or " " in name or value is None or (value is False and name != "greedy"):
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-"))
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words) if words[1] else ""


def settings(runs: list[Run]) -> str:
    """The runs' settings: those that differ in sight, the others and the commands folded up."""
    tables = [{k: v for k, v in run.config.items() if k != "code"} for run in runs]
    for run, table in zip(runs, tables, strict=True):
        code = run.config.get("code")
        table |= {f"code: {k}": v for k, v in code.items()} if isinstance(code, dict) else {}
    keys = list(dict.fromkeys(k for table in tables for k in table))
    differ = [k for k in keys if len({json.dumps(table.get(k)) for table in tables}) > 1]
    text = lambda value: f"<bdi>{'' if value is None else esc(value)}</bdi>"
    rows = "".join(f"<tr><th>{esc(k)}" + "".join(f"<td>{text(table.get(k))}" for table in tables)
                   for k in differ)
    head = "<tr><th>" + "".join(f"<th>{tag(i, run.name)}" for i, run in enumerate(runs))
    same = "".join(f"<span><small>{esc(k)}</small> {text(tables[0][k])}</span>" for k in keys
                   if k not in differ and tables[0].get(k) not in (None, ""))
    commands = "".join(f"<p>{tag(i, run.name)}<pre>{esc(line)}</pre>" for i, run in enumerate(runs)
                       if (line := command(run.config)))
    if not keys:
        return ""
    what = "Settings that are equal" if differ else "All settings"
    return ("<section><h2>Settings</h2>" + f"<table class=differs>{head}{rows}</table>" * bool(rows)
            + f"<details><summary>{what}, and the command that repeats the run</summary>"
            f"<p class=legend>{same}</p>{commands}</details></section>")


def page(runs: list[Run]) -> bytes:
    prompts: dict[str, int] = {}
    for run in runs:
        for row in run.samples["rows"]:  # the completions of a group share one text
            row["prompt"] = prompts.setdefault(row.get("prompt", ""), len(prompts))
    data = {
        "prompts": list(prompts),
        "runs": [run.samples | {"name": run.name} for run in runs if run.samples["rows"]],
    }
    data = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    body = (header(runs) + forest(runs) + charts(runs) + BROWSER * bool(prompts)
            + settings(runs))
    script = SCRIPT.replace("LIMITS", str([LEFT, RIGHT, TOP, BOTTOM]))
    title = esc(", ".join(run.name for run in runs))
    text = (f"<!doctype html><html lang=en><title>{title}</title>{HEAD}<main>{body}</main>"
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
:root { color-scheme: light dark; --bg: light-dark(#fafaf8, #131517);
  --card: light-dark(#fff, #1b1e21); --ink: light-dark(#1b1c1d, #e7e8e6);
  --dim: light-dark(#686c70, #9aa0a5); --line: light-dark(#e2e2dd, #31363a);
  --good: light-dark(#17794a, #57c78e); --bad: light-dark(#b3362b, #f2857a);
  --c: var(--dim) }
.c0 { --c: light-dark(#1f6fc4, #6cb0f7) } .c1 { --c: light-dark(#cf5a12, #f59a58) }
.c2 { --c: light-dark(#11835c, #4fc998) } .c3 { --c: light-dark(#9343c0, #cf93f2) }
.c4 { --c: light-dark(#97750a, #d9b84a) } .c5 { --c: light-dark(#c02a68, #f57fb0) }
.c6 { --c: light-dark(#147f94, #5bc8dd) } .c7 { --c: light-dark(#6a6f76, #a9afb5) }
* { box-sizing: border-box; margin: 0 }
body { background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
main { max-width: 1180px; margin: auto; padding: 24px 16px 80px }
h1, h3 { font-size: 13px; color: var(--dim) } h2 { font-size: 19px; margin: 40px 0 10px }
small { font-size: 12.5px; color: var(--dim); font-weight: 400 }
ul { list-style: none; padding: 0 } li { margin-top: 14px }
.run { font-weight: 600; font-size: 13.5px }
.run i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px;
  background: var(--c) }
.verdict { font-size: 26px; line-height: 1.3; font-weight: 600 } .verdict b { color: var(--dim) }
li:not(:only-child) .verdict { font-size: 18px }
.good, .verdict .good { color: var(--good) } .bad, .verdict .bad { color: var(--bad) }
.legend { display: flex; flex-wrap: wrap; gap: 0 20px; align-items: baseline }
section > .legend { position: sticky; top: 0; background: var(--bg); padding: 6px 0; z-index: 1 }
table { border-collapse: collapse; width: 100%; font-size: 13.5px }
th, td { text-align: left; font-weight: 400; padding: 3px 12px 3px 0; vertical-align: top }
.forest th, .n { white-space: nowrap; width: 1% } .n, #facts td + td { text-align: right }
.bar div { position: relative; height: 20px; border-left: 1px solid var(--line);
  background: repeating-linear-gradient(90deg, transparent 0 calc(10% - 1px), var(--line) 0 10%) }
.bar s, .bar b { position: absolute; top: 8px; height: 4px; background: var(--c); opacity: .5 }
.bar b { top: 5px; width: 10px; height: 10px; margin-left: -5px; border-radius: 5px; opacity: 1 }
.charts { display: grid; gap: 10px; margin-top: 8px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 262px), 1fr)) }
figure, .view { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px; min-width: 0 }
figure { display: flex; flex-direction: column }
figcaption { display: flex; justify-content: space-between; flex-wrap: wrap; gap: 0 12px }
figcaption h3 { color: var(--ink) }
.readout { font-size: 13px; display: flex; flex-wrap: wrap; gap: 0 10px; color: var(--dim) }
.readout [class] { color: var(--c) }
svg { display: block; width: 100%; margin-top: auto; touch-action: pan-y }
svg text { font-size: 11px; fill: var(--dim) } .grid { stroke: var(--line) }
.raw, .line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round } .faint { stroke-width: 1; opacity: .4 }
.band { fill: var(--c); opacity: .14 } circle { fill: var(--c) }
.cursor { stroke: var(--dim); stroke-dasharray: 2 3 }
summary { cursor: pointer; margin: 18px 0 10px; font-weight: 600 }
form { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: end; margin-bottom: 10px }
label { font-size: 12.5px; color: var(--dim); display: grid; gap: 2px; max-width: 100% }
input, select, button { font: inherit; font-size: 14px; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; padding: 5px 8px; min-width: 0 }
[type=number] { width: 84px } [type=range] { padding: 0; accent-color: var(--ink) }
button { cursor: pointer } :disabled { opacity: .5; cursor: default }
:focus-visible { outline: 3px solid var(--dim); outline-offset: 2px }
.slider { flex: 1 1 260px } #chips { display: flex; flex-wrap: wrap; gap: 5px; margin: 10px 0 }
#chips button { font-size: 13px; padding: 2px 9px; border-left: 4px solid var(--line) }
#chips .right { border-left-color: var(--good) } #chips .wrong { border-left-color: var(--bad) }
#chips [aria-current] { background: var(--ink); color: var(--bg) }
.columns { display: grid; grid-template-columns: minmax(0, 1fr) minmax(170px, 260px);
  gap: 8px 26px; align-items: start }
#answers { grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr)) }
#prompt, .text { max-height: 75vh; overflow: auto }
#prompt, .part { white-space: pre-wrap; unicode-bidi: isolate; margin-bottom: 10px }
pre { white-space: pre-wrap; font-size: 12.5px }
.differs { width: auto } .differs td { font-weight: 600 }
.part { padding: 7px 12px; border-left: 3px solid var(--line); margin: 5px 0 }
.answer { border-color: var(--ink); font-weight: 600;
  background: color-mix(in srgb, var(--ink) 7%, transparent) }
.tag { color: var(--dim); font: 12px ui-monospace, monospace }
.hidden { font-size: 0; unicode-bidi: isolate }
.hidden::before { content: attr(data-code); font: 10.5px ui-monospace, monospace; color: var(--bad);
  border: 1px solid; border-radius: 3px; margin: 0 1px; padding: 0 3px }
@media (max-width: 640px) { .columns { grid-template-columns: minmax(0, 1fr) }
  .verdict { font-size: 20px } .forest small { display: none } }
</style>"""

BROWSER = """
<h2>Completions</h2><noscript>They are shown by a script, and scripts are off here.</noscript>
<form>
<label>Run <select id=run></select></label>
<label>Show <select id=which><option value=all>all<option value=right>right answers
<option value=wrong>wrong answers<option value=format>format broken
<option value=missing>reward missing<option value=disagree>judge (yes from 0.5) and answer disagree
</select></label>
<label>Stop reason <select id=stop></select></label>
<label>Reward from <input id=low type=number step=any></label>
<label>to <input id=high type=number step=any></label>
<label>Containing <input id=words type=search></label>
</form>
<form>
<label class=slider><span id=at></span><input id=slider type=range min=0></label>
<button type=button id=back aria-label="Previous completion">←</button>
<button type=button id=next aria-label="Next completion">→</button>
<small><span id=status role=status></span><br>Keys: ← and →, with Shift the next step</small>
</form>
<small id=note></small>
<div id=chips role=group aria-label="Completions of this step"></div>
<div class=view id=view><h3>Prompt</h3><div id=prompt></div>
<div class=columns><div class=columns id=answers></div><table id=facts></table></div></div>"""

SCRIPT = r"""<script type=module>
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const make = (tag, css, text) =>
  Object.assign(document.createElement(tag), {className: css, textContent: text});

// ---- values under the pointer, read off the lines
for (const figure of document.querySelectorAll("figure")) {
  const readout = figure.querySelector(".readout"), cursor = figure.querySelector(".cursor");
  const svg = figure.querySelector("svg"), ends = [...readout.childNodes];
  const {width, height} = svg.viewBox.baseVal, [left, right, top, bottom] = LIMITS;
  const [step0, step1, low, high] = svg.dataset.axes.split(" ").map(Number);
  svg.onpointerleave = () => { readout.replaceChildren(...ends); cursor.removeAttribute("d"); };
  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * width;
    readout.replaceChildren();
    for (const line of svg.querySelectorAll(".raw")) {
      const points = line.getAttribute("d").slice(1).split(/[ML]/).map(p => p.split(","));
      const [x, y] = points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)
        .map(Number);
      const step = step0 + (x - left) / (width - left - right) * (step1 - step0);
      const value = high - (y - top) / (height - top - bottom) * (high - low);
      const text = `step ${Math.round(step)}: ${value.toPrecision(3)}`;
      readout.append(make("span", line.classList[0], text));
      cursor.setAttribute("d", `M${x} ${top}V${height - bottom}`);
    }
  };
}

// ---- completions are hostile text: text nodes only, and what would hide or reorder is named
const HIDDEN = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029]+/gu;
function put(node, text) {
  let at = 0;
  for (const {0: hidden, index} of text.matchAll(HIDDEN)) {
    const codes = [...hidden].slice(0, 8).map(c => "U+" + c.codePointAt().toString(16));
    const span = make("span", "hidden", hidden);
    span.dataset.code = codes.join(" ") + (hidden.length > 16 ? " …" : "");
    node.append(text.slice(at, index), span);
    at = index + hidden.length;
  }
  node.append(text.slice(at));
}
function putCompletion(node, text) {
  let part = node;  // the node itself: outside of the tags
  for (const piece of text.split(/(<\/?(?:reasoning|answer)>)/i)) {
    const [, close, name] = /^<(\/?)(reasoning|answer)>$/i.exec(piece) ?? [];
    if (name && !close) part = node.appendChild(make("div", "part " + name.toLowerCase(), ""));
    if (name) part.append(make("span", "tag", piece));
    else if (part !== node || !piece.trim()) put(part, piece);
    else put(node.appendChild(make("div", "part", "")), piece);
    if (close) part = node;
  }
}

let run, samples, steps, matches, now;
const judge = s => s.rewards.judge ?? s.rewards.judge_correctness;  // 0 to 1
const WHICH = {
  all: s => true, right: s => s.correct === true, wrong: s => s.correct === false,
  format: s => s.format === false, missing: s => Object.keys(s.errors).length > 0,
  disagree: s => judge(s) != null && s.correct != null && judge(s) >= 0.5 !== s.correct,
};
function open() {
  run = data.runs[$("run").value];
  samples = run.rows;
  steps = [...new Set(samples.map(s => s.at))];
  const stops = [...new Set(samples.map(s => s.stop ?? ""))].filter(Boolean);
  $("stop").replaceChildren(new Option("any", ""), ...stops.map(s => new Option(s)));
  for (const option of $("which").options) option.disabled = !samples.some(WHICH[option.value]);
  $("which").value = "all";
  $("slider").max = steps.length - 1;
  $("note").textContent = run.note;
  filter(samples.findIndex(s => s.at === steps.at(-1)));
}
function filter(from) {  // and go on from the sample of that number
  const [low, high, stop, words] = ["low", "high", "stop", "words"].map(id => $(id).value);
  matches = [...samples.keys()].filter(i => {
    const s = samples[i];
    return WHICH[$("which").value](s) && (!stop || s.stop === stop)
      && (!low || s.reward >= +low) && (!high || s.reward <= +high) && (!words ||
      (data.prompts[s.prompt] + "\n" + s.completion).toLowerCase().includes(words.toLowerCase()));
  });
  const next = matches.findIndex(i => i >= from);
  show(next < 0 ? matches.length - 1 : next);
}
function show(position) {
  now = Math.max(0, Math.min(matches.length - 1, position));
  const s = samples[matches[now]], show3 = v => v == null ? "missing" : String(+v.toFixed(3));
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
    const css = {true: "right", false: "wrong"}[other.correct] ?? "";
    const name = "advantage" in other ? "missing" : other.mode ?? `#${i + 1}`;
    const text = "reward" in other ? show3(other.reward) : name;
    const chip = $("chips").appendChild(make("button", css, text));
    if (css) chip.title = `${css} answer`;
    if (i === now) chip.ariaCurrent = "true";
    chip.onclick = () => { show(i); document.querySelector("[aria-current]").focus(); };
  }
  put($("prompt"), data.prompts[s.prompt]);
  for (const [other, answer] of [[run, s], ...beside(s)]) {
    const column = $("answers").appendChild(make("div", "", ""));
    const title = `${other.name}, ${other.unit} ${answer.at}`
      + ({true: ": right", false: ": wrong"}[answer.correct] ?? "");
    put(column.appendChild(make("h3", "", "")), title);
    putCompletion(column.appendChild(make("div", "text", "")), answer.completion ?? "");
  }
  const facts = {
    answer: s.correct == null ? null : s.correct ? "right" : "wrong", expected: s.gold,
    format: s.format == null ? null : s.format ? "strict" : "broken",
    reward: "advantage" in s || "reward" in s ? show3(s.reward) : null,
    ...Object.fromEntries(Object.entries(s.rewards).map(([k, v]) => ["· " + k, show3(v)])),
    ...Object.fromEntries(Object.entries(s.errors).map(([k, v]) => [k + ", why", v])),
    advantage: "advantage" in s ? show3(s.advantage) : null, stop: s.stop, tokens: s.n_tokens,
    group: s.group, mode: s.mode, domain: s.domain,
  };
  for (const [name, value] of Object.entries(facts)) {
    if (value == null) continue;
    const row = $("facts").insertRow();
    put(row.insertCell(), name);
    put(row.insertCell(), String(value));
    row.cells[1].className = {right: "good", wrong: "bad"}[value] ?? "";
  }
}
function beside(s) {  // answers to the same prompt: of the other runs, else of an earlier step
  const found = [];
  if (!data.prompts[s.prompt]) return found;
  for (const other of data.runs.filter(other => other !== run)) {
    const rows = other.rows.filter(row => row.prompt === s.prompt);
    const answer = rows.findLast(row => row.mode === s.mode) ?? rows.at(-1);
    if (answer) found.push([other, answer]);
  }
  const earlier = run.rows.find(row => row.prompt === s.prompt && row.at < s.at);
  return found.length || !earlier ? found : [[run, earlier]];
}
function go(to, by) {  // to the first match at or beyond a step
  for (let at = to; at in steps; at += by) {
    const first = matches.findIndex(i => samples[i].at === steps[at]);
    if (first >= 0) return show(first);
  }
  show(now);
}
if (data.runs.length) {
  const here = () => steps.indexOf(samples[matches[now]]?.at);
  $("run").replaceChildren(...data.runs.map((run, i) => new Option(run.name, i)));
  $("run").onchange = open;
  for (const id of ["which", "stop", "low", "high", "words"])
    $(id).oninput = () => filter(matches[now] ?? 0);
  for (const form of document.forms) form.onsubmit = () => false;
  $("slider").oninput = () => go(+$("slider").value, +$("slider").value < here() ? -1 : 1);
  $("back").onclick = () => show(now - 1);
  $("next").onclick = () => show(now + 1);
  document.onkeydown = event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!by || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.matches("input, select")) return;  // they have their own use for arrows
    event.preventDefault();
    event.shiftKey ? go(here() + by, by) : show(now + by);
  };
  open();
}
</script>"""

if __name__ == "__main__":
    try:
        print(main(tyro.cli(Config, description=__doc__)))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
