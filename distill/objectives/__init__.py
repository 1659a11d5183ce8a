"""What the student learns from: losses as pure functions, and the objective that weighs them."""

from distill.objectives.objective import Objective, build_objective

__all__ = ["Objective", "build_objective"]
