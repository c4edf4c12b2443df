#!/bin/bash
# Times bf16, e4m3 and int8, each twelve times in a row; from the root of the tree.
set -o pipefail
R=$PWD; K=$R/scratch/kernel3
export PYTHONPATH=$R/packages/flash-kmeans/src:$R/packages/svg-kernels/src:$R/packages/svg-attention/src:$R/packages/svg-models/src:$R/benchmarks:$R/packages/svg-kernels/tests:$PYTHONPATH
timeout ${LIMIT:-150} python3 -u $K/bench.py "$@" 2>&1 | grep -v Warning
