"""Evaluation: what a checkpoint can do, measured item by item, and whether that lets it go on.

Enters: a checkpoint, pinned items, held-out documents. Leaves: per-sample scores, and a gate decision over two reports.
Refuses: tasks without labels, comparisons of unlike measurements, verdicts without evidence.
"""
