"""A student of thin layers in MobileBERT's manner, fitted to a teacher of BERT's kind.

Its states are as wide as the teacher's. A layer reads them through a product H -> b, works at width b, and adds what a
product b -> H makes of that. Going up from the embeddings, every product is set by least squares: inside, the teacher's
states stand in the b principal directions of what its layer hands to its feed-forward; each feed-forward of the stack
mends what the ones before it left. There is no LayerNorm to imitate: the student's norms are a scale and a shift.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.features import evaluating
from distill.progress import SILENT, Progress
from distill.student.build import Student
from distill.student.fitting import embedding_norm, fit_linear, gather, head_products, layer_calls, linear
from distill.student.reduction import choose_units
from distill.student.shape import inner_width, position_offset
from distill.student.surgery import Batch, Importance, Layout, layers_of, layout_of, rank_units


def fit_bottlenecks(
    teacher: PreTrainedModel,
    student: Student,
    batches: Sequence[Batch],
    *,
    importance: Importance | None = None,
    progress: Progress = SILENT,
) -> Student:
    """Fits a MobileBERT student to its teacher, module by module, without gradients.

    Args:
        teacher: Of a family that `inherit` can take for it, as wide as the student and with its vocabulary.
        student: As `build_student` made it; a new one is returned.
        batches: A few hundred texts; labels are used where they are given.
        importance: Of the teacher's units; None measures it on `batches`.
        progress: Told about layers as they are fitted.

    Raises:
        StudentError: For a teacher of a family that surgery does not know.
    """
    layout_of(teacher)
    ranks = importance or rank_units(teacher, batches, progress=progress)
    model = copy.deepcopy(student.model).eval()
    with (
        evaluating(teacher),
        torch.no_grad(),
        progress.stage("Fitting the student", total=len(student.layer_map) + 2, unit="parts") as stage,
    ):
        fit = _Fit(teacher, model, batches, ranks)
        fit.embeddings()
        stage.advance()
        for mine, theirs in student.layer_map:
            fit.layer(mine - 1, theirs - 1)
            stage.advance()
        fit.head()
        stage.advance()
    names = tuple(name for name, _ in model.named_parameters())
    said = f"every part fitted to the teacher on {sum(len(batch['attention_mask']) for batch in batches)} texts"
    more = inner_width(model.config) * int(model.config.num_feedforward_networks) - inner_width(teacher.config)
    spare = (f"random start: {more} neurons of each layer, which has more than the teacher's",) if more > 0 else ()
    return replace(student, model=model.train(), inherited=names, fresh=(), remarks=(*spare, said))


class _Fit:
    """One student being fitted; see `fit_bottlenecks` for the arguments."""

    def __init__(
        self, teacher: PreTrainedModel, student: PreTrainedModel, batches: Sequence[Batch], ranks: Importance
    ) -> None:
        self.teacher, self.student, self.batches, self.ranks = teacher, student, batches, ranks
        self.layout: Layout = layout_of(teacher)
        self.theirs, self.mine = layers_of(teacher), layers_of(student)

    def embeddings(self) -> None:
        """The strongest directions of the tokens' rows behind the teacher's norm, and a product that leads back."""
        source, own = self.teacher.base_model.embeddings, self.student.base_model.embeddings
        norm = embedding_norm(self.teacher)
        word_VE = source.word_embeddings.weight
        positions = source.position_embeddings.weight[position_offset(self.teacher.config) :]
        usual_E = positions.mean(0) + source.token_type_embeddings.weight[0]
        rows_VH = norm(word_VE + usual_E)
        middle_H = rows_VH.mean(0)
        basis_Hr = principal(rows_VH - middle_H, own.word_embeddings.weight.shape[1])
        own.word_embeddings.weight.copy_((rows_VH - middle_H) @ basis_Hr)
        # LN(x) is nearly linear, x having nearly the same deviation for all tokens.
        slope_E = norm.get_parameter("weight") / (word_VE + usual_E).std(-1, unbiased=False).mean()
        for table, rows in (
            (own.position_embeddings, positions),
            (own.token_type_embeddings, source.token_type_embeddings.weight),
        ):
            away = rows - (positions.mean(0) if table is own.position_embeddings else rows[0])
            table.weight.copy_((away - away.mean(-1, keepdim=True)) * slope_E)
        self._identity(own.LayerNorm)
        product = own.embedding_transformation
        sides = (product.in_features // basis_Hr.shape[1] - 1) // 2  # neighbours on either side
        none = torch.zeros(len(basis_Hr), sides * basis_Hr.shape[1])
        product.weight.copy_(torch.cat([none, basis_Hr, none], dim=1))
        product.bias.copy_(middle_H)
        wanted = self._of(self.teacher, norm)
        given = self._of(self.student, own.LayerNorm)
        read = self._of(self.student, product, read=True)
        fit_linear(product, read, wanted - given + self._of(self.student, product), product.weight.clone())

    def layer(self, number: int, source: int) -> None:
        """One layer of the student, from what it reads to what it gives."""
        theirs, mine = self.theirs[source], self.mine[number]
        names = {name: theirs.get_submodule(getattr(self.layout, name)) for name in Layout.__dataclass_fields__}
        wanted = gather(
            self.teacher, names, self.batches, calls=layer_calls(self.teacher, [theirs], self.batches)[theirs]
        )
        self.calls = layer_calls(self.student, [mine], self.batches)[mine]
        self._all_norms(mine)
        inside_Hb = self._enter(mine, theirs, wanted)
        self._feed_forwards(mine, wanted, inside_Hb, source)
        out = linear(mine, "output.bottleneck.dense")
        left = wanted["norm"] - self._now(linear(mine, "bottleneck.input.dense"), read=True)
        fit_linear(out, self._now(out, read=True), left, inside_Hb)

    def head(self) -> None:
        """The products of the head, on what the student now gives them."""
        for big, small in zip(head_products(self.teacher), head_products(self.student), strict=True):
            if big.weight.shape == small.weight.shape:
                read = self._of(self.student, small, read=True)
                fit_linear(small, read, self._of(self.teacher, big), big.weight)

    def _enter(self, mine: nn.Module, theirs: nn.Module, wanted: dict[str, Tensor]) -> Tensor:
        """The way in and attention; returns the (H, b) directions that stand for the teacher's states inside."""
        width = linear(mine, "bottleneck.input.dense").out_features
        states = wanted["attention_norm"]
        inside_Hb = principal(states - states.mean(0), width)
        for name in ("input", "attention"):
            product = linear(mine, f"bottleneck.{name}.dense")
            read = self._now(product, read=True)
            directions = inside_Hb if name == "input" else self._asked(theirs, read, width)
            fit_linear(product, read, read @ directions, directions.T)
        heads = int(self.student.config.num_attention_heads)
        source = self.theirs.index(theirs)
        products = (wanted["query"], wanted["key"], wanted["value"])
        units = choose_units(self.ranks, source, products, heads=heads, width=width, neurons=1)
        for name, unit_map in (("query", units.query), ("key", units.key), ("value", units.value)):
            product = linear(mine, f"attention.self.{name}")
            read = self._now(product, read=True)
            fit_linear(product, read, wanted[name] @ unit_map, torch.zeros_like(product.weight))
        out = linear(mine, "attention.output.dense")
        left = states @ inside_Hb - self._now(mine.get_submodule("bottleneck.input"))
        fit_linear(out, self._now(out, read=True), left, torch.zeros_like(out.weight))
        return inside_Hb

    def _feed_forwards(self, mine: nn.Module, wanted: dict[str, Tensor], inside_Hb: Tensor, source: int) -> None:
        """The stack: each takes the next most important neurons, and mends what is left."""
        stack = [f"ffn.{place}." for place in range(int(self.student.config.num_feedforward_networks) - 1)] + [""]
        inner = inner_width(self.student.config)
        order = self.ranks.neurons[source].argsort(descending=True)
        target = (wanted["attention_norm"] + wanted["down"]) @ inside_Hb
        for place, prefix in enumerate(stack):
            up, down = linear(mine, f"{prefix}intermediate.dense"), linear(mine, f"{prefix}output.dense")
            chosen = order[place :: len(stack)][:inner]
            read = self._now(up, read=True)
            # Where they have run out, the others stay as they began.
            part = nn.utils.skip_init(nn.Linear, up.in_features, len(chosen))  # type: ignore[no-untyped-call]
            fit_linear(part, read, wanted["up"][:, chosen], torch.zeros_like(part.weight))
            up.weight[: len(chosen)], up.bias[: len(chosen)] = part.weight, part.bias
            fit_linear(down, self._now(down, read=True), target - read, torch.zeros_like(down.weight))

    def _asked(self, theirs: nn.Module, states: Tensor, width: int) -> Tensor:
        """(H, b) directions of the states that queries and keys depend on most."""
        weights = [linear(theirs, getattr(self.layout, name)).weight for name in ("query", "key")]
        centred = states - states.mean(0)
        root = torch.linalg.cholesky(centred.T @ centred / len(centred) + 1e-6 * torch.eye(centred.shape[1]))
        _, _, directions = torch.linalg.svd(torch.cat(weights) @ root, full_matrices=False)
        return torch.linalg.qr(root @ directions[:width].T).Q

    def _all_norms(self, layer: nn.Module) -> None:
        for name, module in layer.named_modules():
            if name.endswith("LayerNorm"):
                self._identity(module)

    def _identity(self, norm: nn.Module) -> None:
        norm.get_parameter("weight").fill_(1.0)
        norm.get_parameter("bias").fill_(0.0)

    def _now(self, module: nn.Module, *, read: bool = False) -> Tensor:
        """What a module of the layer being fitted gives, or reads, now."""
        return gather(self.student, {"x": module}, self.batches, read=read, calls=self.calls)["x"]

    def _of(self, model: PreTrainedModel, module: nn.Module, *, read: bool = False) -> Tensor:
        return gather(model, {"x": module}, self.batches, read=read)["x"]


def principal(rows: Tensor, rank: int) -> Tensor:
    """(H, rank) orthonormal: the strongest directions of centred rows (N, H)."""
    moment = rows.double().T @ rows.double()
    return torch.linalg.eigh(moment).eigenvectors[:, -rank:].flip(-1).float()
