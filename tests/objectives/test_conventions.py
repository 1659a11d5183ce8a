"""What published code computes, stated apart from ours in NumPy, one array at a time, and what our losses give for it.

Each `reference` follows the file that its docstring names, padding, means and factors included; nothing here is taken
from our own losses.
"""

import numpy as np
import pytest
import torch

from distill.encoders import Architecture
from distill.errors import ObjectiveError
from distill.objectives import attention, embedding, generation, grams, hidden, relational, soft_labels
from distill.objectives.objective import build_objective
from distill.recipe import TermRecipe

RANDOM = np.random.default_rng(3)
B, L, H, W, A, C = 4, 5, 8, 12, 4, 6
LENGTHS = [5, 3, 4, 1]
MASK = np.array([[1] * n + [0] * (L - n) for n in LENGTHS])
S, T = RANDOM.normal(size=(B, C)), RANDOM.normal(size=(B, C))
TOKENS_S, TOKENS_T = RANDOM.normal(size=(B, L, C)), RANDOM.normal(size=(B, L, C))
HS, HT, WIDE = (RANDOM.normal(size=(B, L, width)) for width in (H, H, W))
HS2, HT2 = RANDOM.normal(size=(B, L, H)), RANDOM.normal(size=(B, L, H))
WIDE2 = RANDOM.normal(size=(B, L, W))
AS, AT, MORE = (RANDOM.normal(size=(B, heads, L, L)) for heads in (A, A, 2 * A))
LABELS = np.array([2, -100, 0, 5])
EVERY = torch.ones(B, dtype=torch.bool)


def softmax(values, axis=-1):
    e = np.exp(values - values.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def kl(p, q, axis=-1):
    return (p * (np.log(p) - np.log(q))).sum(axis)


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(array)) for array in arrays]


def agrees(found, expected):
    total, count = found
    assert (total / count).item() == pytest.approx(float(expected), rel=1e-5, abs=1e-6)


# Logits


def test_distilbert_and_distil_whisper_select_rows_and_take_batchmean():
    """distiller.py: masked_select, KLDivLoss(batchmean) * T^2; run_distillation.py: the sum over the count."""
    rows_s, rows_t = TOKENS_S[MASK == 1], TOKENS_T[MASK == 1]
    expected = kl(softmax(rows_t / 2), softmax(rows_s / 2)).sum() / len(rows_s) * 2**2
    student, teacher, scored = tensors(TOKENS_S, TOKENS_T, MASK == 1)
    agrees(soft_labels.soft_labels(student, teacher, scored=scored, temperature=2.0), expected)


@pytest.mark.parametrize(
    "loss", [soft_labels.soft_labels, generation.jsd, generation.reverse_kl, generation.total_variation]
)
def test_positions_ruled_out_by_minus_infinity_do_not_count(loss):
    """run_squad_w_distillation.py softmaxes over padding too; with -inf in both, 0 * (inf - inf) must not be nan."""
    ruled = np.full((B, 2), -np.inf)
    student, teacher = tensors(np.hstack([S, ruled]), np.hstack([T, ruled]))
    short = torch.from_numpy(S).requires_grad_()
    expected, _ = loss(short, torch.from_numpy(T), scored=EVERY)
    found, _ = loss(student.requires_grad_(), teacher, scored=EVERY)
    torch.testing.assert_close(found, expected)
    expected.backward()
    found.backward()
    torch.testing.assert_close(student.grad[:, :C], short.grad)
    assert not student.grad[:, C:].any()


def test_modelopt_averages_over_classes_too():
    """LogitsDistillationLoss(reduction="mean"): every element, times T^2."""
    p, q = softmax(T / 3), softmax(S / 3)
    expected = (p * (np.log(p) - np.log(q))).mean() * 9
    student, teacher = tensors(S, T)
    agrees(soft_labels.soft_labels(student, teacher, scored=EVERY, temperature=3.0, convention="modelopt"), expected)


def test_textbrewer_kd_mse_is_regression_over_temperature_squared():
    """kd_mse_loss: mean of (s / T - t / T)^2."""
    student, teacher = tensors(S, T)
    total, count = soft_labels.regression(student, teacher, scored=EVERY)
    agrees((total / 4.0**2, count), ((S / 4 - T / 4) ** 2).mean())


def test_torchdistill_standardises_logits():
    """LogitStdKDLoss: (x - mean) / (1e-7 + std), std with n - 1, then KL(batchmean) * T^2."""

    def normed(x):
        return (x - x.mean(-1, keepdims=True)) / (1e-7 + x.std(-1, ddof=1, keepdims=True))

    expected = kl(softmax(normed(T) / 2), softmax(normed(S) / 2)).mean() * 4
    student, teacher = tensors(S, T)
    agrees(soft_labels.soft_labels(student, teacher, scored=EVERY, temperature=2.0, standardise=True), expected)


def test_textbrewer_shifts_probability_to_the_gold_label():
    """probability_shift_: highest and gold logit change places; rows without a label stay; the input is left alone."""
    swapped = T.copy()
    for row, gold in enumerate(LABELS):
        if gold >= 0:
            highest = T[row].argmax()
            swapped[row, highest], swapped[row, gold] = T[row, gold], T[row, highest]
    assert (swapped != T).any(), "the teacher must be wrong somewhere, or nothing is tested"
    expected = kl(softmax(swapped), softmax(S)).mean()
    student, teacher, labels = tensors(S, T.copy(), LABELS)
    agrees(
        soft_labels.soft_labels(student, teacher, scored=EVERY, labels=labels, temperature=1.0, shift=True), expected
    )
    assert (teacher.numpy() == T).all()


@pytest.mark.parametrize("labels", [None, torch.rand(B, C), torch.zeros(B, L, dtype=torch.long)])
def test_a_shift_without_labels_of_classes_is_refused(labels):
    student, teacher = tensors(S, T)
    with pytest.raises(ObjectiveError, match=r"no labels of classes. Take shift = true away"):
        soft_labels.soft_labels(student, teacher, scored=EVERY, labels=labels, shift=True)


@pytest.mark.parametrize("mix", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_trl_generalised_jensen_shannon(mix):
    """generalized_jsd_loss: mixture of beta * teacher and (1 - beta) * student; ends are forward and reverse KL."""
    p, q = softmax(T), softmax(S)
    m = mix * p + (1 - mix) * q
    expected = {0.0: kl(p, q), 1.0: kl(q, p)}.get(mix, mix * kl(p, m) + (1 - mix) * kl(q, m)).mean()
    student, teacher = tensors(S, T)
    agrees(generation.jsd(student, teacher, scored=EVERY, mix=mix), expected)


@pytest.mark.parametrize("mix", [-0.1, 1.5])
def test_a_mix_outside_0_to_1_is_refused(mix):
    student, teacher = tensors(S, T)
    with pytest.raises(ObjectiveError, match=f"mix must be between 0 and 1; got {mix:g}"):
        generation.jsd(student, teacher, scored=EVERY, mix=mix)


def test_reverse_kl_and_total_variation():
    p, q = softmax(T / 2), softmax(S / 2)
    student, teacher = tensors(S, T)
    agrees(generation.reverse_kl(student, teacher, scored=EVERY, temperature=2.0), 4 * kl(q, p).mean())
    agrees(generation.total_variation(student, teacher, scored=EVERY, temperature=2.0), abs(p - q).sum(-1).mean() / 2)


def test_dist_as_its_authors_wrote_it():
    """hunto/DIST_KD: tau^2 * (1 - pearson(rows).mean()) + tau^2 * (1 - pearson(columns).mean())."""
    p, q = softmax(T / 2), softmax(S / 2)
    inter = 1 - np.mean([np.corrcoef(p[i], q[i])[0, 1] for i in range(B)])
    intra = 1 - np.mean([np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(C)])
    student, teacher = tensors(S, T)
    found = relational.dist(student, teacher, scored=EVERY, temperature=2.0, inter=2.0, intra=3.0)
    agrees(found, 4 * (2 * inter + 3 * intra))


def test_distilbert_for_questions_and_answers():
    """run_squad_w_distillation.py: KLDivLoss(batchmean) over all L positions * T^2, of start and end, averaged."""
    starts_s, ends_s, starts_t, ends_t = TOKENS_S[..., 0], TOKENS_S[..., 1], TOKENS_T[..., 0], TOKENS_T[..., 1]
    expected = sum(
        kl(softmax(t / 2), softmax(s / 2)).sum() / B * 2**2 for s, t in ((starts_s, starts_t), (ends_s, ends_t))
    )
    student, teacher, inside = tensors(TOKENS_S[..., :2], TOKENS_T[..., :2], MASK == 1)
    options = {"scored": torch.ones(B, 2, dtype=torch.bool), "inside": inside, "temperature": 2.0}
    agrees(soft_labels.soft_spans(student, teacher, convention="distilbert", **options), expected / 2)
    # Ours rules padding out in both, where the script lets it take probability.
    ours = 0.0
    for b, n in enumerate(LENGTHS):
        for s, t in ((starts_s, starts_t), (ends_s, ends_t)):
            ours += 4 * kl(softmax(t[b, :n] / 2), softmax(s[b, :n] / 2)) / (2 * B)
    agrees(soft_labels.soft_spans(student, teacher, **options), ours)


def test_lmops_cross_entropy_of_labelled_tokens():
    """get_distil_loss: -sum p log q at T = 1 over positions whose label is not -100, by their number."""
    p, q = softmax(TOKENS_T), softmax(TOKENS_S)
    expected = -((p * np.log(q)).sum(-1) * MASK).sum() / MASK.sum()
    student, teacher, scored = tensors(TOKENS_S, TOKENS_T, MASK == 1)
    found = soft_labels.soft_labels(student, teacher, scored=scored, temperature=1.0, convention="textbrewer")
    agrees(found, expected)


def test_mobilebert_mixes_hard_and_soft_labels_in_two_terms():
    """run_pretraining.py: cross-entropy with r * onehot + (1 - r) * teacher, here r = 0.5."""
    gold = np.array([2, 1, 0, 5])
    mixed = 0.5 * np.eye(C)[gold] + 0.5 * softmax(T)
    expected = -(mixed * np.log(softmax(S))).sum(-1).mean()
    student, teacher, labels = tensors(S, T, gold)
    hard, count = soft_labels.hard_labels(student, None, labels=labels, scored=EVERY)
    soft, _ = soft_labels.soft_labels(student, teacher, scored=EVERY, temperature=1.0, convention="textbrewer")
    agrees((0.5 * hard + 0.5 * soft, count), expected)


# Hidden states


def test_textbrewer_hidden_mse_with_mask():
    """hid_mse_loss: the sum over valid tokens / (valid tokens * width)."""
    expected = (((HS - HT) * MASK[..., None]) ** 2).sum() / (MASK.sum() * H)
    student, teacher, mask = tensors(HS, HT, MASK)
    agrees(hidden.hidden_mse(student, teacher, mask=mask), expected)


def test_distillkit_averages_over_mapped_layers():
    """hs_mse: the mean over mapped layers of each layer's mean."""
    small, large = (Architecture("bert", layers=n, width=H, heads=A, labels=C, vocab=9) for n in (2, 4))
    objective = build_objective(
        [TermRecipe.model_validate({"loss": "hidden_mse", "layers": [[1, 2], [2, 4]]})], small, large
    )
    student, teacher = {"hidden.1": HS, "hidden.2": HS2}, {"hidden.2": HT, "hidden.4": HT2}
    batch = dict(zip(("attention_mask", "scored"), tensors(MASK, np.ones(B, bool)), strict=True))
    found = objective(
        *({name: torch.from_numpy(value) for name, value in side.items()} for side in (student, teacher)), batch
    )["hidden_mse"]
    each = [((s - t)[MASK == 1] ** 2).mean() for s, t in ((HS, HT), (HS2, HT2))]
    agrees(found, np.mean(each))


def test_textbrewer_mmd_of_a_layer_with_itself():
    """mmd_loss: Gram over the own width, squared differences of valid pairs over sum_b n_b^2."""
    total = pairs = 0.0
    for b, n in enumerate(LENGTHS):
        s, t = HS[b, :n], WIDE[b, :n]
        total += ((s @ s.T / H - t @ t.T / W) ** 2).sum()
        pairs += n * n
    student, teacher, mask = tensors(HS, WIDE, MASK)
    agrees(grams.nst(student, teacher, mask=mask), total / pairs)


def test_textbrewer_mmd_of_two_layers():
    """mmd_loss: one layer's tokens against another's."""
    total = pairs = 0.0
    for b, n in enumerate(LENGTHS):
        s, t = HS[b, :n] @ HS2[b, :n].T / H, WIDE[b, :n] @ WIDE2[b, :n].T / W
        total += ((s - t) ** 2).sum()
        pairs += n * n
    one, two, three, four, mask = tensors(HS, HS2, WIDE, WIDE2, MASK)
    agrees(grams.mmd((one, two), (three, four), mask=mask), total / pairs)


def test_mobilebert_feature_map_and_its_statistics():
    """README of MobileBERT: the map by 100, differences of means squared by 5000, of variances by 5."""
    total = 0.0
    for b, n in enumerate(LENGTHS):
        for s, t in zip(HS[b, :n], HT[b, :n], strict=True):
            norm_s, norm_t = ((x - x.mean()) / np.sqrt(x.var() + 1e-5) for x in (s, t))
            total += 100 * ((norm_s - norm_t) ** 2).mean()
            total += 5000 * (s.mean() - t.mean()) ** 2 + 5 * abs(s.var() - t.var())
    student, teacher, mask = tensors(HS, HT, MASK)
    found, count = hidden.feature_map(student, teacher, mask=mask, means=50.0, variances=0.05)
    agrees((100 * found, count), total / MASK.sum())


def test_textbrewer_fsp():
    """fsp_loss: masked states, Gram over the valid length, MSE over B * H * H."""
    expected = 0.0
    for b, n in enumerate(LENGTHS):
        s, t = HS[b, :n].T @ HS2[b, :n] / n, HT[b, :n].T @ HT2[b, :n] / n
        expected += ((s - t) ** 2).mean() / B
    one, two, three, four, mask = tensors(HS, HS2, HT, HT2, MASK)
    agrees(grams.fsp((one, two), (three, four), mask=mask), expected)


def pooled(states):
    return np.stack([states[b, :n].mean(0) for b, n in enumerate(LENGTHS)])


def test_sentence_transformers_embed_distill():
    """EmbedDistillLoss: 1 - cosine, Euclidean distance or MSELoss of the sentence vectors."""
    s, t = pooled(HS), pooled(HT)
    cosine = (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
    expected = {
        "cosine": (1 - cosine).mean(),
        "l2": np.linalg.norm(s - t, axis=-1).mean(),
        "mse": ((s - t) ** 2).mean(),
    }
    student, teacher, mask = tensors(HS, HT, MASK)
    for metric, value in expected.items():
        agrees(embedding.embedding(student, teacher, mask=mask, metric=metric), value)
    first = ((HS[:, 0] - HT[:, 0]) ** 2).mean()
    agrees(embedding.embedding(student, teacher, mask=mask, metric="mse", pooling="first"), first)


# Rows of a batch


def huber(x):
    return np.where(abs(x) < 1, x**2 / 2, abs(x) - 0.5)


def test_rkd_distance_as_its_authors_wrote_it():
    """lenscloth/RKD: distances over the mean of the positive ones, smooth_l1 over all B^2; ours leaves zeros out."""

    def distances(x):
        d = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
        return d / d[d > 0].mean()

    expected = huber(distances(pooled(HS)) - distances(pooled(WIDE))).mean() * B / (B - 1)
    student, teacher, mask = tensors(HS, WIDE, MASK)
    agrees(relational.rkd_distance(student, teacher, mask=mask), expected)


def test_rkd_angle_as_its_authors_wrote_it():
    """lenscloth/RKD: cosines of all angles, smooth_l1; here one triplet of different rows at a time."""

    def cosine(x, i, j, k):
        one, other = x[i] - x[j], x[k] - x[j]
        return one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    s, t = pooled(HS), pooled(WIDE)
    each = [
        huber(cosine(s, i, j, k) - cosine(t, i, j, k))
        for i in range(B) for j in range(B) for k in range(B) if len({i, j, k}) == 3
    ]  # fmt: skip
    student, teacher, mask = tensors(HS, WIDE, MASK)
    agrees(relational.rkd_angle(student, teacher, mask=mask), np.mean(each))


def test_similarity_preserving_and_setfit():
    """SPKD: G with rows at norm 1, Frobenius over B^2. SetFit: MSE of pairwise cosines."""

    def gram(x):
        g = x @ x.T
        return g / np.linalg.norm(g, axis=-1, keepdims=True)

    def cosines(x):
        unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return unit @ unit.T

    s, t = pooled(HS), pooled(WIDE)
    student, teacher, mask = tensors(HS, WIDE, MASK)
    agrees(relational.spkd(student, teacher, mask=mask), ((gram(s) - gram(t)) ** 2).sum() / B**2)
    agrees(relational.pairwise_cosine(student, teacher, mask=mask), ((cosines(s) - cosines(t)) ** 2).mean())


def test_margin_mse_over_all_candidates_of_a_row():
    """sentence-transformers' MarginMSELoss, each row a query and every pair of others its two passages."""
    s, t = pooled(HS) @ pooled(HS).T, pooled(WIDE) @ pooled(WIDE).T
    margins = [
        ((s[i, j] - s[i, k]) - (t[i, j] - t[i, k])) ** 2
        for i in range(B) for j in range(B) for k in range(B) if len({i, j, k}) == 3
    ]  # fmt: skip
    student, teacher, mask = tensors(HS, WIDE, MASK)
    agrees(relational.margin_mse(student, teacher, mask=mask, metric="dot"), np.mean(margins))


def test_probabilistic_knowledge_transfer():
    """passalis/probabilistic_kt: cosines moved to [0, 1], rows normalised, mean of p log(p / q) over B^2 entries."""

    def nearness(x):
        unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
        moved = (unit @ unit.T + 1) / 2
        return moved / moved.sum(-1, keepdims=True)

    p, q = nearness(pooled(WIDE)), nearness(pooled(HS))
    expected = (p * np.log(p / q)).mean() * B
    student, teacher, mask = tensors(HS, WIDE, MASK)
    agrees(relational.pkt(student, teacher, mask=mask), expected)


def test_sentence_transformers_kl_over_candidates():
    """DistillKLDivLoss: KLDivLoss(batchmean) of softmaxed scores / T, times T^2; other rows are the candidates."""
    s, t = pooled(HS) @ pooled(HS).T, pooled(WIDE) @ pooled(WIDE).T
    others = [[j for j in range(B) if j != i] for i in range(B)]
    expected = np.mean([kl(softmax(t[i, o] / 2), softmax(s[i, o] / 2)) * 4 for i, o in enumerate(others)])
    student, teacher, mask = tensors(HS, WIDE, MASK)
    agrees(relational.candidates_kl(student, teacher, mask=mask, temperature=2.0, metric="dot"), expected)


def test_contrastive_with_soft_and_hard_targets():
    """SEED: cross-entropy to the teacher's similarities, less their entropy. InfoNCE: -log of the own pair."""
    s, t = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (pooled(HS), pooled(HT)))
    q, p = softmax(s @ t.T / 0.2), softmax(t @ t.T / 0.2)
    student, teacher, mask = tensors(HS, HT, MASK)
    agrees(relational.contrastive(student, teacher, mask=mask, temperature=0.2), kl(p, q).mean())
    found = relational.contrastive(student, teacher, mask=mask, temperature=0.2, targets="hard")
    agrees(found, -np.log(np.diag(q)).mean())


def test_contrastive_against_rows_of_earlier_batches():
    """CRD and SEED: negatives from a memory of the teacher's rows; its own row of an epoch ago is no negative."""
    s, t, m = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (pooled(HS), pooled(HT), pooled(HS2)))
    every = np.concatenate([t, m])
    q, p = softmax(s @ every.T / 0.2), softmax(t @ every.T / 0.2)
    student, teacher, mask, memory = tensors(HS, HT, MASK, np.concatenate([pooled(HS2), pooled(HT)[:1]]))
    found = relational.contrastive(student, teacher, mask=mask, temperature=0.2, memory=memory[:-1])
    agrees(found, kl(p, q).mean())
    hard = {"mask": mask, "temperature": 0.2, "targets": "hard"}
    agrees(relational.contrastive(student, teacher, memory=memory[:-1], **hard), -np.log(np.diag(q)).mean())
    others = softmax(s[1:] @ np.concatenate([every, t[:1]]).T / 0.2)
    expected = -np.log(np.append(np.diag(others, 1), q[0, 0])).mean()
    agrees(relational.contrastive(student, teacher, memory=memory, **hard), expected)


# Attention


def test_textbrewer_attention_mse_with_mask():
    """att_mse_loss: its mask is repeated for each head before it is counted; att_mse_sum_loss: heads added up first."""
    pairs = (MASK[:, :, None] * MASK[:, None, :]).astype(float)
    repeated = np.repeat(MASK[:, None], A, axis=1)  # (B, A, L)
    valid = (repeated.sum(2) ** 2).sum()
    each = (((AS - AT) ** 2) * repeated[..., None] * repeated[:, :, None]).sum() / valid
    added = (((AS.sum(1) - MORE.sum(1)) ** 2) * pairs).sum() / pairs.sum()
    student, teacher, more, mask = tensors(AS, AT, MORE, MASK)
    agrees(attention.attention_mse(student, teacher, mask=mask, convention="textbrewer"), each)
    agrees(attention.attention_mse(student, more, mask=mask, convention="textbrewer", heads="sum"), added)


def test_textbrewer_attention_ce():
    """att_ce_loss: masked keys and queries / (heads * valid); att_ce_mean_loss: heads averaged first."""
    each = averaged = 0.0
    for b, n in enumerate(LENGTHS):
        s, t, mean_s, mean_t = (x[..., :n, :n] for x in (AS[b], AT[b], AS[b].mean(0), MORE[b].mean(0)))
        each -= (softmax(t) * np.log(softmax(s))).sum() / A
        averaged -= (softmax(mean_t) * np.log(softmax(mean_s))).sum()
    student, teacher, more, mask = tensors(AS, AT, MORE, MASK)
    agrees(attention.attention_ce(student, teacher, mask=mask), each / MASK.sum())
    agrees(attention.attention_ce(student, more, mask=mask, heads="mean"), averaged / MASK.sum())


def test_mobilebert_attention_over_every_position():
    """run_pretraining.py: the mean over texts, heads and positions of cross-entropies, padded queries among them."""
    expected = 0.0
    for b, n in enumerate(LENGTHS):
        s, t = AS[b, :, :, :n], AT[b, :, :, :n]
        expected -= (softmax(t) * np.log(softmax(s))).sum() / (B * A * L)
    student, teacher, mask = tensors(AS, AT, MASK)
    agrees(attention.attention_ce(student, teacher, mask=mask, convention="mobilebert"), expected)


def heads_of(states, R):
    """(B, L, R, d), as calc_multi_relation_loss has them after its first transposition."""
    return states.reshape(B, L, R, -1)


def test_pp_minilm_relations_with_padding_as_published():
    """calc_multi_relation_loss: head-head over (B, L, R, R), sample-sample over (L, R, B, B); padding takes part."""
    student, teacher, mask = tensors(HS, WIDE, MASK)
    between_heads = between_samples = 0.0
    s, t = heads_of(HS, 2), heads_of(WIDE, 2)
    for i in range(L):
        for b in range(B):
            one, other = s[b, i] @ s[b, i].T / np.sqrt(H // 2), t[b, i] @ t[b, i].T / np.sqrt(W // 2)
            between_heads += kl(softmax(other), softmax(one)).sum() / (2 * B * L)
        for r in range(2):
            one, other = s[:, i, r] @ s[:, i, r].T / np.sqrt(H // 2), t[:, i, r] @ t[:, i, r].T / np.sqrt(W // 2)
            between_samples += kl(softmax(other), softmax(one)).sum() / (2 * B * L)
    options = {"mask": mask, "relation_heads": 2, "convention": "paddle"}
    agrees(attention.head_relation(student, teacher, **options), between_heads)
    agrees(attention.sample_relation(student, teacher, **options), between_samples)


def test_head_relation_of_valid_tokens():
    expected = 0.0
    s, t = heads_of(HS, 4), heads_of(WIDE, 4)
    for b, n in enumerate(LENGTHS):
        for i in range(n):
            one, other = s[b, i] @ s[b, i].T / np.sqrt(H // 4), t[b, i] @ t[b, i].T / np.sqrt(W // 4)
            expected += kl(softmax(other), softmax(one)).sum() / 4
    student, teacher, mask = tensors(HS, WIDE, MASK)
    agrees(attention.head_relation(student, teacher, mask=mask, relation_heads=4), expected / MASK.sum())


def test_one_head_has_no_other_to_relate_to():
    student, teacher, mask = tensors(HS, WIDE, MASK)
    with pytest.raises(ObjectiveError, match=r"1 relation head has no other .* Set relation_heads to 2 or more"):
        attention.head_relation(student, teacher, mask=mask, relation_heads=1)
    odd, bert = (Architecture("bert", layers=2, width=width, heads=1, labels=C, vocab=9) for width in (9, 16))
    with pytest.raises(ObjectiveError, match="one relation head has no other to relate to; take a loss on hidden"):
        build_objective([TermRecipe(loss="query_head_relation")], odd, bert)


def test_minilm_v1_value_relation_is_ours_with_the_models_own_heads():
    """2002.10957, equation 3: softmax(V V^T / sqrt(d_k)) of each attention head."""
    expected = 0.0
    for b, n in enumerate(LENGTHS):
        for a in range(A):
            s, t = (x[b, :n, a * H // A : (a + 1) * H // A] for x in (HS, HT))
            expected += kl(softmax(t @ t.T / np.sqrt(H // A)), softmax(s @ s.T / np.sqrt(H // A))).sum()
    student, teacher, mask = tensors(HS, HT, MASK)
    agrees(attention.relation(student, teacher, mask=mask, relation_heads=A), expected / (A * MASK.sum()))


def test_pp_minilm_sample_relation_over_rows_with_a_token():
    """calc_multi_relation_loss: (L, R, B, d), softmax over the batch; here over the rows that reach the position."""
    expected = 0.0
    for i in range(L):
        rows = [b for b in range(B) if MASK[b, i]]
        for r in range(2):
            s, t = (x[rows, i, r * width // 2 : (r + 1) * width // 2] for x, width in ((HS, H), (WIDE, W)))
            expected += kl(softmax(t @ t.T / np.sqrt(W // 2)), softmax(s @ s.T / np.sqrt(H // 2))).sum() / 2
    student, teacher, mask = tensors(HS, WIDE, MASK)
    agrees(attention.sample_relation(student, teacher, mask=mask, relation_heads=2), expected / MASK.sum())
