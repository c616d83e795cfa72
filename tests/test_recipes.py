"""The recipes: commands that parse, numbers that were published, and tiny runs from end to end."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys

import pytest
import tyro
from conftest import ONE_DEVICE, ROOT, lines

import problems
import runs

sys.path.append(str(ROOT / "recipes"))
import table  # noqa: E402

# What is published of each, transcribed by hand; see the head of each script.
PUBLISHED = {
    "tunix": {
        "grpo": dict(
            model="gemma2-2b", data="gsm8k", rewards="tunix", max_prompt=256, max_new=768,
            temperature=0.9, top_k=50, kl_coef=0.08, clip_low=0.2, clip_high=0.2, inner_epochs=1,
            lora_rank=64, lora_alpha=64.0, lora_targets="q,k,v,o,gate,up,down", adam_b2=0.99,
            weight_decay=0.1, clip_norm=0.1, learning_rate=3e-6, warmup=0.1, final_lr=0.0,
            steps=3738, loss_norm="sequence",
        ),
    },
    "grar": {
        "sft": dict(
            model="gemma2-2b", lora_rank=16, lora_alpha=32.0, max_length=4096, batch_rows=8,
            learning_rate=2e-5, warmup=0.05, final_lr=0.1, steps=33_000 // 8,
        ),
        "grpo": dict(
            judge="gemma3-12b", judge_style="grar", rewards="grar", kl_coef=0.08, clip_low=0.1,
            clip_high=0.1, prompts=4, steps=1000, learning_rate=1e-5, temperature=0.9,
            max_prompt=1024, max_new=1024, loss_norm="sequence",
        ),
    },
    "pinocchio": {
        "sft": dict(
            model="gemma3-1b", lora_rank=0, max_length=1792, batch_rows=4 * 4, learning_rate=5e-5,
            steps=9000, time_limit="2h",
        ),
        "pairs": dict(
            margin=4.0, reference=True, judge_style="pinocchio", judge_calls="group",
            rewards="pinocchio,format:2.5,tags_pinocchio:2.5",
        ),
        "simpo": dict(
            loss="simpo", beta=1.0, gamma_ratio=0.4, label_smoothing=0.1, learning_rate=1e-6,
            warmup=0.2, lora_rank=64, time_limit="25m",
        ),
        "grpo": dict(
            lora_rank=64, lora_alpha=64.0, group=8, inner_epochs=2, kl_coef=0.07, clip_low=0.25,
            clip_high=0.25, temperature=1.0, top_k=200, max_prompt=256, max_new=768,
            learning_rate=5e-6, steps=800 // 2, prompts=2000 // 400, rows=2000,
            judge_style="pinocchio", judge_calls="group", judge_threads=16, loss_norm="sequence",
            rewards="pinocchio,format:2.5,tags_pinocchio:2.5",
        ),
    },
    "ideae": {
        "sft": dict(model="gemma2-2b", max_length=768 + 512),
        "grpo": dict(
            rewards="ideae", lora_rank=64, lora_alpha=64.0, kl_coef=0.08, clip_low=0.2,
            clip_high=0.2, temperature=0.9, max_prompt=768, max_new=512, loss_norm="sequence",
        ),
    },
    "gsm8k": {  # ours: GRPO learns on what SFT has not seen
        "sft": dict(data="gsm8k[:50%]", lora_rank=32, time_limit="1h"),
        "grpo": dict(data="gsm8k[50%:]", lora_rank=32, kl_coef=0.0, time_limit="6h"),
    },
    "gemmatron": {"traces": dict(teacher="http://h/v1", teacher_model="m"), "sft": {}, "grpo": {}},
}
# What the column of the tiny model may replace, besides the flags of a hosted judge or teacher.
REPLACED = {"model", "data", "out", "adapter", "rows", "samples", "rewards", "time-limit", "steps",
            "reward-file", "max-length", "max-prompt", "max-new", "pack-length", "micro-rows",
            "prompts", "learning-rate", "dtype", "batch-rows"}
GIVEN = {"pinocchio": dict(judge="http://h/v1", judge_model="m"),
         "gemmatron": dict(teacher="http://h/v1", teacher_model="m")}
STUB = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>"$COMMANDS"
printf '\\n' >>"$COMMANDS"
[[ "$*" != *"${FAIL:-no such command}"* ]]
"""


def commands(folder, name, *arguments, code=0, **given) -> list[list[str]]:
    """What a recipe would run: it finds a python that only takes notes."""
    folder.mkdir(exist_ok=True)
    (folder / "python").write_text(STUB)
    (folder / "python").chmod(0o755)
    notes = folder / "notes"
    notes.write_text("")
    env = os.environ | given | {"PATH": f"{folder}:{os.environ['PATH']}", "COMMANDS": str(notes),
                                "OUT": str(folder / "out")}
    command = ["bash", str(ROOT / "recipes" / f"{name}.sh"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == code, done.stderr
    if code == 2:
        assert not notes.read_text() and len(done.stderr.strip().splitlines()) == 1
        return done.stderr
    return [line.split("\0")[:-1] for line in notes.read_text().splitlines()]


def flags_of(argv: list[str]) -> dict[str, str]:
    """--rows 5 --reference -> {"rows": "5", "reference": ""}"""
    values = [v if not v.startswith("--") else "" for v in (*argv[1:], "")]
    pairs = zip(argv, values, strict=True)
    return {flag[2:]: value for flag, value in pairs if flag.startswith("--")}


def stages(folder, name, *arguments, **given) -> dict:
    """(argv, config with the defaults filled) of each command, by the folder it writes."""
    found, out = {}, str(folder / "out")
    *scripts, last = commands(folder, name, *arguments, **given)
    assert last == ["recipes/table.py", out]
    for script, *argv in scripts:
        module = importlib.import_module(script.removesuffix(".py"))
        config = tyro.cli(module.Config, args=argv)
        config = module.resolve(dataclasses.replace(config, adapter=None))
        found[config.out.removeprefix(f"{out}/")] = argv, config
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_flags_are_the_published_ones(name, tmp_path):
    real = stages(tmp_path, name, **GIVEN.get(name, {}))
    tiny = stages(tmp_path, name, "--model", "tiny")
    assert real.keys() == tiny.keys()
    made = [stage for stage in real if not stage.startswith("eval-")]
    assert made == [*PUBLISHED[name]]
    trained = [stage for stage in made if stage in ("sft", "simpo", "grpo")]
    limits = [runs.parse_time(real[stage][1].time_limit) for stage in trained]
    assert sum(limits) <= 8 * 3600  # an hour is for pairs and evaluations
    for stage in made:
        for field, value in PUBLISHED[name][stage].items():
            assert getattr(real[stage][1], field) == value, (stage, field)
    latest = None
    for stage in real:  # each goes on from the one before, and is evaluated
        both = flags_of(real[stage][0]), flags_of(tiny[stage][0])
        assert all(flags.get("adapter") == latest for flags in both), stage
        latest = both[0]["out"] if stage in trained else latest
        for flag in {*both[0], *both[1]} - REPLACED:
            hosted = flag.startswith(("judge", "teacher")) or flag == "limit"
            assert hosted or both[0].get(flag) == both[1].get(flag), (stage, flag)
    assert [stage for stage in real if stage not in made] == [
        f"eval-{stage}" for stage in ("start", *trained)
    ]


def test_the_gsm8k_recipe_has_a_column_for_two_cores_and_three_acts(tmp_path):
    small = stages(tmp_path, "gsm8k", model="gemma3-270m-pt", ACTS="start sft pairs simpo grpo")
    assert [*small] == ["eval-start", "sft", "eval-sft", "pairs", "simpo", "eval-simpo", "grpo",
                        "eval-grpo"]
    assert small["sft"][1].dtype == small["grpo"][1].dtype == "float32"
    assert small["grpo"][1].time_limit == "3h" and small["grpo"][1].max_new == 192
    assert {small[stage][1].lora_rank for stage in ("sft", "simpo", "grpo")} == {32}


def test_the_distillation_recipe_makes_a_teacher_of_the_tiny_model(tmp_path):
    """GRPO and distillation have the same start, the same problems and the same minutes."""
    real, tiny = (stages(tmp_path, "distill", *more) for more in ((), ("--model", "tiny")))
    assert [*real] == ["eval-start", "sft", "eval-sft", "distill", "eval-distill"]
    assert [*tiny] == ["eval-start", "teacher", "eval-teacher", "grpo", "eval-grpo", "distill",
                       "eval-distill"]
    assert real["distill"][1].teacher == "gemma3-12b" and not real["distill"][1].teacher_adapter
    assert flags_of(real["distill"][0])["adapter"] == str(tmp_path / "out" / "sft")
    grpo, distill = tiny["grpo"][1], tiny["distill"][1]
    assert distill.teacher_adapter == str(tmp_path / "out" / "teacher")
    for field in ("data", "rows", "time_limit", "seed", "lora_rank", "max_new", "eval_every"):
        assert getattr(grpo, field) == getattr(distill, field), field
    assert not {"adapter"} & {*flags_of(tiny["grpo"][0]), *flags_of(tiny["distill"][0])}


def test_a_recipe_says_what_it_lacks_and_stops_where_a_stage_does(tmp_path):
    assert "judge is missing: judge=..." in commands(tmp_path, "pinocchio", code=2)
    assert "teacher is missing" in commands(tmp_path, "gemmatron", code=2)
    assert "usage: " in commands(tmp_path, "tunix", "--steps", "3", code=2)
    ran = commands(tmp_path, "pinocchio", "--model", "tiny", FAIL="train_simpo.py", code=1)
    assert [argv[0] for argv in ran] == ["eval.py", "train_sft.py", "eval.py", "synthesize.py",
                                         "train_simpo.py"]
    noted = (tmp_path / "out" / "seconds").read_text().splitlines()
    assert [line.split()[0] for line in noted] == ["sft", "pairs", "simpo"]
    # some of the stages, with another value of the table
    (tmp_path / "out" / "sft" / "final").mkdir(parents=True)  # made earlier
    only = stages(tmp_path, "pinocchio", "--model", "tiny", ACTS="pairs simpo", simpo_time="3m")
    assert [*only] == ["pairs", "simpo", "eval-simpo"] and only["simpo"][1].time_limit == "3m"
    assert flags_of(only["pairs"][0])["adapter"] == str(tmp_path / "out" / "sft")
    assert flags_of(only["eval-simpo"][0])["adapter"] == str(tmp_path / "out" / "simpo")


def test_the_table(tmp_path):
    """A stage that is not evaluated counts to the next one; sessions add up."""
    for name, more in (("start", {}), ("simpo", {"pass@1": 0.5, "maj@8": 0.625})):
        folder = tmp_path / "run" / f"eval-{name}"
        folder.mkdir(parents=True)
        results = {"pass@1": None, "format": 0.995, "length": 41.6} | more
        (folder / "results.json").write_text(json.dumps(results))
    (tmp_path / "run" / "seconds").write_text("pairs 30\nsimpo 40\nsimpo 20\ngrpo 9\n")
    lines = table.table([tmp_path / "run"]).splitlines()
    assert lines[2] == "| start |  |  |  | 99.5 | 42 |"
    assert lines[3:] == ["| simpo | 1.5 | 50.0 | 62.5 | 99.5 | 42 |"]
    assert table.table([tmp_path / "run"] * 2).count("| run: simpo |") == 2


# -------------------------------------------------------------------------------------- whole runs

SHORT = dict(sft_time="20m", simpo_time="20m", grpo_time="20m", time="20m", sft_steps="2",
             simpo_steps="2", grpo_steps="1", steps="1", pair_rows="4", pair_length="384",
             simpo_micro="4", trace_rows="16", prompts="2", sft_micro="4",
             test_rows="4")


def whole(folder, name, **more):
    """A recipe on the tiny model from end to end -> its folder, and the rows of its table."""
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(problems.word_problem("train", i)) for i in range(48)))
    env = ONE_DEVICE | SHORT | more | {"OUT": str(folder / "out"), "data": str(rows)}
    if name in ("ideae", "gemmatron"):  # which have no steps: the clock ends them
        env |= {"sft_time": "40s", "grpo_time": "40s"}
    env |= {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "recipes" / f"{name}.sh"), "--model", "tiny"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out", done.stdout[done.stdout.index("| stage |") :].splitlines()[2:]


def steps_of(folder) -> list[dict]:
    """The lines of its training steps."""
    return [m for m in lines(folder / "metrics.jsonl") if "step_s" in m]


def test_the_shortest_end_to_end(tmp_path):
    out, printed = whole(tmp_path, "tunix", ACTS="grpo", max_new="24")
    assert len(printed) == 1 and printed[0].startswith("| grpo |")
    (step,) = steps_of(out / "grpo")
    assert {"kl", "rewards/answer_tunix/mean"} <= step.keys()
    results = json.loads((out / "eval-grpo/results.json").read_text())
    assert results["n"] == 4 and "maj@8" in results


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pinocchio", "grar", "ideae", "gemmatron"])
def test_the_others_end_to_end_and_again(name, tmp_path):
    out, printed = whole(tmp_path, name)
    trained = [stage for stage in PUBLISHED[name] if stage in ("sft", "simpo", "grpo")]
    assert [line.split("|")[1].strip() for line in printed] == ["start", *trained]

    def read():
        return {stage: (steps_of(out / stage), (out / f"eval-{stage}/results.json").read_text())
                for stage in trained}

    before = read()
    if name == "grar":
        (step,) = before["grpo"][0]
        assert step["judge_n"] == 16 and step["judge_missing"] == 0
    whole(tmp_path, name)  # nothing is left to do
    assert read() == before
