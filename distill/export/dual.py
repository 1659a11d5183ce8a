"""Parts the one graph of two encoders into the files that clients expect: one for texts, one for images.

    part(Path("student-int8.onnx"), Path("text_model_quantized.onnx"), Path("vision_model_quantized.onnx"))

They have the names of optimum and transformers.js, whose `CLIPTextModelWithProjection` and
`CLIPVisionModelWithProjection` load them.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from distill.errors import ExportError
from distill.export.graph import drop_unread_inputs
from distill.heads.image_text import IMAGE, TEXT


def part(source: Path, text: Path, image: Path) -> None:
    """Writes both files; what is there is replaced once the new one is complete.

    Args:
        source: What `export_graph` or the quantiser wrote, with both outputs.
        text: From `input_ids` and `attention_mask` to `text_embeds`.
        image: From `pixel_values` to `image_embeds`.

    Raises:
        ExportError: One encoder reads what belongs to the other.
    """
    for name, path, inputs in (
        (TEXT, text, {"input_ids", "attention_mask"}),
        (IMAGE, image, {"pixel_values"}),
    ):
        model = ir.load(source)
        outputs = [value for value in model.graph.outputs if value.name == name]
        model.graph.outputs.clear()
        model.graph.outputs.extend(outputs)
        RemoveUnusedNodesPass()(model)
        drop_unread_inputs(model)
        others = [str(value.name) for value in model.graph.inputs if value.name not in inputs]
        if others or not outputs:
            raise ExportError(
                f"{name} cannot be parted from {', '.join(others) or 'the rest'}",
                where=str(source),
                fix="Take a CLIP model as the teacher.",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".writing")
        ir.save(model, beside)
        os.replace(beside, path)
