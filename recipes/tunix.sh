#!/usr/bin/env bash
# Tunix's own GRPO on GSM8K, the baseline that everybody started from.
#
#   bash recipes/tunix.sh
#
# Theirs, Gemma-2-2B-it: prompt up to 256, completion up to 768, T 0.9, top-k 50, beta 0.08, eps
# 0.2, mu 1, LoRA r64 alpha 64 on q,k,v,o,gate,up,down, AdamW(0.9, 0.99), weight decay 0.1, clip
# 0.1, lr 0 -> 3e-6 -> 0 (10 % warm-up, cosine), 1 prompt x G 2 a step, 3,738 steps; format 3, four
# tags +-0.5, the answer -1 to 3, its first number 1.5: --rewards tunix, recipes/tunix.py
#
# Differences:
# 1. G is 8. With G 2 and division by the std every advantage is +-0.707, whatever the scores.
# 2. 8 prompts a step, because one would leave cores idle. 3,738 steps then see GSM8K four times;
#    if eight hours are too short for them, the clock ends the schedule.
# 3. One mesh axis over all devices, not (fsdp 2, tp 4), because the base fits on each device.

source "$(dirname "$0")/common.sh"

#    name       v5e-8       tiny
pick model      gemma2-2b   tiny
pick data       gsm8k       problems
pick prompts    8           16
pick max_prompt 256         88
pick max_new    768         104
pick lr         3e-6        1e-3
pick steps      3738
pick time       8h          2m30s
pick test       gsm8k:test  problems:test
pick test_rows  300         200

evaluate start
stage grpo train_grpo.py --data "$data" --skip-bad-rows --rewards tunix --time-limit "$time" \
  --steps "$steps" --prompts "$prompts" --group 8 --inner-epochs 1 --kl-coef 0.08 --clip-low 0.2 \
  --clip-high 0.2 --loss-norm sequence --temperature 0.9 --top-k 50 --max-prompt "$max_prompt" \
  --max-new "$max_new" --lora-rank 64 --lora-alpha 64 --lora-targets q,k,v,o,gate,up,down \
  --adam-b2 0.99 --weight-decay 0.1 --clip-norm 0.1 --learning-rate "$lr" --warmup 0.1 --final-lr 0
table
