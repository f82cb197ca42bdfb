"""Qwen2.5-VL: the worked example of docs/families.md."""

from davsp.lvlm.qwen2_vl import Qwen2VLLVLM


class Qwen25VLLVLM(Qwen2VLLVLM):
    """Another tower (windowed attention) behind the same input: pictures, positions and placeholders are Qwen2-VL's."""
