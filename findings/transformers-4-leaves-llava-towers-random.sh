#!/usr/bin/env bash
# transformers 5.24.0 and 4.57.1: a LLaVA that 5 has saved, loaded by 4. Both know the model and the format.
# Expected: the same weights, or an error. (A Qwen2-VL that 5 has saved is read whole by 4.)
# Seen: 5 calls the tower's weights vision_tower.*, 4 looks for vision_tower.vision_model.*: the tower is random, the load succeeds with a
# warning alone, and the same picture is seen otherwise. So the cards of davsp-mini say which transformers reads them.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
for version in 5.24.0 4.57.1; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 "transformers==$version"
done
"$folder/5.24.0/bin/python" - "$folder/model" <<'P'
import sys

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

torch.manual_seed(0)
small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
vision = CLIPVisionConfig(**small, image_size=28, patch_size=14)
text = LlamaConfig(**small, num_key_value_heads=2, vocab_size=64)
config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=3, image_token_index=3, vision_feature_layer=-1)
LlavaForConditionalGeneration(config).save_pretrained(sys.argv[1])
P
cat > "$folder/load.py" <<'P'
import sys

import transformers

transformers.logging.set_verbosity_error()
model, told = transformers.LlavaForConditionalGeneration.from_pretrained(sys.argv[1], output_loading_info=True)
tower = [name for name, _ in model.named_parameters() if "vision_tower" in name]
random = [name for name in told["missing_keys"] if "vision_tower" in name]
print(f"transformers {transformers.__version__}: {len(random)} of the tower's {len(tower)} weights are random")
assert len(random) == (len(tower) if transformers.__version__ < "5" else 0), "the behaviour has changed"
P
"$folder/5.24.0/bin/python" "$folder/load.py" "$folder/model"
"$folder/4.57.1/bin/python" "$folder/load.py" "$folder/model"
