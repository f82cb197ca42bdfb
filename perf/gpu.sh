#!/usr/bin/env bash
# One prepared run on a machine with a GPU: at most 6 minutes, no weights are downloaded. Figures: $OUT or results/perf, gpu.json.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pip install --quiet -e . || true  # a machine without a network has what it has
fourbit=--no-4bit
python -c 'import bitsandbytes' 2>/dev/null && fourbit=--4bit
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
timeout 360 env PYTHONPATH="src:perf:${PYTHONPATH:-}" python perf/gpu.py "$fourbit" --out "${OUT:-results/perf}/gpu.json"
