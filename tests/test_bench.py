"""bench.py: the figures it prints are those of the work it says it did."""

import json

import pytest

import bench


def test_both_phases_give_their_figures_and_lengths_a_long_tail(small, capsys):
    config = bench.Config(
        weights=str(small), dtype="float32", remat="none", rows=8, length=32, micro_rows=1,
        prompts=8, group=4, prompt_length=8, new_tokens=40, mean_length=8, slots=2, repeats=1,
        lora_rank=4, json=True,
    )
    out = bench.main(config)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed.keys() == out.keys() and printed["grpo_step_s"] == out["grpo_step_s"]
    assert out["sft_tokens_per_s"] == pytest.approx(8 * 32 / out["sft_step_s"])
    assert 3 < out["mean_length"] < 20 and 0 < out["padding"] < 0.8
    n_tokens = 8 * 4 * out["mean_length"]
    assert out["rollout_tokens_per_s"] == pytest.approx(n_tokens / out["grpo_rollout_s"])
    parts = sum(out[f"grpo_{part}_s"] for part in ("rollout", "reference", "update"))
    assert parts == pytest.approx(out["grpo_step_s"]) and out["peak_rss_bytes"] > 2**26
    with pytest.raises(ValueError, match="--phases speed"):
        bench.main(bench.Config(weights=str(small), phases="speed"))
