#!/usr/bin/env bash
# Pinocchio-1B: three acts in one session, SFT -> SimPO -> GRPO with a hosted judge.
#
#   data=traces.jsonl judge=https://host/v1 judge_model=NAME bash recipes/pinocchio.sh
#
# Theirs, Gemma-3-1B:
#   act 1   full SFT: ~63k filtered teacher traces, sequence 1792, batch 4 x 4, lr 5e-5, 3 epochs =
#           9k steps, 1.5-2 h
#   act 2   SimPO, ~25 min: beta 1, gamma 0.4 inside beta, label smoothing 0.1, lr 1e-6, 20 %
#           warm-up, LoRA r64; student against student with a reward margin of 4 or more, and the
#           teacher against a wrong student
#   act 3   GRPO, 4 h at most: LoRA r64 alpha 64, G 8, mu 2, beta 0.07, eps 0.25, T 1, top-k 200,
#           256 + 768 tokens, 800 optimiser steps, lr 5e-6, ~2k prompts; the reference is the model
#           after act 2
#   reward  5 x correctness (0-1) + reasoning (0-5) - fatal flags, by a hosted judge (16 threads,
#           one call a group) + 5 for the strict format, or 0.3, 0.3, 0.2, 0.2 of the 5 for each tag
#           that is there once; at least -10: --rewards pinocchio, recipes/pinocchio.py
#
# Differences:
# 1. Rows are packed, so 9,000 updates of 16 rows see each trace more often than three epochs do.
# 2. Half of the 5 is for the strict format alone, because theirs ignored the order of the tags.
# 3. A completion whose judge call failed leaves its group. Theirs scored the content 0 and still
#    paid the format.
# 4. 800 optimiser steps with mu 2 are 400 batches, so ~2k prompts make 5 a batch. Act 3 may take
#    5 h, which nine hours leave beside act 2's sampling and the evaluations.
# 5. Unknown: the pairs and steps of act 2 (here 500 prompts with 8 samples each, and at most 200
#    updates of 16 rows) and its alpha (here act 3's 64, because act 3 trains the same adapter).
#
# The tiny model has no judge: a right answer replaces correctness, a trace that says more than the
# answer replaces its grade, and there are no flags.

source "$(dirname "$0")/common.sh"

#    name         v5e-8       tiny
pick model        gemma3-1b   tiny
pick data         gsm8k       problems
pick judge        ''
pick judge_model  ''
pick content      pinocchio   answer:5,reasoning:5
pick sft_length   1792        256
pick sft_micro    2           16
pick sft_lr       5e-5        5e-4
pick sft_steps    9000
pick sft_time     2h          35s
pick pair_rows    500         100
pick pair_length  2048        512
pick simpo_micro  1           4
pick simpo_lr     1e-6        1e-4
pick simpo_steps  200         1000
pick simpo_time   25m         30s
pick prompts      5           16
pick max_prompt   256         88
pick max_new      768         104
pick grpo_lr      5e-6        1e-3
pick grpo_steps   400
pick grpo_time    5h          90s
pick test         gsm8k:test  problems:test
pick test_rows    300         200

scored=(--rewards "$content,format:2.5,tags_pinocchio:2.5")
if [ -n "$tiny" ]; then
  scored+=(--reward-file recipes/pinocchio.py:tags_pinocchio)
else
  need judge "an OpenAI-compatible endpoint, http(s)://host/v1; its key in JUDGE_API_KEY"
  scored+=(--judge "$judge" --judge-model "$judge_model" --judge-style pinocchio --judge-calls group
    --judge-threads 16)
fi

evaluate start
stage sft train_sft.py --data "$data" --skip-bad-rows --time-limit "$sft_time" \
  --steps "$sft_steps" --lora-rank 0 --max-length "$sft_length" --batch-rows 16 \
  --micro-rows "$sft_micro" --learning-rate "$sft_lr"
stage pairs synthesize.py pairs --data "$data" --skip-bad-rows --rows "$pair_rows" "${scored[@]}" \
  --samples 8 --margin 4 --reference --max-prompt "$max_prompt" --max-new "$max_new"
stage simpo train_simpo.py --data "$out/pairs/pairs.jsonl" --skip-bad-rows \
  --time-limit "$simpo_time" --steps "$simpo_steps" --beta 1 --gamma-ratio 0.4 \
  --label-smoothing 0.1 --learning-rate "$simpo_lr" --warmup 0.2 --lora-rank 64 --lora-alpha 64 \
  --max-length "$pair_length" --batch-rows 16 --micro-rows "$simpo_micro"
stage grpo train_grpo.py --data "$data" --skip-bad-rows --rows 2000 "${scored[@]}" \
  --time-limit "$grpo_time" --steps "$grpo_steps" --prompts "$prompts" --group 8 \
  --inner-epochs 2 --kl-coef 0.07 --clip-low 0.25 --clip-high 0.25 --loss-norm sequence \
  --temperature 1 --top-k 200 --max-prompt "$max_prompt" --max-new "$max_new" \
  --lora-rank 64 --lora-alpha 64 --learning-rate "$grpo_lr"
table
