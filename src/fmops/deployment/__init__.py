"""Release, serving: what leaves the workshop, and how it answers."""
