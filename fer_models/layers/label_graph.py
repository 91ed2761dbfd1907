"""A classifier that a graph convolutional network writes from a graph of the labels: Emotion-GCN's head.

Nodes are the expressions and, as two more, valence and arousal. Two graph convolutions turn the labels' word
vectors Z (n, E) into one weight vector a node, W = Â LeakyReLU(Â Z W₁) W₂ (n, num_features), and the outputs
are embedding · Wᵀ, without a bias. W depends on no image: in evaluation it is computed once.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fer_kernels.checks import a_choice

from ..base import LinearHead
from ..data.labels import EMOTIONS
from ..losses import Targets, label_distribution, labelled

OF_DATA = ("spearman", "conditional")  # what needs a data set's labels
ADJACENCIES = ("auto", "published", *OF_DATA, "identity", "full")
NORMS = ("code", "sym", "row")
CONTINUOUS = ("valence", "arousal")
EMBEDDINGS = ("auto", "table", "learned")  # or a file's
TABLE = Path(__file__).parent / "label_vectors.json"
VECTOR_NORM = 6.0  # about that of GloVe's 300-d vectors of these words: W₁'s published range expects it

# Spearman correlations with valence and arousal of the labels of AffectNet's training set, as published with
# Emotion-GCN. Contempt is not among them: it gets disgust's, being as rare in AffectNet (3,750 images and
# 3,803), and as unpleasant and mildly aroused.
PUBLISHED = {
    "neutral": (-0.3351, -0.2841),
    "happy": (0.8611, 0.0145),
    "sad": (-0.4530, -0.4337),
    "surprise": (-0.0276, 0.3382),
    "fear": (-0.1218, 0.2356),
    "disgust": (-0.1764, 0.1437),
    "anger": (-0.3837, 0.4138),
    "contempt": (-0.1764, 0.1437),
}
PUBLISHED_VALENCE_AROUSAL = 0.0373


# Relations between labels: (n, n) float64, nodes in the order of the classes, then valence and arousal


def published_relation(labels: Sequence[str], *, va_nodes: bool = True) -> Tensor:
    """The published correlations of these expressions; those between two expressions are 0."""
    unknown = [label for label in labels if label not in PUBLISHED]
    if unknown:
        raise ValueError(
            f"published_relation: no published correlations of {', '.join(map(repr, unknown))}: expected "
            f"labels among {', '.join(PUBLISHED)}"
        )
    n = len(labels)
    relation = torch.eye(n + 2, dtype=torch.float64)
    relation[:n, n:] = torch.tensor([PUBLISHED[label] for label in labels], dtype=torch.float64)
    relation[n:, :n] = relation[:n, n:].T
    relation[n, n + 1] = relation[n + 1, n] = PUBLISHED_VALENCE_AROUSAL
    return relation if va_nodes else relation[:n, :n]


def spearman_relation(targets: Targets, num_classes: int, *, va_nodes: bool = True) -> Tensor:
    """Spearman correlations of being of a class, valence and arousal, over a data set's labels.

    Only samples with a class (and, with va_nodes, valence and arousal) count. Correlations between two
    expressions, which exclude each other, are 0, and so are those of something that never varies.
    """
    label, _, valence_arousal = _known("spearman_relation", targets._replace(distribution=None), va_nodes)
    columns = label_distribution(label, num_classes).double()
    if valence_arousal is not None:
        columns = torch.cat([columns, valence_arousal.double()], 1)
    ranks = torch.stack([_ranks(column) for column in columns.T])
    ranks = F.normalize(ranks - ranks.mean(1, keepdim=True), dim=1)
    relation = ranks @ ranks.T
    relation[:num_classes, :num_classes] = 0
    return relation.fill_diagonal_(1.0)


def conditional_relation(
    targets: Targets, num_classes: int, *, va_nodes: bool = True, min_share: float = 0.2
) -> Tensor:
    """P(j | i), ML-GCN's: the share of the samples with label i that have label j too.

    A sample has every expression with at least min_share of its votes (without votes only its label), valence
    where that is above 0, and arousal likewise.
    """
    label, distribution, valence_arousal = _known("conditional_relation", targets, va_nodes)
    votes = label_distribution(label, num_classes, distribution)
    has = (votes >= min_share).double()
    if valence_arousal is not None:
        has = torch.cat([has, (valence_arousal > 0).double()], 1)
    together = has.T @ has
    return (together / together.diagonal().clamp(min=1).unsqueeze(1)).fill_diagonal_(1.0)


def _known(here: str, targets: Targets, va_nodes: bool) -> Targets:
    """The samples with a class; with va_nodes, those of them with valence and arousal, else without these."""
    known = labelled(targets._replace(valence_arousal=None))
    if va_nodes:
        if targets.valence_arousal is not None:
            known = known & ~targets.valence_arousal.isnan().any(1)
        if targets.valence_arousal is None or known.sum() < 2:
            raise ValueError(
                f"{here}: no two samples have a class, valence and arousal; pass va_nodes=False for a graph "
                f"of the classes alone"
            )
    else:
        targets = targets._replace(valence_arousal=None)
    return Targets(*(None if part is None else part[known] for part in targets))  # type: ignore[arg-type]


def _ranks(values: Tensor) -> Tensor:
    """Places in the sorted order; equal values share the mean of theirs."""
    _, index, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts.double() - 1) / 2)[index]


# From relations to graphs


def adjacency_from(relation: Tensor, *, threshold: float = 0.1, reweight: float = 0.5) -> Tensor:
    """A (n, n): j is i's neighbour where |relation_ij| >= threshold, and i's neighbours share `reweight`.

    A_ii = 1 - reweight. A node without neighbours keeps all of itself, so that every row sums to 1.
    """
    if relation.dim() != 2 or relation.shape[0] != relation.shape[1]:
        raise ValueError(f"adjacency_from: relation must be (n, n), got {tuple(relation.shape)}")
    if not 0 <= reweight <= 1:
        raise ValueError(f"adjacency_from: reweight must lie in [0, 1], got {reweight}")
    linked = (relation.abs() >= threshold).double().fill_diagonal_(0.0)
    degree = linked.sum(1, keepdim=True)
    a = reweight * linked / degree.clamp(min=1)
    return a + torch.diag(torch.where(degree > 0, 1 - reweight, 1.0).squeeze(1))


def normalise_adjacency(a: Tensor, norm: str = "code") -> Tensor:
    """Â, what a graph convolution multiplies by; D holds A's row sums.

    "code": (A D^-½)ᵀ D^-½, as Emotion-GCN's published code, which is Aᵀ where the rows sum to 1
    "sym":  D^-½ A D^-½
    "row":  D⁻¹ A
    """
    a_choice("normalise_adjacency", "norm", norm, NORMS)
    degree = a.sum(1)
    if norm == "row":
        return a / degree.unsqueeze(1)
    scaled = a * degree.rsqrt() * degree.rsqrt().unsqueeze(1)
    return scaled.mT if norm == "code" else scaled


def build_adjacency(
    kind: str,
    num_classes: int,
    *,
    labels: Sequence[str] | None = None,
    va_nodes: bool = True,
    targets: Targets | None = None,
    threshold: float = 0.1,
    reweight: float = 0.5,
) -> Tensor:
    """A (n, n) float64 with n = num_classes, and two more with va_nodes.

    Args:
        kind: "published":   from the correlations that Emotion-GCN publishes (`PUBLISHED`)
              "spearman":    the same from the labels of a data set, `targets`
              "conditional": from conditional probabilities in `targets`, as ML-GCN
              "identity":    no links
              "full":        all links
              "auto":        published where it knows all labels, else full
        labels: names of the classes, for "published" and "auto".
    """
    a_choice("build_adjacency", "adjacency", kind, ADJACENCIES)
    if kind == "auto":
        kind = "published" if labels is not None and set(labels) <= set(PUBLISHED) else "full"
    if kind in ("identity", "full"):
        n = num_classes + 2 * va_nodes
        relation = torch.eye(n) if kind == "identity" else torch.ones(n, n)
    elif kind == "published":
        if labels is None:
            raise ValueError(
                f"build_adjacency: adjacency='published' needs the labels' names, and {num_classes} classes "
                f"have none by default (7 and 8 have: {', '.join(EMOTIONS)})"
            )
        relation = published_relation(labels, va_nodes=va_nodes)
    elif targets is None:
        raise ValueError(f"build_adjacency: adjacency={kind!r} needs targets, the labels of a data set")
    else:
        make = spearman_relation if kind == "spearman" else conditional_relation
        relation = make(targets, num_classes, va_nodes=va_nodes)
    return adjacency_from(relation, threshold=threshold, reweight=reweight)


# Vectors of labels


def read_glove(path: str | os.PathLike, words: Sequence[str]) -> Tensor:
    """(words, E) from a text file of word vectors: a word and its E numbers a line, as GloVe's."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_glove: no file {path}")
    wanted, found = set(words), {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            word, _, rest = line.partition(" ")
            if word not in wanted or word in found:
                continue
            try:
                found[word] = [float(value) for value in rest.split()]
            except ValueError:
                raise ValueError(
                    f"read_glove: {path}, line {number}: expected numbers after {word!r}"
                ) from None
            if len(found) == len(wanted):
                break
    missing = [word for word in words if word not in found]
    if missing:
        raise ValueError(f"read_glove: {path} has no vector of {', '.join(map(repr, missing))}")
    widths = sorted({len(vector) for vector in found.values()})
    if len(widths) > 1 or widths[0] == 0:
        raise ValueError(f"read_glove: {path}: vectors of different widths, {', '.join(map(str, widths))}")
    return torch.tensor([found[word] for word in words])


@functools.cache
def _table() -> dict[str, list[float]]:
    with open(TABLE, encoding="utf-8") as file:
        return json.load(file)["vectors"]


def table_vectors(words: Sequence[str]) -> Tensor:
    """(words, 384) from the table in the package: sentence embeddings of the labels' names, of one length.

    Their origin and license are in the table, label_vectors.json; tools/label_vectors.py made it.
    """
    missing = [word for word in words if word not in _table()]
    if missing:
        raise ValueError(
            f"table_vectors: the table has no vector of {', '.join(map(repr, missing))}, only of "
            f"{', '.join(_table())}; give embeddings='learned' or the path of a GloVe text file"
        )
    return VECTOR_NORM * F.normalize(torch.tensor([_table()[word] for word in words]), dim=1)


class GraphConvolution(nn.Module):
    """Â H W of nodes H (n, in_features), without a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        nn.init.uniform_(self.weight, -1 / math.sqrt(out_features), 1 / math.sqrt(out_features))

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ (nodes @ self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class LabelGraphHead(nn.Module):
    """embedding (B, num_features) to (logits (B, num_classes), valence and arousal (B, 2) or None).

    In evaluation without gradients (or with frozen weights) the generated classifier is computed once, and
    again after its weights changed in any way that autograd sees, or the module was in training mode.
    Compiled or exported code computes it anew; `to_linear` gives a head that need not.

    Args:
        num_features: width of the embedding.
        num_classes: at least 2.
        valence_arousal: whether the head gives them.
        labels: names of the classes; None takes the first of `fer_models.data.EMOTIONS` for 7 and 8
            classes, and for other numbers none.
        adjacency: a kind of `build_adjacency`, or A itself, (n, n) numbers.
        embeddings: vectors of the labels: "table" (in the package), "learned", the path of a GloVe text file,
            or the vectors, (n, E) numbers; "auto" is the table where it has all labels, else learned ones.
        va_nodes: keep valence and arousal in the graph where they are no output: in the published graph all
            links lead to them.
        hidden: width between the two graph convolutions.
        embedding_dim: width of learned vectors.
        norm: of `normalise_adjacency`.
        targets, threshold, reweight: of `build_adjacency`.
        learn_adjacency: train A too.
    """

    adjacency: Tensor
    vectors: Tensor

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        valence_arousal: bool = False,
        *,
        labels: Sequence[str] | None = None,
        adjacency: str | Tensor | Sequence[Sequence[float]] = "auto",
        embeddings: str | os.PathLike | Tensor | Sequence[Sequence[float]] = "auto",
        va_nodes: bool = True,
        hidden: int = 512,
        embedding_dim: int = 300,
        norm: str = "code",
        negative_slope: float = 0.2,
        targets: Targets | None = None,
        threshold: float = 0.1,
        reweight: float = 0.5,
        learn_adjacency: bool = False,
    ) -> None:
        super().__init__()
        here = type(self).__name__
        a_choice(here, "norm", norm, NORMS)
        if num_classes < 2:
            raise ValueError(f"{here}: num_classes must be at least 2, got {num_classes}")
        if valence_arousal and not va_nodes:
            raise ValueError(f"{here}: valence_arousal=True needs their nodes, got va_nodes=False")
        if labels is None and num_classes in (7, 8):
            labels = EMOTIONS[:num_classes]
        if labels is not None and (len(labels) != num_classes or len(set(labels)) != num_classes):
            raise ValueError(f"{here}: labels must be {num_classes} different names, got {', '.join(labels)}")
        self.num_classes, self.valence_arousal, self.norm = num_classes, valence_arousal, norm
        self.negative_slope, self.va_nodes = negative_slope, va_nodes
        self.labels = None if labels is None else tuple(labels)
        nodes = num_classes + 2 * va_nodes

        if isinstance(adjacency, str):
            adjacency = build_adjacency(
                adjacency,
                num_classes,
                labels=labels,
                va_nodes=va_nodes,
                targets=targets,
                threshold=threshold,
                reweight=reweight,
            )
        if not isinstance(adjacency, Tensor):
            adjacency = torch.tensor(adjacency, dtype=torch.float64)
        if adjacency.shape != (nodes, nodes):
            raise ValueError(f"{here}: adjacency must be {(nodes, nodes)}, got {tuple(adjacency.shape)}")
        if not adjacency.is_meta and not (adjacency.sum(1) > 0).all():
            raise ValueError(f"{here}: every row of the adjacency must have a positive sum")
        adjacency = adjacency.detach().clone().to(torch.get_default_dtype())
        if learn_adjacency:
            self.adjacency = nn.Parameter(adjacency)
        else:
            self.register_buffer("adjacency", adjacency)

        vectors = self._vectors(embeddings, nodes, embedding_dim)
        if isinstance(vectors, nn.Parameter):
            self.vectors = vectors
        else:
            self.register_buffer("vectors", vectors)
        self.gc1 = GraphConvolution(vectors.shape[1], hidden)
        self.gc2 = GraphConvolution(hidden, num_features)
        self._cache: tuple[list[tuple[Tensor, Tensor, int]], Tensor] | None = None

    def _vectors(
        self, embeddings: str | os.PathLike | Tensor | Sequence[Sequence[float]], nodes: int, width: int
    ) -> Tensor:
        words = None if self.labels is None else self.labels + CONTINUOUS * self.va_nodes
        if isinstance(embeddings, str) and embeddings == "auto":
            embeddings = "table" if words is not None and set(words) <= set(_table()) else "learned"
        if not isinstance(embeddings, (Tensor, str, os.PathLike)):
            embeddings = torch.tensor(embeddings, dtype=torch.float64)
        if isinstance(embeddings, Tensor):
            if embeddings.dim() != 2 or embeddings.shape[0] != nodes:
                raise ValueError(
                    f"{type(self).__name__}: embeddings must be ({nodes}, E), got {tuple(embeddings.shape)}"
                )
            return embeddings.detach().clone().to(torch.get_default_dtype())
        if embeddings == "learned":
            return nn.Parameter(torch.randn(nodes, width) * VECTOR_NORM / math.sqrt(width))
        if words is None:
            raise ValueError(
                f"{type(self).__name__}: embeddings={str(embeddings)!r} needs the labels' names; give them, "
                f"or embeddings='learned'"
            )
        vectors = table_vectors(words) if embeddings == "table" else read_glove(embeddings, words)
        return vectors.to(torch.get_default_dtype())

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        out = F.linear(embedding, self.classifier())
        if not self.valence_arousal:
            return out, None
        return out[:, : self.num_classes], out[:, self.num_classes :]

    def classifier(self) -> Tensor:
        """The generated weights (outputs, num_features): the classes', then valence's and arousal's."""
        sources = [self.gc1.weight, self.gc2.weight, self.vectors, self.adjacency]
        fixed = not self.training and not (torch.is_grad_enabled() and any(s.requires_grad for s in sources))
        if not fixed or torch.compiler.is_compiling() or any(s.is_inference() for s in sources):
            return self._generate()
        if self._cache is None or not all(map(_unchanged, sources, self._cache[0])):
            # Not an inference tensor even in inference mode: it may serve autograd later
            with torch.inference_mode(False), torch.no_grad():
                kept = [(source, source.detach(), source._version) for source in sources]
                self._cache = kept, self._generate()
        return self._cache[1]

    def _generate(self) -> Tensor:
        # What is kept in evaluation must not depend on who asked first
        with torch.autocast(self.gc1.weight.device.type, enabled=False):
            adjacency = normalise_adjacency(self.adjacency, self.norm)
            hidden = F.leaky_relu(self.gc1(self.vectors, adjacency), self.negative_slope)
            weights = self.gc2(hidden, adjacency)
        return weights if self.valence_arousal else weights[: self.num_classes]

    @torch.no_grad()
    def to_linear(self) -> LinearHead:
        """A linear head with this one's classifier as it is now, for export."""
        weights = self._generate()
        head = LinearHead(weights.shape[1], self.num_classes, self.valence_arousal).to(weights)
        head.fc.weight.copy_(weights[: self.num_classes])
        head.fc.bias.zero_()
        if head.va is not None:
            head.va.weight.copy_(weights[self.num_classes :])
            head.va.bias.zero_()
        return head.train(self.training)

    def train(self, mode: bool = True) -> LabelGraphHead:
        if mode:
            self._cache = None
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": None}  # copies and pickles make their own

    def extra_repr(self) -> str:
        labels = "" if self.labels is None else f", labels={', '.join(self.labels)}"
        return (
            f"nodes={self.adjacency.shape[0]}, outputs={self.num_classes + 2 * self.valence_arousal}{labels}"
        )


def _unchanged(source: Tensor, kept: tuple[Tensor, Tensor, int]) -> bool:
    """Whether this is the tensor that was kept, with the storage (held, so not another's now) and content."""
    tensor, alias, version = kept
    return source is tensor and source._version == version and source.data_ptr() == alias.data_ptr()
