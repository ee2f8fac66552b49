"""Which part of a product a program computes. Parts decide bits and follow from the weight's shape alone; tiles only
decide speed. The figures are estimates: no card has tuned them yet."""

from __future__ import annotations

from typing import NamedTuple

#: of the rule of parts: another rule gives other bits
VERSION = 1
#: a part has a multiple of so many columns, so of every group of quantised weights, too
PART_STEP = 256
MOST_PARTS = 8
#: programs that fill a card of 132 processors twice
PROGRAMS = 264
#: columns of a decoding tile
NARROW = 64


class Tile(NamedTuple):
    """`rows` x `columns` of the result are one program's; `depth` columns of the weight are one step."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def part_length(N: int, K: int) -> int:
    """Returns the length of a part of a weight [N, K]: enough parts that one row's products fill a card."""
    wanted = -(-PROGRAMS // -(-N // NARROW))
    parts = max(1, min(wanted, MOST_PARTS, K // PART_STEP))
    return -(-K // (parts * PART_STEP)) * PART_STEP


def part_count(N: int, K: int) -> int:
    """Returns how many parts there are."""
    return -(-K // part_length(N, K))


#: of decoding, of many sequences or a short chunk, and of prefill; 128 x 128 would not fit the registers of every card
TILES = (Tile(16, NARROW, 64, 4, 6), Tile(64, NARROW, 64, 8, 3), Tile(128, NARROW, 32, 8, 4))
#: a gate tile and its up tile together: two accumulators, beside which 64 deep would not fit the registers of sm_80 to
#: 89 with every compiler
PAIRED_TILES = (Tile(16, 32, 64, 4, 6), Tile(64, 32, 64, 4, 3), Tile(128, 64, 32, 8, 5))
#: of an expert's second product, whose rows lie apart: 64 x 64 would not fit the registers of sm_86 and 89 with int4
EXPERT_TILES = (TILES[0], Tile(64, 32, 64, 8, 3))
#: rows of the largest call whose parts run beside each other; in larger ones a program adds its parts itself
PARALLEL_ROWS = 16


def tile(rows: int, tiles: tuple[Tile, ...] = TILES) -> Tile:
    """Returns the smallest tile that holds so many rows, or the largest."""
    return next((one for one in tiles if rows <= one.rows), tiles[-1])
