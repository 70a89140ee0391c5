"""Packed codes in registers: as integers for a product, as pairs of bfloat16, and as float32.

Turning an integer into a float is slow on a GPU, and so is one operation after another for each code. Bits of codes are
put to where a float has its mantissa instead, several codes at a time.
"""

import triton
import triton.language as tl


@triton.jit
def load_units(units, rows, valid, STRIDE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """`[rows, BLOCK]` bytes or words of rows that are STRIDE apart, zero beyond COUNT and where `valid` is False.

    rows: int32, from where `units` points, so that only that has to be 64 bits wide.
    """
    places = tl.arange(0, BLOCK)
    mask = valid[:, None]
    if COUNT < BLOCK:
        mask = mask & (places < COUNT)[None, :]
    return tl.load(units + (rows[:, None] * STRIDE + places[None, :]), mask=mask, other=0)


@triton.jit
def opaque(tile):
    """The same `[M, N]` integers, for an operand of a product.

    Triton (3.4 to 3.9) looks through `join` to where numbers were loaded, chooses another order of the operand for
    them, and needs an extra move for each register. It does not look through a reduction, be it of one number.
    """
    return tl.max(tl.reshape(tile, [tile.shape[0], tile.shape[1], 1]), 2).to(tile.dtype)


@triton.jit
def _moved(units, DOWN: tl.constexpr):
    """Shifted so many bits down, or up where that is below zero."""
    if DOWN < 0:
        return units << -DOWN
    else:
        return units >> DOWN


# -- float32 -----------------------------------------------------------------------------------------------------------


@triton.jit
def _spread(units, FIRST: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, AT: tl.constexpr):
    """Every STEP-th code of units of WIDTH bits from the FIRST on, in int32, where its lowest bit is bit AT."""
    if STEP * BITS == WIDTH:
        return _moved(units, FIRST * BITS - AT) & (((1 << BITS) - 1) << AT)
    else:
        even = _spread(units, FIRST, 2 * STEP, WIDTH, BITS, AT)
        return tl.join(even, _spread(units, FIRST + STEP, 2 * STEP, WIDTH, BITS, AT))


@triton.jit
def _mantissas(units, BITS: tl.constexpr, AT: tl.constexpr):
    """Codes `[N, codes]` of units `[N, units]`, int32, where the lowest bit of each is bit AT."""
    WIDTH: tl.constexpr = units.dtype.primitive_bitwidth
    spread = _spread(units.to(tl.int32), 0, 1, WIDTH, BITS, AT)
    return opaque(tl.reshape(spread, [units.shape[0], units.shape[1] * (WIDTH // BITS)]))


@triton.jit
def raised_codes(
    units, rows, valid, BITS: tl.constexpr, STRIDE: tl.constexpr, LOW: tl.constexpr, BLOCK_D: tl.constexpr
):
    """2**BITS + code, float32 `[N, BLOCK_D]`: the code is the mantissa. LOW: units with two bits of codes of three."""
    WIDTH: tl.constexpr = units.dtype.element_ty.primitive_bitwidth
    if BITS == 3:
        low = load_units(units, rows, valid, STRIDE, LOW, BLOCK_D * 2 // WIDTH)
        high = load_units(units + LOW, rows, valid, STRIDE, STRIDE - LOW, BLOCK_D // WIDTH)
        mantissas = _mantissas(low, 2, 20) | _mantissas(high, 1, 22)
    else:
        mantissas = _mantissas(load_units(units, rows, valid, STRIDE, STRIDE, BLOCK_D * BITS // WIDTH), BITS, 23 - BITS)
    return (mantissas | ((127 + BITS) << 23)).to(tl.float32, bitcast=True)


# -- pairs of bfloat16 -------------------------------------------------------------------------------------------------


@triton.jit
def _pairs(words, FIRST: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    """2**BITS + code in the lower and upper half of int32, for every STEP-th code of a half from the FIRST on."""
    if STEP * BITS == 16:
        codes = _moved(words, FIRST * BITS - (7 - BITS)) & ((((1 << BITS) - 1) << (7 - BITS)) * 0x00010001)
        return codes | (((127 + BITS) << 7) * 0x00010001)
    else:
        return tl.join(_pairs(words, FIRST, 2 * STEP, BITS), _pairs(words, FIRST + STEP, 2 * STEP, BITS))


@triton.jit
def raised_pairs(words, BITS: tl.constexpr):
    """2**BITS + code, bfloat16 `[N, codes]`, of words `[N, words]` with codes of 2 or 4 bits, in `paired_order`.

    Two codes at a time, that of the lower half of a word beside that of the upper half.
    """
    return _halves(_pairs(words, 0, 1, BITS), words.shape[1] * (32 // BITS))


@triton.jit
def paired_order(BITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which channel each column of `raised_pairs` is; of 1 bit, which bit each column of `signs` is."""
    columns = tl.arange(0, BLOCK_D)
    within = columns % (32 // BITS)
    return columns - within + within // 2 + (within % 2) * (16 // BITS)


@triton.jit
def _halves(pairs, COUNT: tl.constexpr):
    """bfloat16 `[N, COUNT]` of int32 that hold two each, that of the lower half first."""
    halves = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return opaque(tl.reshape(halves, [pairs.shape[0], COUNT])).to(tl.bfloat16, bitcast=True)


# -- signs -------------------------------------------------------------------------------------------------------------


@triton.jit
def _sign_pairs(words, FIRST: tl.constexpr, STEP: tl.constexpr):
    """-1 where a bit is set and else 1, bfloat16 in both halves of int32, of every STEP-th bit of a half."""
    if STEP == 16:
        return (words << (15 - FIRST)) & -0x7FFF8000 | 0x3F803F80
    else:
        return tl.join(_sign_pairs(words, FIRST, 2 * STEP), _sign_pairs(words, FIRST + STEP, 2 * STEP))


@triton.jit
def signs(words):
    """-1 for a bit that is set, 1 for one that is not, bfloat16 `[N, bits]` of words `[N, words]`, in `paired_order`.

    A code of any width is a sum of these, and so is its product: of one operation for each two bits, and no shift.
    """
    return _halves(_sign_pairs(words, 0, 1), 32 * words.shape[1])


@triton.jit
def load_words(units, rows, valid, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Words `[rows, BLOCK]`, int32, of rows of STRIDE units of 8, 16 or 32 bits; zero where there are none."""
    WIDTH: tl.constexpr = units.dtype.element_ty.primitive_bitwidth
    if WIDTH == 32:
        return load_units(units, rows, valid, STRIDE, STRIDE, BLOCK)
    else:
        EACH: tl.constexpr = 32 // WIDTH
        places = EACH * tl.arange(0, BLOCK)
        words = tl.zeros([rows.shape[0], BLOCK], tl.int32)
        for part in tl.static_range(EACH):
            mask = valid[:, None] & (places + part < STRIDE)[None, :]
            unit = tl.load(units + part + (rows[:, None] * STRIDE + places[None, :]), mask=mask, other=0)
            words |= (unit.to(tl.int32) & ((1 << WIDTH) - 1)) << (part * WIDTH)
        return words


# -- integers ----------------------------------------------------------------------------------------------------------


@triton.jit
def digit(numbers, terms, DIGITS: tl.constexpr):
    """Digit number `terms` of float32 numbers `[M, K]` in -1 .. 1, int8. terms: `[M]`; there are DIGITS, others are 0.

    A number is the sum of its digits times `digit_units`.
    """
    rest = numbers * 127.0
    found = tl.zeros_like(numbers)
    for term in tl.static_range(DIGITS):
        whole = tl.floor(rest + 0.5)
        found = tl.where((terms == term)[:, None], whole, found)
        rest = (rest - whole) * 254.0
    return found.to(tl.int8)


@triton.jit
def digit_units(terms):
    """What a digit stands for, float32."""
    units = tl.where(terms == 0, 1.0 / 127, 1.0 / (127 * 254))
    return tl.where(terms <= 1, units, 1.0 / (127 * 254 * 254))


@triton.jit
def dot_codes(planes, bytes_, BITS: tl.constexpr):
    """Products of integers with codes of 1, 2, 4 or 8 bits, int32 `[M, N]`, exact; bytes_: `[N, K]`.

    planes: int8 `[M, K]`, what the first codes of bytes are multiplied with, the second ones and so on. No code is
    moved: sums of products with codes in higher places are multiples of what these places are worth. The last code of
    a byte counts as code - 2**(BITS - 1), as integers of tensor cores have a sign: see `missing`.
    """
    LAST: tl.constexpr = 8 // BITS - 1
    codes = (bytes_ & (((1 << BITS) - 1) << (LAST * BITS))) ^ 0x80
    products = tl.dot(planes[LAST], tl.trans(codes.to(tl.int8, bitcast=True)), out_dtype=tl.int32)
    for step in tl.static_range(1, LAST + 1):
        codes = bytes_ & (((1 << BITS) - 1) << ((LAST - step) * BITS))
        transposed = tl.trans(codes.to(tl.int8, bitcast=True))
        products = tl.dot(planes[LAST - step], transposed, products >> BITS, out_dtype=tl.int32)
    return products


@triton.jit
def missing(channels, BITS: tl.constexpr):
    """How much less than a code `dot_codes` counts, by channel; of 3 bits, two low ones and 4 times the high one."""
    if BITS == 3:
        return missing(channels, 2) + 4 * missing(channels, 1)
    else:
        return tl.where(channels % (8 // BITS) == 8 // BITS - 1, 1 << (BITS - 1), 0)
