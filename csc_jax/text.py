"""Text of the user's, such as names of classes and files, made safe to print.

A name may hold what a terminal obeys (escape sequences), what turns the rest of a line around
(marks of right-to-left script), or bytes that are no character at all.
"""

import unicodedata

_KEPT = "\n\t"
# Of Unicode's general categories: controls, marks of direction and other formats, halves of
# characters (also bytes of a file name that are no text), private and unassigned ones, and the two
# separators of lines that are no "\n".
_ESCAPED = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(text: object, *, kept: str = _KEPT) -> str:
    r"""Returns the text with every character that is not for printing as an escape, `\x1b`.

    Args:
      text: anything; what is no string is converted by `str`.
      kept: characters that stay as they are, by default line ends and tabs.
    """
    string = str(text)
    if string.isascii() and string.isprintable():
        return string
    return "".join(
        c if c in kept or unicodedata.category(c) not in _ESCAPED else _escape(c) for c in string
    )


def name(text: object) -> str:
    """Returns a name of a class or file on one line: `printable`, line ends escaped as well."""
    return printable(text, kept="")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
