#!/usr/bin/env bash
# transformers 5.24.0: a tokenizer is made with additional_special_tokens (a list) and extra_special_tokens (names for the image token).
# Expected: both are special: <turn> stands alone among the tokens, beside a word as well.
# Seen: the list is dropped without a word; "<turn>user" is one unknown word. With the list alone, or with <turn> among the names, it stands.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0
cat > "$folder/ask.py" <<'P'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def tokens(**special):
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<turn>": 1, "<image>": 2, "user": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special)
    return made.convert_ids_to_tokens(made("<turn>user")["input_ids"])


apart, dropped = ["<turn>", "user"], ["<unk>"]
seen = {
    "list": tokens(additional_special_tokens=["<turn>"]),
    "names": tokens(extra_special_tokens={"image_token": "<image>", "turn_token": "<turn>"}),
    "list and names": tokens(additional_special_tokens=["<turn>"], extra_special_tokens={"image_token": "<image>"}),
}
print(seen)
assert seen == {"list": apart, "names": apart, "list and names": dropped}, "the behaviour has changed"
P
"$folder/venv/bin/python" "$folder/ask.py"
