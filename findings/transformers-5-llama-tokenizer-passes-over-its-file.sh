#!/usr/bin/env bash
# transformers 5.24.0 and 4.57.1: a Llama tokenizer with the special token <image>, as LLaVA's have it. Its tokenizer.json marks the beginning of
# every piece between special tokens (normalizer Prepend), its tokenizer_config.json says "legacy": false.
# Expected: the tokens of tokenizer.json, as the library tokenizers and transformers 4 give them: a mark after <image>, too.
# Seen: 5 takes vocabulary and merges of the file alone and builds the rest anew by "legacy": the mark is at the very beginning only. The
# same checkpoint asks by other tokens.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
for version in 5.24.0 4.57.1; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
done
cat > "$folder/make.py" <<'P'
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, normalizers, processors

folder = Path(sys.argv[1])
folder.mkdir()
names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *sorted(set("USER:whatis"))]
vocabulary = {name: i for i, name in enumerate(names)}
made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
special = ("<unk>", "<s>", "</s>", "<image>")
made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
made.save(str(folder / "tokenizer.json"))
config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
(folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
P
cat > "$folder/ask.py" <<'P'
import sys

import tokenizers
import transformers

text = "USER: <image>\nwhat is"
asked = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
tokens = asked.convert_ids_to_tokens(asked(text)["input_ids"])
file = tokenizers.Tokenizer.from_file(sys.argv[1] + "/tokenizer.json").encode(text).tokens
after = [some[some.index("<image>") + 1] for some in (file, tokens)]
print(f"after <image>: {after[0]!r} by tokenizer.json, {after[1]!r} by transformers {transformers.__version__}")
changed = "the behaviour has changed"
assert after[0] == "▁" and after[1] == ("▁" if transformers.__version__ < "5" else "<0x0A>"), changed
assert (tokens == file) == (transformers.__version__ < "5"), changed
P
"$folder/5.24.0/bin/python" "$folder/make.py" "$folder/tokenizer"
"$folder/5.24.0/bin/python" "$folder/ask.py" "$folder/tokenizer"
"$folder/4.57.1/bin/python" "$folder/ask.py" "$folder/tokenizer"
