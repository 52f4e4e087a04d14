#!/usr/bin/env bash
# What fifteen minutes on a GPU decide, on a machine that has nothing of fedkern yet: builds, tests the CUDA kernels, sets
# what has changed beside a copy, and rounds beside a lean loop. Then, within thirty seconds and on the same machine,
# `again`: what failed, the sanitizers, three runs twice. The first takes less than ten minutes, the second than three.
#   benchmarks/gpu/fifteen.sh --out DIR         DIR, or $OUT, gets fifteen.tar.gz, written anew after every line
#   benchmarks/gpu/fifteen.sh again --out DIR
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -m benchmarks.gpu.fifteen "$@"
