"""Qwen3-VL: Qwen2-VL's pictures in multiples of 32 pixels."""

from davsp.lvlm.qwen2_vl import Qwen2VLLVLM


class Qwen3VLLVLM(Qwen2VLLVLM):
    """Features of the tower's middle are added behind the first decoder blocks, at the picture's tokens alone: the hooked state
    of the last prompt token is the model's own."""
