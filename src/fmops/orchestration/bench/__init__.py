"""`fmops loop bench`: faults are put into replayed traffic, and the real loop has to find and mend them."""
