"""The kernel of accelerators, in Triton: a program for each tile, up to 4,096 classes of a row.

A program reads its tile of p and q once, into registers, and leaves a part (see `parts.py`); a second kernel merges the
parts of a row. Which classes make a tile depends on their number alone, and so does the order of every sum: a row has
its bits in any batch.

Importing this file takes Triton; `klmetric.arithmetic.accelerator` does it when it is first needed.
"""

import triton
import triton.language as tl

from klmetric.arithmetic.parts import (
    INF,
    careful,
    divergence_of,
    inner,
    largest_of,
    merged,
    merged_with,
    nothing,
    of_logs,
    of_plain_logs,
    of_probs,
)

# Classes of a tile: of the smallest and of the largest in float32, and of the largest in float64, which takes twice the
# registers and more.
LEAST, TILE, CAREFUL = 32, 4096, 1024
# Of these each of the 32 threads of a warp takes a 32nd; of a tile in float32 a quarter is done at once in float64.
OF_A_WARP, OF_A_CAREFUL_WARP = 1024, 256
FIELDS = 8  # of a part
MERGED = 32  # parts that are merged at once


@inner
def _read(data, step, left, N: tl.constexpr, UNIT: tl.constexpr):
    """N classes, in float32 where they are no float64. Past the end it is the last one again."""
    at = tl.arange(0, N)
    if left >= N:
        x = tl.load(data + (at if UNIT else at * step))
    else:
        at = tl.minimum(at, left - 1)
        x = tl.load(data + (at if UNIT else at * step))
    if x.dtype == tl.bfloat16:  # the upper half of a float32; the interpreter's own way gets its denormal numbers wrong
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@inner
def _logarithms(x, inside, PROBS: tl.constexpr):
    x = x.to(tl.float64)
    if PROBS:
        x = tl.where(x < 0, float("nan"), tl.log(tl.abs(x)))
    return tl.where(inside, x, -INF)


@inner
def _careful_tile(
    p,
    q,
    p_step,
    q_step,
    left,
    tau,
    P: tl.constexpr,
    Q: tl.constexpr,
    UNIT_P: tl.constexpr,
    UNIT_Q: tl.constexpr,
    swapped: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The part of a tile, in float64."""
    if CHUNK == C:
        inside = tl.arange(0, C) < left
        a = _logarithms(_read(p, p_step, left, C, UNIT_P), inside, P)
        b = _logarithms(_read(q, q_step, left, C, UNIT_Q), inside, Q)
        a, b = (b, a) if swapped else (a, b)
        return careful(a, b, 0.0, tau)
    top, mass, base, centre, total, extra, y, edge = nothing((left * 0).to(tl.float64))
    for start in range(0, left, CHUNK):
        inside = tl.arange(0, CHUNK) < left - start
        a = _logarithms(_read(p + start * p_step, p_step, left - start, CHUNK, UNIT_P), inside, P)
        b = _logarithms(_read(q + start * q_step, q_step, left - start, CHUNK, UNIT_Q), inside, Q)
        a, b = (b, a) if swapped else (a, b)
        top2, mass2, base2, centre2, total2, extra2, y2, edge2 = careful(a, b, 0.0, tau)
        top, mass, base, centre, total, extra, y, edge = merged_with(
            top, mass, base, centre, total, extra, y, edge, top2, mass2, base2, centre2, total2, extra2, y2, edge2
        )
    return top, mass, base, centre, total, extra, y, edge


@inner
def _first_of_largest(x, before, N: tl.constexpr):
    top = largest_of(x)
    return top.to(tl.float64), tl.min(tl.where(x == top, tl.arange(0, N), N)) + before


# No argument but the constants makes another program: whether a pointer is a multiple of 16 must not show in a sum.
@triton.jit(
    do_not_specialize=["within", "classes", "begin", "p_outer", "p_inner", "p_step", "q_outer", "q_inner", "q_step"],
    do_not_specialize_on_alignment=["p", "q", "kl", "same", "parts"],
)
def measure_tiles(
    p,
    q,
    kl,
    same,
    parts,
    begin: tl.int64,
    within: tl.int64,
    classes: tl.int64,
    p_outer: tl.int64,
    p_inner: tl.int64,
    p_step: tl.int64,
    q_outer: tl.int64,
    q_inner: tl.int64,
    q_step: tl.int64,
    tau: tl.float64,
    factor: tl.float32,
    log2e: tl.float32,
    ln2: tl.float32,
    ln2_rest: tl.float32,
    reach: tl.float32,
    under: tl.float32,
    P: tl.constexpr,
    Q: tl.constexpr,
    UNIT_P: tl.constexpr,
    UNIT_Q: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    AGREES: tl.constexpr,
    FAST: tl.constexpr,
    ONE: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Measure a tile, C classes of a row: its divergence where they are all (ONE), else its part.

    Row r is (r // within, r % within), at steps of `outer` and `inner`. P and Q say whether a side is probabilities,
    UNIT whether its classes are neighbours in memory; FIRST and END whether KL(p || q) is wanted (0), KL(q || p) (1) or
    both. What float32 cannot do (or all, unless FAST) goes through float64, CHUNK classes at once.
    """
    row = begin + tl.program_id(0)
    tile = tl.program_id(1)
    before = tile.to(tl.int64) * C
    left = tl.minimum(classes - before, C).to(tl.int32)
    p += (row // within) * p_outer + (row % within) * p_inner + before * p_step
    q += (row // within) * q_outer + (row % within) * q_inner + before * q_step
    x, y = _read(p, p_step, left, C, UNIT_P), _read(q, q_step, left, C, UNIT_Q)
    if AGREES:
        top_p, place_p = _first_of_largest(x, before, C)
        top_q, place_q = _first_of_largest(y, before, C)
        if ONE:
            tl.store(same + row, place_p == place_q)
    divergence = (left * 0).to(tl.float64)
    step = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)  # between the fields of parts
    parts += tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tile
    for swapped in tl.static_range(FIRST, END):
        if FAST:
            a, b = (y, x) if swapped else (x, y)
            inside = tl.arange(0, C) < left
            if P:
                fit, top, mass, base, centre, total, extra, rest, edge = of_probs(a, b, inside)
            else:
                fit, top, mass, base, centre, total, extra, rest, edge = of_plain_logs(
                    a, b, inside, factor, log2e, ln2, ln2_rest, reach, under
                )
                if not fit:
                    fit, top, mass, base, centre, total, extra, rest, edge = of_logs(
                        a, b, inside, tau, factor, log2e, ln2, ln2_rest, reach, under
                    )
            if not fit:
                top, mass, base, centre, total, extra, rest, edge = _careful_tile(
                    p, q, p_step, q_step, left, tau, P, Q, UNIT_P, UNIT_Q, swapped, C, CHUNK
                )
        else:
            top, mass, base, centre, total, extra, rest, edge = _careful_tile(
                p, q, p_step, q_step, left, tau, P, Q, UNIT_P, UNIT_Q, swapped, C, CHUNK
            )
        if ONE:
            divergence += divergence_of(top, mass, total, extra, rest, edge, classes)
        else:
            tl.store(parts, top)
            tl.store(parts + step, mass)
            tl.store(parts + 2 * step, base)
            tl.store(parts + 3 * step, centre)
            tl.store(parts + 4 * step, total)
            tl.store(parts + 5 * step, extra)
            tl.store(parts + 6 * step, rest)
            tl.store(parts + 7 * step, edge)
            parts += 8 * step
    if ONE:
        tl.store(kl + row, divergence)
    if AGREES and not ONE:
        tl.store(parts, top_p)
        tl.store(parts + step, place_p.to(tl.float64))
        tl.store(parts + 2 * step, top_q)
        tl.store(parts + 3 * step, place_q.to(tl.float64))


@inner
def _leader(parts, step, tile, tiles, best, place):
    """The largest of these tiles and of those before, and the first place of it."""
    top = tl.load(parts + tile, mask=tile < tiles, other=-INF)
    here = tl.load(parts + step + tile, mask=tile < tiles, other=INF)
    largest = tl.max(top)
    first = tl.min(tl.where(top == largest, here, INF))
    return tl.maximum(best, largest), tl.where(largest > best, first, place)


@triton.jit(
    do_not_specialize=["begin", "tiles", "classes"],
    do_not_specialize_on_alignment=["parts", "kl", "same"],
)
def merge_tiles(
    parts,
    kl,
    same,
    begin: tl.int64,
    tiles: tl.int32,
    classes: tl.int64,
    DIRECTIONS: tl.constexpr,
    AGREES: tl.constexpr,
    N: tl.constexpr,
):
    """Merge the parts of a row, N at once."""
    row = begin + tl.program_id(0)
    step = tl.num_programs(0).to(tl.int64) * tiles
    parts += tl.program_id(0).to(tl.int64) * tiles
    zero = (tiles * 0).to(tl.float64)
    divergence = zero
    for _ in tl.static_range(DIRECTIONS):
        top, mass, base, centre, total, extra, rest, edge = nothing(zero)
        for start in range(0, tiles, N):
            tile = start + tl.arange(0, N)
            inside = tile < tiles
            top2, mass2, base2, centre2, total2, extra2, rest2, edge2 = merged(
                tl.load(parts + tile, mask=inside, other=0.0),
                tl.load(parts + step + tile, mask=inside, other=0.0),
                tl.load(parts + 2 * step + tile, mask=inside, other=0.0),
                tl.load(parts + 3 * step + tile, mask=inside, other=0.0),
                tl.load(parts + 4 * step + tile, mask=inside, other=0.0),
                tl.load(parts + 5 * step + tile, mask=inside, other=-INF),
                tl.load(parts + 6 * step + tile, mask=inside, other=0.0),
                tl.load(parts + 7 * step + tile, mask=inside, other=-INF),
            )
            top, mass, base, centre, total, extra, rest, edge = merged_with(
                top, mass, base, centre, total, extra, rest, edge,
                top2, mass2, base2, centre2, total2, extra2, rest2, edge2,
            )  # fmt: skip
        divergence += divergence_of(top, mass, total, extra, rest, edge, classes)
        parts += 8 * step
    tl.store(kl + row, divergence)
    if AGREES:
        top_p, place_p, top_q, place_q = zero - INF, zero, zero - INF, zero
        for start in range(0, tiles, N):
            tile = start + tl.arange(0, N)
            top_p, place_p = _leader(parts, step, tile, tiles, top_p, place_p)
            top_q, place_q = _leader(parts + 2 * step, step, tile, tiles, top_q, place_q)
        tl.store(same + row, place_p == place_q)
