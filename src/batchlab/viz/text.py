"""Outside text (names, notes, messages) made safe to show: in a figure, on a page, in a terminal."""

from __future__ import annotations

import html
import re

LABEL_LIMIT = 60
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    """Text with control characters, bidirectional overrides and lone surrogates each replaced by U+FFFD.

    >>> visible("a\\x1b[31mb") == "a\\ufffd[31mb"
    True
    """
    return _CONTROL.sub("\ufffd", str(text))


def label(text: object, limit: int = LABEL_LIMIT) -> str:
    """Text as a figure may show it: Plotly reads a subset of HTML in every string, so it is escaped, and cut.

    >>> label("<b>loss</b>")
    '&lt;b&gt;loss&lt;/b&gt;'
    """
    plain = visible(text)
    return html.escape(plain if len(plain) <= limit else plain[: limit - 1] + "…", quote=False)
