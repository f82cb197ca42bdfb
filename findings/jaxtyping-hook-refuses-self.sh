#!/usr/bin/env bash
# jaxtyping 0.3.11 with beartype 0.23.1: a module whose method returns typing.Self, imported under jaxtyping's import hook.
# Expected: it is imported and checked; beartype knows Self (PEP 673), as the class shows that is decorated by beartype itself.
# Seen: the hook decorates each method by itself, so beartype does not know the class and refuses the annotation: the import ends in an
# exception. A TypeVar in its place works. So davsp, whose tests run under the hook, has no Self.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jaxtyping==0.3.11 beartype==0.23.1
cat > "$folder/shape.py" <<'P'
from typing import Self


class Shape:
    def same(self) -> Self:
        return self
P
cat > "$folder/ask.py" <<'P'
from beartype import beartype
from beartype.roar import BeartypeDecorHintPep673Exception
from jaxtyping import install_import_hook

import shape

decorated = beartype(shape.Shape)()
assert decorated.same() is decorated, "the behaviour has changed"
del __import__("sys").modules["shape"]
seen = "imported"
try:
    with install_import_hook("shape", "beartype.beartype"):
        import shape
except BeartypeDecorHintPep673Exception:
    seen = "refused"
print("under the hook the module is", seen)
assert seen == "refused", "the behaviour has changed"
P
(cd "$folder" && venv/bin/python ask.py)
