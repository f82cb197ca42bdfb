"""What tests of the paper's tables share: a protocol in small, and a row of figures."""

SMALL = {"vector": 10, "sweep": 6, "train": 96, "harm": 4, "utility": 1, "mme": 2, "llava_bench": 2}


def row(defense: str, benchmark: str, metric: str, value: float | None, split: str = "total") -> dict:
    spread = (None, None) if value is None else (value - 0.02, value + 0.02)
    head = {"model": "m", "defense": defense, "benchmark": benchmark, "split": split, "metric": metric}
    return head | {"value": value, "low": spread[0], "high": spread[1], "n": 50}
