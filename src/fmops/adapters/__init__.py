"""One file per outside framework.

Enters: plain files and typed values. Leaves: plain files and typed values.
Refuses: to be imported at the top of a room; each stage imports its adapter where it runs.
"""
