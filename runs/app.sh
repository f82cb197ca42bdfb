#!/usr/bin/env bash
# The border and the vector that ship for `davsp app`: run this again when the weights of a small model change (some minutes on two cores).
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${1:-davsp-mini}
OUT=${OUT:-out/app}/$MODEL
SHIPPED=src/davsp/app/prompts/$MODEL
DAVSP=.venv/bin/davsp

rm -rf "$OUT"
$DAVSP vector --model "$MODEL" --out "$OUT/vector"                            # the direction, the layer, the margins
$DAVSP train --model "$MODEL" --vector "$OUT/vector" --out "$OUT/prompt"      # the border
mkdir -p "$SHIPPED"
cp "$OUT/prompt/vsp.png" "$OUT/vector/vector.safetensors" "$SHIPPED"          # the picture's PNG text holds the rest
.venv/bin/python -m pytest tests/test_app.py                                  # what ships refuses attacks and answers the rest
