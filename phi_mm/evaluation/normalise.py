"""What is left of an answer when case, punctuation, articles and spacing do not matter."""

import re

_APOSTROPHES = re.compile(r"['’]")
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str, articles: bool = False) -> str:
    """Lower case, no punctuation, single spaces; without a, an, the unless `articles` keeps them.

    In the manner of SQuAD's official evaluation (Rajpurkar et al. 2016), with two differences: a
    hyphen parts two words instead of joining them, and an answer that is nothing but an article
    (the "A" of a multiple choice) stays.
    """
    text = _PUNCTUATION.sub(" ", _APOSTROPHES.sub("", text.lower()))
    bare = text if articles else _ARTICLES.sub(" ", text)
    return " ".join((bare if bare.strip() else text).split())
