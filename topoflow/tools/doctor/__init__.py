"""The checks of a cluster before a job: `[srun ...] python -m topoflow doctor [CONFIG] [section.key=value ...]`.

With --json, rank 0 prints one object:

    verdict                 "ok", "WARNING" or "FAIL": the worst of all
    config, run_directory, data     paths, or null without a config
    launcher, launcher_reason, processes
    checks                  [{check, verdict, summary, findings: [{verdict, node, ranks, text}]}], in the order made
    nodes                   [{node, verdict, ranks, figures: {name: value}}], in the order of ranks

Names of figures end in their unit (`clock_offset_seconds`, `write_bytes_per_second`); those that differ between the
processes of a node (`devices`, `pass_seconds`, `memory_bytes`) are lists in the order of `ranks`. What could not be
measured is absent or null.
"""
