"""The quick paths compute what the plain ones do: exactly without dropout, in distribution with it."""

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from distill.training.quick import NAME, PLAIN_UP_TO, QuickDropout, attention, dropout, quick


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_drops_its_share_and_scales_the_rest(dtype, share):
    torch.manual_seed(0)
    values = torch.rand(101, 997, dtype=torch.float32).add(0.5).to(dtype).requires_grad_()
    kept = dropout(values, share)
    assert float((kept == 0).float().mean()) == pytest.approx(share, abs=0.004)
    where = kept != 0
    torch.testing.assert_close(kept[where], values.detach()[where] / (1 - share), rtol=1e-2, atol=0)
    for axis in (0, 1):  # no row and no column is treated otherwise
        assert float((kept == 0).float().mean(axis).sub(share).abs().max()) < 0.25
    kept.sum().backward()
    torch.testing.assert_close(values.grad[where], torch.full_like(values.grad[where], 1 / (1 - share)))
    assert float(values.grad[~where].abs().max()) == 0.0


def test_two_draws_differ_and_the_generator_repeats_them():
    values = torch.ones(64, 64)
    state = torch.get_rng_state()
    one, two = dropout(values, 0.3), dropout(values, 0.3)
    torch.set_rng_state(state)
    assert not torch.equal(one, two)
    assert torch.equal(one, dropout(values, 0.3))


def test_neighbours_fall_independently():
    torch.manual_seed(1)
    gone = (dropout(torch.ones(400_000, dtype=torch.bfloat16), 0.2) == 0).float()
    for apart in (1, 2, 3, 4, 8):
        assert float((gone[apart:] * gone[:-apart]).mean()) == pytest.approx(0.04, abs=0.002)


@pytest.mark.parametrize("boolean", [True, False])
def test_attention_is_that_of_sdpa(boolean, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 7, 8, requires_grad=True) for _ in range(3))
    keep = torch.arange(7)[None] < torch.tensor([[7], [3], [5]])
    mask = keep[:, None, None].expand(3, 1, 7, 7)
    given = mask if boolean else torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    tiny = 1e-12  # nothing falls, and yet the path with dropout is taken
    mine, _ = attention(torch.nn.Identity(), q, k, v, given, dropout=tiny)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(mine, theirs)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (mine, theirs)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_without_dropout_bf16_learns_through_plain_products(monkeypatch):
    """PyTorch's own way back is slower there; its attention is for long texts, for fp32, and where nothing learns."""
    asked = []

    def fused(module, q, k, v, mask, **more):
        asked.append((q.dtype, torch.is_grad_enabled()))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2), None

    monkeypatch.setattr("distill.training.quick.sdpa_attention_forward", fused)
    torch.manual_seed(0)
    exact = [torch.randn(3, 2, 7, 8, requires_grad=True) for _ in range(3)]
    given = [each.detach().bfloat16().requires_grad_() for each in exact]
    mask = (torch.arange(7)[None] < torch.tensor([[7], [3], [5]]))[:, None, None].expand(3, 1, 7, 7)
    mine, _ = attention(torch.nn.Identity(), *given, mask)
    assert asked == []
    theirs, _ = attention(torch.nn.Identity(), *exact, mask)
    with torch.no_grad():
        attention(torch.nn.Identity(), *given, mask)
    long = torch.zeros(1, 1, PLAIN_UP_TO + 1, 8, dtype=torch.bfloat16, requires_grad=True)
    attention(
        torch.nn.Identity(), long, long, long, torch.ones(1, 1, PLAIN_UP_TO + 1, PLAIN_UP_TO + 1, dtype=torch.bool)
    )
    assert asked == [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)]
    torch.testing.assert_close(mine.float(), theirs, rtol=0, atol=0.03)
    grads = [torch.autograd.grad(out.float().sum(), parts) for out, parts in ((mine, given), (theirs, exact))]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0, atol=0.06)


def test_a_model_is_quick_inside_the_block_alone(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertForSequenceClassification(config).train()
    ids = torch.randint(5, 50, (4, 9))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    before = list(model.state_dict())
    model.eval()
    said = model(ids, attention_mask=mask).logits
    model.train()
    with quick(model):
        assert model.config._attn_implementation == NAME
        assert sum(isinstance(part, QuickDropout) for part in model.modules()) == 8
        assert not torch.equal(model(ids, attention_mask=mask).logits, said)
        assert list(model.state_dict()) == before
        model.save_pretrained(tmp_path)
        model.eval()
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, said)
    assert model.config._attn_implementation == "sdpa"
    assert not any(isinstance(part, QuickDropout) for part in model.modules())
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    again = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids, attention_mask=mask).logits, said)
