"""One release behind an OpenAI-compatible endpoint."""
