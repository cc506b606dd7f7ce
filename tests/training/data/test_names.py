"""Names in little memory: read as a list is."""

import pickle
import tracemalloc

import pytest

from training.data.names import BLOCK, Names


@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_names_are_read_as_a_list_is(length: int) -> None:
    expected = [f"{'x' * (i % 5)}{i}" if i % 7 else "" for i in range(length)]
    names = Names(iter(expected))
    assert len(names) == length and list(names) == expected and names[1:-1:3] == expected[1:-1:3]
    assert [names[i] for i in range(-length, length)] == expected * 2
    for outside in (length, -length - 1):
        with pytest.raises(IndexError, match=f"name {outside} of {length}"):
            names[outside]


def test_any_text_is_a_name() -> None:
    expected = ["plain", "größer", "猫/犬.png", "🐈", "\udce4.jpg", "two\nlines", "\0"]
    names = pickle.loads(pickle.dumps(Names(expected)))  # as a worker that is not forked gets them
    assert list(names) == expected and [names[i] for i in range(7)] == expected and names.index("🐈") == 3


def test_names_take_4_bytes_beside_their_characters() -> None:
    count = 20 * BLOCK
    tracemalloc.start()
    names = Names(f"train/n00000001/{i:014}" for i in range(count))
    taken = tracemalloc.get_traced_memory()[0] / count
    tracemalloc.stop()
    assert len(names[0]) == 30 and 34 <= taken < 35
