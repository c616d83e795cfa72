#!/usr/bin/env bash
# Gemmatron: traces of a strong hosted model -> SFT, the "cognitive backbone" -> GRPO.
#
#   teacher=https://host/v1 teacher_model=NAME bash recipes/gemmatron.sh
#
# Theirs: synthetic traces of Gemini 2.5 Pro and Flash, SFT, GRPO. Everything else is unknown, so
# the numbers are the scripts' defaults, except for one adapter of rank 64 through both stages.
#
# Traces that are cut, wrong, repetitive, near-duplicates or not in the format are left out. Making
# traces needs no accelerator: run ACTS=traces before the session, and train for all of it. The
# teacher's key is in TEACHER_API_KEY; at most `requests` requests are sent.
#
# With the tiny model, the model itself is the teacher: four tries a problem, right ones are kept.

source "$(dirname "$0")/common.sh"

#    name          v5e-8       tiny
pick model         gemma3-1b   tiny
pick data          gsm8k       problems
pick teacher       ''
pick teacher_model ''
pick requests      10000
pick trace_rows    0           200
pick samples       1           4
pick sft_length    2048        256
pick sft_lr        2e-4        2e-3
pick sft_time      1h30m       40s
pick max_new       768         104
pick grpo_lr       1e-5        1e-3
pick grpo_time     6h          2m
pick test          gsm8k:test  problems:test
pick test_rows     300         200
taught=()
if [ -z "$tiny" ]; then
  need teacher "an OpenAI-compatible endpoint, http(s)://host/v1"
  taught=(--teacher "$teacher" --teacher-model "$teacher_model" --limit "$requests")
fi

evaluate start
stage traces synthesize.py traces --data "$data" --skip-bad-rows --rows "$trace_rows" \
  --samples "$samples" ${taught[@]+"${taught[@]}"}
stage sft train_sft.py --data "$out/traces/rows.jsonl" --skip-bad-rows --time-limit "$sft_time" \
  --lora-rank 64 --lora-alpha 64 --max-length "$sft_length" --learning-rate "$sft_lr"
stage grpo train_grpo.py --data "$data" --skip-bad-rows --time-limit "$grpo_time" \
  --lora-rank 64 --lora-alpha 64 --max-new "$max_new" --learning-rate "$grpo_lr"
table
