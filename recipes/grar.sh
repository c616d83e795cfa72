#!/usr/bin/env bash
# G-RaR, rubrics as rewards: SFT, then GRPO scored by a larger Gemma that never decodes.
#
#   data=rows.jsonl bash recipes/grar.sh    # with "task_type" and "rubrics": docs/data.md
#
# Theirs, Gemma-2-2B with a Gemma-3-12B-IT judge:
#   SFT     LoRA r16 alpha 32, sequence 4096, effective batch 8, lr 2e-5, 5 % warm-up, cosine to
#           10 %, 1 epoch over ~33k general reasoning rows
#   GRPO    G 2, beta 0.08, eps 0.1, 4 prompts a step, 1000 steps, lr 1e-5, T 0.9, 1024 + 1024
#           tokens; the policy on half of the chips, the judge on the other half
#   reward  clip(0.2 format + 0.2 numeric_exact + 0.6 grar, 0, 1), grar the mean of the digits 1-5
#           under the judge's softmax, scaled to 0-1: --rewards grar --judge-style grar,
#           recipes/grar.py
#
# Differences:
# 1. G is 8. With G 2 and division by the std every advantage is +-0.707, whatever the scores.
# 2. The KL reference is the model after SFT. Theirs was the policy itself, so its KL was always 0.
# 3. Policy and judge share all chips, and the judge's weights are sharded over them.
# 4. Rows are packed, so 4,125 updates (33k / 8) of 8 rows see each example more than once.
# 5. Unknown: the adapter of their GRPO. Here GRPO continues the adapter of SFT.
#
# With the tiny model as judge the scores mean nothing; the run shows only that the stages work.

source "$(dirname "$0")/common.sh"

#    name        v5e-8       tiny
pick model       gemma2-2b   tiny
pick data        gsm8k       problems
pick judge       gemma3-12b  tiny
pick sft_length  4096        256
pick sft_micro   1           8
pick sft_lr      2e-5        2e-3
pick sft_steps   4125
pick sft_time    1h30m       45s
pick prompts     4           16
pick max_prompt  1024        88
pick max_new     1024        104
pick pack_length 2048        256
pick grpo_lr     1e-5        1e-3
pick grpo_steps  1000
pick grpo_time   6h          2m
pick test        gsm8k:test  problems:test
pick test_rows   300         200

evaluate start
stage sft train_sft.py --data "$data" --skip-bad-rows --time-limit "$sft_time" \
  --steps "$sft_steps" --lora-rank 16 --lora-alpha 32 --max-length "$sft_length" --batch-rows 8 \
  --micro-rows "$sft_micro" --learning-rate "$sft_lr" --warmup 0.05 --final-lr 0.1
stage grpo train_grpo.py --data "$data" --skip-bad-rows --rewards grar --judge "$judge" \
  --judge-style grar --time-limit "$grpo_time" --steps "$grpo_steps" --prompts "$prompts" \
  --group 8 --kl-coef 0.08 --clip-low 0.1 --clip-high 0.1 --loss-norm sequence --temperature 0.9 \
  --max-prompt "$max_prompt" --max-new "$max_new" --pack-length "$pack_length" --lora-rank 16 \
  --lora-alpha 32 --learning-rate "$grpo_lr"
table
