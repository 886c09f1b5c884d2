"""Which rank is lost, and where it was: known to all ranks within system.watch.silent_seconds, whatever hangs.

    with watched(config, run_dir) as place:         # watch.py, on every rank
        place.at("assembling")

Every rank tells rank 0 once a second where it is (a step, a phase), over a connection of its own, from a thread of its
own: the training may meanwhile stand in a collective that never ends. Rank 0 judges (judge.py): a connection that
closes is a dead process, one that falls silent a stopped process or a cut link, steps and phases that end nowhere a
hang. It tells all ranks; they print one line, write it to runs/NAME/failures.jsonl and end with code 75. A rank that
does not hear of rank 0 any more comes to the same end by itself.
"""
