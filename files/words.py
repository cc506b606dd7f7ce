"""Numbers and the words behind them, in messages."""


def counted(count: float, noun: str) -> str:
    """The number with its noun: `1 epoch`, `0 epochs`, `1,437 training images`, `2 classes`, `3 entries`, `1.5 epochs`."""
    told = f"{count:g}" if isinstance(count, float) else f"{count:,}"
    if count == 1:
        return f"{told} {noun}"
    if noun.endswith(("s", "x", "tch", "nch")):
        return f"{told} {noun}es"
    return f"{told} {noun[:-1]}ies" if noun.endswith("ry") else f"{told} {noun}s"
