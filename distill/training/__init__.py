"""Training: one loop for teacher and student.

fit          a model, rows and an objective -> the best state of its weights; resumes exactly
trainer      DistillationTrainer, a transformers.Trainer that divides each term once
rhythm       when it saves, measures and speaks; step_clock says where a step's time goes
optimizer    AdamW that spends on an embedding only what a batch reads
lighter      what a run does without: frozen layers, kept activations, Python between operations
quick        what makes a step on a processor faster
on_policy    batches that the student writes itself; fake_int8 rounds as the shipped file will
"""

from __future__ import annotations

from distill.training.fit import fit
from distill.training.trainer import DistillationTrainer

__all__ = ["DistillationTrainer", "fit"]
