"""Aya Vision: InternVL's tiles, each behind its number."""

from davsp.lvlm.internvl import InternVLLVLM

BEGIN, END = "<|START_OF_IMG|>", "<|END_OF_IMG|>"


class AyaVisionLVLM(InternVLLVLM):
    """Tiles of 364 pixels, 169 tokens each; the whole stands last, behind a mark of its own, also where it is all."""

    def _tiles(self) -> tuple[int, int]:
        vision, factor = self.model.config.vision_config, self.model.config.downsample_factor
        return vision.image_size, (vision.image_size // (vision.patch_size * factor)) ** 2

    def _put_marks(self) -> None:
        self.picture_text = ("<image>", f"{BEGIN}{self.tokenizer.convert_ids_to_tokens(self.image_token_id)}{END}")

    def picture_ids(self, height: int, width: int) -> list[int]:
        tile = self.tokenizer.convert_ids_to_tokens(self.image_token_id) * self.tile_tokens
        marks = [f"TILE_{i}" for i in range(1, self._looks_at(height, width))] + ["TILE_GLOBAL"]
        text = BEGIN + "".join(mark + tile for mark in marks) + END
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])[1:-1]
