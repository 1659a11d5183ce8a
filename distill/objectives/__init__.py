from distill.objectives.objective import Objective, build_objective

__all__ = ["Objective", "build_objective"]
