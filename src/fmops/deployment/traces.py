"""Moved to fmops.traces: feedback reads them, too."""

from fmops.traces import Arm, Cursor, DayLog, Feedback, Trace

__all__ = ["Arm", "Cursor", "DayLog", "Feedback", "Trace"]
