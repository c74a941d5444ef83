"""Writes pattern_tables.c: what Python's re knows about characters beyond ASCII, as sorted ranges.

    python src/core/pattern_tables.py > src/core/pattern_tables.c

The committed file was made with Python 3.11 (Unicode 14.0).
"""

import _sre
import re
import sys
import unicodedata

LAST = sys.maxunicode


def ranges(test):
    """(first, last) of each run of code points for which test holds."""
    out, start = [], None
    for c in range(LAST + 2):
        hit = c <= LAST and test(c)
        if hit and start is None:
            start = c
        elif not hit and start is not None:
            out.append((start, c - 1))
            start = None
    return out


def lower_runs():
    """(first, last, stride, delta): every stride-th code point of first … last has lower case c + delta."""
    pairs = [(c, _sre.unicode_tolower(c) - c) for c in range(LAST + 1) if _sre.unicode_tolower(c) != c]
    runs = []
    for c, delta in pairs:
        if runs:
            first, last, stride, d = runs[-1]
            step = c - last
            if d == delta and step in (1, 2) and (stride in (0, step)):
                runs[-1] = (first, c, step, d)
                continue
        runs.append((c, c, 0, delta))
    return [(a, b, s or 1, d) for a, b, s, d in runs]


def show(kind, name, rows, width):
    body = [", ".join(row for row in rows[i : i + width]) for i in range(0, len(rows), width)]
    print(f"\nconst {kind} {name}[] = {{")
    for line in body:
        print(f"    {line},")
    print("};")
    print(f"const size_t {name}_count = sizeof {name} / sizeof {name}[0];")


def main():
    from re import _casefix

    word = re.compile(r"\w")
    digit = re.compile(r"\d")
    space = re.compile(r"\s")
    print("/* Made by pattern_tables.py; change that file, not this one.")
    print(
        f" * Unicode {unicodedata.unidata_version}, as Python {sys.version_info[0]}.{sys.version_info[1]}'s re sees it. */"
    )
    print('#include "pattern_internal.h"')
    for name, pattern in (("pc_word_ranges", word), ("pc_digit_ranges", digit), ("pc_space_ranges", space)):
        found = ranges(lambda c, pattern=pattern: pattern.match(chr(c)) is not None)
        show("pc_char_range", name, [f"{{0x{a:X}, 0x{b:X}}}" for a, b in found], 6)
    show("pc_lower_run", "pc_lower_runs", [f"{{0x{a:X}, 0x{b:X}, {s}, {d}}}" for a, b, s, d in lower_runs()], 5)
    # Lower-case letters that count as equal although none is the other's lower case: each with the smallest of its class.
    twins = []
    for c, others in sorted(_casefix._EXTRA_CASES.items()):
        smallest = min((c, *others))
        if smallest != c:
            twins.append(f"{{0x{c:X}, 0x{smallest:X}}}")
    show("pc_char_range", "pc_case_twins", twins, 6)


main()
