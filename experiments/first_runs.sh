#!/usr/bin/env bash
# MAML and TA-MAML on Omniglot (two seeds) and CIFAR-FS (one seed), 5-way 1-shot, one thread a run.
#
#     experiments/first_runs.sh DATA_ROOT OUT
#
# DATA_ROOT holds omniglot/ and cifar-100-python/. Nothing was searched: CIFAR-FS has the program's defaults; Omniglot has
# one adaptation step, fewer training queries, higher rates and the protocol's meta-batch of 16, for the sake of time.
set -euo pipefail
data=$1 out=$2

omniglot=(--data omniglot --data-root "$data" --ways 5 --shots 1 --queries 5 --test-queries 15 --adaptation-steps 1
  --fast-lr 0.4 --meta-lr 0.003 --meta-batch-size 16 --execution looped --threads 1 --val-every 250
  --iterations 2500)
cifar=(--data cifar-fs --data-root "$data" --ways 5 --shots 1 --iterations 2000 --threads 1)

for seed in 0 1; do
  for algorithm in maml ta-maml; do
    run=$out/omniglot-5way1shot-$algorithm-seed$seed
    metaheed train "$algorithm" "${omniglot[@]}" --seed "$seed" --out "$run"
    metaheed evaluate "$run" --tasks 300
  done
done
for algorithm in maml ta-maml; do
  run=$out/cifar-fs-5way1shot-$algorithm-seed0
  metaheed train "$algorithm" "${cifar[@]}" --seed 0 --out "$run"
  metaheed evaluate "$run" --tasks 300
done

metaheed compare "$out"/omniglot-5way1shot-ta-maml-seed{0,1} --against "$out"/omniglot-5way1shot-maml-seed{0,1}
metaheed compare "$out"/cifar-fs-5way1shot-ta-maml-seed0 --against "$out"/cifar-fs-5way1shot-maml-seed0
