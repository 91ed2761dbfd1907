"""The one label order that every data set is mapped into, and the usual names of its emotions."""

import difflib

EMOTIONS = ("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt")
"""The canonical order (AffectNet's). The seven-class problem is the first seven of it."""

UNLABELLED = -100
"""The label of a sample without a class, such as a frame with only valence: cross_entropy ignores it."""

_SPELLINGS = {
    "neutral": ("ne", "neutrality", "no emotion"),
    "happy": ("ha", "happiness", "joy", "joyful"),
    "sad": ("sa", "sadness"),
    "surprise": ("su", "surprised"),
    "fear": ("fe", "fearful", "afraid", "scared"),
    "disgust": ("di", "disgusted"),
    "anger": ("an", "angry"),
    "contempt": ("co", "contemptuous"),
}
_INDEX = {
    spelling: EMOTIONS.index(emotion)
    for emotion, others in _SPELLINGS.items()
    for spelling in (emotion, *others)
}


def nearest(word: str, words: "tuple[str, ...] | list[str]") -> str:
    """``"; did you mean 'x'?"``, or nothing where no word is near."""
    found = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def class_names(count: int) -> tuple[str, ...]:
    """Of a classifier that knows no names of its own."""
    return EMOTIONS[:count] if count in (7, 8) else tuple(f"class {index}" for index in range(count))


def emotion_index(name: str) -> int:
    """Canonical index of an emotion by any of its usual names, in any case: ``Happiness`` is 1."""
    key = name.strip().lower()
    if key not in _INDEX:
        raise ValueError(
            f"emotion_index: {name!r} names no emotion, expected one of {', '.join(EMOTIONS)}"
            + nearest(key, list(_INDEX))
        )
    return _INDEX[key]
