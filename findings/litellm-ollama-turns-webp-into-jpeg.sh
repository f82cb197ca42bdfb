#!/usr/bin/env bash
# LiteLLM 1.110.2, the ollama/ road: what becomes of a picture on its way to the model.
# Expected: the pixels that were sent (Ollama reads PNG, so a lossless picture could be sent on as one).
# Seen: JPEG and PNG pass; a WebP, a lossless one too, is sent on as a JPEG of Pillow's default quality. So PNG is what keeps a border whole.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check litellm==1.110.2 pillow==13.0.0
cd "$folder"
LITELLM_LOCAL_MODEL_COST_MAP=True venv/bin/python - 2>/dev/null <<'P'
import base64
import io
from PIL import Image
from litellm.llms.ollama.common_utils import _convert_image

picture, seen = Image.effect_noise((64, 64), 80).convert("RGB"), {}
for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    sent = Image.open(io.BytesIO(base64.b64decode(_convert_image(base64.b64encode(file.getvalue()).decode()))))
    seen[kind] = (sent.format, sent.convert("RGB").tobytes() == picture.tobytes())
    print(kind, "is sent on as", sent.format, "| same pixels:", seen[kind][1])
assert seen == {"PNG": ("PNG", True), "WEBP": ("JPEG", False)}, "the behaviour has changed"
P
