"""AdamW that spends on an embedding matrix only what the batch touches, and gives what dense AdamW would.

A batch of 32 sentences uses some 400 of 30,522 rows, yet dense AdamW writes a gradient for all, reads it and moves
every row: a third of a small student's step on a processor. A row without a gradient still moves, by its old mean and
by weight decay; both are known in advance, so the steps that a row missed are made up for just before it is next read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distill.encoders import token_embedding
from distill.training.zero import Zero

WINDOW = 256
"""Steps after which every row is brought up to date: as many sums as are kept of what a row has missed."""


class RowAdamW(torch.optim.AdamW):
    """AdamW, with an embedding updated by rows.

    For k steps without a gradient, dense AdamW moves a row by the sum over those steps of
    `rate * sqrt(1 - beta2^t) / (1 - beta1^t) * (beta1 / sqrt(beta2))^k * m / (sqrt(v) + eps)`, and shrinks it by the
    product of `1 - rate * decay`. The sums do not depend on the row, only on the step it was last used in.

    Args:
        params: Parameters or groups, as in AdamW.
        table: Its weight is one of them. Until `close` its gradient is sparse, and rows are brought up to date when
            they are looked up.
        **settings: As in AdamW.
    """

    def __init__(self, params: Iterable[Any], *, table: nn.Embedding, **settings: Any) -> None:
        super().__init__(params, **settings)
        self._table = table
        table.sparse = True
        self._hook = table.register_forward_pre_hook(self._before_lookup)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; rows without a gradient are left for later."""
        weight = self._table.weight
        gradient, weight.grad = weight.grad, None
        loss = super().step(closure)
        weight.grad = gradient
        if gradient is not None:
            self._step_rows(weight, gradient.coalesce())
        return loss

    @torch.no_grad()
    def settle(self) -> None:
        """Brings every row up to date: before anything but the next step reads the weights."""
        state = self.state.get(self._table.weight)
        if not state:
            return
        self._bring_up(torch.arange(len(self._table.weight)))
        state["base"].copy_(state["step"])
        state["shrink"].fill_(1.0)
        state["drift"].fill_(0.0)

    def close(self) -> None:
        """Brings every row up to date and leaves the table as it was."""
        self.settle()
        self._hook.remove()
        self._table.sparse = False

    @property
    def _group(self) -> dict[str, Any]:
        weight = self._table.weight
        return next(group for group in self.param_groups if any(one is weight for one in group["params"]))

    def _before_lookup(self, table: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.state.get(self._table.weight):
            with torch.no_grad():
                self._bring_up(torch.unique(inputs[0]))

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        """State of a matrix before its first step, in the matrix's own dtype: loading a state makes it so."""
        state, dtype = self.state[parameter], parameter.dtype
        state["step"] = torch.zeros(())
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["last"] = torch.zeros(len(parameter), dtype=dtype)  # the step that a row was last brought up to
        state["base"] = torch.zeros((), dtype=dtype)
        state["shrink"] = torch.ones(WINDOW, dtype=dtype)  # by what a row of last step base + i shrinks until now
        state["drift"] = torch.zeros(WINDOW, dtype=dtype)  # and how many times m / (sqrt(v) + eps) it moves
        return state

    def _step_rows(self, weight: Tensor, gradient: Tensor) -> None:
        state, group = self.state[weight] or self._begin(weight), self._group
        (beta1, beta2), rate, shrink = group["betas"], float(group["lr"]), 1 - group["lr"] * group["weight_decay"]
        rows, g_RH = gradient.indices()[0], gradient.values()
        self._bring_up(rows)  # those that another process looked up
        state["step"] += 1
        step = int(state["step"])
        corrected1, corrected2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
        p_RH, m_RH, v_RH = (matrix[rows] for matrix in (weight, state["exp_avg"], state["exp_avg_sq"]))
        m_RH.lerp_(g_RH, 1 - beta1)
        v_RH.mul_(beta2).addcmul_(g_RH, g_RH, value=1 - beta2)
        denominator_RH = v_RH.sqrt().div_(corrected2).add_(group["eps"])
        p_RH.mul_(shrink).addcdiv_(m_RH, denominator_RH, value=-rate / corrected1)
        self._write(rows, (p_RH, m_RH, v_RH))
        past = step - int(state["base"])  # rows whose last step was before this one have missed it
        absent = torch.arange(past, 0, -1, dtype=torch.float64)
        moved = rate * corrected2 / corrected1 * (beta1 / beta2**0.5) ** absent
        state["shrink"][:past] *= shrink
        state["drift"][:past] = state["drift"][:past] * shrink + moved.to(weight.dtype)
        if past == WINDOW - 1:
            self.settle()

    def _bring_up(self, rows: Tensor) -> None:
        """Makes up for the steps that `rows` (R,) missed, as dense AdamW would have taken them."""
        weight = self._table.weight
        state, (beta1, beta2) = self.state[weight], self._group["betas"]
        rows = rows[state["last"][rows] < state["step"]]
        last = state["last"][rows]
        missed, place = (state["step"] - last)[:, None], (last - state["base"]).long()
        p_RH, m_RH, v_RH = (matrix[rows] for matrix in (weight, state["exp_avg"], state["exp_avg_sq"]))
        eps = self._group["eps"] * (1 - beta2 ** (last.double() + 1)).sqrt().to(last.dtype)[:, None]
        p_RH.mul_(state["shrink"][place][:, None])
        p_RH.addcmul_(m_RH / (v_RH.sqrt() + eps), state["drift"][place][:, None], value=-1.0)
        self._write(rows, (p_RH, m_RH.mul_(beta1**missed), v_RH.mul_(beta2**missed)))

    def _write(self, rows: Tensor, values: tuple[Tensor, Tensor, Tensor]) -> None:
        state = self.state[self._table.weight]
        for matrix, part in zip((self._table.weight, state["exp_avg"], state["exp_avg_sq"]), values, strict=True):
            matrix.index_copy_(0, rows, part)
        state["last"].index_fill_(0, rows, float(state["step"]))


def total_norm(parameters: Iterable[nn.Parameter], most: float = 0.0, zero: Zero | None = None) -> Tensor:
    """The norm of all gradients as one vector; they are scaled down to `most` where that is not 0.

    Args:
        parameters: Their gradients are dense or sparse over rows.
        most: The largest norm that is left as it is.
        zero: Divides the parameters over processes; the norm is that of all.
    """
    gradients, counted = [], []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
        gradient = parameter.grad.values() if parameter.grad.is_sparse else parameter.grad
        gradients.append(gradient)
        if zero is None or zero.owns(parameter):
            counted.append(gradient)
    norm = torch.nn.utils.get_total_norm(counted)
    norm = zero.norm(norm) if zero else norm
    if most > 0 and not norm + 1e-6 <= most:  # also where the norm is no number
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def row_embedding(student: Any) -> nn.Embedding | None:
    """The student's word embedding, if it may be updated by rows: on a processor, trained, and tied to nothing."""
    table = token_embedding(student)
    if type(table) is not nn.Embedding or not table.weight.requires_grad or table.weight.device.type != "cpu":
        return None
    uses = sum(value is table.weight for module in student.modules() for value in module.parameters(recurse=False))
    return table if uses == 1 and table.max_norm is None and not table.scale_grad_by_freq else None
