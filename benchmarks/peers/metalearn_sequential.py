"""parallel-metalearn with its backend "sequential"."""

from functools import partial

from benchmarks.peers import metalearn

build = partial(metalearn.build, backend="sequential")
