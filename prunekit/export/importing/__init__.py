"""Reading what others' code made: the APTP authors' released checkpoints."""
