#!/usr/bin/env bash
# The proof on the embedded model, step by step: what `davsp demo` does in one go, with each part left to look at.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/steps}
DAVSP=.venv/bin/davsp

$DAVSP mini data --out "$OUT/data"                                     # the protocol as folders of queries
$DAVSP vector --out "$OUT/vector"                                      # the direction, the layer, the margins
$DAVSP train --vector "$OUT/vector" --out "$OUT/prompt"                # the border
$DAVSP info "$OUT/prompt"
$DAVSP eval --prompt "$OUT/prompt" --vector "$OUT/vector" --out "$OUT/eval"
