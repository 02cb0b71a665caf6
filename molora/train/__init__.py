"""Updates: recipes, the step, and the loop that a kill cannot hurt."""

from molora.train.loop import train
from molora.train.recipe import Recipe

__all__ = ["Recipe", "train"]
