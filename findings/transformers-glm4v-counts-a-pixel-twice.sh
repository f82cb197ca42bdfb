#!/usr/bin/env bash
# transformers 5.24.0: the image processors of GLM-4.1V and Qwen2-VL, both with patches of 14 and size.longest_edge 1,200,000, which is a bound
# of pixels in both. One picture of 980 x 980, 960,400 pixels, multiples of 28.
# Expected: both leave it as it is, as it is within the bound.
# Seen: GLM's counts the picture once for each of the two frames that it makes of it, 1,920,800, and shrinks it to 756 x 756. So the bounds
# of one family's checkpoint do not mean the same pixels in the other's.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 pillow==12.3.0
"$folder/venv/bin/python" - <<'P'
import numpy as np
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

picture, sides = np.zeros((980, 980, 3), np.uint8), {}
for processor in (Glm4vImageProcessorPil, Qwen2VLImageProcessorPil):
    made = processor(size={"shortest_edge": 3136, "longest_edge": 1_200_000})(picture, return_tensors="np")
    sides[processor.__name__] = 14 * int(made["image_grid_thw"][0][1])
print(sides)
assert sides == {"Glm4vImageProcessorPil": 756, "Qwen2VLImageProcessorPil": 980}, "the behaviour has changed"
P
