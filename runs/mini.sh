#!/usr/bin/env bash
# davsp-mini from nothing: five stages, then measuring and the card. Resumable: run it again after a kill.
# Two CPU cores: about three hours in sequence. The stages `tower` + `read` and `words` do not need each other,
# so on two cores they may run side by side, one thread each, and `joint` then takes both cores.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/mini}

OMP_NUM_THREADS=1 .venv/bin/davsp mini train --out "$OUT" --stage words & # questions in words, then oracle patches
OMP_NUM_THREADS=1 .venv/bin/davsp mini train --out "$OUT" --stage tower    # a class for every patch
wait
.venv/bin/davsp mini train --out "$OUT" --stage read   # pages of whole words: reading is the slowest to come
.venv/bin/davsp mini train --out "$OUT"                # bridge, joint, card
