"""Examine the nodes of a job before it is submitted: `[srun ...] python -m topoflow doctor [CONFIG] [key=value ...]`.

Each process examines its machine (`probe.py`, `storage.py`, `network.py`), then all try the network and the model
together (`network.py`, `trial.py`). Rank 0 gathers what was found, compares it and prints the report (`report.py`).
`command.py` has the table of checks. All end with the same status:

    0   every check passed, perhaps with warnings
    1   at least one check failed
    2   the launcher's variables or the config cannot be used (also: bad usage)
    5   the processes did not connect within a minute, or one was lost later

With --json, rank 0 prints one object, for each of these statuses except bad usage:

    verdict                 "ok", "WARNING" or "FAIL": the worst of all
    config, run_directory, data     paths, or null without a config
    launcher, launcher_reason, processes    null where the launcher's variables cannot be used
    checks                  [{check, verdict, summary, findings: [{verdict, node, ranks, text}]}], in the order made
    nodes                   [{node, verdict, ranks, figures: {name: value}}], in the order of ranks

Names of figures end in their unit (`clock_offset_seconds`, `write_bytes_per_second`); those that differ between the
processes of a node (`devices`, `pass_seconds`, `memory_bytes`) are lists in the order of `ranks`. What could not be
measured is absent or null. A process whose launcher variables cannot be used does not know its rank, and prints an
object of its own.
"""
