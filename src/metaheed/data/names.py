"""Names of classes and files in one form, whichever system wrote them.

Unicode writes é as one character or as e and an accent. Linux and Windows keep whichever a file was given; macOS hands
out the second for what was given the first. Compared and sorted as they come, the same folder would be divided
otherwise on another machine, and a class could be in two splits under what looks like one name.
"""

import unicodedata


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC), in which names are compared, sorted and recorded."""
    return unicodedata.normalize("NFC", name)
