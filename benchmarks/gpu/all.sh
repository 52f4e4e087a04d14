#!/usr/bin/env bash
# Builds fedkern for this machine's GPU, tests it, measures it, and trains at published scale, in short stages.
# What is done is not done again: after an end of time, start it once more with the same --out.
#   benchmarks/gpu/all.sh --out DIR [--minutes 9] [--data-root CIFAR-10 and MNIST] [--packed FILE] [STAGE ...]
#   benchmarks/gpu/all.sh --list
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
