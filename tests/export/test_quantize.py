from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx.reference import ReferenceEvaluator
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill.data import load_examples  # noqa: F401
from distill.errors import ExportError
from distill.export.graph import export_graph
from distill.export.quantize import quantize_columns, quantize_dynamic_int8, quantize_rows
from distill.export.runtime import OnnxModel
from distill.tasks.text_classification import TextClassification
