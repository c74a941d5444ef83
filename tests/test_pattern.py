"""The pattern engine against Python's re, and its bounds."""

import random
import re
import warnings

import pytest

from peftc import _core

ATOMS = ["a", "b", "0", "_", "A", "k", "-", "\\.", ".", "\\d", "\\w", "\\s", "\\W", "\\D", "\\S", "[ab]", "[^a]"]
ATOMS += ["[a-c0]", "[\\w.]", "[^\\W_]", "[]a]", "[a-]", "\\x61", "\\u0061", "\\101", "[.\\-]", "é", "[é-ü]"]
ATOMS += ["^", "$", "\\b", "\\B", "\\A", "\\Z", "\\1", "\\2", "(?P=n)"]
GROUPS = ["({})", "({})", "(?:{})", "(?P<n>{})", "(?={})", "(?!{})", "(?<={})", "(?<!{})", "(?>{})", "(?i:{})"]
GROUPS += ["(?-i:{})", "(?s:{})", "(?m:{})", "(?x: {} #c\n)", "(?a:{})", "(?(1){}|b)", "(?(1){})"]
REPEATS = ["*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "{,}", "{", "{}", "{1", "{0}"]
FLAGS = ["(?i)", "(?s)", "(?m)", "(?x)", "(?a)", "(?u)", "(?im)", "(?ai)"]
JUNK = "ab.*+?()[]{}|\\^$-<>=!:PiLx#01, dwxuN&n"

needs_311 = pytest.mark.skipif("sys.version_info < (3, 11)", reason="atomic groups came to re in 3.11")


def element(rnd, depth):
    text = rnd.choice(ATOMS[:9]) if rnd.random() < 0.5 else rnd.choice(ATOMS)
    if depth > 0 and rnd.random() < 0.3:
        text = rnd.choice(GROUPS).format(alternatives(rnd, depth - 1))
    if rnd.random() < 0.4:
        text += rnd.choice(REPEATS) + rnd.choice(["", "", "", "?", "+"])
    return text


def alternatives(rnd, depth):
    branches = rnd.choice([1, 1, 1, 2, 3])
    return "|".join("".join(element(rnd, depth) for _ in range(rnd.randint(1, 4))) for _ in range(branches))


def compiled(pattern):
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, ValueError):
        return None


def attempt(call, pattern, subject):
    """Its result, or the exception."""
    try:
        return call(pattern, subject)
    except ValueError as error:
        return error


def same(ours, theirs, *where):
    if isinstance(ours, ValueError) and "allowed" in str(ours):
        return  # more work than we do; re would have done it
    if theirs is None:
        assert isinstance(ours, ValueError), (where, ours)
    else:
        assert ours == theirs[0], (where, ours)


@needs_311
@pytest.mark.parametrize("seed", range(4))
def test_random_patterns_match_as_in_re(seed):
    rnd = random.Random(seed)
    warnings.simplefilter("ignore")
    for _ in range(4000):
        if rnd.random() < 0.25:
            pattern = "".join(rnd.choice(JUNK) for _ in range(rnd.randint(1, 10)))
        else:
            pattern = alternatives(rnd, rnd.randint(0, 3))
        if rnd.random() < 0.1:
            pattern = rnd.choice(FLAGS) + pattern
        if "\\N" in pattern or re.search(r"\(\?[a-z]*t", pattern):
            continue  # named characters and the undocumented flag t are refused on purpose
        plain, suffix = compiled(pattern), compiled(rf"(.*\.)?({pattern})$")
        for _ in range(3):
            subject = "".join(rnd.choice("ab.0_-A\nké") for _ in range(rnd.randint(0, 8)))
            full = attempt(_core.pattern_fullmatch, pattern, subject)
            same(full, plain and (plain.fullmatch(subject) is not None,), "full", pattern, subject)
            found = attempt(_core.pattern_search, pattern, subject)
            same(found, plain and (search(plain, subject),), "search", pattern, subject)
            ends = attempt(_core.pattern_match_suffix, pattern, subject)
            if plain is not None:
                same(ends, suffix and (suffix.match(subject) is not None,), "suffix", pattern, subject)


def search(pattern, subject):
    match = pattern.search(subject)
    return None if match is None else ((match.group(1) if pattern.groups else None),)


REAL = [
    r".*\.(q|k|v)_proj",
    r"model\.layers\.(?:0|1|2)\..*_proj",
    r"layer\.5\.attention\.self\.query",
    "model.layers.0.self_attn.q_proj",
    r"^encoder.*(?<!lm)_head$",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"(?i).*ATTN.*",
    r"(\w+\.)*dense",
    r".*\.layers\.(\d+)\..*",
    r"bert\.encoder\.layer\.(?!0\.)[0-9]+\.output\.dense",
    r"layers\.[0-9]{1,2}\.mlp",
    "",
    "a|",
]
NAMES = ["", "q_proj", "model.layers.0.self_attn.q_proj", "model.layers.11.mlp", "bert.encoder.layer.0.output.dense"]
NAMES += ["bert.encoder.layer.5.attention.self.query", "xlayer.5.attention.self.query", "a\nlayers.3.mlp"]
NAMES += [
    "layers.3.mlp\n",
    "decoder.block.0.SelfAttention.q",
    "encoder.lm_head",
    "encoder.my_head",
    "h.attn",
    "é.dense",
]


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_of_real_files(pattern):
    for name in NAMES:
        assert _core.pattern_fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None), name
        if not pattern.startswith("(?i)"):
            expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
            assert _core.pattern_match_suffix(pattern, name) == expected, name


def test_work_is_bounded():
    name = "a" * 5000 + "!"
    for pattern in [
        "(a+)+$",
        "(a|aa)*b",
        "(.*)*x",
        "(?:a?){400}a{400}$",
        "(a*)*(a*)*(a*)*c",
        "((a{0,50}){0,50}){0,50}z",
    ]:
        with pytest.raises(ValueError, match="allowed"):
            _core.pattern_fullmatch(pattern, name)


def test_a_program_that_repeats_nothing_ends():
    with pytest.raises(ValueError, match="allowed"):
        _core.pattern_fullmatch("(?:){4000000000}", "")
    assert _core.pattern_fullmatch("(a?)*", "")
    assert _core.pattern_fullmatch("(?:a?|b)*?c", "abac")


@pytest.mark.parametrize("length", [10, 100, 1000])
def test_deep_nesting_is_refused_or_works(length):
    pattern = "(" * length + "a" + ")" * length
    if length <= 100:
        assert _core.pattern_fullmatch(pattern, "a")
    else:
        with pytest.raises(ValueError, match="nested too deeply"):
            _core.pattern_fullmatch(pattern, "a")


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("a(", "unterminated subpattern"),
        ("a)", "unbalanced parenthesis"),
        ("[a", "unterminated character set"),
        ("*a", "nothing to repeat"),
        ("a**", "multiple repeat"),
        ("a{2,1}", "min repeat greater"),
        ("\\q", "bad escape"),
        ("a\\", "bad escape"),
        ("[b-a]", "bad character range"),
        ("(?<=a*)b", "fixed-width"),
        ("(?P<n>a)(?P<n>b)", "redefinition"),
        ("(?P=x)", "unknown group name"),
        ("\\2(a)", "invalid group reference"),
        ("(a\\1)", "open group"),
        ("a(?i)b", "global flags"),
        ("(?L)a", "bytes"),
        ("\\N{DOT}", "named characters"),
        ("(?Q)", "unknown extension"),
        ("a{99999999999}", "too large"),
        ("x" * 100_000, "longer than"),
    ],
)
def test_what_is_no_pattern_is_refused_by_name(pattern, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        _core.pattern_fullmatch(pattern, "a")


def test_classes_know_every_character():
    if __import__("unicodedata").unidata_version != "14.0.0":
        pytest.skip("the tables are those of Unicode 14")
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for name in "wds":
        inside = re.compile(f"\\{name}")
        members = [c for c in every if inside.match(c)]
        others = [c for c in every if not inside.match(c)]
        for characters, pattern in ((members, f"\\{name}*"), (others, f"\\{name.upper()}*")):
            for i in range(0, len(characters), 50_000):
                assert _core.pattern_fullmatch(pattern, "".join(characters[i : i + 50_000]))


def test_case_is_ignored_as_in_re():
    rnd = random.Random(5)
    cased = [chr(c) for c in range(0x20000) if chr(c).lower() != chr(c) or chr(c).upper() != chr(c)]
    for c in rnd.sample(cased, 600) + list("KkſsSİiıIµΜμςσΣßẞ\u212a\u0345ιͅ"):
        for other in {c, c.lower()[0], c.upper()[0], c.swapcase()[0], c.casefold()[0]}:
            for pattern in (re.escape(c), f"[{re.escape(c)}]", f"[^{re.escape(c)}]"):
                for flag in ("(?i)", "(?ai)"):
                    expected = re.fullmatch(flag + pattern, other) is not None
                    assert _core.pattern_fullmatch(flag + pattern, other) == expected, (flag, pattern, other)
    for span in ("a-z", "À-Þ", "α-ω", "Ⰰ-Ⱟ", "@-_", "ſ-ƀ", "K-k"):
        for other in rnd.sample(cased, 200) + list("kKſsS\u212aÀàΣςσ"):
            expected = re.fullmatch(f"(?i)[{span}]", other) is not None
            assert _core.pattern_fullmatch(f"(?i)[{span}]", other) == expected, (span, other)


def test_arguments_are_checked():
    for arguments in [(), ("a",), ("a", b"a"), (1, "a"), ("a", "a", "a")]:
        with pytest.raises(TypeError):
            _core.pattern_fullmatch(*arguments)
    with pytest.raises(UnicodeEncodeError):
        _core.pattern_fullmatch("a", "\ud800")
