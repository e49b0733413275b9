"""Block sizes: how many units are removed between two updates of the remaining weights."""

from __future__ import annotations

from ..checks import Integer, OneOf


def dynamic(removed: int, count: int, largest: int = 1024, smallest: int = 8) -> int:
    """Half of the units that are still to be removed, between two sizes.

    SlimGPT's dynamic group size starts large, "such as 1024", and ends at about 8; how it gets from
    one to the other is not published, halving is our choice.
    """
    return min(max((count - removed) // 2, smallest), largest)


def released(removed: int, count: int) -> int:
    """Block sizes of SlimGPT's released code: up to 1024 at first, soon 64.

    There ``block`` starts at ``(count - 512) // 2``, shrinks to ``(block - 512) // 2`` with every
    block, and a block has ``min(max(block, 64), 1024)`` columns.
    """
    block, done = (count - 512) // 2, 0
    while (size := min(max(block, 64), 1024, count - done)) and done + size <= removed:
        block, done = (block - 512) // 2, done + size
    return size


#: Rules by name: ``(units removed so far, units to remove)`` to the size of the next block.
BLOCK_SIZES = {"dynamic": dynamic, "released": released}

#: Check of the option: a rule's name, or one size for all blocks.
BlockSize = Integer(1) | OneOf(BLOCK_SIZES)


def next_block(block_size: str | int, removed: int, count: int) -> int:
    """Size of the next block, at most what is still to be removed."""
    if isinstance(block_size, str):
        block_size = BLOCK_SIZES[block_size](removed, count)
    return min(block_size, count - removed)
