"""Outliers of activations moved into weights, so that one scale serves a whole tensor again.

    smoothed = smooth_outliers("model.onnx", "smoothed.onnx", observe("model.onnx", texts))

A channel that is a hundred times larger than the others takes all 255 steps of a tensor for itself. Divided by s, and
the weights that read it multiplied by s, the product stays what it was: (x / s) (s W) = x W (SmoothQuant, Xiao et al.
2023, equation 4 with strength 0.5).
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx_ir as ir

from distill.export.calibrate import Observed
from distill.export.passes.match import Product, array, constant, maker, node_after, numbers_of, products
from distill.export.passes.shapes import gemm_as_product

OUTLIER = 8.0  # how much larger than the median channel the largest has to be
STRENGTH = 0.5


def smooth_outliers(
    fp32_path: str | Path, smoothed_path: str | Path, observed: Observed, *, strength: float = STRENGTH
) -> tuple[str, ...]:
    """Writes the same model with outlier channels divided among activations and weights.

    The factors go into the LayerNormalization or the constant factor that makes the channels where nothing else reads
    them; else they cost one multiplication. Values without outliers are left alone.

    Args:
        fp32_path: What `export_graph` wrote.
        smoothed_path: The file to write.
        observed: What `observe` saw in the file.
        strength: Share of an outlier that goes into the weights, from 0 to 1.

    Returns:
        Names of the values that were smoothed; where there are none, the file is written all the same.
    """
    model, path = ir.load(fp32_path), Path(smoothed_path)
    gemm_as_product(model)
    groups: dict[ir.Value, list[Product]] = defaultdict(list)
    for found in products(model.graph):
        groups[found.x].append(found)
    done = []
    for x, group in groups.items():
        seen = observed.values.get(str(x.name))
        if seen is None or not _has_outliers(seen.channels) or any(len(found.weight.uses()) > 1 for found in group):
            continue
        factors = _factors(seen.channels, [numbers_of(found.weight) for found in group], strength)
        for found in group:
            weight = numbers_of(found.weight) * factors[:, None]
            found.matmul.replace_input_with(1, _renamed(model.graph, found.weight, weight))
        _divide(model.graph, x, group, factors)
        done.append(str(x.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".writing")
    ir.save(model, beside)
    os.replace(beside, path)
    return tuple(done)


def _has_outliers(channels: np.ndarray) -> bool:
    return bool(channels.max() > OUTLIER * max(float(np.median(channels)), 1e-12))


def _factors(channels: np.ndarray, weights: list[np.ndarray], strength: float) -> np.ndarray:
    """(K,) s = max|x|^strength / max|W|^(1 - strength), their median 1; channels that only zeros read are levelled."""
    rows = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    alive = (channels > 0) & (rows > 0)
    factors = np.maximum(channels / max(float(np.median(channels)), 1e-12), 1)
    if alive.any():
        balanced = channels[alive] ** strength / rows[alive] ** (1 - strength)
        factors[alive] = balanced / np.median(balanced)
    return np.clip(factors, 1e-5, 1e5).astype(np.float32)


def _renamed(graph: ir.Graph, old: ir.Value, numbers: np.ndarray) -> ir.Value:
    """A constant in the place of `old`, under its name, so that reports name the same product."""
    name = str(old.name)
    del graph.initializers[name]
    return constant(graph, numbers, name)


def _divide(graph: ir.Graph, x: ir.Value, group: list[Product], factors: np.ndarray) -> None:
    """X / s for the products of `group`."""
    alone = len(x.uses()) == len(group) and not x.is_graph_output()
    norm, scaled = maker(x, "LayerNormalization"), maker(x, "Mul")
    if alone and norm is not None and array(norm.inputs[1]) is not None:
        for index in range(1, len(norm.inputs)):
            given = norm.inputs[index]
            if given is not None:
                own = constant(graph, numbers_of(given) / factors, f"{given.name}.smoothed")
                norm.replace_input_with(index, own)
        return
    if alone and scaled is not None and (vector := array(scaled.inputs[1])) is not None:
        own = constant(graph, (vector / factors).astype(np.float32), f"{scaled.inputs[1].name}.smoothed")
        scaled.replace_input_with(1, own)
        return
    producer = x.producer()
    assert producer is not None
    inverse = constant(graph, 1 / factors, f"{x.name}.smooth")
    smoothed = node_after(producer, "Mul", [x, inverse], x)
    for found in group:
        found.matmul.replace_input_with(0, smoothed.outputs[0])
