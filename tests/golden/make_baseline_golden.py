#!/usr/bin/env python3
"""Golden blocks of the scalar formats: encoders in float64 that share no code with ours.

    python3 tests/golden/make_baseline_golden.py          (needs numpy; writes tests/golden/baselines/<format>.bin)

The rules are those of the table in kernels/kv_baselines.h, the byte offsets too.  The inputs are those of
make_nsn_golden.py: small integers times powers of two, exact in fp16, from a formula that the test repeats.

<format>.bin, little-endian, for every case in order:  u32 d, u32 key, u32 kind, u32 bytes, u32 beside, the block, and what
is beside it: deco4's matrix, learned from this very block; xquant's codes.
"""
import os
import struct
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
BLOCK, POS = 64, 192          # the block stands at positions 192..255
RANDOM, ZERO, CONSTANT, ONE_HOT, HUGE, TINY, NOT_A_NUMBER = range(7)
CASES = [(d, key, RANDOM) for d in (8, 48, 64, 128) for key in (1, 0)] + \
        [(48, key, kind) for kind in range(1, 7) for key in (1, 0)]


def inputs(d, kind):
    t, c = np.mgrid[0:BLOCK, 0:d]
    u = (t * d + c + 1) * 2654435761 % 2**32
    u = (u ^ u >> 15) * 2246822519 % 2**32
    u ^= u >> 13
    x = ((u & 255) + (u >> 8 & 255) + (u >> 16 & 255) + (u >> 24) - 510 + (c * 37 % 17 - 8) * 24) * 2.0 ** (t % 5 - 8)
    if kind == ZERO:
        x[:] = 0
    if kind == CONSTANT:
        x[:] = x[0]
    if kind == ONE_HOT:
        x = (c == t % d) * 3.0
    if kind == HUGE:
        x = np.sign(x) * 65504.0
    if kind == TINY:
        x = np.sign(x) * 2.0**-24
    if kind == NOT_A_NUMBER:
        x[17, d - 1] = np.nan
    return x


def rope(x):
    """Rows at POS + t, by the angles that the runtime keeps: f32 cos and sin of 64 b f and of r f, multiplied out."""
    d = x.shape[1]
    f = 10000.0 ** (-2.0 * np.arange(d // 2) / d)
    angle = lambda a: (np.cos(a).astype(np.float32).astype(float), np.sin(a).astype(np.float32).astype(float))
    (cb, sb), (cr, sr) = angle(POS * f)[0:2], angle(np.arange(BLOCK)[:, None] * f)
    c, s = cb * cr - sb * sr, cb * sr + sb * cr
    lo, hi = x[:, :d // 2], x[:, d // 2:]
    return np.concatenate([lo * c - hi * s, lo * s + hi * c], axis=1)


def hadamard(x):
    d = x.shape[1]
    p = d & -d
    signs = np.array([[1 - 2 * (bin(r & c).count("1") & 1) for c in range(p)] for r in range(p)], dtype=float)
    return (x.reshape(BLOCK, d // p, p) @ signs).reshape(BLOCK, d) * (1 / np.sqrt(p))


def half(v):
    """f64 -> f32 -> f16, the largest f16 where it would overflow; the value that is kept."""
    return float(np.float16(np.float32(np.clip(v, -65504.0, 65504.0))))


def min_max(bits):
    def encode(x):
        scale, zero = half((x.max() - x.min()) / (2**bits - 1)), half(x.min() + 0.0)
        return (np.clip(np.rint((x - zero) / scale), 0, 2**bits - 1) if scale else 0 * x), scale, zero
    return encode


def q8(x):
    scale = half(np.abs(x).max() / 127)
    return (np.clip(np.rint(x / scale) + 128, 0, 255) if scale else 0 * x), scale


def q4(x):
    scale = half(x.flat[np.abs(x).argmax()] / -8)
    return (np.clip(np.rint(x / scale + 8), 0, 15) if scale else 0 * x), scale


LEVELS2 = np.array([-1.5104, -0.4528, 0.4528, 1.5104], dtype=np.float32).astype(float)


def tq2(x):
    scale = half(np.sqrt((x * x).mean()))
    return (np.abs(x[..., None] / scale - LEVELS2).argmin(-1) if scale else 0 * x), scale


def calibrated(bits, eta):
    plain = min_max(bits)
    def encode(x):
        q, scale, zero = plain(x)
        return q, half((1 - 2 * eta) * scale), half(zero + eta * scale * (2**bits - 1))
    return encode


NF4 = np.array([-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0, 0.0795803, 0.1609302,
                0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1], dtype=np.float32).astype(float)


def nqkv(x):
    scale = half(np.abs(x).max())
    return (np.abs(x[..., None] / scale - NF4).argmin(-1) if scale else 0 * x), scale


def absmax4(x):
    scale = half(np.abs(x).max() / 7)
    return (np.clip(np.rint(x / scale) + 8, 0, 15) if scale else 0 * x), scale


def matrix(rows, w):
    """S V^T / sqrt(n) of the rows of w channels; largest first, the largest entry of a row positive."""
    x = rows.reshape(-1, w)
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    order = np.argsort(-values, kind="stable")
    m = np.sqrt(np.maximum(values[order], 0))[:, None] * vectors[:, order].T
    m *= np.sign(m[np.arange(w), np.abs(m).argmax(1)])[:, None]
    return np.vectorize(half)(m)


#          bits (K, V), rotated, group (tokens, channels) for K, V; encode(group) -> codes, scale[, zero] for K, V
FORMATS = {"kivi2": ((2, 2), False, ((32, 1), (1, 32)), (min_max(2), min_max(2))),
           "q8": ((8, 8), True, ((1, 32), (1, 32)), (q8, q8)),
           "q4": ((4, 4), True, ((1, 32), (1, 32)), (q4, q4)),
           "tq2": ((2, 2), True, ((1, 256), (1, 256)), (tq2, tq2)),
           "nqkv": ((4, 4), False, None, (nqkv, nqkv)),
           "deco4": ((4, 4), False, ((1, 256), (1, 256)), (absmax4, absmax4)),
           "xquant": ((2, 1), False, ((64, 1), (1, 128)), (calibrated(2, 0.045), calibrated(1, 1 / 6)))}
HAS_ZERO = ("kivi2", "xquant")


def block(name, d, key, kind):
    bits, rotated, groups, encoders = FORMATS[name]
    side = 0 if key else 1
    bits, encode = bits[side], encoders[side]
    tokens, channels = groups[side] if groups else (2 ** int(np.log2(256 / d)), d)      # nqkv: 256 values at most
    rows = inputs(d, kind)
    w = 16 if d % 16 == 0 else 8
    if kind == NOT_A_NUMBER:      # codes 0, scales NaN, zeros 0
        n = BLOCK // tokens * -(-d // channels)
        nans = lambda n: np.full(n, 0x7e00, "<u2").tobytes()
        codes, numbers = bytes(BLOCK * d * bits // 8), nans(n) + (bytes(2 * n) if name in HAS_ZERO else b"")
        return (numbers, codes) if name == "xquant" else (codes + numbers, nans(w * w) if name == "deco4" else b"")
    if key:
        rows = rope(rows)
    if rotated:
        rows = hadamard(rows)
    beside = b""
    if name == "deco4":
        m = matrix(rows, w)
        beside = m.astype("<f2").tobytes()
        norm = (m * m).sum(1)
        rows = (rows.reshape(-1, w) @ m.T * np.divide(1, norm, out=np.zeros(w), where=norm > 0)).reshape(BLOCK, d)
    code, kept = np.zeros((BLOCK, d), int), []
    for t in range(0, BLOCK, tokens):
        for c in range(0, d, channels):
            q, *numbers = encode(rows[t:t + tokens, c:c + channels])
            code[t:t + tokens, c:c + channels] = q
            kept.append(numbers)
    # Lowest bits first: spread every code over its bits, then pack eight bits a byte.
    spread = (code[:, :, None] >> np.arange(bits) & 1).reshape(-1).astype(np.uint8)
    codes, numbers = np.packbits(spread, bitorder="little").tobytes(), np.array(kept).T.astype("<f2").tobytes()
    return (numbers, codes) if name == "xquant" else (codes + numbers, beside)


for name in FORMATS:
    with open(os.path.join(HERE, "baselines", name + ".bin"), "wb") as f:
        for d, key, kind in CASES:
            if name == "deco4" and kind in (CONSTANT, ONE_HOT, HUGE, TINY) and not key:
                continue      # equal eigenvalues: any basis of their space is right
            b, beside = block(name, d, key, kind)
            f.write(struct.pack("<5I", d, key, kind, len(b), len(beside)) + b + beside)
