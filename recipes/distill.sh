#!/usr/bin/env bash
# On-policy distillation: a larger Gemma teaches a small one, token by token.
#
#   bash recipes/distill.sh
#   bash recipes/distill.sh --model tiny
#
# The real run takes Gemma-3-12B-IT as it is published for the teacher of a 1B student, which first
# learns the format by SFT. (GKD, arXiv 2306.13649; "On-policy distillation", Thinking Machines
# 2025: reverse KL, four completions of each of 64 prompts a step, about 100 steps.)
#
# The tiny model has no larger sibling. Its teacher is the tiny model itself after longer training
# on `solutions`, in which every trace shows its steps. GRPO runs for the same minutes from the same
# start, for comparison.

source "$(dirname "$0")/common.sh"

#    name        v5e-8       tiny
pick model       gemma3-1b   tiny
pick teacher     gemma3-12b  tiny
pick data        gsm8k       problems
pick time        6h          3m
pick teach_time  ''          20m
pick max_prompt  512         88
pick max_new     768         104
pick test        gsm8k:test  problems:test
pick test_rows   300         400

evaluate start
teacher=(--teacher "$teacher")
if [ -z "$tiny" ]; then
  stage sft train_sft.py --data "$data" --time-limit 1h
else
  stage teacher train_sft.py --data solutions --lora-rank 0 --time-limit "$teach_time" \
    --learning-rate 1.5e-3 --batch-rows 32 --micro-rows 16 --eval-every 0 --show 0
  teacher+=(--teacher-adapter "$out/teacher")
  from=''
  stage grpo train_grpo.py --data "$data" --time-limit "$time" --eval-every 0
  from=''
fi
stage distill train_distill.py --data "$data" "${teacher[@]}" --time-limit "$time" \
  --max-prompt "$max_prompt" --max-new "$max_new" --eval-every 0
table
