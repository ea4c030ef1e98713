"""From a checkpoint to one that answers, and answers as people prefer.

Enters: a checkpoint, conversations or preferences. Leaves: a checkpoint.
Refuses: chat templates whose answers it cannot tell apart, examples that are too long, losses that are not finite.
"""
