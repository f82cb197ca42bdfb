#!/usr/bin/env bash
# torch 2.13.0 and Pillow 13.0.0: a picture of 8 bit, resized by torch's own antialiased bicubic for uint8, which follows Pillow's method.
# Expected: the same pixels, so that the quicker one could take the other's place.
# Seen: about one value in a thousand differs by one level. A border's canvas is held to Pillow's pixels, so Pillow resizes here.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 pillow==13.0.0 numpy
"$folder/venv/bin/python" - <<'P'
import numpy as np
import torch
from PIL import Image

pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
pillow = np.asarray(Image.fromarray(pixels).resize((276, 207), Image.Resampling.BICUBIC)).astype(int)
planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # channels last in memory: the quick road
resized = torch.nn.functional.interpolate(planes, (207, 276), mode="bicubic", antialias=True)
difference = np.abs(resized[0].permute(1, 2, 0).numpy().astype(int) - pillow)
print(f"values that differ: {(difference > 0).mean():.3%}, by at most {difference.max()} levels")
assert difference.max() == 1 and 0 < (difference > 0).mean() < 0.02, "the behaviour has changed"
P
