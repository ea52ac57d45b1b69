#!/usr/bin/env python3
"""Golden blocks of nsn1, nsn2, nsn2b, nsn4b: an encoder and a decoder in float64 that share no code with ours.

    python3 tests/golden/make_nsn_golden.py          (needs numpy; writes tests/golden/nsn.bin)

The formulas are those of the NSNQuant paper as kernels/nsn_seal.h lists them, the byte offsets those of the table in
kernels/kv_block.h; only the codebook is read from kernels/nsn_codebook.inc.  The inputs are small integers times powers of
two, exact in fp16, from a formula that tests/test_nsn.cpp repeats, so they are not stored.

nsn.bin, little-endian, for every case in order:  u32 format (1 nsn1, 2 nsn2, 3 nsn2b, 4 nsn4b), u32 d, u32 key, u32 kind,
u32 bytes, the block, then f64 rows 0, 1, 31 and 63 as decoded (4 d).
"""
import os
import re
import struct
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BLOCK, POS = 64, 192          # the block stands at positions 192..255
FORMATS = {1: ("NSN1", 8), 2: ("NSN2", 8), 3: ("NSN2B", 4), 4: ("NSN4B", 2)}
RANDOM, ZERO, CONSTANT, ONE_HOT, HUGE, TINY, ONE_ZERO_TOKEN = range(7)


def codebook(name, channels):
    text = open(os.path.join(ROOT, "kernels/nsn_codebook.inc")).read()
    k = float(re.search(name + r"_DELTA = (\d+) / 256", text).group(1)) / 256
    body = text[text.index(name + "_INDEX"):]
    numbers = re.findall(r"-?\d+", body[body.index("{"):body.index("};")])
    return (np.array(numbers, dtype=np.float64).reshape(256, channels) + 0.5) * k


def inputs(d, kind):
    x = np.zeros((BLOCK, d))
    for t in range(BLOCK):
        for c in range(d):
            u = (t * d + c + 1) * 2654435761 % 2**32
            u = (u ^ u >> 15) * 2246822519 % 2**32
            u ^= u >> 13
            n = (u & 255) + (u >> 8 & 255) + (u >> 16 & 255) + (u >> 24) - 510 + (c * 37 % 17 - 8) * 24
            x[t, c] = n * 2.0 ** (t % 5 - 8)
    if kind == ZERO:
        x[:] = 0
    if kind == CONSTANT:
        x[:] = x[0]
    if kind == ONE_HOT:
        x[:] = 0
        for t in range(BLOCK):
            x[t, t % d] = 3.0
    if kind == HUGE:
        x = np.clip(np.sign(x), -1, 1) * 65504.0
    if kind == TINY:
        x = np.sign(x) * 2.0**-24
    if kind == ONE_ZERO_TOKEN:
        x[5] = 0
    return x


def f16(x):
    return float(np.float16(x))


def rtn4(v):
    step, low = f16(max((v.max() - v.min()) / 15, 1e-5)), f16(v.min())
    code = np.rint(np.clip((v - low) / step, 0, 15)).astype(int)
    return code, step, low, code * step + low


def nibbles(code):
    return bytes(int(code[i]) | int(code[i + 1]) << 4 for i in range(0, len(code), 2))


def halves(values):
    return np.array(values, dtype="<f2").tobytes()


def hadamard(d):
    p = d & -d
    h = np.array([[-1.0 if bin(r & c).count("1") % 2 else 1.0 for c in range(p)] for r in range(p)]) / np.sqrt(p)
    return np.kron(np.eye(d // p), h)


def rope(x, pos, d):
    j = np.arange(d // 2)
    a = pos * 10000.0 ** (-2.0 * j / d)
    lo, hi = x[:d // 2], x[d // 2:]
    return np.concatenate([lo * np.cos(a) - hi * np.sin(a), lo * np.sin(a) + hi * np.cos(a)])


def encode(x, fmt, d, key):
    name, C = FORMATS[fmt]
    book, H = codebook(name, C), hadamard(d)
    x = x.copy()
    s1_code, s1_step, s1_min, s1 = rtn4(np.linalg.norm(x, axis=1) / np.sqrt(d))
    x = np.divide(x, s1[:, None], out=np.zeros_like(x), where=s1[:, None] > 0)
    mean = x.mean(axis=0)
    mean_codes, steps, mins = [], [], []
    for g in range(0, d, 32):
        code, step, low, value = rtn4(mean[g:g + 32])
        mean_codes += list(code)
        steps.append(step)
        mins.append(low)
        x[:, g:g + 32] -= value
    codes, signs, s2 = [], [], np.zeros(BLOCK)
    for t in range(BLOCK):
        n = np.linalg.norm(x[t]) / np.sqrt(d)
        if n == 0:
            codes.append(np.zeros(d // C, dtype=int))
            signs.append(np.zeros(d // 8, dtype=int))
            continue
        y = x[t] / n
        if key:
            y = rope(y, POS + t, d)
        y = H @ y
        sign = (y < 0).astype(int)
        z = (np.abs(y) if fmt == 2 else y).reshape(-1, C)
        k = ((z[:, None, :] - book[None]) ** 2).sum(axis=2).argmin(axis=1)
        xq = (z * book[k]).sum()
        s2[t] = n * (z * z).sum() / xq if xq > 0 else 0
        codes.append(k)
        row = [0] * (d // 8)
        for c in range(d):    # of 32 channels byte b has 4 k + b, as bit k; what is left over goes byte by byte
            whole = c < d // 32 * 32
            row[c // 32 * 4 + c % 4 if whole else c // 8] |= int(sign[c]) << (c % 32 // 4 if whole else c % 8)
        signs.append(row)
    out = np.array(codes, dtype=np.uint8).tobytes()
    if fmt == 2:
        out += np.array(signs, dtype=np.uint8).tobytes()
    if fmt <= 2:
        out += halves(np.minimum(s2, 65504.0))
    else:
        logs = np.log2(s2[s2 > 0]) if (s2 > 0).any() else np.zeros(1)
        low, step = f16(logs.min()), f16((logs.max() - logs.min()) / 254) if (s2 > 0).any() else 0.0
        u = [0 if v == 0 else 1 + (int(np.rint(np.clip((np.log2(v) - low) / step, 0, 254))) if step > 0 else 0) for v in s2]
        out += bytes(u) + halves([step, low])
    out += nibbles(s1_code) + halves([s1_step, s1_min]) + nibbles(mean_codes) + halves(steps) + halves(mins)
    return out


def decode(b, fmt, d, key):
    name, C = FORMATS[fmt]
    book, H = codebook(name, C), hadamard(d)
    at = 0

    def take(n, dtype=np.uint8):
        nonlocal at
        v = np.frombuffer(b, dtype=dtype, count=n, offset=at)
        at += n * np.dtype(dtype).itemsize
        return v

    def unpack(v):
        return np.stack([v & 15, v >> 4], axis=1).reshape(-1).astype(float)

    code = take(BLOCK * d // C).reshape(BLOCK, d // C)
    q = book[code].reshape(BLOCK, d)
    if fmt == 2:
        bits = np.unpackbits(take(BLOCK * d // 8), bitorder="little").reshape(BLOCK, d)
        whole = d // 32 * 32
        words = bits[:, :whole].reshape(BLOCK, -1, 4, 8)    # (.., b, k) is the sign of channel 4 k + b
        sign = np.concatenate([words.transpose(0, 1, 3, 2).reshape(BLOCK, whole), bits[:, whole:]], axis=1)
        q = np.where(sign == 1, -q, q)
    if fmt <= 2:
        s2 = take(BLOCK, "<f2").astype(float)
    else:
        u = take(BLOCK).astype(float)
        step, low = take(2, "<f2").astype(float)
        s2 = np.where(u > 0, 2.0 ** (low + step * (u - 1)), 0.0)
    s1 = unpack(take(BLOCK // 2))
    step, low = take(2, "<f2").astype(float)
    s1 = low + step * s1
    mean = unpack(take(d // 2))
    groups = (d + 31) // 32
    steps, mins = take(groups, "<f2").astype(float), take(groups, "<f2").astype(float)
    mean = np.array([mins[c // 32] + steps[c // 32] * mean[c] for c in range(d)])
    assert at == len(b)
    rows = []
    for t in range(BLOCK):
        plain = rope(mean, POS + t, d) if key else mean
        rows.append(s1[t] * (s2[t] * (H @ q[t]) + plain))
    return np.array(rows)


def main():
    cases = [(f, d, key, RANDOM) for f in FORMATS for d in (8, 48, 64, 96, 128, 256) for key in (0, 1)]
    cases += [(f, 64, key, kind) for f in FORMATS for key in (0, 1) for kind in (ZERO, CONSTANT, ONE_HOT, HUGE, TINY, ONE_ZERO_TOKEN)]
    with open(os.path.join(ROOT, "tests/golden/nsn.bin"), "wb") as out:
        for f, d, key, kind in cases:
            x = inputs(d, kind)
            b = encode(x, f, d, key)
            rows = decode(b, f, d, key)
            out.write(struct.pack("<5I", f, d, key, kind, len(b)) + b)
            out.write(rows[[0, 1, 31, 63]].astype("<f8").tobytes())
            error = np.linalg.norm(rows - np.array([rope(r, POS + t, d) if key else r for t, r in enumerate(x)])) / max(np.linalg.norm(x), 1e-300)
            print(FORMATS[f][0], d, "K" if key else "V", kind, len(b), "relative error %.4f" % error)


main()
