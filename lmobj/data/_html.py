"""HTML to text, as a reader would see it: paragraphs apart, scripts gone, entities decoded.

The parser is lexbor's HTML5 parser, by selectolax.
"""

from __future__ import annotations

import html
import re

from lmobj.data._extras import clean_extra

__all__ = ["html_to_text"]

_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9-]*(?:\s[^<>]*|/)?>|<!--|<!doctype\b", re.IGNORECASE)
_UNSEEN = ["head", "script", "style", "template", "noscript"]
_BLOCKS = (
    "address,article,aside,blockquote,details,dialog,div,dl,fieldset,figcaption,figure,footer,form,h1,h2,h3,h4,h5,h6,"
    "header,hr,main,nav,ol,p,pre,section,table,ul"
)
_ROWS = "caption,dd,dt,li,option,summary,tr"
_CELLS = "td,th"
# Noncharacters, which no text may hold, stand for breaks, and for white space to be kept, while the rest is collapsed.
_PARAGRAPH, _LINE, _BR = "\ufdd0", "\ufdd1", "\ufdd2"
_KEPT = {"\n": "\ufdd3", " ": "\ufdd4", "\t": "\ufdd5"}
_TO_MARKS = str.maketrans(_KEPT)
_FROM_MARKS = str.maketrans({mark: blank for blank, mark in _KEPT.items()})
_MARKS = re.compile("[\ufdd0-\ufdd5]")
_BLANKS = re.compile(r"[ \t\n\r\f]+")
_BREAKS = re.compile(f" *[{_PARAGRAPH}{_LINE}{_BR}][ {_PARAGRAPH}{_LINE}{_BR}]*")


def html_to_text(text: str) -> str:
    """The text of an HTML page or fragment.

    Paragraphs, headings, lists and other blocks are set off by a blank line; items, rows and <br> begin a line, cells
    are set off by a space. White space is collapsed as browsers do, except inside <pre>. Text without tags keeps its
    white space, and only its entities are decoded.
    """
    if not _TAG.search(text):
        return html.unescape(text)
    parser = clean_extra("selectolax.lexbor", "data.clean.html is true").LexborHTMLParser(_MARKS.sub("", text))
    parser.strip_tags(_UNSEEN, recursive=True)
    root = parser.body
    if root is None:  # a frameset
        return ""
    for node in root.css("pre"):
        node.replace_with(_PARAGRAPH + node.text().rstrip("\n").translate(_TO_MARKS) + _PARAGRAPH)
    for selector, before, after in (
        (_BLOCKS, _PARAGRAPH, _PARAGRAPH),
        (_ROWS, _LINE, _LINE),
        (_CELLS, " ", " "),
        ("br", _BR, ""),
    ):
        for node in root.css(selector):
            node.insert_before(before)
            node.insert_after(after)
    seen = _BREAKS.sub(_break, _BLANKS.sub(" ", root.text(separator="")))
    return seen.strip("\n ").translate(_FROM_MARKS)


def _break(found: re.Match[str]) -> str:
    """A blank line between paragraphs and for two <br>, else a new line."""
    return "\n\n" if _PARAGRAPH in found[0] or found[0].count(_BR) > 1 else "\n"
