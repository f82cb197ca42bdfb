#!/usr/bin/env bash
# transformers 5.24.0: the image processor of DeepSeek-VL, on pictures that are not square.
# Expected: the pixels of DeepSeek's own code (deepseek-ai/DeepSeek-VL, deepseek_vl/models/image_processing_vlm.py, commit 9bb7bc3), whose
# resize() cuts the shorter side off to a whole number of pixels: int(short / long * 384).
# Seen: it is rounded, so half of all shapes get a row or column more, and all their pixels are resampled otherwise.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 pillow==13.0.0 numpy
"$folder/venv/bin/python" - <<'P'
import numpy as np
from PIL import Image
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

processor = DeepseekVLImageProcessorPil(size={"height": 384, "width": 384}, min_size=14, image_mean=[0.5] * 3)
random, more = np.random.default_rng(0), []
for long, short in random.integers([300, 50], [1200, 300], (200, 2)):
    white = Image.new("RGB", (int(long), int(short)), "white")  # what pads it is grey, so its rows can be counted
    (pixels,) = processor([white], do_rescale=False, do_normalize=False)["pixel_values"]
    rows = int((np.asarray(pixels)[0] == 255).all(1).sum())
    more.append(rows - max(int(short / long * 384), 14))
print(f"rows more than DeepSeek's code: none in {more.count(0)} of {len(more)} pictures, one in {more.count(1)}")
assert set(more) == {0, 1} and 70 < more.count(1) < 130, "the behaviour has changed"
P
