"""What must hold before a challenger sees a request: its files, its parity, its golden answers.

Enters: a release, its record's digests, the URL of its engine. Leaves: the reasons against it; none when all holds.
Refuses: nothing itself; an engine that does not answer is a reason, too.
"""

from __future__ import annotations

from collections.abc import Mapping

from fmops.artifacts import Release
from fmops.deployment.golden import Ask, ask_golden
from fmops.deployment.verify import verify_release
from fmops.errors import IntegrityError


def before_traffic(release: Release, files: Mapping[str, str], ask: Ask) -> tuple[str, ...]:
    """Reasons not to send traffic to an engine that claims to serve `release`.

    The files are compared with the record, parity must have been proved on them, and the running engine must repeat the
    answers that it was certified with: a wrong tokenizer, chat template or weights do not.
    """
    try:
        verify_release(release.path, files)
        golden = ask_golden(release, ask)
    except IntegrityError as error:
        return (str(error),)
    except (OSError, ValueError, LookupError, TypeError) as error:
        return (f"its engine does not answer the golden prompts: {type(error).__name__}: {error}",)
    if golden.agree:
        return ()
    return (
        f"{len(golden.differ)} of {golden.asked} golden answers are not the certified ones: "
        f"{', '.join(golden.differ)}. The running engine's tokenizer, chat template or weights are not the release's",
    )
