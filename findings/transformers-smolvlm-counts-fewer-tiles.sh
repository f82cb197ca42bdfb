#!/usr/bin/env bash
# transformers 5.23.0: SmolVLM's image processor with tiles of 512 and size.longest_edge 1200, which is no multiple of 512. One picture of 1200 x 404.
# Expected: get_number_of_image_patches, by which the text's placeholders are counted before a picture is made, tells what the processor makes.
# Seen: it tells one row of three tiles and the whole, 4 pictures; the processor makes two rows, 7 pictures. Bringing the width to 1536 first, it
# takes the height along, to 517, and cuts that into two tiles; the count leaves the height at 404. Idefics3's two functions are the same.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 pillow==12.3.0
"$folder/venv/bin/python" - <<'P'
import numpy as np
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

processor = SmolVLMImageProcessorPil(size={"longest_edge": 1200}, max_image_size={"longest_edge": 512})
made = processor(np.zeros((3, 404, 1200), np.uint8), return_row_col_info=True, return_tensors="np")
told, pictures = processor.get_number_of_image_patches(404, 1200), made["pixel_values"].shape[1]
print(f"told: {told}; made: {pictures} pictures, {made['rows'][0][0]} rows, {made['cols'][0][0]} columns")
assert told == (4, 1, 3) and (pictures, made["rows"][0][0], made["cols"][0][0]) == (7, 2, 3), "the behaviour has changed"
P
