#!/usr/bin/env bash
# pydantic 2.14.3 with beartype 0.23.1: a field validator whose second parameter has pydantic's own annotation, ValidationInfo.
# Expected: the class is made and its annotations are checked, as those of the same validator without it are.
# Seen: ValidationInfo is a Protocol that nobody may ask isinstance of (it lacks runtime_checkable), so beartype refuses the annotation
# while the class is made: the import ends in an exception. With Any in its place it works. So davsp, whose tests run under beartype,
# has Any there.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pydantic==2.14.3 beartype==0.23.1
cat > "$folder/ask.py" <<'P'
from typing import Any

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep3119Exception
from pydantic import BaseModel, ValidationInfo, field_validator


def made(annotation: Any) -> str:
    def double(cls, value: int, info) -> int:
        return 2 * value if info.field_name == "steps" else value

    double.__annotations__["info"] = annotation
    try:
        checked = beartype(double)
    except BeartypeDecorHintPep3119Exception:
        return "refused"

    class Settings(BaseModel):
        steps: int
        _double = field_validator("steps")(checked)

    return f"made, {Settings(steps=2).steps}"


seen = made(ValidationInfo), made(Any)
print("with ValidationInfo:", seen[0], "- with Any:", seen[1])
assert seen == ("refused", "made, 4"), "the behaviour has changed"
P
"$folder/venv/bin/python" "$folder/ask.py"
