"""files/errors.py: the nearest match of a wrong word."""

from files.errors import nearest


def test_nearest() -> None:
    assert nearest("cosin", ["linear", "cosine"]) == "; did you mean 'cosine'?"
    assert nearest("zzz", ["linear", "cosine"]) == ""
