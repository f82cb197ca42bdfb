#!/usr/bin/env bash
# The paper on LLaVA-1.5-13B, for who has a GPU and the data. Nothing of this has been run by its authors on a released checkpoint:
# begin with DRY=1, which loads nothing and lists cells, calls and hours. Every step is resumable: run the script again after a stop.
#
#   DATA=~/data JUDGE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=deepseek-chat runs/paper-llava-1.5-13b.sh
#
# DATA holds VLGuard, MM-SafetyBench, MM-Vet, FigStep, MME and LLaVA-Bench as docs/benchmarks.md says. Memory: 13 B in bfloat16 takes
# 26 GB, the training of a border some 10 GB more (micro-batches and checkpointing lower that); two 24 GB cards do with DEVICE=auto.
# Answers have the authors' 1,024 tokens (davsp's default for released models); BATCH lowers the queries a batch where memory ends.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-llava-hf/llava-1.5-13b-hf}
DEVICE=${DEVICE:-cuda}
DATA=${DATA:-data}
OUT=${OUT:-out/paper/$(basename "$MODEL")}
TEMPLATE=${TEMPLATE:-llava_v1}                        # as the authors ask LLaVA-1.5; checkpoint: as a server does
CANVAS=${CANVAS:-}                                    # only for Qwen2-VL: side of the prompts' canvas
DAVSP=.venv/bin/davsp

if [ -n "${DRY:-}" ]; then
  exec $DAVSP reproduce all --model "$MODEL" --dry-run ${PER_CALL:+--per-call "$PER_CALL"} --benchmark "mme=$DATA/MME"
fi

sets=(--benchmark "mm_safetybench=$DATA/MM-SafetyBench" --benchmark "mm_vet=$DATA/mm-vet")
others=(--benchmark "figstep=$DATA/FigStep" --benchmark "mme=$DATA/MME" --benchmark "llava_bench=$DATA/llava-bench-in-the-wild")
model=(--model "$MODEL" --device "$DEVICE" --template "$TEMPLATE" ${CANVAS:+--canvas "$CANVAS"})
batch=(${BATCH:+--batch-size "$BATCH"})
asked=(--judge-url "${JUDGE_URL:?an OpenAI-compatible server of the judge}" --judge-model "${JUDGE_MODEL:?the judge\'s model}")

$DAVSP data check "$DATA"                                                       # counts and broken files, before anything is paid for

# what the undefended model refuses decides who makes the vector ("easily refused") and who trains ("hard to refuse")
$DAVSP eval "${model[@]}" "${batch[@]}" --defense none --benchmark "vlguard=$DATA/VLGuard" --split train --judge davsp "${asked[@]}" --out "$OUT/guard"
$DAVSP eval "${model[@]}" "${batch[@]}" --defense none --benchmark "mm_safetybench=$DATA/MM-SafetyBench" --split all --judge davsp-mmsafety "${asked[@]}" \
    --out "$OUT/safety"
[ -f "$OUT/split.json" ] || $DAVSP data split "$OUT/split.json" --run "$OUT/guard" --run "$OUT/safety" \
    --benchmark "vlguard=$DATA/VLGuard" "${sets[@]}" "${others[@]}"

# all six tables; the prompts are trained on the way by the setting of the authors' code, 1,200 steps each (docs/published.md); its layer
# and margins are of LLaVA-1.5-13B, and on another model the vector's own are taken
$DAVSP reproduce all "${model[@]}" "${batch[@]}" --recipe published --split "$OUT/split.json" --benchmark "vlguard=$DATA/VLGuard" "${sets[@]}" "${others[@]}" \
    --judge davsp --judge mm-vet --judge llava-bench --grader-runs 5 "${asked[@]}" \
    ${BORROW:+--borrow "LLaVA-1.5-13B=$BORROW"} --out "$OUT/tables"
