"""What a model weighs, and what its int8 file will: known on the meta device, before it has weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.student.parts import final_linear, part_of
from distill.student.shape import depth

_FEW_ROWS = 64  # tables this short, such as token types, are exported as they are
_BLOCK = 32  # numbers of a row that share an fp16 scale in int4
_GRAPH_BYTES = 10_000  # a layer: node names and shapes of an exported graph, beside its weights


@dataclass(frozen=True, slots=True)
class Component:
    """One row of the size table: a part, its parameters, and its bytes in the int8 file.

    `saved` are those that it has not where the table of the tokens is in int4 (`export.embeddings`).
    """

    name: str
    parameters: int
    int8_bytes: int
    saved: int = 0


@dataclass(frozen=True, slots=True)
class Size:
    """What a model weighs, part by part."""

    components: tuple[Component, ...]

    @property
    def parameters(self) -> int:
        """Trained numbers, shared ones counted once."""
        return sum(part.parameters for part in self.components)

    @property
    def int8_bytes(self) -> int:
        """Expected bytes of the int8 ONNX file: weights, scales, what stays fp32, and the graph itself."""
        return sum(part.int8_bytes for part in self.components)

    @property
    def int4_bytes(self) -> int:
        """Expected bytes of the same file with the table of the tokens in int4."""
        return self.int8_bytes - sum(part.saved for part in self.components)

    def rows(self) -> list[list[str]]:
        """Component, parameters, bytes of the int8 file without and with embeddings in int4: for a printed table."""
        total = Component("total", self.parameters, self.int8_bytes, self.int8_bytes - self.int4_bytes)
        return [
            [part.name, *(f"{n:,}" for n in (part.parameters, part.int8_bytes, part.int8_bytes - part.saved))]
            for part in (*self.components, total)
        ]


def measure(model: PreTrainedModel) -> Size:
    """Parameters and expected int8 bytes by component; works on the meta device.

    As `export` writes them: a product's weight takes a byte a number and an fp32 scale for each column of its result, a
    table a byte a number and an fp32 scale a row; biases, norms, short tables and the last product stay fp32. In int4
    the table of the tokens takes half a byte a number and an fp16 scale for 32; one that is multiplied with too stays
    as it is.
    """
    tables = {id(table.weight) for table in model.modules() if isinstance(table, nn.Embedding)}
    last = final_linear(model)
    tokens = _untied_tokens(model)
    sums: dict[str, list[int]] = {name: [0, 0, 0] for name in ("embeddings", "layers", "head")}
    for name, parameter in model.named_parameters():
        part = part_of(model, name)
        exact = parameter.shape[0] <= (_FEW_ROWS if id(parameter) in tables else 0) or name == f"{last}.weight"
        sums[part][0] += parameter.numel()
        sums[part][1] += _int8_bytes(parameter, exact=exact)
        if tokens is not None and parameter is tokens and not exact:
            sums[part][2] += _int8_bytes(parameter, exact=False) - parameter.shape[0] * int4_row(parameter.shape[1])
    sums["graph"] = [0, _GRAPH_BYTES * depth(model.config), 0]
    return Size(tuple(Component(name, *counts) for name, counts in sums.items()))


def int4_row(width: int) -> int:
    """Bytes of a row of a table in int4."""
    return -(-width // 2) + 2 * -(-width // _BLOCK)


def _untied_tokens(model: PreTrainedModel) -> Tensor | None:
    """The table of a model's tokens, unless it is multiplied with as well."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(table, nn.Embedding) or (head is not None and head.weight is table.weight):
        return None
    return table.weight


def _int8_bytes(parameter: Tensor, *, exact: bool) -> int:
    if exact or parameter.dim() < 2:
        return 4 * parameter.numel()
    return parameter.numel() + 4 * parameter.shape[0]
