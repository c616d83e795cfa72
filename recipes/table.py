"""Prints the stages of recipe runs as one table: python recipes/table.py runs/NAME ...

Accuracy, format and length are those of eval.py's greedy answers, maj@8 is of eight samples.
Minutes are the wall-clock time of a stage's commands over all starts, with loading and compiling; a
start that was killed together with the script is not counted. Traces and pairs count to the stage
that learns from them. The minutes of eval.py count to no stage.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import disk  # noqa: E402


def rows(folder: Path) -> list[tuple[str, float, dict]]:
    """(stage, minutes, results) of each evaluated stage, in the order they ran."""
    seconds, noted = {}, folder / "seconds"
    for line in noted.read_text().splitlines() if noted.exists() else []:
        name, _, s = line.partition(" ")
        if s.isdecimal():  # not a torn line
            seconds[name] = seconds.get(name, 0) + int(s)
    out, waiting = [], 0
    for name in ["start", *seconds]:
        waiting += seconds.get(name, 0)
        file = folder / f"eval-{name}" / "results.json"
        if file.exists():
            results = disk.read_json(file)
            results = {key: disk.json_value(results, key, float, None, file, low=0)
                       for key in ("pass@1", "maj@8", "format", "length")}
            out.append((name, waiting / 60, results))
            waiting = 0
    return out


def table(folders: list[Path]) -> str:
    lines = ["| stage | minutes | pass@1, % | maj@8, % | format, % | tokens a completion |"]
    lines.append("|---" * 6 + "|")
    for folder in folders:
        prefix = f"{folder.name}: " if len(folders) > 1 else ""
        for name, minutes, r in rows(folder):
            percent = lambda key, r=r: "" if r[key] is None else f"{100 * r[key]:.1f}"
            cells = [prefix + name, f"{minutes:.1f}" if minutes else ""]
            cells += [*map(percent, ("pass@1", "maj@8", "format")), f"{r['length'] or 0:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([Path(folder) for folder in sys.argv[1:]]))
