#!/usr/bin/env bash
# Does attention help on CIFAR-FS 5-way 1-shot, and against which control? The protocol's T, B and Q; one thread a run.
#
#     experiments/cifar_fs.sh search DATA_ROOT OUT      10 configurations x 1,000 iterations, of MAML and of TA-MAML
#     experiments/cifar_fs.sh train DATA_ROOT OUT       4,000 iterations of every arm, judged on 600 frozen tasks
#     experiments/cifar_fs.sh learners DATA_ROOT OUT    the same of MetaSGD and MetaLSTM++, with and without attention
#     experiments/cifar_fs.sh full DATA_ROOT OUT        55,000 iterations of the three main arms, 3 seeds: for a GPU, where
#                                                       a seed takes a quarter of an hour; into an OUT of their own
#
# DATA_ROOT holds cifar-100-python. Every command may be given again, or in several terminals: what is done is left, what
# was cut off goes on. To train with the search that was made here, copy results/cifar_fs_search/search-* into OUT first.
# MAML and TA-MAML have the settings that their searches chose (validation only). Arms without attention and TAML have
# MAML's; attended arms, and the replayed control, which asks whether it matters who gets a weight, have TA-MAML's.
# MetaSGD's rates start at MAML's fast_lr; MetaLSTM++ has its meta_lr.
set -euo pipefail
. "$(dirname "$0")/run_once.sh"
what=$1 data=$2 out=$3
iterations=4000
setting=(--data cifar-fs --data-root "$data" --ways 5 --shots 1 --threads 1)

study() { echo "$out/search-cifar-fs-5way1shot-$1"; }
rate() { sed -n "s/^ *$2: //p" "$(study "$1")/best.yaml"; }

if [ "$what" = search ]; then
  for algorithm in maml ta-maml; do
    metaheed search "$algorithm" "${setting[@]}" --trials 10 --iterations 1000 --out "$(study "$algorithm")"
  done
  exit
fi

maml=(--fast-lr "$(rate maml fast_lr)" --meta-lr "$(rate maml meta_lr)")
attended=(--fast-lr "$(rate ta-maml fast_lr)" --meta-lr "$(rate ta-maml meta_lr)")
equivariant=(--attention-architecture equivariant --attention-standardize)
gamma=(--attention-lr "$(rate ta-maml attention_lr)")

run() { # NAME SEED, then what to train
  local folder=$out/cifar-fs-5way1shot-$1-seed$2 seed=$2
  shift 2
  run_once "$folder" "$@" "${setting[@]}" --seed "$seed" --iterations "$iterations"
}

counterparts() { # of seed $1: what the first two questions need
  run maml "$1" maml "${maml[@]}"
  run ta-maml "$1" ta-maml "${attended[@]}" "${gamma[@]}"
  run uniform-2b-maml "$1" custom --learner maml --rule uniform-2b "${maml[@]}"
}

controls() { # of seed $1; the replayed arm needs the seed's TA-MAML
  run replayed-maml "$1" custom --learner maml --rule replayed \
    --replay "$out/cifar-fs-5way1shot-ta-maml-seed$1" "${attended[@]}"
  run loss-softmax-maml "$1" custom --learner maml --rule loss-softmax "${maml[@]}"
  run ta-maml-reuse "$1" ta-maml --attention-reuse-probe "${attended[@]}" "${gamma[@]}"
  run taml "$1" taml "${maml[@]}"
}

forms() { # of seed $1
  run ta-maml-as-released "$1" ta-maml --faithful-to-release "${attended[@]}" "${gamma[@]}"
  run ta-maml-equivariant "$1" ta-maml "${equivariant[@]}" "${attended[@]}" "${gamma[@]}"
}

steep() { # of seed $1: γ as large as the released code's default, 18 times what came with the draw that won the search
  run ta-maml-gamma "$1" ta-maml "${attended[@]}" --attention-lr 3e-3
  run ta-maml-equivariant-gamma "$1" ta-maml "${equivariant[@]}" "${attended[@]}" --attention-lr 3e-3
}

if [ "$what" = full ]; then
  iterations=55000
  for seed in 0 1 2; do counterparts "$seed"; done
  exit
fi
if [ "$what" = learners ]; then
  for seed in 0 1; do
    run metasgd "$seed" metasgd "${maml[@]}"
    run ta-metasgd "$seed" ta-metasgd "${attended[@]}" "${gamma[@]}"
    run metalstm++ "$seed" metalstm++ --meta-lr "$(rate maml meta_lr)"
    run ta-metalstm++ "$seed" ta-metalstm++ --meta-lr "$(rate ta-maml meta_lr)" "${gamma[@]}"
  done
  exit
fi
for seed in 0 1 2; do counterparts "$seed"; done
controls 0
forms 0
for seed in 3 4; do counterparts "$seed"; done
controls 1
steep 0
forms 1
steep 1
