"""From a base model to one that has read the corpus.

Enters: a model source, a curated corpus. Leaves: checkpoints.
Refuses: pickles and code inside models, losses that are not finite, an old domain that worsens beyond its ceiling.
"""
