"""The student: from a card and a teacher to a smaller model that starts from what the teacher knows.

shape          config, layer map, bytes: what it will be, before any weight
inheritance    what is copied; factorisation cuts a wide embedding
surgery        what in a teacher matters, measured; fitting sets modules by least squares
reduction      a narrower student, fitted to its teacher; bottleneck one of MobileBERT"s kind
vocabulary     fewer tokens; tokenizer_json rewrites the tokenizer"s file
build          card + teacher -> student; start gives it the best start there is
"""

from __future__ import annotations

from distill.student.build import Plan, Student, build_student, plan_student
from distill.student.start import start_student

__all__ = ["Plan", "Student", "build_student", "plan_student", "start_student"]
