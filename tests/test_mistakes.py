"""A user's mistake ends any script in one line that names the flag."""

import json

import pytest

import eval as evaluation
import train_distill
import train_grpo
import train_ppo
import train_sft
import train_simpo

RLVR = train_grpo, train_ppo, train_distill
TRAINERS = train_sft, train_simpo, *RLVR
MISTAKES = [  # the scripts, fields of their Config, what the line says
    (TRAINERS, {"lora_targets": "zz"}, "--lora-targets"),
    (TRAINERS, {"adapter": "nowhere"}, "--adapter nowhere"),
    (TRAINERS, {"time_limit": "soon"}, "--time-limit soon"),
    (TRAINERS, {"data": "nowhere.jsonl"}, "nowhere.jsonl"),
    (TRAINERS, {"warmup": 2.0}, "--warmup 2.0: expected 0 to 1"),
    (TRAINERS, {"eval_rows": -3}, "--eval-rows -3"),
    (TRAINERS, {"seed": -1}, "--seed -1: expected 0"),
    ((train_sft, train_simpo, train_grpo), {"base": "int8", "lora_rank": 0},
     "--base int8 with --lora-rank 0"),
    ((train_sft, train_simpo), {"batch_rows": 3}, "--batch-rows 3"),
    ((train_sft, train_simpo), {"mix": "0.5,0.5"}, "--mix 0.5,0.5"),
    ([train_sft], {"data": "gsm8k:dev"}, "--data gsm8k:dev"),
    ([train_sft], {"from_scratch": True, "lora_rank": 4}, "--lora-rank 4: --from-scratch"),
    ([train_simpo], {"data": None}, '--data is missing: name a JSONL file of {"prompt"'),
    ([train_simpo], {"data": "rows"}, "rows.jsonl:1: "),
    ([train_simpo], {"gamma_ratio": 0.5, "loss": "dpo"},
     "--gamma-ratio 0.5: --loss dpo has only --beta"),
    ([train_simpo], {"beta": 2.0, "loss": "orpo"},
     "--beta 2.0: --loss orpo has only --orpo-lambda"),
    ([train_simpo], {"beta": 0.0}, "--beta 0.0"),
    ([train_simpo], {"label_smoothing": 0.5}, "--label-smoothing 0.5"),
    ([train_simpo], {"max_length": 16}, "more than --max-length 16"),
    (RLVR, {"slots": 0}, "--slots 0: expected 1 to inf"),
    (RLVR, {"temperature": 0.0}, "--temperature 0"),
    (RLVR, {"pack_length": 64}, "--pack-length 64"),
    (RLVR, {"rewards": "answre:1"}, "answre"),
    (RLVR, {"rewards": "judge:1"}, "--rewards judge: needs --judge"),
    ((train_grpo, train_distill), {"top_p": 0.0}, "--top-p 0.0"),
    ((train_grpo, train_ppo), {"curriculum": "hard"}, "--curriculum"),
    ((train_grpo, train_ppo), {"curriculum": "0:1,2:3"}, "stay below 1"),
    ((train_grpo, train_ppo), {"kl_coef": -1.0}, "--kl-coef -1.0"),
    ([train_grpo], {"group": 1}, "--group 1"),
    ([train_ppo], {"group": 0}, "--group 0: expected 1"),
    ([train_grpo], {"rewards": "judge_correctness:1", "judge": "tiny"},
     "--rewards judge_correctness: needs --judge-style pinocchio"),
    ([train_grpo], {"judge": "tiny"}, "--judge tiny: needs --rewards"),
    ([train_grpo], {"max_prompt": 3}, "--max-prompt 3"),
    ([train_grpo], {"cispo_cap": 5.0, "clip_high": 0.3},
     "--clip-high 0.3 has no effect beside --cispo-cap 5.0"),
    ([train_grpo], {"cispo_cap": 5.0, "clip_low": 0.1},
     "--clip-low 0.1 has no effect beside --cispo-cap 5.0"),
    ([train_grpo], {"per_reward": True, "scale": "none"},
     "--scale none has no effect beside --per-reward True"),
    ([train_grpo], {"per_reward": True, "baseline": "loo"},
     "--baseline loo has no effect beside --per-reward True"),
    ([train_grpo], {"sapo": True, "clip_high": 0.2},
     "--clip-high 0.2 has no effect beside --sapo True"),
    ([train_grpo], {"cispo_cap": 5.0, "sapo": True},
     "--sapo True has no effect beside --cispo-cap 5.0"),
    ([train_grpo], {"ratio_level": "geometric", "dual_clip": 3.0},
     "--dual-clip 3.0 has no effect beside --ratio-level geometric"),
    ([train_grpo], {"is_mode": "mask"}, "--is-mode mask has no effect without --is-cap"),
    ([train_grpo], {"kl_unbiased": True}, "--kl-unbiased True has no effect without --kl-coef"),
    ([train_grpo], {"sapo_neg": 2.0}, "--sapo-neg 2.0 has no effect without --sapo"),
    ([train_grpo], {"dual_clip": 1.1}, "--dual-clip 1.1: expected more than 1 + --clip-high"),
    ([train_grpo], {"is_cap": 1.0, "is_floor": 2.0}, "--is-floor 2: expected less than --is-cap 1"),
    ([train_ppo], {"lora_rank": 0}, "--lora-rank 0: expected 1 or more"),
    ([train_ppo], {"dual_clip": 0.9}, "--dual-clip 0.9: expected more than 1 + --clip-high"),
    ([train_ppo], {"gamma": 1.1}, "--gamma 1.1: expected 0 to 1"),
    ([train_ppo], {"kl_in": "loss"}, "--kl-in loss has no effect without --kl-coef"),
    ([train_ppo], {"minibatches": 0}, "--minibatches 0: expected 1"),
    ([train_distill], {"beta": 1.1}, "--beta 1.1: expected 0 to 1"),
    ([train_distill], {"on_policy": -0.1}, "--on-policy -0.1"),
    ([train_distill], {"group": 0}, "--group 0: expected 1"),
    ([train_distill], {"group": 1, "rewards": "format"}, "--group 1: expected 2 or more"),
    ([train_distill], {"judge": "tiny"}, "--judge tiny: needs --rewards"),
    ([train_distill], {"reward_file": "my.py"}, "--reward-file my.py: needs --rewards"),
    ([train_distill], {"reward_coef": -1.0}, "--reward-coef -1"),
    ([train_distill], {"reward_coef": 2.0}, "--reward-coef 2.0: needs --rewards"),
    ([evaluation], {"model": "llama"}, "--model llama"),
    ([evaluation], {"samples": -1}, "--samples"),
    ([evaluation], {"samples": 0, "greedy": False}, "--samples"),
    ([evaluation], {"temperature": -1.0}, "--temperature -1.0: expected 0"),
    ([evaluation], {"rewards": "fromat:1"}, "--rewards 'fromat:1'"),
    ([evaluation], {"rewards": "format:1,judge:2"}, "--rewards judge: needs --judge"),
    ([evaluation], {"rewards": "format:1", "judge": "tiny"}, "--judge tiny: needs --rewards"),
]


@pytest.mark.parametrize("module, fields, says", [
    pytest.param(module, fields, says, id=f"{module.__name__} {says}")
    for modules, fields, says in MISTAKES for module in modules])
def test_a_mistake_is_one_line(small, tmp_path, module, fields, says):
    rows = str(small / "rows.jsonl")
    if module is train_simpo:
        rows = str(tmp_path / "pairs.jsonl")
        pairs = [{"prompt": f"{i} + 1?", "chosen": "more " * 9, "rejected": "no"} for i in range(9)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    given = {"data": rows, "out": str(tmp_path / "run")} | fields
    if fields.get("data") == "rows":
        given["data"] = str(small / "rows.jsonl")
    if "model" not in fields:
        given["weights"] = str(small)
    if module is not evaluation:
        given |= {"steps": 1, "eval_every": 0}
    with pytest.raises((ValueError, SystemExit)) as error:
        module.main(module.Config(**given))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run/final").exists()
