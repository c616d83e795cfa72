#!/usr/bin/env bash
# IDEA-E distillation: SFT on a teacher's traces, then GRPO that rewards similarity to them.
#
#   data=traces.jsonl bash recipes/ideae.sh    # rows with "question", "reasoning" and "answer"
#
# Theirs, Gemma-2-2B:
#   scaffold  [I]dentify, [D]efine, [E]thics, [A]ct, [E]xplain in the trace; later phases drop the
#             markers
#   GRPO      LoRA r64 alpha 64, G 2, beta 0.08, eps 0.2, lr 1e-6, T 0.9, 768 + 512 tokens, 10k +
#             10k steps
#   reward    0.75 exact format + four tags +-0.0625 + 0.10 x five markers (scaffold phases only) +
#             2.25 cos(tfidf(teacher trace), tfidf(model trace)) + answer 0-4: --rewards ideae,
#             recipes/ideae.py, which needs scikit-learn
#
# Differences:
# 1. G is 8. With G 2 and division by the std every advantage is +-0.707, whatever the scores. 8
#    prompts a step keep eight cores busy.
# 2. A step then has 64 completions instead of 2, and eight hours are too short for 20,000 steps. So
#    the clock ends the run, and the learning rate is theirs times about sqrt(64 / 2), 5e-6.
# 3. Their 10k + 10k steps are two halves: markers pay in the first half (SCAFFOLD in ideae.py).
# 4. Unknown: everything about their SFT (here the defaults, with the adapter that GRPO continues),
#    and the schedule of the markers within a phase.
# Their published summary reads differently: the trace must differ from the answer, so that it does
# not leak it. For that reading set rewards=ideae,tfidf:0,contrast:2.25. What one line of junk is
# paid, and the repaired weights, are in recipes/ideae.py.

source "$(dirname "$0")/common.sh"

#    name        v5e-8       tiny
pick model       gemma2-2b   tiny
pick data        gsm8k       problems
pick rewards     ideae
pick sft_length  1280        256
pick sft_lr      2e-4        2e-3
pick sft_time    1h30m       45s
pick prompts     8           16
pick max_prompt  768         88
pick max_new     512         104
pick grpo_lr     5e-6        1e-3
pick grpo_time   6h          2m
pick test        gsm8k:test  problems:test
pick test_rows   300         200

evaluate start
stage sft train_sft.py --data "$data" --skip-bad-rows --time-limit "$sft_time" \
  --max-length "$sft_length" --lora-rank 64 --lora-alpha 64 --learning-rate "$sft_lr"
stage grpo train_grpo.py --data "$data" --skip-bad-rows --rewards "$rewards" \
  --time-limit "$grpo_time" --prompts "$prompts" --group 8 --kl-coef 0.08 --clip-low 0.2 \
  --clip-high 0.2 --loss-norm sequence --temperature 0.9 --max-prompt "$max_prompt" \
  --max-new "$max_new" --lora-rank 64 --lora-alpha 64 --learning-rate "$grpo_lr"
table
