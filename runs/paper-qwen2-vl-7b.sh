#!/usr/bin/env bash
# As paper-llava-1.5-13b.sh, on Qwen2-VL-7B (16 GB in bfloat16). With a border trained on LLaVA-1.5-13B in BORROW it fills the paper's Table 3 as well.
set -euo pipefail
TEMPLATE=checkpoint MODEL=${MODEL:-Qwen/Qwen2-VL-7B-Instruct} exec "$(dirname "$0")/paper-llava-1.5-13b.sh"
