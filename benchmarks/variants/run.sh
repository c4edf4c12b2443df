#!/bin/bash
# Times attention kernels, each twelve times in a row; from the root of the tree.
set -o pipefail
R=$PWD; K=$R/scratch/kernel4
[ -d $K/lib ] || tar xf $K/lib.tar.xz -C $K
export PYTHONPATH=$K/py/packages/svg-kernels/src:$K/py/packages/svg-kernels/tests:$R/packages/flash-kmeans/src:$R/packages/svg-attention/src:$R/packages/svg-models/src:$R/benchmarks:$PYTHONPATH
timeout ${LIMIT:-200} python3 -u $K/bench.py "$@" 2>&1 | grep -v Warning
