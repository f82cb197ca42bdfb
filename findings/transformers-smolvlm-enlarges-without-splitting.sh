#!/usr/bin/env bash
# transformers 5.23.0: SmolVLM's image processor as its checkpoints have it (tiles of 512, size.longest_edge 2048), with do_image_splitting=False.
# One picture of 512 x 512, the size that the tower takes.
# Expected: without splitting, a picture of the tower's size is shown to it as it is.
# Seen: it is enlarged to 2048 and shrunk to 512 again, and 98 of 100 values of a noisy one change. Only size.longest_edge=512 leaves it alone.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 pillow==12.3.0
"$folder/venv/bin/python" - <<'P'
import numpy as np
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

picture = np.random.default_rng(0).integers(0, 256, (3, 512, 512), dtype=np.uint8)
changed = {}
for edge in (2048, 512):
    processor = SmolVLMImageProcessorPil(
        size={"longest_edge": edge}, max_image_size={"longest_edge": 512}, do_image_splitting=False
    )
    made = processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    changed[edge] = float((made.reshape(picture.shape) != picture).mean())
print("share of values that change, by longest_edge:", changed)
assert changed[2048] > 0.9 and changed[512] == 0, "the behaviour has changed"
P
