"""One ONNX file in ONNX Runtime: NumPy in, NumPy out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from distill.errors import BundleError
from distill.export.sessions import open_session
from distill.export.single_file import is_ort_file, metadata_of, refuse_external_data

Array = np.ndarray
PAST, PRESENT = "past_key_values.", "present."
"""How the names begin of what a graph remembers, as inputs and as outputs."""


class OnnxModel:
    """An ONNX file in ONNX Runtime: NumPy in, NumPy out.

    Args:
        path: One file, .onnx or .ort; one that points to data outside itself is refused.
        threads: Threads of a call; 0 leaves it to ONNX Runtime. One is fastest for a short sentence on most phones.
            Every session has its own: two open at a time with two threads each want four cores.

    Raises:
        BundleError: The file is missing, broken, or not alone.
    """

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise BundleError("there is no such file", where=str(path), fix="Copy the whole bundle again.")
        said: dict[str, str] = {}
        if not is_ort_file(self.path):  # that format names no other file, and all that options could change is done
            refuse_external_data(self.path)
            said = metadata_of(self.path)
        try:
            self.session = open_session(self.path, threads, said)
        except Exception as error:  # onnxruntime raises classes of its own, one a status code
            reason = " ".join(str(error).split())[:200]
            raise BundleError(
                f"ONNX Runtime cannot load it ({reason})", where=str(path), fix="Copy the whole bundle again."
            ) from None
        self.inputs = tuple(value.name for value in self.session.get_inputs())
        every = [value.name for value in self.session.get_outputs()]
        self.outputs = tuple(name for name in every if not name.startswith(PRESENT))
        self.memory = {
            value.name: (int(value.shape[1]), 0, int(value.shape[3]))
            for value in self.session.get_inputs()
            if value.name.startswith(PAST)
        }
        self.by_token = frozenset(value.name for value in self.session.get_outputs() if "length" in value.shape[1:2])
        self.width = max(  # numbers a token
            (
                value.shape[2]
                for value in self.session.get_outputs()
                if value.name in self.by_token and len(value.shape) == 3 and isinstance(value.shape[2], int)
            ),
            default=1,
        )
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map

    encodes = False
    """It is an encoder with a decoder behind it."""

    @property
    def writes(self) -> bool:
        """It returns keys and values, so that texts can be written with it."""
        return bool(self.memory)

    def predict(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Every output for a batch; of the batch, what the graph reads is used.

        Args:
            batch: `input_ids`, `attention_mask`, [`token_type_ids`], (B, L) int64 each. A graph with a memory is asked
                without one.
        """
        values = self.session.run(self.outputs, self._feed(batch, {}, 0))
        return dict(zip(self.outputs, values, strict=True))

    def step(self, ids: Array, past: Mapping[str, Array] | None) -> tuple[Array, dict[str, Array]]:
        """Reads further tokens: a `distill.heads.generation.Step` of a graph that returns keys and values.

        Args:
            ids: (B, L) int64, the tokens behind the past, without padding.
            past: What the call before returned; None at the first.

        Returns:
            (B, V) logits of the token behind the last one, and the past with these tokens.
        """
        logits, past = self.read(ids, past)
        return logits[:, -1], past

    def read(self, ids: Array, past: Mapping[str, Array] | None) -> tuple[Array, dict[str, Array]]:
        """`step` with the logits behind each token, (B, L, V)."""
        before = next(iter(past.values())).shape[2] if past else 0
        batch = {"input_ids": ids, "attention_mask": np.ones((len(ids), before + ids.shape[1]), np.int64)}
        names = [name.replace(PAST, PRESENT) for name in self.memory]
        logits, *kept = self.session.run([self.outputs[0], *names], self._feed(batch, past or {}, before))
        return logits, dict(zip(self.memory, kept, strict=True))

    def _feed(self, batch: Mapping[str, Array], past: Mapping[str, Array], before: int) -> dict[str, Array]:
        """What the graph reads of a batch with so many tokens before it; no past is an empty one."""
        if "input_ids" not in batch:
            rows, length = len(next(iter(batch.values()))), 0
        else:
            rows, length = batch["input_ids"].shape
        known: dict[str, Array] = {
            "position_ids": np.tile(np.arange(before, before + length, dtype=np.int64), (rows, 1)),
            **{name: np.zeros((rows, *shape), np.float32) for name, shape in self.memory.items() if name not in past},
            **past,
            **batch,
        }
        return {name: known[name] for name in self.inputs}
