"""Procedural faces driven by facial action units: data for tests, first runs and demonstrations.

A face is drawn from signed distances (a stroke, a lens or an ellipse is where its distance is below zero, and
the distance over one pixel's width is its coverage), each for the whole image at once. No picture of a person
is involved.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import FaceDataset, Record
from .labels import EMOTIONS
from .source import DataError

ACTION_UNITS = (
    "AU1 inner brow raiser",
    "AU2 outer brow raiser",
    "AU4 brow lowerer",
    "AU5 upper lid raiser",
    "AU6 cheek raiser",
    "AU7 lid tightener",
    "AU9 nose wrinkler",
    "AU10 upper lip raiser",
    "AU12L lip corner puller, left in the image",
    "AU12R lip corner puller, right in the image",
    "AU14L dimpler, left in the image",
    "AU14R dimpler, right in the image",
    "AU15 lip corner depressor",
    "AU17 chin raiser",
    "AU20 lip stretcher",
    "AU24 lip pressor",
    "AU25 lips part",
    "AU26 jaw drop",
)
_CODES = [unit.split()[0] for unit in ACTION_UNITS]

# What each emotion does at full intensity (contempt: on one side, drawn by lot)
_PROTOTYPES: dict[str, dict[str, float]] = {
    "neutral": {},
    "happy": {"AU6": 0.9, "AU12L": 1, "AU12R": 1, "AU25": 0.6},
    "sad": {"AU1": 1, "AU4": 0.45, "AU15": 1, "AU17": 0.6},
    "surprise": {"AU1": 1, "AU2": 1, "AU5": 0.9, "AU25": 0.8, "AU26": 1},
    "fear": {"AU1": 0.9, "AU2": 0.4, "AU4": 0.6, "AU5": 1, "AU20": 1, "AU25": 0.8},
    "disgust": {"AU4": 0.35, "AU7": 0.7, "AU9": 1, "AU10": 1, "AU15": 0.5},
    "anger": {"AU4": 1, "AU5": 0.3, "AU7": 0.7, "AU17": 0.3, "AU24": 1},
    "contempt": {"AU12R": 1.2, "AU14R": 1.2, "AU24": 0.3},
}
_VALENCE_AROUSAL: dict[str, tuple[float, float]] = {
    "neutral": (0.0, 0.0),
    "happy": (0.85, 0.4),
    "sad": (-0.75, -0.45),
    "surprise": (0.2, 0.85),
    "fear": (-0.6, 0.8),
    "disgust": (-0.75, 0.35),
    "anger": (-0.5, 0.65),
    "contempt": (-0.5, 0.15),
}

_SPLITS = {"train": 20_000, "valid": 2_000, "test": 2_000}
_DRAWS, _TRAITS = 64, 24  # random numbers a face and a person get; more than are used, so both can grow
_POSE, _LIGHT, _OCCLUSION = range(6, 12), range(26, 32), 32  # which of the draws
_NOISE = 1 << 20


class SyntheticFaces(FaceDataset):
    """Drawn faces with seven or eight expressions, their intensity, and valence and arousal that follow it.

    Sample ``index`` of a split depends on the seed, the split and the index alone: a longer data set begins
    with the shorter one. Classes come in turn, so counts are equal. Each split has its own people (form of
    face, skin, hair, brows, eyes, nose, lips, glasses, beard); pose, gaze, light, background, occlusion and
    noise vary with each face. ``root`` is not used.

    Args:
        size: side of the images.
        length: number of faces, by default 20,000 to train on and 2,000 in ``valid`` and ``test``.
        people: number of people a split shows.
        difficulty: how far pose, light, noise and occlusion go: 0 not at all, 1 as far as they may. Below
            about 0.8 a linear classifier passes 60 %.
        intensity: range of the strength of an expression, 1 being the strongest.
        seed: another seed gives other people and other faces.
        cache: draw all faces now and keep them, 3 * size * size bytes each.
    """

    name = "synthetic"
    splits = tuple(_SPLITS)
    default_classes = 8

    def __init__(
        self,
        root: str | Path | None = None,
        split: str = "train",
        *,
        size: int = 64,
        length: int | None = None,
        people: int = 500,
        difficulty: float = 0.9,
        intensity: tuple[float, float] = (0.6, 1.0),
        seed: int = 0,
        cache: bool = False,
        **options: Any,
    ):
        self.choose("split", split, self.splits)
        low, high = intensity
        if size < 16 or (length is not None and length < 1) or people < 1 or not 0 <= low <= high <= 1:
            raise ValueError(
                f"SyntheticFaces: size = {size}, length = {length}, people = {people}, intensity = "
                f"{intensity}; expected size >= 16, length and people >= 1 and 0 <= intensity <= 1"
            )
        if not 0 <= difficulty <= 1:
            raise ValueError(f"SyntheticFaces: difficulty = {difficulty}, expected 0 to 1")
        self.difficulty = difficulty
        self.size, self.intensity, self.seed = size, (low, high), seed
        self.length = _SPLITS[split] if length is None else length
        self.people = people
        self._shown_classes = options.get("classes") or self.default_classes
        self._cache: Tensor | None = None
        super().__init__("", split, **options)
        axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
        self._grid = (np.tile(axis, (size, 1)), np.tile(axis[:, None], (1, size)))
        if cache:
            self._cache = torch.stack([self.draw(index) for index in range(len(self))])

    def open_source(self, root: str | Path) -> Any:
        return None

    @property
    def where(self) -> str:
        return f"SyntheticFaces (seed {self.seed})"

    def has_image(self, record: Record) -> bool:
        return True

    def read_records(self) -> list[Record]:
        split = list(_SPLITS).index(self.split)
        n = self.length
        # Drawn row by row, so that the first rows do not depend on the number of rows
        self._draws = np.random.default_rng((self.seed, split, 0)).random((n, _DRAWS), dtype=np.float32)
        persons = np.random.default_rng((self.seed, split, 1))
        self._traits = persons.random((self.people, _TRAITS), dtype=np.float32)
        for draw in (*_POSE, *_LIGHT):
            self._draws[:, draw] = 0.5 + self.difficulty * (self._draws[:, draw] - 0.5)
        self._draws[:, _OCCLUSION] /= max(self.difficulty, 1e-6)
        noise = np.random.default_rng((self.seed, split, 2)).integers(-127, 128, (2, _NOISE), dtype=np.int8)
        self._noise = noise[0].astype(np.float32) + noise[1]  # triangular, close enough to normal
        self._noise /= self._noise.std()

        label = np.arange(n) % self._shown_classes
        draws = self._draws
        self._person = np.minimum((draws[:, 0] * self.people).astype(int), self.people - 1)
        low, high = self.intensity
        self.strength = np.where(label == 0, 0.0, low + (high - low) * draws[:, 1]).astype(np.float32)
        full = np.array(
            [[_PROTOTYPES[emotion].get(code, 0.0) for code in _CODES] for emotion in EMOTIONS], np.float32
        )
        variation = 0.8 + 0.35 * draws[:, 40 : 40 + len(_CODES)]
        other = draws[:, [40 + (7 * unit + 3) % len(_CODES) for unit in range(len(_CODES))]]
        rest = 0.12 * other * other
        units = np.minimum(full[label] * self.strength[:, None] * variation + rest, 1)
        # A smile may be closed
        units[:, _CODES.index("AU25")] *= np.where((label == 1) & (draws[:, 2] < 0.4), 0.0, 1.0)
        # Contempt may be on the other side
        left = np.flatnonzero((label == EMOTIONS.index("contempt")) & (draws[:, 3] < 0.5))
        for code in ("AU12", "AU14"):
            pair = [_CODES.index(f"{code}L"), _CODES.index(f"{code}R")]
            units[left[:, None], pair] = units[left[:, None], pair[::-1]]
        self.action_units = units
        """(N, len(ACTION_UNITS)) in [0, 1]: how strongly each unit acts in each face."""
        affect = np.array([_VALENCE_AROUSAL[emotion] for emotion in EMOTIONS], np.float32)
        affect = affect[label] * self.strength[:, None] + 0.05 * (draws[:, 4:6] - 0.5)
        return [
            Record(str(i), int(label[i]), None, float(v), float(a), f"{self.split}-{self._person[i]}")
            for i, (v, a) in enumerate(affect.clip(-1, 1))
        ]

    def load(self, record: Record) -> Tensor:
        index = int(record.image)
        return self._cache[index].clone() if self._cache is not None else self.draw(index)

    def draw(self, index: int) -> Tensor:
        """Face ``index`` as uint8 (3, size, size)."""
        if not 0 <= index < self.length:
            raise DataError(f"{self.where}: face {index} of {self.length}")
        draws = self._draws[index].tolist()
        image = _face(
            self._grid,
            draws,
            self._traits[self._person[index]].tolist(),
            dict(zip(_CODES, self.action_units[index].tolist(), strict=True)),
        )
        count = image.size
        start = int(draws[39] * (_NOISE - 1))
        noise = self._noise[start : start + count]
        if len(noise) < count:
            noise = np.resize(np.concatenate((noise, self._noise)), count)
        image += (self.difficulty * (2 + 7 * draws[38])) * noise.reshape(image.shape)
        np.clip(image, 0, 255, out=image)
        return torch.from_numpy(image.astype(np.uint8))


def _between(low: float, high: float, draw: float) -> float:
    return low + (high - low) * draw


def _paint(image: np.ndarray, cover: np.ndarray, color: "np.ndarray | list[float]") -> None:
    """Lays a colour on the image where ``cover`` (0 to 1) says."""
    change = np.asarray(color, np.float32)[:, None, None] - image
    change *= cover
    image += change


def _face(
    grid: tuple[np.ndarray, np.ndarray], draws: list[float], traits: list[float], au: dict[str, float]
) -> np.ndarray:
    """One face, float32 (3, S, S) in 0 to 255 and a little beyond.

    In the face's own coordinates x goes right, y down, the chin is near y = 1 and the crown near y = -1.
    """
    gx, gy = grid
    size = gx.shape[0]
    d, t, mix = draws, traits, _between

    # Pose: shift, scale and turn in the plane; then features slide over the head as it turns aside or nods
    scale = mix(0.76, 0.92, d[6])
    angle = mix(-0.3, 0.3, d[7])
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    shift_x, shift_y = mix(-0.12, 0.12, d[8]), mix(-0.1, 0.1, d[9])
    u = gx * cos + gy * sin - (shift_x * cos + shift_y * sin)
    v = gy * cos - gx * sin - (shift_y * cos - shift_x * sin)
    yaw, nod = mix(-0.2, 0.2, d[10]), mix(-0.08, 0.08, d[11])
    pixel = 2 / (size * scale)  # a pixel's width in these coordinates

    def cover(distance: np.ndarray) -> np.ndarray:
        distance *= -1 / pixel
        distance += 0.5
        np.maximum(distance, 0, out=distance)
        return np.minimum(distance, 1, out=distance)

    def window(half: float, top: float, bottom: float) -> tuple[slice, slice]:
        """Rows and columns that show |u| < half, top < v < bottom: features are drawn in there alone."""
        c, s = math.cos(angle) * scale, math.sin(angle) * scale
        across = [shift_x + a * c - b * s for a in (-half, half) for b in (top, bottom)]
        down = [shift_y + a * s + b * c for a in (-half, half) for b in (top, bottom)]
        low, high = (
            (max(0, int((min(e) + 1) * size / 2)) for e in (down, across)),
            (min(size, int((max(e) + 1) * size / 2) + 2) for e in (down, across)),
        )
        rows, columns = (slice(a, max(a + 1, b)) for a, b in zip(low, high, strict=True))
        return rows, columns

    def features(half: float, top: float, bottom: float) -> tuple[np.ndarray, ...]:
        """That part of the image, and x, y and |x| on the head's surface."""
        rows, columns = window(half, top, bottom)
        x, y = u[rows, columns], v[rows, columns]
        x = x - yaw * (1 - x * x)
        y = y - nod * (1 - y * y)
        return whole_image[:, rows, columns], x, y, np.abs(x)

    # Colours
    tone = t[0]
    skin = np.array((mix(125, 242, tone), mix(84, 202, tone), mix(62, 172, tone)), np.float32)
    skin *= mix(0.92, 1.05, t[1])
    hair = np.array((mix(15, 190, t[2] ** 2), mix(12, 140, t[2] ** 2), mix(10, 80, t[3] * t[2])), np.float32)
    dark = skin * 0.45
    lips = skin * np.array((0.86, 0.58, 0.6), np.float32) * mix(0.85, 1.05, t[4])

    # Background: a colour that changes along one direction, with soft stripes
    whole_image = image = np.empty((3, size, size), np.float32)
    slope_x, slope_y = mix(-50, 50, d[12]), mix(-50, 50, d[13])
    stripes = mix(0, 30, d[14]) * np.sin(gx[0] * mix(3, 20, d[15]) + 6 * d[16])
    field = gy * slope_y
    field += (gx[0] * slope_x + stripes)[None]
    for channel in range(3):
        np.add(field, mix(30, 225, d[17 + channel]), out=image[channel])

    # Shoulders, hair, head
    width = mix(0.7, 0.82, t[5])
    jaw = au["AU26"]
    below = np.maximum(v, 0)
    half = width - mix(0.08, 0.26, t[6]) * below * below
    length = 1 + 0.1 * jaw
    clothes = [mix(20, 230, d[20]), mix(20, 230, d[21]), mix(20, 230, d[22])]
    u2 = u * u
    _paint(image, cover(np.maximum(np.abs(u) - 0.34, 0.6 - v)), skin * 0.8)
    _paint(image, cover(1.25 - v + 0.3 * u2), clothes)
    volume = mix(0.04, 0.2, t[7])
    radius = np.sqrt(u2 / (width + volume) ** 2 + (v + 0.12) ** 2 / (0.95 + volume) ** 2)
    _paint(image, cover((radius - 1) * width), hair)
    stretch = v / length
    radius = np.sqrt(u2 / (half * half) + stretch * stretch)
    head = cover((radius - 1) * width)
    _paint(image, head, skin)
    # Roundness: darker towards the outline
    shade = np.minimum(radius, 1)
    shade *= shade
    shade *= -mix(0.1, 0.35, d[23])
    shade *= head
    shade += 1
    image *= shade
    fringe = mix(-0.72, -0.5, t[9]) + mix(-0.12, 0.12, t[10]) * u
    _paint(image, head * cover(v - fringe - mix(0.0, 0.25, t[11]) * u2), hair)
    if t[12] < 0.2:  # beard: the lower face in the colour of hair
        beard = head * cover(mix(0.25, 0.45, t[13]) - v - 0.5 * u2)
        beard *= 0.45
        _paint(image, beard, hair)

    # Eyes: a lens between two lids, on both sides at once
    image, x, y, side = features(0.85, -0.75, 0.2)
    eye_x, eye_y = mix(0.3, 0.37, t[14]), -0.12
    eye_half = mix(0.17, 0.21, t[15])
    across = (side - eye_x) / eye_half
    arch = 1 - across * across
    cheek = au["AU6"]
    upper = mix(0.095, 0.115, t[16]) * (
        1 + 0.95 * au["AU5"] - 0.45 * au["AU7"] - 0.25 * cheek - 0.25 * au["AU9"]
    )
    lower = 0.07 * (1 + 0.3 * au["AU5"] - 0.75 * au["AU7"] - 0.85 * cheek - 0.3 * au["AU9"])
    lid = y - eye_y
    upper_lid = lid + upper * arch
    lens = cover(np.maximum(-upper_lid, lid - lower * arch))
    lens *= np.abs(across) < 1
    _paint(image, lens, [235, 235, 230])
    gaze = mix(-0.045, 0.045, d[24])
    sideways = x - eye_x * np.sign(x) - gaze
    iris = np.sqrt(sideways * sideways + lid * lid)
    iris_color = [mix(25, 110, t[17]), mix(20, 110, t[18]), mix(15, 140, t[17] * t[18])]
    _paint(image, lens * cover(iris - 0.082), iris_color)
    stroke = cover(np.abs(upper_lid) - 0.022)
    stroke *= np.abs(across) < 1.1
    stroke *= 0.8
    _paint(image, stroke, dark * 0.5)

    # Brows: from inside (-1) to outside (1)
    brow_half = mix(0.17, 0.21, t[19])
    along = (side - (eye_x + 0.01 - 0.05 * au["AU4"])) / brow_half
    inner = 0.5 - 0.5 * along
    rise = 0.2 * au["AU1"] - 0.17 * au["AU4"] - 0.05 * au["AU9"]
    outer_rise = 0.18 * au["AU2"] - 0.03 * au["AU4"]
    brow = y - (mix(-0.37, -0.33, t[20]) - 0.04)
    brow += inner * (rise - outer_rise) + outer_rise
    brow -= 0.045 * along * along
    line = cover(np.abs(brow) - mix(0.026, 0.05, t[21]))
    line *= np.abs(along) < 1
    _paint(image, line, np.minimum(hair * 0.7, skin * 0.5))

    # Frown between the brows, wrinkles on the nose: short dark lines
    frown = cover(np.abs(side - 0.06) - 0.022)
    frown *= np.abs(y + 0.3) < 0.1
    frown *= 0.75 * au["AU4"]
    _paint(image, frown, dark)
    wrinkle = np.sin((y + 0.25) * 44)
    wrinkle *= side < 0.15
    wrinkle *= np.abs(y + 0.07) < 0.14
    np.maximum(wrinkle, 0, out=wrinkle)
    wrinkle *= 0.9 * au["AU9"]
    _paint(image, wrinkle, dark)

    if t[12] > 0.85:  # glasses
        rim = np.sqrt(((side - eye_x) * 0.9) ** 2 + lid * lid)
        frame = cover(np.abs(rim - 0.23) - 0.02)
        np.maximum(frame, cover(np.maximum(np.abs(lid + 0.03) - 0.018, side - 0.12)), out=frame)
        _paint(image, frame, [40, 35, 35])

    # Nose: one shaded side, two nostrils
    lift = 0.07 * au["AU9"] + 0.03 * au["AU10"]
    nose = mix(0.08, 0.13, t[22])
    image, x, y, side = features(0.75, -0.25, 1.1)
    bridge = cover(np.abs(x - (0.05 + 0.12 * (y + 0.1)) * (1 if d[25] > 0.5 else -1)) - 0.02)
    bridge *= np.abs(y - 0.05) < 0.2
    bridge *= 0.35
    _paint(image, bridge, dark)
    nostril = np.sqrt((side - nose * (1 + 0.3 * au["AU9"])) ** 2 + ((y - 0.27 + lift) * 1.5) ** 2)
    _paint(image, cover(nostril - 0.045) * 0.75, dark * 0.7)

    # Folds from the nose to the corners of the mouth
    pull = 0.5 * (au["AU12L"] + au["AU12R"])
    fold = cover(np.abs(side - 0.2 - 0.5 * (y - 0.22) - 0.08 * pull) - 0.018)
    fold *= np.abs(y - 0.36) < 0.14
    fold *= 0.5 * min(1.0, pull + 0.7 * au["AU10"] + 0.5 * au["AU9"]) + 0.08 * t[23]
    _paint(image, fold, dark)

    # Mouth: lips around an opening, along a curve whose two ends move on their own
    mouth_y = 0.52 + 0.05 * jaw - 0.03 * au["AU17"]
    mouth_half = mix(0.29, 0.36, t[13])
    mouth_half *= 1 + 0.25 * pull + 0.35 * au["AU20"] - 0.3 * jaw - 0.12 * au["AU24"]
    along = x / mouth_half
    along2 = along * along
    arch = np.maximum(1 - along2, 0)
    left, right = au["AU12L"], au["AU12R"]
    down = 0.22 * au["AU15"] + 0.04 * au["AU20"]
    curve = along * (-0.13 * (right - left))
    curve += down - 0.13 * (right + left)
    curve *= along2
    middle = y - mouth_y - 0.5 * (0.13 * (right + left) - down)
    middle -= curve
    part = au["AU25"] * (1 - 0.9 * au["AU24"])
    open_up = 0.012 + 0.045 * part + 0.07 * jaw + 0.09 * au["AU10"]
    open_down = 0.012 + 0.05 * part + 0.2 * jaw
    press = 1 - 0.75 * au["AU24"]
    lip_up = mix(0.045, 0.075, t[4]) * press
    lip_down = mix(0.055, 0.09, t[10]) * press * (1 + 0.2 * au["AU17"])
    inside = np.abs(along) < 1
    ends = np.maximum(-middle - (open_up + lip_up) * arch, middle - (open_down + lip_down) * arch)
    whole = cover(ends)
    whole *= inside
    _paint(image, whole, lips)
    top = -middle - open_up * arch
    hole = cover(np.maximum(top, middle - open_down * arch))
    hole *= inside
    _paint(image, hole, [55, 18, 22])
    teeth = cover(middle + (open_up - 0.085 * min(1.0, 0.3 + part)) * arch)
    teeth *= hole
    teeth *= min(1.0, 8 * max(0.0, open_up + open_down - 0.06))
    _paint(image, teeth, [232, 228, 215])
    # Chin raised: a shadow under the lower lip; dimples beside the corners
    chin = cover(np.abs(y - mouth_y - 0.2 + 0.3 * x * x) - 0.025)
    chin *= side < 0.16
    chin *= 0.55 * au["AU17"]
    _paint(image, chin, dark)
    for sign, strength in ((-1, au["AU14L"]), (1, au["AU14R"])):
        if strength > 0.15:
            corner = np.sqrt((x - sign * (mouth_half + 0.06)) ** 2 + ((y - mouth_y + 0.07) * 0.6) ** 2)
            _paint(image, cover(corner - 0.06) * (0.85 * strength), dark)

    # Light from one side, a cast, and more or less of it
    light = gx[0] * mix(-0.3, 0.3, d[26])
    field = gy * mix(-0.25, 0.25, d[27])
    field += (light + mix(0.8, 1.15, d[28]))[None]
    image = whole_image
    image *= field
    for channel in range(3):
        image[channel] *= mix(0.9, 1.1, d[29 + channel])

    if d[_OCCLUSION] < 0.2:  # something in front of one half of the face: a bar, from outside
        turn = mix(-0.6, 0.6, d[33])
        reach = u * math.cos(turn) + v * math.sin(turn)
        aside = v * math.cos(turn) - u * math.sin(turn) - mix(-0.7, 0.9, d[34])
        if d[35] < 0.5:
            reach = -reach
        bar = cover(np.maximum(mix(0.38, 0.65, d[36]) - reach, np.abs(aside) - mix(0.1, 0.25, d[37])))
        _paint(image, bar, clothes[::-1])
    return image


__all__ = ["ACTION_UNITS", "SyntheticFaces"]
