"""From a graph's outputs to what an app wants, one file a task. NumPy alone: the base install runs it.

A new task enters `HEADS` with the head that reads its graph.
"""

from __future__ import annotations

from distill.heads.base import Asked, Head, Prediction, Text, Window
from distill.heads.captioning import Captioner
from distill.heads.classification import Classifier, Label
from distill.heads.embedding import Embedder, Embedding, Similarity
from distill.heads.image_classification import ImageClassifier
from distill.heads.image_text import Retriever
from distill.heads.language import Continuation, Writer
from distill.heads.multi_label import Labels, MultiLabel
from distill.heads.spans import Answer, Reader, Span
from distill.heads.states import Encoder, States
from distill.heads.tagging import Entity, Tagger, Tagging
from distill.heads.translation import Translation, Translator
from distill.heads.value import Regressor, Value

HEADS: dict[str, Head] = {
    "text-classification": Classifier(),
    "masked-lm": Encoder(),
    "multi-label": MultiLabel(),
    "question-answering": Reader(),
    "image-classification": ImageClassifier(),
    "image-captioning": Captioner(),
    "image-text": Retriever(),
    "regression": Regressor(),
    "token-classification": Tagger(),
    "sentence-embedding": Embedder(),
    "causal-lm": Writer(),
    "seq2seq": Translator(),
}
"""By task."""

__all__ = [
    "HEADS",
    "Answer",
    "Asked",
    "Captioner",
    "Classifier",
    "Continuation",
    "Embedder",
    "Embedding",
    "Encoder",
    "Entity",
    "Head",
    "ImageClassifier",
    "Label",
    "Labels",
    "MultiLabel",
    "Prediction",
    "Reader",
    "Regressor",
    "Retriever",
    "Similarity",
    "Span",
    "States",
    "Tagger",
    "Tagging",
    "Text",
    "Translation",
    "Translator",
    "Value",
    "Window",
    "Writer",
]
