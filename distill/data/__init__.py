"""The data: from files or a hub id to cleaned, split rows.

tables         reads a CSV, JSONL, Parquet, text or Arrow file, or a hub id; remote fetches one from elsewhere
streams        reads what may be larger than memory part by part; corpus cleans it, packing keeps its ids on disk
fields         kinds of columns: what a text and a label may be
rows           what is wrong with a row, and what is done about it
splits         training, validation and test rows that share no text
sampling       batches of like length, in an order that (seed, epoch) decides
augmentation   new texts from old ones, for small sets
"""

from __future__ import annotations

from distill.data.splits import Splits, load_splits

__all__ = ["Splits", "load_splits"]
