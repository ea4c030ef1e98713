"""Feedback: what users said becomes data that may be trained on, or is set aside."""
