"""Write docs/api.md, the reference of everything public, from signatures and docstrings.

python docs/make_api.py            write it
python docs/make_api.py --check    exit status 1, with a diff, if it is not up to date
"""

from __future__ import annotations

import difflib
import enum
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import peftc
from peftc._optional import require

TARGET = Path(__file__).with_name("api.md")
HEADER = """\
# API reference

Made from the docstrings by `make docs`; a test checks that it is up to date.

"""


def members(thing: object) -> list[str]:
    """Public names of a module or class, in the order of its __all__ or of its definition."""
    if isinstance(thing, ModuleType):
        return list(getattr(thing, "__all__", ()))
    return [name for name in vars(thing) if not name.startswith("_")]


def signature(name: str, thing: Callable[..., object]) -> str:
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return f"{name}(…)"
    text = re.sub(r"\btyping\.|\bcollections\.abc\.|\bpeftc\.\w+\.(?=[A-Z])", "", text)
    text = re.sub(r" at 0x[0-9a-f]+", "", text).replace("NoneType", "None")
    return f"{name}{text}"


def own_doc(thing: object) -> str:
    """The docstring, unless it is inherited or made by a tool (a dataclass's, an enum's)."""
    doc = inspect.cleandoc(thing.__doc__ or "") if thing.__doc__ else ""
    if isinstance(thing, type) and doc.startswith(f"{thing.__name__}("):
        return ""
    return doc


def as_markdown(doc: str) -> str:
    """Docstrings use Google's sections; set them as lists and literal blocks as code."""
    out: list[str] = []
    lines = doc.split("\n")
    i = 0
    while i < len(lines):
        section = re.fullmatch(
            r"(Args|Arguments|Attributes|Returns|Raises|Yields|Fields|Example|Examples):", lines[i].strip()
        )
        if section and not lines[i].startswith(" "):
            body: list[str] = []
            i += 1
            while i < len(lines) and (not lines[i].strip() or lines[i].startswith(" ")):
                body.append(lines[i])
                i += 1
            out += ["", f"**{section[1]}**", "", *as_list(section[1], textwrap.dedent("\n".join(body)).strip("\n")), ""]
        elif lines[i].startswith("    ") and (not out or not out[-1].strip() or out[-1].startswith("    ")):
            out.append(lines[i])
            i += 1
        else:
            out.append(lines[i])
            i += 1
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip("\n")


def as_list(section: str, body: str) -> list[str]:
    if section.startswith("Example"):
        return textwrap.indent(body, "    ").split("\n")
    items: list[str] = []
    for line in body.split("\n"):
        head = re.match(r"([\w`*.,\[\] /]+?)(?: \(([^)]*)\))?: (.*)|([\w`*.,\[\] /]+):$", line)
        if head and not line.startswith(" "):
            name = head[1] or head[4]
            kind = f" ({head[2]})" if head[2] else ""
            items.append(f"- `{name.strip('`')}`{kind}: {head[3] or ''}".rstrip())
        elif items and line.strip():
            items.append(f"  {line.strip()}")
        elif line.strip():
            items.append(line.strip())
    return items


def document(name: str, thing: object, level: int) -> list[str]:
    heading = "#" * min(level, 5)
    if isinstance(thing, ModuleType):
        out = [f"{heading} {name}", "", as_markdown(own_doc(thing)), ""]
        for member in members(thing):
            out += document(f"{name}.{member}", getattr(thing, member), level + 1)
        return out
    if isinstance(thing, type) and issubclass(thing, enum.Enum):
        values = ", ".join(f"`{member.name}`" for member in thing)
        return [f"{heading} {name}", "", as_markdown(own_doc(thing)), "", f"Members: {values}.", ""]
    if isinstance(thing, type):
        bases = [base.__name__ for base in thing.__bases__ if base is not object and not base.__name__.startswith("_")]
        out = [f"{heading} class {name}" + (f" ({', '.join(bases)})" if bases else ""), ""]
        if not issubclass(thing, BaseException):
            out += ["```python", signature(thing.__name__, thing), "```", ""]
        out += [as_markdown(own_doc(thing)), ""]
        for member in members(thing):
            value = inspect.getattr_static(thing, member)
            if isinstance(value, property) or inspect.isdatadescriptor(value):
                if value.__doc__:
                    out += [f"- `{member}`: " + " ".join((value.__doc__ or "").split()), ""]
                continue
            value = getattr(value, "__func__", value)
            if callable(value) and (value.__doc__ or "").strip():
                out += [f"{heading}# {name.rpartition('.')[2]}.{member}", "", "```python", signature(member, value)]
                out += ["```", "", as_markdown(own_doc(value)), ""]
        return out
    if callable(thing):
        return [f"{heading} {name}", "", "```python", signature(name.rpartition(".")[2], thing), "```", ""] + [
            as_markdown(own_doc(thing)),
            "",
        ]
    return [f"{heading} {name}", "", f"`{thing!r}`", ""]


def render() -> str:
    require("torch", "The API page, which has classes for torch models,")  # peftc.__all__ leaves them out without it
    lines: list[str] = []
    ordered = sorted(peftc.__all__, key=lambda name: isinstance(getattr(peftc, name), ModuleType))
    for name in ordered:
        lines += document(f"peftc.{name}", getattr(peftc, name), 2)
    text = HEADER + "\n".join(lines)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def main() -> int:
    text = render()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    old = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
    if old == text:
        return 0
    diff = difflib.unified_diff(old.splitlines(True), text.splitlines(True), "docs/api.md", "what the docstrings say")
    sys.stdout.writelines(list(diff)[:60])
    print("docs/api.md is not up to date: run `make docs`")
    return 1


if __name__ == "__main__":
    sys.exit(main())
