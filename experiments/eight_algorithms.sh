#!/usr/bin/env bash
# The paper's eight algorithms on Omniglot 5-way 1-shot, 1,500 iterations each, seed 0, one thread a run.
#
#     experiments/eight_algorithms.sh DATA_ROOT OUT [ALGORITHM...]
#
# A small budget, and nothing was searched: one adaptation step for the learners of gradient steps, two for the learned
# optimiser, 5 training queries a class, meta-batches of 4. It shows that each of them learns, not which is best.
set -euo pipefail
data=$1 out=$2
shift 2

omniglot=(--data omniglot --data-root "$data" --ways 5 --shots 1 --queries 5 --test-queries 15 --meta-batch-size 4
  --meta-lr 0.003 --execution looped --threads 1 --val-every 100 --val-tasks 100 --iterations 1500 --seed 0)
gradient_steps=(--adaptation-steps 1 --fast-lr 0.4)
learned_optimiser=(--adaptation-steps 2)

for algorithm in "${@:-maml taml ta-maml metasgd ta-metasgd metalstm metalstm++ ta-metalstm++}"; do
  for name in $algorithm; do
    run=$out/omniglot-5way1shot-$name-seed0
    case $name in
      *metalstm*) own=("${learned_optimiser[@]}") ;;
      *) own=("${gradient_steps[@]}") ;;
    esac
    metaheed train "$name" "${omniglot[@]}" "${own[@]}" --out "$run"
    metaheed evaluate "$run" --tasks 300
  done
done
