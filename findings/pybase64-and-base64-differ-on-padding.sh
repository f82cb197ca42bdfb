#!/usr/bin/env bash
# pybase64 1.5.1, made to take the place of Python's base64, both with validate=True.
# Expected: both read or refuse the same texts.
# Seen: padding after whole groups ("QUJD====") is read by Python's base64 as "ABC" and refused by pybase64.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pybase64==1.5.1
"$folder/venv/bin/python" - <<'P'
import base64
import binascii
import pybase64

read = base64.b64decode(b"QUJD====", validate=True)
try:
    other = pybase64.b64decode(b"QUJD====", validate=True)
except binascii.Error as error:
    other = f"refused ({error})"
print("base64:", read, "| pybase64:", other)
assert read == b"ABC" and isinstance(other, str), "the behaviour has changed"
P
