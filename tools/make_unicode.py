#!/usr/bin/env python3
"""Write tokenizer/unicode.inc: the parts of the Unicode database that tokenizers need.

    pip install unicodedata2==16.0.0 && python3 tools/make_unicode.py > tokenizer/unicode.inc

Version 16.0.0 because the regular expressions of the `tokenizers` package (0.23.3) know that version: its \\p{L} and
\\p{N} hold the same code points (141,028 and 1,911); those of Python's own unicodedata do not.
"""
import unicodedata2 as ud

VERSION = "16.0.0"
COLUMNS = 120
ALL = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def ranges(value):
    """[(first, last, value)] of runs of equal, true value(c)."""
    out = []
    for c in ALL:
        v = value(c)
        if v and out and out[-1][1] == c - 1 and out[-1][2] == v:
            out[-1][1] = c
        elif v:
            out.append([c, c, v])
    return out


def table(declaration, rows):
    print(f"\nstatic const {declaration}[] = {{    // {len(rows)}")
    line = ""
    for row in rows:
        text = "{" + ",".join(f"0x{v:x}" if v > 9 else str(v) for v in row) + "},"
        if len(line) + len(text) > COLUMNS:
            print(line)
            line = ""
        line += text
    print(line + "\n};")


def pairs():
    """Canonical decompositions of one step: (c, a, b), b = 0 for a single code point.  Hangul is arithmetic, not a table."""
    out = []
    for c in ALL:
        parts = ud.decomposition(chr(c)).split()
        if parts and not parts[0].startswith("<"):
            a, b = ([int(p, 16) for p in parts] + [0])[:2]
            out.append((c, a, b))
    return out


def main():
    assert ud.unidata_version == VERSION, f"unicodedata2 is {ud.unidata_version}, expected {VERSION}"
    decompositions = pairs()
    # A pair composes unless the standard excludes it: then normalising the pair does not give the composed character.
    compositions = sorted((a, b, c) for c, a, b in decompositions
                          if b and ud.normalize("NFC", chr(a) + chr(b)) == chr(c))
    print(f"// unicode.inc - Unicode {VERSION}, written by tools/make_unicode.py (run it to change anything here).")
    print("// Code points are sorted, so that a binary search finds them.")
    table("CodeRange LETTERS", [r[:2] for r in ranges(lambda c: ud.category(chr(c))[0] == "L")])
    table("CodeRange NUMBERS", [r[:2] for r in ranges(lambda c: ud.category(chr(c))[0] == "N")])
    print("\n// first, last, canonical combining class")
    table("CombiningRange COMBINING", ranges(lambda c: ud.combining(chr(c))))
    print("\n// c = a b in one step; b = 0: c = a alone")
    table("Decomposition DECOMPOSITIONS", decompositions)
    print("\n// a b -> c, sorted by a, then b")
    table("Composition COMPOSITIONS", compositions)


main()
