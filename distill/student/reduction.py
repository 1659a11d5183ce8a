"""A narrower student that answers like its teacher: every product is fitted to what the teacher does, in order.

The student's states live in the teacher's principal directions (rotated, so that no coordinate is an outlier and int8
has an even range). Going through the student from the embeddings up, each module is fitted by least squares on real
text: what it reads is what the student really has there, what it should give is what the teacher gives there, in the
student's coordinates. Errors of earlier modules are seen, and mended, by later ones.

Attention keeps the most important heads (first-order importance), cut to the directions that matter for the scores
where the student's are thinner; the feed-forward keeps the most important neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from distill.errors import StudentError
from distill.features import evaluating
from distill.progress import SILENT, Progress
from distill.student.build import Student, fresh_parts
from distill.student.fitting import (
    Call,
    embedding_norm,
    fit_linear,
    fit_norm,
    gather,
    head_products,
    layer_calls,
    linear,
)
from distill.student.parts import part_of
from distill.student.shape import inner_width
from distill.student.surgery import (
    LAYOUTS,
    Batch,
    Importance,
    Layout,
    layers_of,
    layout_of,
    rank_units,
)


@dataclass(frozen=True, slots=True)
class Units:
    """Which of a teacher layer's units a student layer has.

    Attributes:
        query: (teacher heads' width, student heads' width) map of queries; `key` and `value` likewise.
        neurons: Indices of the kept feed-forward neurons.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    neurons: Tensor


def carry_over(
    teacher: PreTrainedModel,
    student: Student,
    batches: Sequence[Batch],
    *,
    importance: Importance | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Student:
    """Fits a student of any smaller shape to its teacher, module by module, without gradients.

    Args:
        teacher: Same family and vocabulary as the student; left as it is.
        student: As `build_student` made it; a new one is returned.
        batches: A few hundred texts; labels are used by `rank_units` where they are given. The same few thousand
            positions are held in memory in fp32, one layer of the teacher at a time.
        importance: Of the teacher's units; None measures it on `batches`.
        seed: Decides the rotation of the student's coordinates.
        progress: Told about modules as they are fitted.

    Raises:
        StudentError: For another family, or one that surgery does not know.
    """
    if teacher.config.model_type != student.model.config.model_type:
        raise StudentError(
            f"a {student.model.config.model_type} student cannot be fitted to a {teacher.config.model_type} teacher",
            where="student",
            fix="Take a card of the teacher's own family.",
        )
    layout_of(teacher)
    if not (carries(teacher.config) and carries(student.model.config)):
        raise StudentError(
            f"this {teacher.config.model_type} has products that cannot be fitted one after the other",
            where="student",
            fix='Set student.init = "copy".',
        )
    inner, most = inner_width(student.model.config), inner_width(teacher.config)
    if inner > most:
        raise StudentError(
            f"intermediate_size {inner} is wider than the teacher's {most}",
            where="student",
            fix=f"Set student.intermediate_size to at most {most}.",
        )
    ranks = importance or rank_units(teacher, batches, progress=progress)
    model = copy.deepcopy(student.model).eval()
    total = len(student.layer_map) + 2
    with (
        evaluating(teacher),
        torch.no_grad(),
        progress.stage("Fitting the student", total=total, unit="parts") as stage,
    ):
        fit = _Fit(teacher, model, batches, student.layer_map, ranks, seed)
        fit.embeddings()
        stage.advance()
        for number in range(len(student.layer_map)):
            fit.layer(number)
            stage.advance()
        fit.head()
        stage.advance()
    names = [name for name, _ in model.named_parameters()]
    before = dict(student.model.named_parameters())
    left = [name for name in student.fresh if torch.equal(model.get_parameter(name), before[name])]
    fresh, random = fresh_parts(model, set(names) - set(left))
    which = "all other parts" if fresh else "every part"
    said = f"{which} fitted to the teacher on {sum(len(b['attention_mask']) for b in batches)} texts"
    inherited = tuple(name for name in names if name not in fresh)
    return replace(student, model=model.train(), inherited=inherited, fresh=fresh, remarks=(*random, said))


def carries(config: PretrainedConfig) -> bool:
    """Whether `carry_over` knows a model of this config.

    It knows no products that read positions too, as DeBERTa's queries and keys do, and none between a table and the
    first layer, as ELECTRA's small models have.
    """
    between = getattr(config, "embedding_size", config.hidden_size) != config.hidden_size
    return config.model_type in LAYOUTS and config.model_type != "deberta-v2" and not between


class _Fit:
    """One student being fitted; see `carry_over` for the arguments."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        batches: Sequence[Batch],
        layer_map: list[tuple[int, int]],
        ranks: Importance,
        seed: int,
    ) -> None:
        self.teacher, self.student, self.batches, self.ranks = teacher, student, batches, ranks
        self.layout: Layout = layout_of(teacher)
        self.theirs = [layers_of(teacher)[layer - 1] for _, layer in layer_map]
        self.numbers = [layer - 1 for _, layer in layer_map]
        self.mine = layers_of(student)
        self.their_calls = layer_calls(teacher, self.theirs, batches)
        self.my_calls: list[Call] | None = None  # of the layer being fitted; None: the whole student is run
        self.basis = self._directions(student.config.hidden_size, seed)

    def embeddings(self) -> None:
        """Tables in the student's coordinates, then the norm behind them."""
        table_norm = embedding_norm(self.student)
        for name, parameter in self.student.named_parameters():
            if part_of(self.student, name) == "embeddings" and parameter.dim() == 2:
                values = self.teacher.get_parameter(name)
                parameter.copy_(values @ self.basis if values.shape[1] == self.basis.shape[0] else values)
        target = self._gather(self.teacher, {"h": embedding_norm(self.teacher)})["h"] @ self.basis
        self._norm(table_norm, target)

    def layer(self, number: int) -> None:
        """One layer of the student, from what it reads to what it gives."""
        names, theirs, mine = self.layout, self.theirs[number], self.mine[number]
        get = theirs.get_submodule
        taps = {name: get(getattr(names, name)) for name in Layout.__dataclass_fields__}
        wanted = self._gather(self.teacher, taps, calls=self.their_calls[theirs])
        self.my_calls = layer_calls(self.student, [mine], self.batches)[mine]
        units = choose_units(
            self.ranks,
            self.numbers[number],
            (wanted["query"], wanted["key"], wanted["value"]),
            heads=int(self.student.config.num_attention_heads),
            width=int(self.student.config.hidden_size),
            neurons=inner_width(self.student.config),
        )
        rotate, mapped = self.basis, {"query": units.query, "key": units.key, "value": units.value}
        for name, unit_map in mapped.items():
            product = linear(mine, getattr(names, name))
            begun = product.weight.clone()
            prior = unit_map.T @ linear(theirs, getattr(names, name)).weight @ rotate
            self._fit(product, wanted[name] @ unit_map, prior)
            if name != "query":  # what stands for nothing in the teacher must not be 0 all along, or it never learns
                unused = ~unit_map.any(dim=0)
                product.weight[unused] = begun[unused]
        back = torch.linalg.pinv(units.value)  # (student heads' width, teacher heads' width)
        out, down = linear(theirs, names.out).weight, linear(theirs, names.down).weight
        up = linear(theirs, names.up).weight
        self._fit(linear(mine, names.out), wanted["out"] @ rotate, rotate.T @ out @ back.T)
        self._norm(mine.get_submodule(names.attention_norm), wanted["attention_norm"] @ rotate)
        self._fit(linear(mine, names.up), wanted["up"][:, units.neurons], up[units.neurons] @ rotate)
        self._fit(linear(mine, names.down), wanted["down"] @ rotate, rotate.T @ down[:, units.neurons])
        self._norm(mine.get_submodule(names.norm), wanted["norm"] @ rotate)
        self.my_calls = None
        del self.their_calls[theirs]

    def head(self) -> None:
        """The products of the head: inner ones keep the coordinates that the next one weighs most.

        The table of the tokens, where it is such a product too, stays as it is in a student of the teacher's width: the
        first layer was fitted to it.
        """
        theirs, mine = head_products(self.teacher), head_products(self.student)
        columns = self.basis  # (teacher's width, student's width) of what the product reads
        table = self.student.get_input_embeddings().weight
        for place, (big, small) in enumerate(zip(theirs, mine, strict=True)):
            if small.weight is table and big.weight.shape == small.weight.shape:
                continue
            wanted = self._gather(self.teacher, {"y": big})["y"]
            rows = torch.arange(big.out_features)
            if place + 1 < len(theirs):
                strength = wanted.std(dim=0) * theirs[place + 1].weight.norm(dim=0)
                rows = strength.topk(small.out_features).indices.sort().values
            if small.out_features == len(rows):
                self._fit(small, wanted[:, rows], big.weight[rows] @ columns)
            columns = torch.eye(big.out_features)[:, rows]

    def _directions(self, width: int, seed: int) -> Tensor:
        """(H, width) orthonormal: the principal directions of the teacher's states, rotated; identity at its width."""
        full = self.teacher.config.hidden_size
        if width == full:
            return torch.eye(full)
        gram = torch.zeros(full, full, dtype=torch.float64)
        norms = [embedding_norm(self.teacher), *(layer.get_submodule(self.layout.norm) for layer in self.theirs)]
        gathered = self._gather(self.teacher, {str(number): norm for number, norm in enumerate(norms)})
        for states in gathered.values():
            moment = states.double().T @ states.double()
            gram += moment / moment.trace()
        directions = torch.linalg.eigh(gram).eigenvectors[:, -width:].float()
        generator = torch.Generator().manual_seed(seed)
        rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        return directions @ rotation

    def _fit(self, product: nn.Linear, target: Tensor, prior: Tensor) -> None:
        """`fit_linear` on what the product reads now."""
        fit_linear(
            product, self._gather(self.student, {"x": product}, read=True, calls=self.my_calls)["x"], target, prior
        )

    def _norm(self, norm: nn.Module, target: Tensor) -> None:
        """`fit_norm` on what the norm reads now."""
        fit_norm(norm, self._gather(self.student, {"x": norm}, read=True, calls=self.my_calls)["x"], target)

    def _gather(
        self,
        model: PreTrainedModel,
        modules: dict[str, nn.Module],
        *,
        read: bool = False,
        calls: list[Call] | None = None,
    ) -> dict[str, Tensor]:
        return gather(model, modules, self.batches, read=read, calls=calls)


def choose_units(
    ranks: Importance,
    layer: int,
    products: tuple[Tensor, Tensor, Tensor],
    *,
    heads: int,
    width: int,
    neurons: int,
) -> Units:
    """Heads and neurons of one of the teacher's layers, by importance.

    Args:
        ranks: Of the teacher's units.
        layer: Its number, from 0.
        products: What its queries, keys and values are, (positions, heads' width) each.
        heads: That the student has.
        width: Of all of them together.
        neurons: That the student's feed-forward has.
    """
    query, key, value = products
    many, wide, thin = ranks.heads.shape[1], query.shape[1] // ranks.heads.shape[1], width // heads
    order = ranks.heads[layer].argsort(descending=True).tolist()
    together = max(thin // wide, 1)  # teacher heads that share one of the student's
    groups = [sorted(order[: heads * together])[at::heads] for at in range(heads)]
    maps = [torch.zeros(many * wide, width) for _ in range(3)]
    for slot, group in enumerate(groups):
        for place, head in enumerate(group):
            rows = slice(head * wide, (head + 1) * wide)
            each = min(wide, thin)
            begin = slot * thin + place * wide
            cut = _thin_head(query[:, rows], key[:, rows], value[:, rows], each)
            for whole, part in zip(maps, cut, strict=True):
                whole[rows, begin : begin + each] = part
    if together == 1:
        maps[0] *= (thin / wide) ** 0.5  # the student divides its scores by the root of its own width
    return Units(maps[0], maps[1], maps[2], ranks.neurons[layer].topk(neurons).indices.sort().values)


def _thin_head(query: Tensor, key: Tensor, value: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (d, width) of one head that keep q . k and v best; identities where nothing is cut.

    With Q = Uq Sq Vq' and K = Uk Sk Vk', the scores' best low rank is that of (Sq Vq')(Vk Sk).
    """
    if width == query.shape[1]:
        return torch.eye(width), torch.eye(width), torch.eye(width)
    _, size_q, turn_q = torch.linalg.svd(query.double(), full_matrices=False)
    _, size_k, turn_k = torch.linalg.svd(key.double(), full_matrices=False)
    left, size, right = torch.linalg.svd(size_q[:, None] * (turn_q @ turn_k.T) * size_k)
    root = size[:width].sqrt()
    map_q = (turn_q.T / size_q.clamp_min(1e-9)) @ (left[:, :width] * root)
    map_k = (turn_k.T / size_k.clamp_min(1e-9)) @ (right[:width].T * root)
    map_v = torch.linalg.svd(value.double(), full_matrices=False)[2][:width].T
    return map_q.float(), map_k.float(), map_v.float()
