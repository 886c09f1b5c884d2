"""Exit codes of engine/launch.py, and whether a restart from the last checkpoint has a chance.

| code | meaning | restart |
|---|---|---|
| 0 | done | no |
| 2 | a mistake in what was asked; one line says which | no |
| 70 | the training cannot go on: losses are no numbers, ranks differ, a last checkpoint cannot be written | no |
| 75 | a rank was lost: dead, silent, stuck, or it failed by itself | yes |
| 143 | stopped by a signal (engine/health/guard.py) or RUN/stop, after a checkpoint | yes, when there is room |
| others | an error of a library or of ours, or a signal | yes |

What ends one rank alone with 2 or 70 ends the others with it too (engine/watch/). 70 and 75 are EX_SOFTWARE and
EX_TEMPFAIL of BSD's sysexits.h.
"""

DONE = 0
MISTAKE = 2
FAILED = 70
LOST_RANK = 75
STOPPED = 143  # 128 + SIGTERM, as the shell would report it
FINAL = (DONE, MISTAKE, FAILED, STOPPED)  # a supervisor gives these back as they are
