"""Small generated data sets in their official layouts. No image shows a person."""

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

BOX = '"(0, 0, 48, 48)"'


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (48, 48), mode: str = "RGB") -> Path:
    """Random pixels, other ones for each seed; the suffix decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def zipped(folder: Path, archive: Path, inside: str = "") -> Path:
    """A zip of a folder's content, below ``inside``."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, f"{inside}{path.relative_to(folder).as_posix()}")
    return archive


def rafdb(root: Path) -> Path:
    lines = []
    for i, code in enumerate((1, 2, 3, 4, 5, 6, 7, 4)):
        write_image(root / f"basic/Image/aligned/train_{i:05d}_aligned.jpg", i, (100, 100))
        write_image(root / f"basic/Image/original/train_{i:05d}.jpg", i, (120, 90))
        lines.append(f"train_{i:05d}.jpg {code}")
    write_image(root / "basic/Image/aligned/test_0001_aligned.jpg", 99, (100, 100))
    lines.append("test_0001.jpg 7")
    write_text(root / "basic/EmoLabel/list_patition_label.txt", "\n".join(lines) + "\n")
    return root


def fer2013(root: Path) -> Path:
    rows = ["emotion,pixels,Usage"]
    for usage, count in (("Training", 7), ("PublicTest", 2), ("PrivateTest", 3)):
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, 48 * 48)
            rows.append(f"{i % 7},{' '.join(map(str, pixels))},{usage}")
    write_text(root / "fer2013.csv", "\n".join(rows) + "\n")
    return root


# Ten votes, what each protocol makes of them (the index among FERPlus's columns, or None)
VOTES = [
    ((10, 0, 0, 0, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0)),
    ((0, 6, 0, 0, 0, 0, 0, 4, 0, 0), (1, 1, 1, 1)),
    ((0, 0, 0, 9, 1, 0, 0, 0, 0, 0), (3, 3, 3, 3)),
    ((4, 4, 0, 0, 0, 0, 0, 0, 2, 0), (None, 0, 0, 0)),
    ((1, 1, 1, 1, 1, 1, 1, 1, 1, 1), (None, None, 0, 0)),  # every single vote is dropped
    ((2, 0, 0, 0, 0, 0, 0, 0, 8, 0), (None, None, None, 0)),  # unknown first
    ((0, 0, 0, 0, 0, 0, 0, 0, 0, 10), (None, None, None, None)),
    ((0, 0, 5, 0, 0, 0, 0, 0, 5, 0), (None, None, 2, 2)),  # half is not more than half
    ((2, 2, 2, 2, 0, 0, 2, 0, 0, 0), (None, None, 0, 0)),  # five share the largest value
]


def ferplus(root: Path) -> Path:
    for folder in ("FER2013Train", "FER2013Valid", "FER2013Test"):
        lines = []
        for i, (votes, _) in enumerate(VOTES):
            write_image(root / f"{folder}/fer{i:07d}.png", i, mode="L")
            lines.append(f"fer{i:07d}.png,{BOX},{','.join(map(str, votes))}")
        write_text(root / f"{folder}/label.csv", "\n".join(lines) + "\n")
    return root


def ferplus_csv(root: Path) -> Path:
    """The csv form with the pixels in fer2013.csv; its second row is removed by FERPlus."""
    header = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
    votes, pixels = [header], ["emotion,pixels,Usage"]
    for usage in ("Training", "PublicTest", "PrivateTest"):
        for i, (row, _) in enumerate([VOTES[0], ((0,) * 9 + (10,), ()), *VOTES[1:]]):
            votes.append(f"{usage},{'' if i == 1 else f'fer{i:07d}.png'},{','.join(map(str, row))}")
            pixels.append(f"0,{' '.join([str(i)] * 48 * 48)},{usage}")
    write_text(root / "fer2013new.csv", "\n".join(votes) + "\n")
    write_text(root / "fer2013.csv", "\n".join(pixels) + "\n")
    return root


AFFECTNET_HEADER = (
    "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
)


def affectnet_csv(root: Path) -> Path:
    for name, header in (("training", True), ("validation", False)):
        lines = [AFFECTNET_HEADER] if header else []
        for code in range(11):
            write_image(root / f"Manually_Annotated_Images/{code}/{name}.jpg", code, (80, 60))
            affect = "-2,-2" if code > 7 else f"{code / 10 - 0.5},0.25"
            lines.append(f"{code}/{name}.jpg,10,5,40,30,1.0;2.0,{code},{affect}")
        write_text(root / f"Manually_Annotated_file_lists/{name}.csv", "\n".join(lines) + "\n")
    return root


def affectnet_npy(root: Path) -> Path:
    for folder in ("train_set", "val_set"):
        (root / folder / "annotations").mkdir(parents=True)
        for i in range(8):
            write_image(root / f"{folder}/images/{i * 3}.jpg", i, (224, 224))
            for kind, value in (("exp", str(i)), ("val", "-0.5"), ("aro", "0.125"), ("lnd", np.zeros(136))):
                np.save(root / f"{folder}/annotations/{i * 3}_{kind}.npy", value)  # strings, as given out
    return root


def affwild2(root: Path, *, other: bool = True) -> Path:
    expr = "EXPR_Classification_Challenge" if other else "EXPR_Set"
    va = "VA_Estimation_Challenge" if other else "VA_Set"
    header = "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise" + (",Other" if other else "")
    for folder in ("Train_Set", "Validation_Set"):
        codes = [0, 1, 2, 3, 4, 5, 6, -1, 7 if other else 0]
        write_text(root / f"{expr}/{folder}/12-24_left.txt", "\n".join([header, *map(str, codes)]) + "\n")
        pairs = ["0.5,-0.25"] * 8 + ["-5,-5"]
        for video in ("12-24_left", "7"):
            write_text(root / f"{va}/{folder}/{video}.txt", "\n".join(["valence,arousal", *pairs]) + "\n")
    for video in ("12-24_left", "7"):
        for frame in range(1, 10):
            if frame != 3:  # the face was lost
                write_image(root / f"cropped_aligned/{video}/{frame:05d}.jpg", frame, (112, 112))
    return root


def ckplus(root: Path) -> Path:
    for subject in range(4):
        for sequence in range(2):
            place = f"S{subject:03d}/{sequence:03d}"
            stem = f"S{subject:03d}_{sequence:03d}"
            for frame in range(1, 6):
                seed = subject * 100 + sequence * 10 + frame
                path = root / f"cohn-kanade-images/{place}/{stem}_{frame:08d}.png"
                write_image(path, seed, (64, 49), "L")
            folder = root / f"Emotion/{place}"
            folder.mkdir(parents=True)
            if (subject, sequence) != (0, 1):  # not all are labelled
                code = 1 + (2 * subject + sequence) % 7
                write_text(folder / f"{stem}_00000005_emotion.txt", f"   {code:.7e}\n")
    return root


def jaffe(root: Path) -> Path:
    for subject in ("KA", "KL", "KM"):
        for i, code in enumerate(("AN", "DI", "FE", "HA", "NE", "SA", "SU")):
            write_image(root / f"jaffe/{subject}.{code}1.{i + 39}.tiff", i + ord(subject[1]) * 10, mode="L")
    write_text(root / "jaffe/README", "text")
    return root


def oulu_casia(root: Path, base: str = "OriginalImg") -> Path:
    for subject in range(1, 4):
        for emotion in ("Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise"):
            for frame in range(5):
                path = root / f"{base}/VL/Strong/P{subject:03d}/{emotion}/{frame:03d}.jpeg"
                write_image(path, subject * 100 + len(emotion) * 7 + frame, (40, 32))
    return root


def sfew(root: Path) -> Path:
    for top in ("Train/Train_Aligned_Faces", "Val/Val_Aligned_Faces_new/Val_Aligned_Faces"):
        for i, emotion in enumerate(("Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise")):
            name = f"Bridget_Jones_000519240_{i:08d}.png"
            write_image(root / f"{top}/{emotion}/{name}", i + len(top), (143, 181))
    return root


def mmi(root: Path) -> Path:
    for session in range(1, 9):
        stem = f"S{session // 2:03d}-{session:03d}"
        text = f'<Session><Track><Metatag Name="Emotion" Value="{session}"/></Track></Session>'
        write_text(root / f"Sessions/{session}/{stem}.xml", text)
        write_text(root / f"Sessions/{session}/{stem}.avi", "video")
        for frame in range(1, 10):
            write_image(root / f"Sessions/{session}/{stem}/{frame:04d}.png", session * 10 + frame, (36, 36))
    return root


def image_folder(root: Path) -> Path:
    for split in ("train", "val"):
        for i, emotion in enumerate(("Happiness", "anger", "neutral")):
            for n in range(i + 1):
                write_image(root / f"{split}/{emotion}/{n}.png", 10 * i + n + len(split))
    return root


TREES = {
    "rafdb": rafdb,
    "fer2013": fer2013,
    "ferplus": ferplus,
    "affectnet": affectnet_csv,
    "affwild2": affwild2,
    "ckplus": ckplus,
    "jaffe": jaffe,
    "oulu_casia": oulu_casia,
    "sfew": sfew,
    "mmi": mmi,
    "folder": image_folder,
}


def png_bytes(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
