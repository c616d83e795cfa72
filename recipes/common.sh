# What the recipe scripts share; each of them sources this file.
#
#   bash recipes/NAME.sh                      the real run: nine hours of a v5e-8
#   bash recipes/NAME.sh --model tiny         the same stages with the last column of the script's
#                                             table: minutes on two CPU cores
#   sft_time=1h bash recipes/NAME.sh          another value for a name in that table
#   ACTS="start grpo" bash recipes/NAME.sh    only these stages, from what earlier ones left
#
# The same command again continues a run. Everything is written to $OUT, by default runs/NAME or
# runs/NAME-tiny; `python recipes/table.py FOLDER ...` prints several runs as one table. The time
# limits of a recipe add up to eight hours at most. The ninth hour is meant for pairs and
# evaluations; nobody has measured that it is enough.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}  # huge pages: faster on CPUs
recipe=$(basename "$0" .sh) tiny='' from=''
case "$*" in
  "") ;;
  "--model tiny") tiny=-tiny ;;
  *) echo "usage: [NAME=VALUE ...] bash recipes/$recipe.sh [--model tiny]" >&2 && exit 2 ;;
esac
out=${OUT:-runs/$recipe$tiny}
mkdir -p "$out"

pick() { # NAME VALUE [TINY]: sets a name, unless the environment has it
  local value=$2
  [ -z "$tiny" ] || value=${3-$2}
  printf -v "$1" %s "${!1-$value}"
}

need() { # NAME WHY: stops where a name is empty
  [ -n "${!1}" ] || { echo "$1 is missing: $1=... bash recipes/$recipe.sh ($2)" >&2 && exit 2; }
}

wanted() { [[ " ${ACTS:-$1} " == *" $1 "* ]]; }

run() { # SCRIPT FLAGS...: with the model, and with what the stage before left
  set -- "$@" --model "$model" ${from:+--adapter "$from"}
  echo "+ python $*" >&2
  python "$@"
}

evaluate() { # NAME: the model as it is now, for a row of the table
  wanted "$1" || return 0
  run eval.py --data "$test" --rows "$test_rows" --samples 8 --max-new "$max_new" \
    --out "$out/eval-$1"
}

stage() { # NAME SCRIPT FLAGS...: runs it, notes its seconds, evaluates what it trained
  local name=$1 began=$SECONDS status=0
  shift
  wanted "$name" || { [ ! -d "$out/$name/final" ] || from=$out/$name; return 0; }
  run "$@" --out "$out/$name" || status=$?
  echo "$name $((SECONDS - began))" >>"$out/seconds"
  [ $status = 0 ] || exit $status
  case $1 in train_*) from=$out/$name && evaluate "$name" ;; esac
}

table() { python recipes/table.py "$out"; }
