"""What the daemon knows and keeps: the board in memory, the ledger of commits, spool and disk, and what is deleted."""
