#!/usr/bin/env bash
# Is one update for a batch of tasks better than one after every task? Omniglot 20-way 1-shot, MetaLSTM against MetaLSTM++.
#
#     experiments/omniglot_20way.sh DATA_ROOT OUT
#
# The last columns of the paper's Table 1, shortened: seed 0, 2,000 iterations instead of 55,000 (by estimate what 90
# minutes of one CPU thread give), 5 training queries a class instead of 15. Meta-batches of 16, T = 5 and clipping as in
# the protocol, the original's learning rate; nothing was searched. Both see the same 32,000 tasks; MetaLSTM makes 16
# updates with a meta-batch, MetaLSTM++ one. The command may be given again, or in two terminals: what was cut off goes on.
set -euo pipefail
. "$(dirname "$0")/run_once.sh"
data=$1 out=$2

for algorithm in metalstm metalstm++; do
  run_once "$out/omniglot-20way1shot-$algorithm-seed0" "$algorithm" --data omniglot --data-root "$data" --ways 20 --shots 1 \
    --queries 5 --test-queries 15 --iterations 2000 --val-every 200 --val-tasks 100 --threads 1 --seed 0
done
