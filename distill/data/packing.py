"""Rows of a language model, filled with whole documents.

Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (Ding et al. 2024), fills rows nearly as well
as cutting the stream of documents anywhere.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

Pieces = np.ndarray
"""int64 [n, 3]: document, start, stop."""


def cut_documents(lengths: np.ndarray, size: int) -> Pieces:
    """Cut documents of these lengths into pieces of `size` tokens and a rest, in their order.

    A rest of one token would predict nothing: it gets the last token of the piece before it.
    """
    counts = -(-lengths // size)
    document = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    start = (np.arange(len(document)) - first[document]) * size
    stop = np.minimum(start + size, lengths[document])
    lonely = np.flatnonzero((stop - start == 1) & (start > 0))
    start[lonely] -= 1
    stop[lonely - 1] -= 1
    return np.stack([document, start, stop], axis=1)


def pack(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Put pieces into rows of at most `size` tokens: the longest first, each into the fullest row that has room.

    Returns:
        The pieces of each row, in their order; rows in the order of their first piece.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    """Free tokens -> rows that have so many."""
    rooms: list[int] = []
    """The keys of `with_room`, ascending."""
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, row = size, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        rows[row].append(piece)
        left = room - length
        if left:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(row)
    return sorted(sorted(row) for row in rows)
