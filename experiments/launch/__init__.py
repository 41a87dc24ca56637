"""Scripts that put a run on other machines: one file per kind of machine, each with --dry_run."""
