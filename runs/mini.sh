#!/usr/bin/env bash
# davsp-mini from nothing: eight stages, then measuring and the card. Resumable: run it again after a kill or a failure.
# Two CPU cores: tower and read on one, beside words and place on the other; bridge, joint, sight and skills then take both.
set -euo pipefail
set -m                              # a background side is a process group of its own, so that it can be stopped whole
cd "$(dirname "$0")/.."
OUT=${OUT:-out/mini}

stage() { .venv/bin/davsp mini train --out "$OUT" --stage "$1"; }
side() { export OMP_NUM_THREADS=1; for name in "$@"; do stage "$name"; done; }

side words place &                  # questions in words, then oracle patches; then where things are
words=$!
trap 'kill -- -"$words" 2>/dev/null || true' EXIT
(side tower read)                   # a class for every patch; then pages of whole words
wait "$words"                       # if that side failed, the script ends here
trap - EXIT

stage bridge                        # the picture's own patches in place of the oracle's
stage joint                         # everything together
stage sight                         # tower and projector alone: figures, small and framed pictures, centres
stage skills                        # everything again, with more of what comes slowly: where, how many, sums, borders
stage card                          # export, measure, write the card
