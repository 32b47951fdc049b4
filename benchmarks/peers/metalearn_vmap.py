"""parallel-metalearn with its backend "vmap"."""

from functools import partial

from benchmarks.peers import metalearn

build = partial(metalearn.build, backend="vmap")
