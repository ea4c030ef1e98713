"""What an error says of its cause."""

from __future__ import annotations

import errno

from fmops.errors import disk_is_full, may_not_be_used


def test_a_full_disk_is_found_behind_another_error():
    error = ValueError("could not be written")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert disk_is_full(error)
    assert not disk_is_full(ValueError("something else"))


def test_a_place_that_may_not_be_used_is_known_by_the_system_s_word_or_by_sqlite_s():
    assert may_not_be_used(NotADirectoryError(errno.ENOTDIR, "Not a directory"))
    assert may_not_be_used(ValueError("attempt to write a readonly database"))
    assert not may_not_be_used(FileNotFoundError(errno.ENOENT, "No such file or directory"))


def test_errors_that_stand_behind_each_other_end_the_search():
    first, second = BrokenPipeError("the terminal is gone"), ValueError("raised while that was handled")
    first.__cause__, second.__cause__ = second, first
    assert not disk_is_full(first)
