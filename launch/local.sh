#!/usr/bin/env bash
# Train a recipe on this machine:   launch/local.sh RECIPE [--section.key=value ...]
# PROCESSES sets the number of processes: by default one per GPU, or two on a CPU.
# The same command continues an interrupted run. Ctrl-C saves first.
set -euo pipefail
if [ $# -eq 0 ]; then
    sed -n '2,4s/^# //p' "$0"
    exit 2
fi
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
PROCESSES=${PROCESSES:-$([ "$GPUS" -gt 0 ] && echo "$GPUS" || echo 2)}
# Two OpenMP threads per process made a CPU step 20 times slower; on GPUs threads hardly matter.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A lock file that a killed build leaves in the shared folder would hang later runs silently.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-${TMPDIR:-/tmp}/torch_extensions_$$}
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$PROCESSES" -m vilg train "$@"
