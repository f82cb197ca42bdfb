"""Qwen3.5: Qwen3-VL's pictures before a decoder that is partly linear attention."""

from davsp.lvlm.qwen2_vl import Qwen2VLLVLM


class Qwen35LVLM(Qwen2VLLVLM):
    """Blocks of linear attention may forget a picture or a question before the last token is read. A layer in which the classes then do not
    differ is left out by the vector (`HarmfulnessVector.left_out`)."""
