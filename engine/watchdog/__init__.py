"""Watchdog: all ranks learn within system.watch.silent_seconds which rank is lost and where it was, whatever hangs.

    with watchdog(config, run_dir) as status:         # client.py, on every rank
        status.at("assembling")

Every rank sends rank 0 a heartbeat once a second with its step and phase, over a connection and from a thread of its
own: the training may meanwhile wait in a collective that never ends. Rank 0 decides (server.py): a connection that
closes is a dead process, one that falls silent a stopped process or a cut link, steps and phases that never end a hang.
It tells all ranks; they print one line, append it to runs/NAME/failures.jsonl and end with code 75. A rank that does
not hear of rank 0 any more comes to the same end by itself.
"""
